"""The parts that runs and verifications are built of, as this machine has them: its clocks, the network, its limits."""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import anyio

from bulkwf.credentials import Credentials, TokenSource
from bulkwf.errors import ConfigError, TemporaryStop
from bulkwf.limiter import BLIND_MARGIN_S, LOOPBACK_MARGIN_S, NETWORK_MARGIN_S, WindowLimiter
from bulkwf.model import Clock, Transport
from bulkwf.options import Options, Target
from bulkwf.uncancelled import uncancelled
from bulkwf.wire import kernel_counts

__all__ = ["open_limiter", "open_transport", "require_asyncio", "restore", "system_clock"]

log = logging.getLogger("bulkwf")

LONGEST_STORED_PAUSE_S = 86_400.0
"""A stored pause that is longer than this was written on a clock that was wrong."""


def require_asyncio() -> None:
    """Raise `ConfigError` unless asyncio runs the caller."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigError("bulkwf runs on asyncio only: call it from a coroutine that asyncio runs.") from None


def system_clock() -> Clock:
    """This machine's time and chance, in the running event loop."""
    return Clock(now=asyncio.get_running_loop().time, wall=time.time, sleep=anyio.sleep, draw=random.random)


def open_transport(
    parts: AsyncExitStack, target: Target, token: TokenSource, options: Options, clock: Clock
) -> Transport:
    """The network, open until *parts* are closed."""
    from bulkwf.transport import AiohttpTransport  # noqa: PLC0415 - two thirds of what `import bulkwf` would cost

    transport = AiohttpTransport(target, Credentials(token), options, clock=clock.now, wall=clock.wall)
    parts.push_async_callback(uncancelled, transport.aclose)
    return transport


def open_limiter(target: Target, options: Options, clock: Clock) -> WindowLimiter:
    """The target's limits, with the margin that the way there calls for."""
    network_s = NETWORK_MARGIN_S if kernel_counts() else BLIND_MARGIN_S
    margin_s = LOOPBACK_MARGIN_S if target.loopback else network_s
    return WindowLimiter(options.rate, clock=clock.now, margin_s=margin_s)


def restore(
    limiter: WindowLimiter, attempts: Sequence[tuple[float, int]], pause_until: float, options: Options, wall: float
) -> None:
    """Take over what earlier sessions have sent, as (Unix time, instances), and the pause they were ordered."""
    paused_s = pause_until - wall
    if paused_s > LONGEST_STORED_PAUSE_S:
        log.warning("the checkpoint asks for a pause of %.0f h, which is not believed", paused_s / 3_600)
        paused_s = 0.0
    if paused_s > options.retry.max_outage_s:
        raise TemporaryStop(
            f"the service has ordered silence for {paused_s:,.0f} s more, longer than the longest outage of "
            f"{options.retry.max_outage_s:,.0f} s (--max-outage)."
        )
    # Where the clock has gone back, what seems to be sent later than now was sent just now: it counts longer, not less.
    limiter.restore([(max(0.0, wall - at), instances) for at, instances in attempts], paused_s)
