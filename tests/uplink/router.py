"""A slow uplink between two TUN devices: `python -m uplink.router NEAR FAR RATE DELAY BUFFER`.

Packets from NEAR to FAR (file descriptors) leave at RATE bytes/s, after those before them; what doesn't fit into BUFFER
bytes is dropped. Each packet takes DELAY seconds in either direction.
"""

import contextlib
import os
import select
import sys
import time
from collections import deque

LONGEST_PACKET = 65_536


def route(near: int, far: int, rate: float, delay_s: float, buffer: int) -> None:
    """Forward packets until the devices are gone."""
    waiting = {far: deque(), near: deque()}
    free_at = 0.0
    while True:
        now = time.monotonic()
        for device, packets in waiting.items():
            while packets and packets[0][0] <= now:
                os.write(device, packets.popleft()[1])
        due = min((packets[0][0] for packets in waiting.values() if packets), default=now + 1.0)
        readable, _, _ = select.select([near, far], [], [], max(0.0, due - time.monotonic()))
        now = time.monotonic()
        if near in readable:
            packet = os.read(near, LONGEST_PACKET)
            if (free_at - now) * rate <= buffer:
                free_at = max(now, free_at) + len(packet) / rate
                waiting[far].append((free_at + delay_s, packet))
        if far in readable:
            waiting[near].append((now + delay_s, os.read(far, LONGEST_PACKET)))


if __name__ == "__main__":
    near_, far_, rate_, delay_, buffer_ = sys.argv[1:]
    with contextlib.suppress(OSError):
        route(int(near_), int(far_), float(rate_), float(delay_), int(buffer_))
