"""The library's functions. They check arguments and open a run; `run` and `submission` do the rest."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Self

import anyio

from bulkwf.attempt import Transport
from bulkwf.events import Observer
from bulkwf.model import Result, Summary
from bulkwf.options import Options, Target
from bulkwf.run import Run, open_run
from bulkwf.settings import Settings, arguments, environment
from bulkwf.sources import Rows
from bulkwf.submission.progress import Progress
from bulkwf.transport.credentials import Token, token_credential
from bulkwf.uncancelled import until_done

__all__ = ["Results", "submit_all", "submit_stream"]


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
    """Start one workflow instance for each row; the same call again continues an unfinished run.

    The call may be cancelled at any time; the same call then resumes the run from its checkpoint.

    Args:
        rows: The path of a file of JSON lines (`.gz` too; `-` is standard input), or an iterable or async iterable of
            mappings or `Instance`. A row's keys are the API's: `instance_id`, `params`, `instance_retention` and
            `location_hint`, all optional. An ordinary iterable is read in the event loop, so an iterable that waits
            for I/O should be async. A generator is closed before the call returns, however the run ends; the cleanup
            of an async generator may take 5 s. Other iterators are not closed.
        workflow: Name of the workflow.
        account_id: Id of the account. None takes `CLOUDFLARE_ACCOUNT_ID`.
        base_url: Address of the API. None takes `CLOUDFLARE_API_BASE_URL` or `CLOUDFLARE_BASE_URL`; if neither is set,
            it is Cloudflare's own. https only, except on this machine's loopback.
        api_token: The token, or a function that returns it. The function is called again, in a thread, when the
            service refuses the token. None takes `CLOUDFLARE_API_TOKEN`, or `CLOUDFLARE_EMAIL` with
            `CLOUDFLARE_API_KEY`.
        checkpoint: Path of the file that makes the run resumable. None keeps the checkpoint in memory: it is lost with
            the process, and memory grows with the list.
        new: Whether to move a finished checkpoint aside and start over.
        options: How the run behaves; see `Options`.
        on_progress: Called with the counts each time that a batch has become durable or rows of it are settled. It
            must not block. If it raises an exception, the run goes on, and only the first exception is logged.
        observers: Called with each event of the run (`bulkwf.events`), under the same rules.
        transport: Sends the requests. None sends them over HTTP.

    Returns:
        What has become of the rows. `exit_code` is 0 if every row is created or existed.

    Raises:
        ConfigError: An argument is missing or malformed. Nothing was sent.
        ServiceRefused: The service refuses the run as a whole.
        InputError: The list can't be read to its end, or is not the list that the run began with.
        CheckpointError: The checkpoint is locked, damaged, of another run, or can't be written.
        SystemRefused: The operating system does not let the process start a thread.
        TemporaryStop: The service is failing, or orders too long a pause. Make the same call again later.
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
    """Like `submit_all`, but gives the result of each row as soon as it is durable.

        async with submit_stream(rows, workflow="resize", checkpoint="night.bulkwf") as results:
            async for result in results:
                ...

    The results are those of this call; `read_results` also reads those of earlier calls. They come batch by batch, in
    no fixed order, and a slow reader slows the run down. Leaving the block early drains the run: answers in flight are
    read, and all other rows are left to the next call.

    Args:
        rows: See `submit_all`, as for all other arguments.
        workflow: Name of the workflow.
        account_id: Id of the account.
        base_url: Address of the API.
        api_token: The token, or a function that returns it.
        checkpoint: Path of the file that makes the run resumable.
        new: Whether to move a finished checkpoint aside and start over.
        options: How the run behaves.
        observers: Called with each event of the run.
        transport: Sends the requests.

    Yields:
        The results, as an async iterator. The iteration raises the errors of `submit_all` at its end. If the block is
        left earlier, they are not raised; `summary` says what has become of the rows.
    """
    token = token_credential(api_token)
    del api_token  # error trackers keep the locals of every frame
    target = _target(workflow, account_id, base_url)
    sender, receiver = anyio.create_memory_object_stream[Sequence[Result]](1)

    async def emit(settled: Sequence[Result]) -> None:
        with suppress(anyio.BrokenResourceError):  # the caller has left the block; the results are durable
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
    """The results of a run under way, as an async iterator of `Result`.

    Attributes:
        summary: What has become of the rows; None until the run has ended.
    """

    def __init__(self, receiver: anyio.abc.ObjectReceiveStream[Sequence[Result]]) -> None:
        self.summary: Summary | None = None
        self._receiver = receiver
        self._error: Exception | None = None
        self._page: list[Result] = []

    async def watch(self, run: "Run", sender: anyio.abc.ObjectSendStream[Sequence[Result]]) -> None:
        """Run to the end, then close *sender*. The error that ends the run is kept: the iteration raises it."""
        async with sender:
            try:
                await run.finish()
            except Exception as error:  # noqa: BLE001 - raised again by the iteration
                self._error = error
            finally:
                self.summary = run.summary

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
