"""The parts that runs and verifications are built of, as this machine has them: its clocks, the network, its limits."""

import asyncio
import logging
import random
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

from bulkwf.budget import Budget
from bulkwf.checkpoint import Past
from bulkwf.credentials import Credentials
from bulkwf.errors import ConfigError, TemporaryStop
from bulkwf.limiter import BLIND_MARGIN_S, LOOPBACK_MARGIN_S, NETWORK_MARGIN_S, WindowLimiter
from bulkwf.model import Clock, Transport
from bulkwf.options import Options, Target
from bulkwf.pools import Pools
from bulkwf.uncancelled import uncancelled
from bulkwf.windows import Said
from bulkwf.wire import kernel_counts

__all__ = ["open_limiter", "open_transport", "require_asyncio", "restore", "system_clock", "uncounted"]

log = logging.getLogger("bulkwf")

POOLS = Pools()
"""What all runs and verifications of this process share."""

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
    return Clock(
        now=asyncio.get_running_loop().time,
        wall=time.time,
        sleep=anyio.sleep,
        draw=random.random,
        boot_id=_boot_id(),
        uptime=lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        shared=True,
    )


def _boot_id() -> str:
    """Names this boot of this machine, and whose boot clock it is; empty where the system does not say (only Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
    try:  # a time namespace has a boot clock of its own
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:  # no kernel before 5.6 has such namespaces
        return boot


def open_transport(
    parts: AsyncExitStack, target: Target, credentials: Credentials, options: Options, clock: Clock
) -> Transport:
    """The network, open until *parts* are closed."""
    from bulkwf.transport import AiohttpTransport  # noqa: PLC0415 - two thirds of what `import bulkwf` would cost

    transport = AiohttpTransport(target, credentials, options, clock=clock.now, wall=clock.wall)
    parts.push_async_callback(uncancelled, transport.aclose)
    return transport


def open_limiter(
    parts: AsyncExitStack, target: Target, options: Options, clock: Clock, credentials: Credentials | None = None
) -> WindowLimiter:
    """The target's limits, with the margin that the way there requires. Closed with *parts*.

    Runs of this process share them by endpoint, account and credential; those whose credential is not known (None)
    are taken to have the same.
    """
    network_s = NETWORK_MARGIN_S if kernel_counts() else BLIND_MARGIN_S
    margin_s = LOOPBACK_MARGIN_S if target.loopback else network_s
    budget = Budget(
        clock.now(),
        options.rate,
        margin_s,
        POOLS if clock.shared else Pools(),
        endpoint=target.base_url,
        account=target.account_id,
        workflow=target.workflow,
        token="" if credentials is None else credentials.fingerprint,
    )
    limiter = WindowLimiter(options.rate, clock=clock.now, margin_s=margin_s, budget=budget)
    parts.callback(limiter.close)
    if credentials is not None:
        credentials.changed = limiter.change_token
    return limiter


def uncounted(limiter: WindowLimiter, past: Past, checkpoint: Path, kind: str, wall: float, *, own: bool) -> Past:
    """*past* without the requests that this process has counted already.

    Args:
        limiter: Counts the others from now on.
        past: What the file holds, by the same clock as *wall*.
        checkpoint: The run's checkpoint.
        kind: Whose file it is: of the run, or of the verifications beside it.
        wall: Unix time.
        own: Until the limiter is closed, only its own requests are recorded in the file.
    """
    since = wall - limiter.uncounted_s(f"{kind} {checkpoint.resolve()}", own=own)
    return past._replace(attempts=[attempt for attempt in past.attempts if attempt[0] > since])


def restore(limiter: WindowLimiter, past: Past, options: Options, wall: float) -> None:
    """Take over what earlier sessions have sent, and the pause and the quota that the service told them.

    Args:
        limiter: Takes it over.
        past: Counted by the same clock as *wall*.
        options: The longest outage.
        wall: Unix time.

    Raises:
        TemporaryStop: The pause lasts longer than the longest outage.
    """
    paused_s = past.pause_until - wall
    if paused_s > LONGEST_STORED_PAUSE_S:
        log.warning("the checkpoint asks for a pause of %.0f h, which is not believed", paused_s / 3_600)
        paused_s = 0.0
    if paused_s > options.retry.max_outage_s:
        raise TemporaryStop(
            f"the service has ordered silence for {paused_s:,.0f} s more, longer than the longest outage of "
            f"{options.retry.max_outage_s:,.0f} s (--max-outage)."
        )
    attempts = [(wall - at, instances) for at, instances in past.attempts]
    words = [Said(heard_at - wall, sent_at - wall, text) for heard_at, sent_at, text in past.words]
    limiter.restore(attempts, paused_s, words)
