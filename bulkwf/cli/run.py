"""One run of the command: from the flags to the exit code."""

import resource
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bulkwf.cli.display import ShownRun, show_progress
from bulkwf.cli.messages import say
from bulkwf.cli.resume import say_end
from bulkwf.cli.signals import Signals
from bulkwf.cli.summaries import summary_lines
from bulkwf.errors import BulkwfError, ConfigError
from bulkwf.model import Summary
from bulkwf.options import REHEARSAL, Options, Target
from bulkwf.run import open_run
from bulkwf.transport.credentials import TokenSource, token_source

if TYPE_CHECKING:
    from bulkwf.emulator import Service

__all__ = ["Session", "emulated_service", "raise_descriptor_limit"]

DESCRIPTORS_BESIDE_SOCKETS = 48
"""Number of open files of a run that are not connections to the service."""


@dataclass(frozen=True)
class Session:
    """One run of the command: from its inputs to the exit code."""

    paths: list[str]
    target: Target
    checkpoint: Path
    options: Options
    token_file: Path | None
    emulate: bool
    new: bool

    async def run(self, *, quiet: bool) -> Summary:
        """Submit the list, show the progress, and print what to do next; the summary holds the exit code."""
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
                error, summary = stopped, stopped.summary or Summary(exit_code=stopped.exit_code)
            if not quiet:
                say(*summary_lines(opened, summary))
        say_end(error, signals.received, complete=summary.complete)
        return summary

    @asynccontextmanager
    async def _endpoint(self) -> "AsyncIterator[_Endpoint]":
        """The endpoint of the service, or of a service that is emulated in this process while the block lasts."""
        if not self.emulate:
            yield _Endpoint(self.target, token_source(self.token_file), self.options)
            return
        from bulkwf.emulator import emulate as serve_here  # noqa: PLC0415 - only a rehearsal needs a server

        rate = self.options.rate
        service = emulated_service(rate.instances_per_s, rate.requests_per_5m and max(1_200, rate.requests_per_5m))
        async with serve_here(service) as emulator:
            target = replace(self.target, base_url=emulator.base_url)
            options = replace(self.options, proxy=None)
            yield _Endpoint(target, lambda: {"Authorization": "Bearer emulated"}, options, known_as=REHEARSAL)


class _Endpoint(NamedTuple):
    """The target of a run's requests, with their credential and options.

    Attributes:
        target: The workflow.
        token: Where the credential comes from.
        options: The options of the run.
        known_as: See `open_run`.
    """

    target: Target
    token: TokenSource
    options: Options
    known_as: str | None = None


def emulated_service(
    rate: int | None, request_rate: int | None, max_queued: int | None = None, workflows: Iterable[str] = ()
) -> "Service":
    """An emulated service with these limits; None means no limit. *workflows* are the names that exist; empty: all."""
    from bulkwf.emulator import Limits, Service  # noqa: PLC0415

    limits = Limits(
        instances_per_s=rate,
        account_instances_per_s=None if rate is None else max(300, rate),
        requests_per_5m=request_rate,
        max_queued=max_queued,
    )
    epoch = time.time() - time.monotonic()
    return Service(limits, time.monotonic, workflows=set(workflows) or None, epoch=epoch)


def raise_descriptor_limit(concurrency: int, ends: int) -> None:
    """Raise the limit of open files to what the run needs.

    Args:
        concurrency: Maximum number of requests in flight.
        ends: Sockets of this process for each request: 2 if it also emulates the service.

    Raises:
        ConfigError: The system does not allow that many open files.
    """
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
