"""Opens the parts that runs and verifications share: the machine's clocks, the transport, the limiter."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import anyio

from bulkwf.attempt import Transport
from bulkwf.checkpoint import Executor, Past
from bulkwf.clock import Clock
from bulkwf.errors import ConfigError, TemporaryStop
from bulkwf.limits.budget import Budget
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.limits.pools import Pools
from bulkwf.limits.quota import Said
from bulkwf.limits.window import BLIND_MARGIN_S, LOOPBACK_MARGIN_S, NETWORK_MARGIN_S
from bulkwf.options import Options, Target
from bulkwf.text import seconds
from bulkwf.threads import starting_threads
from bulkwf.transport.credentials import Credentials
from bulkwf.transport.upload import kernel_counts
from bulkwf.uncancelled import uncancelled, until_done

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

POOLS = Pools()
"""What all runs and verifications of this process share."""

LONGEST_STORED_PAUSE_S = 86_400.0
"""Longest stored pause that is kept, in seconds: a longer one was written while the clock was wrong."""


def require_asyncio() -> None:
    """Raise `ConfigError` if the caller does not run on asyncio."""
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
        random=random.random,
        boot_id=_boot_id(),
        uptime=lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        shared=True,
    )


def _boot_id() -> str:
    """The id of this boot of this machine and of its time namespace; empty if the system gives none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
    try:  # each time namespace has its own boot clock
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:  # kernels before 5.6 have no time namespaces
        return boot


def open_transport(
    parts: AsyncExitStack, target: Target, credentials: Credentials, options: Options, clock: Clock
) -> Transport:
    """The HTTP transport. It is closed with *parts*."""
    from bulkwf.transport.http import AiohttpTransport  # noqa: PLC0415 - `import bulkwf` would take three times as long

    transport = AiohttpTransport(target, credentials, options, clock=clock.now, wall=clock.wall)
    parts.push_async_callback(uncancelled, transport.aclose)
    return transport


class _Closable(Protocol):
    def aclose(self) -> Awaitable[None]: ...


C = TypeVar("C", bound=_Closable)


def own_thread(parts: AsyncExitStack, name: str) -> Executor:
    """An executor with one thread, for a file that only this thread uses, as opening and writing may wait for the disk.

    Args:
        parts: Ends the thread when the stack is closed.
        name: Name of the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    parts.callback(pool.shutdown)
    loop = asyncio.get_running_loop()

    def execute(function: Callable[[], Any]) -> Awaitable[Any]:
        with starting_threads():
            return loop.run_in_executor(pool, function)

    return execute


async def open_in_thread(parts: AsyncExitStack, executor: Executor, opening: Callable[[], C]) -> C:
    """Open a file in *executor*. It is closed with *parts*, also if the caller is cancelled meanwhile.

    Args:
        parts: Closes the file when the stack is closed.
        executor: Where the file is opened.
        opening: Opens the file.
    """
    opened: asyncio.Future[C] = asyncio.ensure_future(executor(opening))
    parts.push_async_callback(uncancelled, partial(_close_opened, opened))
    await until_done(opened)
    return opened.result()


async def _close_opened(opened: "asyncio.Future[C]") -> None:
    await until_done(opened)
    if opened.exception() is None:
        await opened.result().aclose()


def open_limiter(
    parts: AsyncExitStack, target: Target, options: Options, clock: Clock, credentials: Credentials | None = None
) -> WindowLimiter:
    """The target's limiter, with the margin that the path to the target requires. It is closed with *parts*.

    Runs of this process with the same endpoint, account and credential share limits. All runs without *credentials*
    count as using the same credential.
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


def restore(
    limiter: WindowLimiter,
    user: Literal["run", "verify"],
    checkpoint: Path | None,
    read_run_past: Callable[[float], Past],
    read_verified_past: Callable[[float], Past] | None,
    options: Options,
    wall: float,
) -> None:
    """Add to a limiter what earlier sessions have sent, and the pause and the quota that the service gave them.

    Runs and verifications of one checkpoint share limits, so the requests of both are added.

    Args:
        limiter: A new limiter.
        user: Whether a run or a verification sends through the limiter.
        checkpoint: Path of the run's checkpoint; verifications keep a file beside it. None if it is in memory.
        read_run_past: Given a Unix time by the same clock as *wall*, returns what runs have sent since then.
        read_verified_past: The same for verifications; None if there can be none.
        options: The run's options, for the longest outage.
        wall: The present Unix time.

    Raises:
        TemporaryStop: The rest of the pause is longer than the longest outage.
    """
    since = wall - limiter.memory_s
    past = read_run_past(since)
    verified = Past([], 0.0, []) if read_verified_past is None else read_verified_past(since)
    paused_s = max(past.pause_until, verified.pause_until) - wall
    if paused_s > LONGEST_STORED_PAUSE_S:
        log.warning("the checkpoint holds a pause of %.0f h, which is ignored: it is too long", paused_s / 3_600)
        paused_s = 0.0
    if paused_s > options.retry.max_outage_s:
        raise TemporaryStop(
            f"the service has ordered a pause of {seconds(paused_s)} more, but the run waits at most "
            f"{seconds(options.retry.max_outage_s)} (--max-outage). Run the same command again later."
        )
    if checkpoint is not None:  # only after the checks above: `_uncounted` marks requests as counted
        past = _uncounted(limiter, past, checkpoint, "run", wall, own=user == "run")
        verified = _uncounted(limiter, verified, checkpoint, "verify", wall, own=user == "verify")
    past = past.joined(verified)
    attempts = [(wall - at, instances) for at, instances in past.attempts]
    words = [Said(heard_at - wall, sent_at - wall, text) for heard_at, sent_at, text in past.words]
    limiter.restore(attempts, paused_s, words)


def _uncounted(limiter: WindowLimiter, past: Past, checkpoint: Path, kind: str, wall: float, *, own: bool) -> Past:
    """*past* without the requests that this process counts already; the others are marked as counted.

    Args:
        limiter: The limiter to which the others will be added.
        past: What the file holds, by the same clock as *wall*.
        checkpoint: Path of the run's checkpoint.
        kind: Whose file it is: `run`, or `verify` for the file of the verifications beside it.
        wall: The present Unix time.
        own: Whether nothing but this limiter's requests is recorded in the file until the limiter is closed.
    """
    since = wall - limiter.uncounted_s(f"{kind} {checkpoint.resolve()}", own=own)
    return past._replace(attempts=[attempt for attempt in past.attempts if attempt[0] > since])
