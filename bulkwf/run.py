"""Builds a run from its parts: `open_run`, `Run`."""

import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from bulkwf.attempt import Transport
from bulkwf.batching.ids import IdScheme
from bulkwf.checkpoint import Checkpoint, Executor, RunHeader, inline
from bulkwf.clock import Clock
from bulkwf.errors import BulkwfError
from bulkwf.events import BatchBegun, BatchSettled, Event, Observer
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.model import Result, Summary
from bulkwf.options import Options, Target
from bulkwf.parts import (
    open_in_thread,
    open_limiter,
    open_transport,
    own_thread,
    require_asyncio,
    restore,
    system_clock,
)
from bulkwf.sources import Paths, Rows, Source, explain_change, identify_source, name_source, open_source
from bulkwf.submission.engine import Engine
from bulkwf.submission.progress import Progress
from bulkwf.transport.credentials import Credentials, TokenSource
from bulkwf.uncancelled import uncancelled
from bulkwf.verification import read_past

__all__ = ["Run", "open_run"]

Emit = Callable[[Sequence[Result]], Awaitable[None]]

RUN_KEY_BYTES = 8
"""Number of random bytes in a run key. Two runs with the same key would take each other's rows for their own. For ten
thousand runs inside one retention, the probability of that is 1 in 100 with 4 bytes, and 1 in 3 · 10¹¹ with 8."""


class Run:
    """A run whose parts are open. Made by `open_run`.

    Attributes:
        progress: The counts of what is durable, up to date at any time.
        checkpoint: Path of the checkpoint; None if it is in memory.
        summary: What has become of the rows; None until the run has ended.
    """

    def __init__(self, engine: Engine, source: Source, checkpoint: Path | None) -> None:
        self.progress = engine.progress
        self.checkpoint = checkpoint
        self.summary: Summary | None = None
        self._engine = engine
        self._source = source
        self._ended = False

    async def finish(self) -> Summary:
        """Run until every row is settled, or until a drain has read the answers in flight.

        Raises:
            BulkwfError: What ended the run; its `summary` says what has become of the rows.
        """
        try:
            await self._engine.run()
        finally:
            self._ended = True
            self.summary = self._engine.summary
        summary, error = self.summary, self._engine.error
        assert summary is not None
        if isinstance(error, BulkwfError):
            error.summary = summary
        if error is not None:
            raise error
        return summary

    def drain(self, signal: int | None = None) -> None:
        """Send nothing more, read the answers in flight, and keep what they settle.

        Args:
            signal: Number of the signal that asks for it; None if none does.
        """
        if not self._ended:
            self._engine.drain(signal=signal)

    def abort(self) -> None:
        """Stop at once; requests in flight stay in doubt."""
        self._engine.abort()

    @property
    def last_error(self) -> str:
        """Why the last attempt failed; empty if no attempt has failed since rows were last settled."""
        return self._engine.last_error

    @property
    def bound_by(self) -> str:
        """What the next request waits for, in words."""
        return self._engine.bound_by

    def where(self, row: int) -> str:
        """The place of a row, for people: `orders.jsonl:1602`."""
        return self._source.where(row)


@asynccontextmanager
async def open_run(
    rows: Rows | Paths,
    *,
    target: Target,
    token: TokenSource,
    checkpoint: str | os.PathLike[str] | None,
    options: Options,
    new: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    observers: Sequence[Observer] = (),
    emit: Emit | None = None,
    known_as: str | None = None,
    transport: Transport | None = None,
    limiter: WindowLimiter | None = None,
    clock: Clock | None = None,
    executor: Executor | None = None,
) -> AsyncIterator[Run]:
    """Open everything that a run needs. What can be checked without touching a file is checked first.

    Args beyond those of `submit_all`:
        target: The workflow.
        token: Returns the headers of the credential.
        emit: Called with each batch of results once it is durable.
        known_as: Base URL for the checkpoint to store, if the real one differs in each session.
        limiter: A new limiter that uses *clock*. None makes one for the target. The requests of earlier sessions are
            added to it.
        clock: Time and random numbers. None takes this machine's.
        executor: Where the checkpoint opens, commits and closes. None starts a thread for that.
    """
    require_asyncio()
    scheme = IdScheme(options.run_key or secrets.token_hex(RUN_KEY_BYTES), options.id_template)
    clock = clock or system_clock()
    async with AsyncExitStack() as parts:
        header = _header(target, known_as, scheme, rows, options)
        source = open_source(rows, stop=options.first)
        del rows  # error trackers keep the locals of every frame
        parts.push_async_callback(uncancelled, source.aclose)
        credentials = None
        if transport is None:
            credentials = Credentials(token)
            transport = open_transport(parts, target, credentials, options, clock)
        path = None if checkpoint is None else Path(checkpoint)
        executor = executor or (inline if path is None else own_thread(parts, "bulkwf-checkpoint"))
        file = await _open_checkpoint(parts, path, header, options, clock, executor, new)
        clock = clock.counted_by(file.boot)
        parts.push(partial(_end_session, file, clock))
        limiter = limiter or open_limiter(parts, target, options, clock, credentials)
        verified = partial(read_past, file.path, boot=file.boot) if file.path is not None else None
        restore(limiter, "run", file.path, file.past, verified, options, clock.wall())
        counts = file.counts()
        progress = Progress(clock.now(), counts, settled_before=counts.settled, reading=lambda: source.read_share)
        engine = Engine(
            target,
            source,
            file,
            transport,
            limiter,
            scheme=IdScheme(file.run_key, options.id_template),
            options=options,
            progress=progress,
            clock=clock,
            source_change=explain_change(file.source_before, header.source),
            emit=emit,
            observers=[*observers, *([] if on_progress is None else [_progress_observer(progress, on_progress)])],
        )
        yield Run(engine, source, file.path)


def _progress_observer(progress: Progress, on_progress: Callable[[Progress], None]) -> Observer:
    """An observer that calls *on_progress* whenever rows have been begun or settled."""

    def observe(event: Event) -> None:
        if isinstance(event, BatchBegun | BatchSettled):
            on_progress(progress)

    return observe


def _end_session(
    checkpoint: Checkpoint, clock: Clock, _kind: object, error: BaseException | None, _traceback: object
) -> None:
    """Store how a session ended whose run never began. Changes nothing if the run began: the engine has stored it."""
    code = error.exit_code if isinstance(error, BulkwfError) else None
    reason = None if error is None else type(error).__name__ if isinstance(error, Exception) else "cancelled"
    checkpoint.end(clock.wall(), reason, code)


def _header(target: Target, known_as: str | None, scheme: IdScheme, rows: Rows | Paths, options: Options) -> RunHeader:
    rate = options.rate
    return RunHeader(
        base_url=known_as or target.base_url,
        account_id=target.account_id,
        workflow=target.workflow,
        run_key=scheme.run_key,
        id_scheme="generated" if scheme.template is None else f"template {scheme.template}",
        row_shape=options.row_shape,
        input=name_source(rows),
        source=identify_source(rows),
        limits=json.dumps({"instances_per_s": rate.instances_per_s, "requests_per_5m": rate.requests_per_5m}),
    )


async def _open_checkpoint(
    parts: AsyncExitStack,
    path: Path | None,
    header: RunHeader,
    options: Options,
    clock: Clock,
    executor: Executor,
    new: bool,
) -> Checkpoint:
    opening = partial(
        Checkpoint.open,
        path,
        header,
        now=clock.wall(),
        boot=clock.boot(),
        executor=executor,
        any_run_key=options.run_key is None,
        new=new,
    )
    return await open_in_thread(parts, executor, opening)
