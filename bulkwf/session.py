"""One run or verification of the command: signals, display, what to do next, the exit code."""

import asyncio
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio

from bulkwf.api import open_run
from bulkwf.console import (
    ShownRun,
    ShownVerification,
    shell_command,
    show_progress,
    summary_lines,
    verified_lines,
    when,
)
from bulkwf.credentials import TokenSource, environment_credential, file_credential
from bulkwf.errors import BulkwfError, CheckpointError, ConfigError, InputError, SystemRefused
from bulkwf.messages import say
from bulkwf.model import Summary
from bulkwf.options import REHEARSAL, Options, Target
from bulkwf.process import caught_signals
from bulkwf.verification import VerificationReport, open_verification

if TYPE_CHECKING:
    from bulkwf.emulator import Service

__all__ = ["Session", "VerifySession", "emulated_service", "make_descriptors_last", "until_signalled"]

DESCRIPTORS_BESIDE_SOCKETS = 48
LARGE_BYTES = 20_000_000
"""Size of a checkpoint that takes more than a second to read, in bytes."""
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """One run of the command: from the open checkpoint to the exit code."""

    paths: list[str]
    target: Target
    checkpoint: Path
    options: Options
    token_file: Path | None
    emulate: bool
    new: bool

    async def run(self, *, quiet: bool) -> Summary:
        """Run, show, and say what to do next; the summary holds the exit code."""
        error: BulkwfError | None = None
        async with AsyncExitStack() as stack:
            endpoint = await stack.enter_async_context(self._endpoint())
            opened = await stack.enter_async_context(
                open_run(
                    self.paths,
                    target=endpoint.target,
                    token=endpoint.token,
                    checkpoint=self.checkpoint,
                    new=self.new,
                    options=endpoint.options,
                    known_as=endpoint.known_as,
                )
            )
            then = "the answers in flight are still read; a second signal stops at once"
            signals = Signals(opened.drain, opened.abort, then)
            stack.enter_context(signals.caught())
            try:
                async with show_progress(ShownRun(opened), quiet=quiet):
                    summary = await opened.finish()
            except BulkwfError as stopped:
                error, summary = stopped, stopped.summary or Summary()
            if not quiet:
                say(*summary_lines(opened, summary))
        _say_end(error, signals.received, complete=summary.complete)
        return summary if error is None else replace(summary, exit_code=error.exit_code)

    @asynccontextmanager
    async def _endpoint(self) -> "AsyncIterator[_Endpoint]":
        """The service, or one that is emulated in this process for as long as the block lasts."""
        if not self.emulate:
            yield _Endpoint(self.target, _token(self.token_file), self.options)
            return
        from bulkwf.emulator import emulate as serve_here  # noqa: PLC0415 - a server, which a real run has no use for

        rate = self.options.rate
        service = emulated_service(rate.instances_per_s, rate.requests_per_5m and max(1_200, rate.requests_per_5m))
        async with serve_here(service) as emulator:
            target = replace(self.target, base_url=emulator.base_url)
            options = replace(self.options, proxy=None)
            yield _Endpoint(target, lambda: {"Authorization": "Bearer emulated"}, options, known_as=REHEARSAL)


class _Endpoint(NamedTuple):
    """Where a run's requests go, and how.

    Attributes:
        target: The workflow.
        token: Where the credential comes from.
        options: The run's.
        known_as: See `open_run`.
    """

    target: Target
    token: TokenSource
    options: Options
    known_as: str | None = None


