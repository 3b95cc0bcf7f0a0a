"""Opens everything that a verification needs."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from bulkwf.checkpoint import read_boot, read_run_past, read_status
from bulkwf.errors import ServiceRefused
from bulkwf.options import REHEARSAL, Options, Target
from bulkwf.parts import (
    open_in_thread,
    open_limiter,
    open_transport,
    own_thread,
    require_asyncio,
    restore,
    system_clock,
)
from bulkwf.submission.client import open_client
from bulkwf.transport.credentials import Credentials, TokenSource
from bulkwf.verification.journal import VerificationJournal
from bulkwf.verification.request_log import read_past
from bulkwf.verification.scope import Scope
from bulkwf.verification.store import VerificationStore
from bulkwf.verification.verify import Verification

__all__ = ["open_verification"]


@asynccontextmanager
async def open_verification(
    checkpoint: Path,
    *,
    account_id: str | None,
    base_url: str,
    token: TokenSource,
    options: Options,
    sample: int | None,
) -> AsyncIterator[Verification]:
    """Open everything that a verification of *checkpoint* needs.

    The token is sent to *base_url*, never to an address from a file. The checkpoint must have the same endpoint.

    Args:
        checkpoint: The run's checkpoint.
        account_id: Id of the account; None means the checkpoint's account.
        base_url: The API's address.
        token: Where the credential comes from.
        options: Time-outs, retries and limits of the requests.
        sample: Size of a random sample of the instances; None means all of them.

    Raises:
        ServiceRefused: The checkpoint is of another endpoint or account, or of a rehearsal.
    """
    require_asyncio()
    clock = system_clock()
    async with AsyncExitStack() as parts:
        executor = own_thread(parts, "bulkwf-verification")
        scope = Scope(checkpoint, await executor(partial(read_status, checkpoint)), sample)
        target = _target(scope, account_id, base_url)
        credentials = Credentials(token)
        transport = open_transport(parts, target, credentials, options, clock)
        opening = partial(VerificationStore.open, scope, clock.wall(), clock.random, executor, clock.boot())
        store = await open_in_thread(parts, executor, opening)
        limiter = open_limiter(parts, target, options, clock, credentials)
        boot = clock.boot()
        clock = clock.counted_by(store.boot)
        sent, asked = (partial(read, checkpoint, boot=store.boot) for read in (read_run_past, read_past))
        restore(limiter, "verify", checkpoint, sent, asked, options, clock.wall())
        journal = VerificationJournal(store.requests, clock.wall)
        client = open_client(transport, limiter, journal, options.retry, clock)
        yield Verification(
            target,
            scope,
            store,
            client,
            journal,
            concurrency=options.rate.concurrency,
            wall=clock.wall,
            boot=boot,
            run_boot=read_boot(checkpoint),
        )


def _target(scope: Scope, account_id: str | None, base_url: str) -> Target:
    """The workflow that has the checkpoint's instances. Refuses a checkpoint of another endpoint or account."""
    header = scope.status.header
    if header.base_url == REHEARSAL:
        raise ServiceRefused(
            f"{scope.path}: this is the checkpoint of a rehearsal (--emulate). The emulator stopped when the "
            "run ended, so there is no service to ask."
        )
    target = Target(
        base_url=base_url,
        account_id=header.account_id if account_id is None else account_id,
        workflow=header.workflow,
    )
    for what, known, asked, flag in (
        ("endpoint", header.base_url, target.base_url, "--base-url"),
        ("account", header.account_id, target.account_id, "-a"),
    ):
        if known != asked:
            raise ServiceRefused(
                f"{scope.path}: the checkpoint's {what} is {known!r}, and the one to be asked is {asked!r}. If the "
                f"token is for {known!r}, say so with {flag}. Nothing was sent."
            )
    return target
