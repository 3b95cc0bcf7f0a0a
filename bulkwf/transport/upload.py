"""Measures when a request's body has left this machine.

Data that asyncio has accepted can still be in the buffers of asyncio or TLS, in the socket, or in a queue on the path.
Linux counts the bytes of each connection: handed to the socket, sent, acknowledged. These counts are the same under
every event loop and every number of TLS layers.

The last byte of a body has left at the later of two moments: when the kernel had sent all of the body, and one round
trip before the last byte was acknowledged. The round trip is the shortest that the connection has measured, so that the
second moment includes the time that the byte spent in a queue. Waiting for the acknowledgement does not lower the rate
while a round trip is shorter than the window's period: the period is counted from the time at which the body had left.

If there is a proxy, all this is measured on the connection to the proxy.

On other systems, only the buffers in this process are known, and the limiter keeps a wider margin.
"""

import asyncio
import fcntl
import functools
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Upload", "kernel_counts"]

SIOCOUTQ = 0x5411
"""Linux ioctl: number of bytes in a socket that are not acknowledged yet, unsent ones included."""
TCP_INFO = struct.Struct("=16x I 100x Q 16x I I")
"""Linux, `struct tcp_info`: snd_mss, bytes_acked, notsent_bytes, min_rtt in µs."""
UNMEASURED_US = 0xFFFFFFFF
"""The `min_rtt` of a connection that has not measured a round trip."""
UNACKNOWLEDGED_SEGMENTS = 2
"""Number of last segments whose acknowledgement is not waited for. A receiver acknowledges every second segment at
once, but may delay the last acknowledgement (Linux: 40 ms)."""
SHORTEST_S = 0.001
"""Shortest time between two checks of a connection, in seconds."""
LOOKS = 64
"""The next check follows after a 64th of the time that has passed, so that it is at most 1.6 % late."""


class _Counts(NamedTuple):
    """The kernel's counts for a connection since it was opened, in bytes."""

    handed: int
    sent: int
    acknowledged: int
    segment: int
    """Size of a full segment."""
    round_trip_us: int
    """The shortest round trip of the last minutes, in microseconds."""


@functools.cache
def kernel_counts() -> bool:
    """Whether this kernel counts what a connection has sent. gVisor has the same call, but leaves most fields zero."""
    if sys.platform != "linux":
        return False
    with socket.socket() as unconnected:
        try:
            return _count(unconnected).round_trip_us == UNMEASURED_US
        except (OSError, struct.error):
            return False


class Upload:
    """Observes the body of one request, and calls *written* once with the time at which the body had left.

    Made just before the body is written, on a connection on which every earlier request has been answered.

    Args:
        transport: The connection.
        written: Called with the time, by *clock*.
        clock: The running loop's time, in seconds.
    """

    def __init__(
        self, transport: asyncio.Transport, written: Callable[[float], None], clock: Callable[[], float]
    ) -> None:
        self._transport = transport
        self._socket = transport.get_extra_info("socket")
        self._written = written
        self._clock = clock
        self._start = _count(self._socket).handed if kernel_counts() else 0
        self._size: int | None = None
        self._followed_at = 0.0
        self._sent_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def follow(self, size: int) -> None:
        """Check now and repeatedly until the body has left: *size* unencrypted bytes, accepted by the event loop."""
        self._size = size
        self._followed_at = self._clock()
        if not self._ended:
            self._look()

    def answered(self) -> None:
        """The answer has begun: if it is not known when the body left, report the present time."""
        if not self._ended:
            now = self._clock()
            left_at = self._left_at(now)
            self._finish(now if left_at is None else left_at)

    def close(self) -> None:
        """Stop watching."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

    def _finish(self, at: float) -> None:
        self.close()
        self._written(at)

    def _look(self) -> None:
        now = self._clock()
        left_at = self._left_at(now)
        if left_at is not None:
            self._finish(left_at)
        else:
            pause_s = max(SHORTEST_S, (now - self._followed_at) / LOOKS)
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._look)

    def _left_at(self, now: float) -> float | None:
        """The time at which the last byte left; None while it is not known."""
        if self._size is None or self._transport.is_closing():
            return None
        if not kernel_counts():
            return now if _buffered(self._transport) == 0 else None
        counts, end = _count(self._socket), self._start + self._size
        if counts.sent < end:
            return None
        if self._sent_at is None:
            self._sent_at = now
        if counts.acknowledged < end - UNACKNOWLEDGED_SEGMENTS * counts.segment:
            return None
        return max(self._sent_at, now - counts.round_trip_us / 1e6)


def _count(connection: socket.socket) -> _Counts:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    segment, acknowledged, unsent, round_trip_us = TCP_INFO.unpack(info)
    # Read after the other counts: bytes acknowledged in between make the sum too small, never too large.
    in_socket = struct.unpack("i", fcntl.ioctl(connection.fileno(), SIOCOUTQ, bytes(4)))[0]
    handed = acknowledged + in_socket
    return _Counts(handed, handed - unsent, acknowledged, segment, round_trip_us)


def _buffered(transport: Any) -> int | None:
    """Bytes in the buffers of asyncio and TLS; None where the event loop does not show them, as uvloop does not."""
    size = 0
    while transport.get_extra_info("sslcontext") is not None:
        size += transport.get_write_buffer_size()
        protocol = getattr(transport, "_ssl_protocol", None)
        if protocol is None or protocol._transport is None:  # noqa: SLF001 - there is no public way
            return None
        transport = protocol._transport  # noqa: SLF001
    return size + int(transport.get_write_buffer_size())