@dataclass(frozen=True)
class VerifySession:
    """One verification: from the checkpoint to the exit code."""

    checkpoint: Path
    account_id: str | None
    base_url: str
    options: Options
    token_file: Path | None
    sample: int | None

    async def run(self, *, quiet: bool) -> VerificationReport:
        """Verify, show the counts, and say what to do next; the report holds the exit code."""
        error: BulkwfError | None = None
        if not quiet and self.checkpoint.is_file() and self.checkpoint.stat().st_size > LARGE_BYTES:
            say("bulkwf: reading the checkpoint …")
        token = _token(self.token_file)
        async with AsyncExitStack() as stack:
            verification = await stack.enter_async_context(
                open_verification(
                    self.checkpoint,
                    account_id=self.account_id,
                    base_url=self.base_url,
                    token=token,
                    options=self.options,
                    sample=self.sample,
                )
            )
            if verification.store.resumed and not quiet:
                since, path = when(verification.store.begun_at), verification.store.path
                say(f"bulkwf: continues the verification begun {since}; to start over, delete {path}")
            working = anyio.CancelScope()
            signals = Signals(lambda _: working.cancel(), working.cancel, "what was found so far is kept")
            stack.enter_context(signals.caught())
            try:
                with working:
                    async with show_progress(ShownVerification(verification), quiet=quiet):
                        await verification.run()
            except BulkwfError as stopped:
                error = stopped
            report = await verification.report(error, signals.received)
        if not quiet:
            say(*verified_lines(report.counts))
        _say_end(error, signals.received, complete=report.counts.complete)
        return report


class Signals:
    """The first signal drains, the second aborts. *then* is the message after the first."""

    def __init__(self, drain: Callable[[int], None], abort: Callable[[], None], then: str) -> None:
        self._drain = drain
        self._abort = abort
        self._then = then
        self.received: signal.Signals | None = None

    def caught(self) -> AbstractContextManager[None]:
        """Receive the process's signals while the block lasts."""
        return caught_signals(self._receive, ("To continue, run:", f"  {_resume_command()}"))

    def _receive(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            say(f"bulkwf: {number.name}: {self._then}")
            self._drain(number)
        else:
            self._abort()


def _token(file: Path | None) -> TokenSource:
    return environment_credential if file is None else file_credential(file)


def _say_end(error: BulkwfError | None, received: signal.Signals | None, *, complete: bool) -> None:
    """Say what has ended the work, and what to do next."""
    if error is not None:
        say(f"bulkwf: {error}")
    if not complete:
        say(f"bulkwf: {_what_next(error, received)}:", f"  {_resume_command()}")


def _what_next(error: BulkwfError | None, received: signal.Signals | None) -> str:
    if isinstance(error, InputError | CheckpointError | SystemRefused):
        return "Fix this, then resume with"
    return f"stopped by {received.name}. To continue, run" if error is None and received else "To continue, run"


def _resume_command() -> str:
    program = sys.argv[0]
    if program.endswith("__main__.py"):
        words = [sys.executable, "-m", "bulkwf"]
    else:
        found = shutil.which("bulkwf")
        words = ["bulkwf" if found and os.path.realpath(found) == os.path.realpath(program) else program]
    # --new would refuse the unfinished checkpoint that this run leaves.
    return shell_command([*words, *(word for word in sys.argv[1:] if word != "--new")])


async def until_signalled(work: Coroutine[Any, Any, T]) -> T | signal.Signals:
    """Run *work* until it ends or a signal arrives; returns its result or the signal."""
    task = asyncio.ensure_future(work)
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    with caught_signals(stop):
        try:
            return await task
        except asyncio.CancelledError:
            if not received:
                raise
            return received[0]


def emulated_service(
    rate: int | None, request_rate: int | None, max_queued: int | None = None, workflows: Iterable[str] = ()
) -> "Service":
    """A service with the limits of the real one, at these rates."""
    from bulkwf.emulator import Limits, Service  # noqa: PLC0415

    limits = Limits(
        instances_per_s=rate,
        account_instances_per_s=None if rate is None else max(300, rate),
        requests_per_5m=request_rate,
        max_queued=max_queued,
    )
    epoch = time.time() - time.monotonic()
    return Service(limits, time.monotonic, workflows=set(workflows) or None, epoch=epoch)


def make_descriptors_last(concurrency: int, ends: int) -> None:
    """Raise the limit of open files to what the run needs, if the system allows it; *ends*: sockets per request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = concurrency * ends + DESCRIPTORS_BESIDE_SOCKETS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        fitting = (allowed - DESCRIPTORS_BESIDE_SOCKETS) // ends
        lower = f"Lower --concurrency to {fitting} or less, or raise" if fitting > 0 else "Raise"
        raise ConfigError(
            f"the run may need {needed} open files, and this process may have {allowed}. {lower} the limit (ulimit -n)."
        )
