"""Build the parts of a run, open them, close them: `submit_all` and `submit_stream`."""

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

import anyio

from bulkwf.batching import IdScheme
from bulkwf.checkpoint import Checkpoint, Executor, RunHeader, inline
from bulkwf.credentials import Credentials, Token, TokenSource, token_credential
from bulkwf.engine import Engine
from bulkwf.errors import BulkwfError
from bulkwf.events import BatchBegun, BatchSettled, Event, Observer
from bulkwf.limiter import WindowLimiter
from bulkwf.model import Clock, Result, Summary, Transport
from bulkwf.options import Options, Target
from bulkwf.progress import Progress
from bulkwf.settings import Settings, arguments, environment
from bulkwf.sources import Paths, Rows, Source, explain_change, identify_source, name_source, open_source
from bulkwf.uncancelled import uncancelled, until_done
from bulkwf.verification import read_past
from bulkwf.wiring import (
    open_in_thread,
    open_limiter,
    open_transport,
    own_thread,
    require_asyncio,
    restore,
    system_clock,
)

__all__ = ["Results", "Run", "open_run", "submit_all", "submit_stream"]

Emit = Callable[[Sequence[Result]], Awaitable[None]]
RUN_KEY_BYTES = 8
"""Of chance. Two runs that draw the same key take each other's rows for their own: of ten thousand runs inside one
retention some do in 1 of 100 nights with 4 bytes, and in 1 of 3 · 10¹¹ with 8."""


async def submit_all(
    rows: Rows,
    *,
    workflow: str,
    account_id: str | None = None,
    base_url: str | None = None,
    api_token: Token | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    new: bool = False,
    options: Options | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    observers: Sequence[Observer] = (),
    transport: Transport | None = None,
) -> Summary:
    """Start one workflow instance for each row; the same call again continues where a run was cut off.

    Args:
        rows: The path of a file of JSON lines (`.gz` too, `-` is standard input), or an iterable or async iterable of
            mappings or `Instance`. A row's keys are the API's: `instance_id`, `params`, `instance_retention`,
            `location_hint`, all of them optional. An ordinary iterable is drawn in the event loop: one that waits for
            something should be an async one. A generator belongs to the call: it is closed before the call returns,
            however the run ends, and an async one has 5 s for its cleanup. No other iterator is closed.
        workflow: Name of the workflow.
        account_id: Id of the account. None takes `CLOUDFLARE_ACCOUNT_ID`.
        base_url: The API's address. None takes `CLOUDFLARE_API_BASE_URL` or `CLOUDFLARE_BASE_URL`, and if neither is
            set, Cloudflare's own. https only, except on this machine's loopback.
        api_token: The token, or a function that gives it and is asked again, in a thread, when the service refuses
            it. None takes `CLOUDFLARE_API_TOKEN`, or `CLOUDFLARE_EMAIL` with `CLOUDFLARE_API_KEY`.
        checkpoint: The file that makes the run resumable. None keeps it in memory: a crash loses it, and every id is
            held there.
        new: Move a finished checkpoint aside and start over.
        options: How the run behaves; see `Options`.
        on_progress: Called with the counts after each batch of rows has become durable. Must not block; an exception
            in it is logged once, and does not end the run.
        observers: Called with each event of the run (`bulkwf.events`), under the same rules.
        transport: Another way to the service than HTTP.

    Returns:
        What has become of the rows. `exit_code` is 0 if every row is created or existed.

    Raises:
        ConfigError: An argument is missing or malformed. Nothing was sent.
        ServiceRefused: The service refuses the run as a whole.
        InputError: The list can't be read to its end, or is not the checkpoint's.
        CheckpointError: The checkpoint is locked, damaged, of another run, or can't be written.
        SystemRefused: The operating system does not let the process start a thread.
        TemporaryStop: The service is failing. Run the same thing again later.

    Cancelled at any time, it leaves a checkpoint that resumes.
    """
    token = token_credential(api_token)
    del api_token  # error trackers keep the locals of every frame
    opening = open_run(
        rows,
        target=_target(workflow, account_id, base_url),
        token=token,
        checkpoint=checkpoint,
        new=new,
        options=options or Options(),
        on_progress=on_progress,
        observers=observers,
        transport=transport,
    )
    del rows
    async with opening as run:
        return await run.finish()


@asynccontextmanager
async def submit_stream(
    rows: Rows,
    *,
    workflow: str,
    account_id: str | None = None,
    base_url: str | None = None,
    api_token: Token | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    new: bool = False,
    options: Options | None = None,
    observers: Sequence[Observer] = (),
    transport: Transport | None = None,
) -> AsyncIterator["Results"]:
    """Like `submit_all`, giving each row's result as soon as it is durable.

        async with submit_stream(rows, workflow="resize", checkpoint="night.bulkwf") as results:
            async for result in results:
                ...

    The results are those of this call: rows that an earlier one settled are in the checkpoint (`read_results`). They
    come batch by batch, in no fixed order, and a slow reader slows the run down. Leaving the block early drains the
    run: answers in flight are read, and the rest stays for the next call. The errors of `submit_all` are raised at the
    end of the iteration. If the block is left earlier, they are not raised; `summary` says what is durable.
    """
    token = token_credential(api_token)
    del api_token  # error trackers keep the locals of every frame
    target = _target(workflow, account_id, base_url)
    sender, receiver = anyio.create_memory_object_stream[Sequence[Result]](1)

    async def emit(settled: Sequence[Result]) -> None:
        with suppress(anyio.BrokenResourceError):  # nobody listens any more; the results are durable all the same
            await sender.send(settled)

    opening = open_run(
        rows,
        target=target,
        token=token,
        checkpoint=checkpoint,
        new=new,
        options=options or Options(),
        emit=emit,
        observers=observers,
        transport=transport,
    )
    del rows
    async with sender, receiver, opening as run:
        results = Results(receiver)
        working = asyncio.ensure_future(results.watch(run, sender))
        try:
            yield results
        except asyncio.CancelledError:
            working.cancel()
            raise
        finally:
            receiver.close()
            run.drain()
            await until_done(working, working.cancel)


