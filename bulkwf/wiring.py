"""The parts that runs and verifications are built of, as this machine has them: its clocks, the network, its limits."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio

from bulkwf.checkpoint import Executor, Past, explain
from bulkwf.credentials import Credentials, TokenSource
from bulkwf.errors import ConfigError, TemporaryStop
from bulkwf.limiter import BLIND_MARGIN_S, LOOPBACK_MARGIN_S, NETWORK_MARGIN_S, WindowLimiter
from bulkwf.model import Clock, Transport
from bulkwf.options import Options, Target
from bulkwf.uncancelled import uncancelled, until_done
from bulkwf.windows import Said
from bulkwf.wire import kernel_counts

__all__ = [
    "open_in_thread",
    "open_limiter",
    "open_transport",
    "own_thread",
    "require_asyncio",
    "restore",
    "system_clock",
]

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
    return Clock(
        now=asyncio.get_running_loop().time,
        wall=time.time,
        sleep=anyio.sleep,
        draw=random.random,
        boot_id=_boot_id(),
        uptime=lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
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
    parts: AsyncExitStack, target: Target, token: TokenSource, options: Options, clock: Clock
) -> Transport:
    """The network, open until *parts* are closed."""
    from bulkwf.transport import AiohttpTransport  # noqa: PLC0415 - two thirds of what `import bulkwf` would cost

    transport = AiohttpTransport(target, Credentials(token), options, clock=clock.now, wall=clock.wall)
    parts.push_async_callback(uncancelled, transport.aclose)
    return transport


class _Closable(Protocol):
    def aclose(self) -> Awaitable[None]: ...


C = TypeVar("C", bound=_Closable)


def own_thread(parts: AsyncExitStack, name: str, path: Path) -> Executor:
    """A thread for the file at *path*, which alone uses it: both opening and writing may wait for the disk."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    parts.callback(pool.shutdown)
    loop = asyncio.get_running_loop()

    def execute(function: Callable[[], Any]) -> Awaitable[Any]:
        try:
            return loop.run_in_executor(pool, function)
        except RuntimeError as error:  # no thread can be had
            raise explain(error, path) from None

    return execute


async def open_in_thread(parts: AsyncExitStack, executor: Executor, opening: Callable[[], C]) -> C:
    """Open a file with *executor*; it is closed with *parts*, also if the caller is cancelled meanwhile.

    Args:
        parts: Close it.
        executor: Where it is opened.
        opening: Opens it.
    """
    opened: asyncio.Future[C] = asyncio.ensure_future(executor(opening))
    parts.push_async_callback(uncancelled, partial(_close_opened, opened))
    await until_done(opened)
    return opened.result()


async def _close_opened(opened: "asyncio.Future[C]") -> None:
    await until_done(opened)
    if opened.exception() is None:
        await opened.result().aclose()


def open_limiter(target: Target, options: Options, clock: Clock) -> WindowLimiter:
    """The target's limits, with the margin that the way there calls for."""
    network_s = NETWORK_MARGIN_S if kernel_counts() else BLIND_MARGIN_S
    margin_s = LOOPBACK_MARGIN_S if target.loopback else network_s
    return WindowLimiter(options.rate, clock=clock.now, margin_s=margin_s)


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
