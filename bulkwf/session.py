"""One run of the command, or one verification: signals, what is shown, what to do next, the exit code."""

import asyncio
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from bulkwf.api import open_run
from bulkwf.console import ShownRun, ShownVerification, say, show_progress, summary_lines, verified_lines, when
from bulkwf.credentials import TokenSource, environment_credential, file_credential
from bulkwf.errors import BulkwfError, CheckpointError, ConfigError, InputError
from bulkwf.model import Summary
from bulkwf.options import REHEARSAL, Options
from bulkwf.process import caught_signals
from bulkwf.verification import VerificationReport, open_verification

if TYPE_CHECKING:
    from bulkwf.emulator import Service

__all__ = ["Session", "VerifySession", "emulated_service", "make_descriptors_last", "until_signalled"]

EMULATED_ACCOUNT = "emulated"
DESCRIPTORS_BESIDE_SOCKETS = 48
LARGE_BYTES = 20_000_000
"""A checkpoint of this size takes more than a second to be read."""
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """One run of the command: from the open checkpoint to the exit code."""

    paths: list[str]
    workflow: str
    account: str | None
    checkpoint: Path
    options: Options
    token_file: Path | None
    emulate: bool

    async def run(self, *, quiet: bool) -> Summary:
        """Run, show, and say what to do next; the summary holds the exit code."""
        error: BulkwfError | None = None
        async with AsyncExitStack() as stack:
            endpoint = await stack.enter_async_context(self._endpoint())
            opened = await stack.enter_async_context(open_run(self.paths, checkpoint=self.checkpoint, **endpoint))
            then = "the answers in flight are still read; a second signal stops at once"
            signals = Signals(opened.drain, opened.abort, then)
            stack.enter_context(signals.caught())
            try:
                async with show_progress(ShownRun(opened), quiet=quiet):
                    summary = await opened.finish()
            except BulkwfError as stopped:
                error, summary = stopped, stopped.summary or Summary()
            if not quiet:
                for line in summary_lines(opened, summary):
                    say(line)
        if error is not None:
            say(f"bulkwf: {error}")
        if not summary.complete:
            say(f"bulkwf: {_what_next(error, signals.received)}:\n  {_resume_command()}")
        return summary if error is None else replace(summary, exit_code=error.exit_code)

    @asynccontextmanager
    async def _endpoint(self) -> AsyncIterator[dict[str, Any]]:
        """Where to: the service, or one emulated in this process."""
        if not self.emulate:
            yield {
                "workflow": self.workflow,
                "account_id": self.account,
                "token": _token(self.token_file),
                "options": self.options,
            }
            return
        from bulkwf.emulator import emulate as serve_here  # noqa: PLC0415 - a server, which a real run has no use for

        rate = self.options.rate
        service = emulated_service(rate.instances_per_s, rate.requests_per_5m and max(1_200, rate.requests_per_5m))
        async with serve_here(service) as emulator:
            yield {
                "workflow": self.workflow,
                "account_id": self.account or EMULATED_ACCOUNT,
                "token": lambda: {"Authorization": "Bearer emulated"},
                "options": replace(self.options, base_url=emulator.base_url, proxy=None),
                "known_as": REHEARSAL,
            }


@dataclass(frozen=True)
class VerifySession:
    """One verification: from the checkpoint to the exit code."""

    checkpoint: Path
    account: str | None
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
                    self.checkpoint, account_id=self.account, token=token, options=self.options, sample=self.sample
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
            for line in verified_lines(report.counts):
                say(line)
        if error is not None:
            say(f"bulkwf: {error}")
        if not report.counts.complete:
            say(f"bulkwf: {_what_next(error, signals.received)}:\n  {_resume_command()}")
        return report


class Signals:
    """The first signal drains, the second aborts; *then* is what the user is told at the first."""

    def __init__(self, drain: Callable[[int], None], abort: Callable[[], None], then: str) -> None:
        self._drain = drain
        self._abort = abort
        self._then = then
        self.received: signal.Signals | None = None

    def caught(self) -> AbstractContextManager[None]:
        """Receive the process's signals while the block lasts."""
        return caught_signals(self._receive, f"To continue, run:\n  {_resume_command()}")

    def _receive(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            say(f"bulkwf: {number.name}: {self._then}")
            self._drain(number)
        else:
            self._abort()


def _token(file: Path | None) -> TokenSource:
    return environment_credential if file is None else file_credential(file)


def _what_next(error: BulkwfError | None, received: signal.Signals | None) -> str:
    if isinstance(error, InputError | CheckpointError):
        return "Once that is mended, continue with"
    return f"stopped by {received.name}. To continue, run" if error is None and received else "To continue, run"


def _resume_command() -> str:
    program = sys.argv[0]
    if program.endswith("__main__.py"):
        words = [sys.executable, "-m", "bulkwf"]
    else:
        found = shutil.which("bulkwf")
        words = ["bulkwf" if found and os.path.realpath(found) == os.path.realpath(program) else program]
    # --new would refuse the unfinished checkpoint that this run leaves.
    return shlex.join([*words, *(word for word in sys.argv[1:] if word != "--new")])


async def until_signalled(work: Coroutine[Any, Any, T]) -> T | signal.Signals:
    """Do *work* until it ends or a signal comes; its result, or the signal."""
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
    """A service with the limits of a real one, at other rates."""
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
    """Let the process open as many files as the run needs, if the system allows it; *ends*: sockets a request."""
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