def _target(workflow: str, account_id: str | None, base_url: str | None) -> Target:
    given = arguments(workflow=workflow, account_id=account_id, base_url=base_url)
    return Settings(given, environment(os.environ)).target()


class Results:
    """The results of a run under way, as an async iterator.

    Attributes:
        summary: What has become of the rows; None until the run has ended.
    """

    def __init__(self, receiver: anyio.abc.ObjectReceiveStream[Sequence[Result]]) -> None:
        self.summary: Summary | None = None
        self._receiver = receiver
        self._error: Exception | None = None
        self._page: list[Result] = []

    async def watch(self, run: "Run", sender: anyio.abc.ObjectSendStream[Sequence[Result]]) -> None:
        """Run to the end; an error waits for whoever iterates."""
        async with sender:
            try:
                self.summary = await run.finish()
            except Exception as error:  # noqa: BLE001 - raised again by the iteration
                self.summary, self._error = run.summary, error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        while not self._page:
            try:
                self._page = list(reversed(await self._receiver.receive()))
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                if self._error is not None:
                    raise self._error from None
                raise StopAsyncIteration from None
        return self._page.pop()


class Run:
    """A run whose parts are open. Made by `open_run`.

    Attributes:
        progress: What is durable, live.
        checkpoint: The file; None if it is in memory.
        interrupted: `drain` or `abort` was called before the run came to its end.
        summary: What has become of the rows; None until the run has ended.
    """

    def __init__(self, engine: Engine, source: Source, checkpoint: Path | None) -> None:
        self.progress = engine.progress
        self.checkpoint = checkpoint
        self.interrupted = False
        self.summary: Summary | None = None
        self._engine = engine
        self._source = source
        self._ended = False

    async def finish(self) -> Summary:
        """Run to the end, or until drained.

        Raises:
            BulkwfError: What ended the run before its end; `summary` says what is durable.
        """
        await self._engine.run()
        self._ended = True
        summary, error = self._engine.summary, self._engine.error
        assert summary is not None
        self.summary = summary
        if isinstance(error, BulkwfError):
            error.summary = summary
        if error is not None:
            raise error
        return summary

    def drain(self, signal: int | None = None) -> None:
        """Send nothing more, read the answers in flight, keep what they settle; *signal*: the number of what asks."""
        if not self._ended:
            self.interrupted = True
            self._engine.drain(signal=signal)

    def abort(self) -> None:
        """Stop at once."""
        self.interrupted = True
        self._engine.abort()

    @property
    def last_error(self) -> str:
        """What the last attempt failed for, while nothing has been settled since; empty otherwise."""
        return self._engine.last_error

    @property
    def bound_by(self) -> str:
        """What the next request waits for, in words."""
        return self._engine.bound_by

    def where(self, row: int) -> str:
        """A row's place for people: `orders.jsonl:1602`."""
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
    """Open everything that a run needs. What can be checked without touching a file comes first.

    Args beyond those of `submit_all`:
        target: The workflow.
        token: Where the credential comes from.
        emit: Called with each batch of results once it is durable.
        known_as: The checkpoint's name for the endpoint, where the base URL changes with each session.
        limiter: A new limiter for this run, which follows *clock*. None makes the target's own. It takes over what
            earlier sessions have sent.
        clock: Time and random numbers. None takes this machine's.
        executor: Where the checkpoint opens, commits and closes. None starts a thread for it.
    """
    require_asyncio()
    scheme = IdScheme(options.run_key or secrets.token_hex(RUN_KEY_BYTES), options.id_template)
    clock = clock or system_clock()
    async with AsyncExitStack() as parts:
        list_name, identity = name_source(rows), identify_source(rows)
        source = open_source(rows, stop=options.first)
        del rows  # error trackers keep the locals of every frame
        parts.push_async_callback(uncancelled, source.aclose)
        credentials = None
        if transport is None:
            credentials = Credentials(token)
            transport = open_transport(parts, target, credentials, options, clock)
        path = None if checkpoint is None else Path(checkpoint)
        header = _header(target, known_as, scheme, (list_name, identity), options)
        executor = executor or (inline if path is None else own_thread(parts, "bulkwf-checkpoint"))
        file = await _open_checkpoint(parts, path, header, options, clock, executor, new)
        clock = clock.counted_by(file.boot)
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
            source_change=explain_change(file.source_before, identity),
            emit=emit,
            observers=[*observers, *([] if on_progress is None else [_progress_observer(progress, on_progress)])],
        )
        yield Run(engine, source, file.path)


def _progress_observer(progress: Progress, on_progress: Callable[[Progress], None]) -> Observer:
    """An observer that hands on the counts whenever they have changed."""

    def observe(event: Event) -> None:
        if isinstance(event, BatchBegun | BatchSettled):
            on_progress(progress)

    return observe


def _header(
    target: Target, known_as: str | None, scheme: IdScheme, known_list: tuple[str, str], options: Options
) -> RunHeader:
    rate, (list_name, identity) = options.rate, known_list
    return RunHeader(
        base_url=known_as or target.base_url,
        account_id=target.account_id,
        workflow=target.workflow,
        run_key=scheme.run_key,
        id_scheme="generated" if scheme.template is None else f"template {scheme.template}",
        row_shape=options.row_shape,
        input=list_name,
        source=identity,
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
