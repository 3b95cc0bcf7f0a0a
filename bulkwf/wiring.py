"""The parts that runs and verifications share: the machine's clocks, the network, the limits."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

from bulkwf.checkpoint import Past, read_past
from bulkwf.credentials import Credentials, TokenSource
from bulkwf.errors import ConfigError, TemporaryStop
from bulkwf.limiter import BLIND_MARGIN_S, LOOPBACK_MARGIN_S, NETWORK_MARGIN_S, WindowLimiter
from bulkwf.model import UNKNOWN_BOOT, Boot, Clock, Transport
from bulkwf.options import Options, Target
from bulkwf.uncancelled import uncancelled
from bulkwf.windows import Said
from bulkwf.wire import kernel_counts

__all__ = ["open_limiter", "open_transport", "require_asyncio", "restore", "system_clock"]

log = logging.getLogger("bulkwf")

LONGEST_STORED_PAUSE_S = 86_400.0
"""A stored pause that is longer than this, in seconds, was written while the clock was wrong."""


def require_asyncio() -> None:
    """Raise `ConfigError` unless asyncio runs the caller."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigError("bulkwf runs on asyncio only: call it from a coroutine that asyncio runs.") from None


def system_clock() -> Clock:
    """This machine's time and random numbers, in the running event loop."""
    return Clock(
        now=asyncio.get_running_loop().time,
        wall=time.time,
        sleep=anyio.sleep,
        draw=random.random,
        boot_id=_boot_id(),
        uptime=lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    )


def _boot_id() -> str:
    """Identifies this boot of this machine and its time namespace; empty where the system has no such name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
    try:  # each time namespace has its own boot clock
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:  # kernels before 5.6 have no time namespaces
        return boot


def open_transport(
    parts: AsyncExitStack, target: Target, token: TokenSource, options: Options, clock: Clock
) -> Transport:
    """The network. It is closed with *parts*."""
    from bulkwf.transport import AiohttpTransport  # noqa: PLC0415 - it would triple the time of `import bulkwf`

    transport = AiohttpTransport(target, Credentials(token), options, clock=clock.now, wall=clock.wall)
    parts.push_async_callback(uncancelled, transport.aclose)
    return transport


def open_limiter(target: Target, options: Options, clock: Clock) -> WindowLimiter:
    """The target's limits, with the margin that the path to it requires."""
    network_s = NETWORK_MARGIN_S if kernel_counts() else BLIND_MARGIN_S
    margin_s = LOOPBACK_MARGIN_S if target.loopback else network_s
    return WindowLimiter(options.rate, clock=clock.now, margin_s=margin_s)


def restore(
    limiter: WindowLimiter,
    read_run_past: Callable[[float], Past],
    checkpoint: Path | None,
    options: Options,
    *,
    wall: float,
    boot: Boot = UNKNOWN_BOOT,
) -> None:
    """Let the limiter count what earlier sessions have sent, and keep to the pause and the quota that they were given.

    Both runs and verifications of a checkpoint count, for both.

    Args:
        limiter: A new one.
        read_run_past: What the run's sessions have sent since a Unix time.
        checkpoint: The run's file, beside which verifications keep theirs; None if it is in memory.
        options: The longest outage.
        wall: Unix time.
        boot: Counts *wall*, and all times that are read.

    Raises:
        TemporaryStop: The pause lasts longer than the longest outage.
    """
    since = wall - limiter.memory_s
    past = read_run_past(since)
    if checkpoint is not None:
        past = past.joined(read_past(checkpoint, since, boot))
    paused_s = past.pause_until - wall
    if paused_s > LONGEST_STORED_PAUSE_S:
        log.warning("the checkpoint holds a pause of %.0f h, which is ignored: it is too long", paused_s / 3_600)
        paused_s = 0.0
    if paused_s > options.retry.max_outage_s:
        raise TemporaryStop(
            f"the service has ordered a pause of {paused_s:,.0f} s more, longer than the longest outage of "
            f"{options.retry.max_outage_s:,.0f} s (--max-outage). Run the same command again later."
        )
    attempts = [(wall - at, instances) for at, instances in past.attempts]
    words = [Said(heard_at - wall, sent_at - wall, text) for heard_at, sent_at, text in past.words]
    limiter.restore(attempts, paused_s, words)
