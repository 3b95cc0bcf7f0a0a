"""Whether the instances that a checkpoint calls created or existed are really there.

Two ways of asking: the workflow's list, a hundred instances a request and in whatever order the service likes, and one
look-up an id.

Rules:

1. The list only ever shows that instances are there. It may skip some, repeat a page or lose its place: what it has
   not shown is asked for by id, and only an instance that was asked for twice, the second time after all others, and
   was not there is missing.
2. The list is read while a page of it finds more than a look-up each would: a list that holds mostly other runs'
   instances, or goes round in circles, is given up.
3. What was found is kept in a file (`Findings`): a verification that is cut off goes on where it was.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from pathlib import Path

import anyio

from bulkwf.channel import Channel, Health
from bulkwf.checkpoint import Findings, Scope, read_recent_attempts, read_status
from bulkwf.credentials import TokenSource
from bulkwf.errors import BulkwfError, ServiceRefused
from bulkwf.limiter import REQUEST_PERIOD_S
from bulkwf.model import Batch, Fault, Outcome, Reply, Verdict
from bulkwf.options import Options, Target
from bulkwf.outcome import judge_lookup, judge_page
from bulkwf.payload import Page
from bulkwf.wiring import open_limiter, open_transport, require_asyncio, restore, system_clock

__all__ = ["REHEARSAL", "Verification", "Verified", "open_verification"]

PER_PAGE = 100
"""The most instances a page that the service is known to give."""
LIST_FROM = 10
"""So few instances are looked up one by one at once."""
LEAST_PATIENCE, MOST_PATIENCE = 10, 1_000
"""Pages that may be read in vain: a tenth of the requests that look-ups would take, within these bounds."""
FEW_EXISTED = 0.01
"""With more than this share of rows that existed before the run, the list is not limited to the run's own time."""
CLOCK_SKEW_S = 3_600.0
UNTOLD = "unknown"
REHEARSAL = "emulator"
"""What the checkpoint of a run with --emulate has for an endpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a verification has come to.

    Attributes:
        instances: Rows whose instances were looked for.
        total: Rows that the checkpoint calls created or existed; more than `instances` if a sample was drawn.
        found: How many of `instances` the service holds.
        missing: How many it does not.
        statuses: The instances found, by the workflow status that the service names.
        run_finished: The run had come to its end.
        complete: All of `instances` were asked for.
        requests: Of this session.
        elapsed_s: Length of this session.
        exit_code: What the command line exits with.
    """

    instances: int
    total: int
    found: int
    missing: int
    statuses: dict[str, int] = field(default_factory=dict)
    run_finished: bool
    complete: bool
    requests: int
    elapsed_s: float
    exit_code: int


class Verification:
    """Asks for every instance of a scope.

    Args:
        scope: What is to be verified.
        findings: What was found so far, and where more goes.
        channel: The way to the service.
        concurrency: Look-ups at a time.
        wall: Unix time in seconds.
    """

    def __init__(
        self, scope: Scope, findings: Findings, channel: Channel, *, concurrency: int, wall: Callable[[], float]
    ) -> None:
        self.findings = findings
        self.requests = 0
        self.trouble = ""
        """What the last request failed for, while none has succeeded since."""
        self._scope = scope
        self._channel = channel
        self._concurrency = concurrency
        self._wall = wall
        self._started_at = channel.clock()
        self._complete = False

    @property
    def bound_by(self) -> str:
        """What the next request waits for, in words."""
        return self._channel.limiter.bound_by

    @property
    def answered(self) -> int:
        """Rows of whose instances is known whether they are there."""
        return self.findings.found + self.findings.missing

    async def run(self) -> None:
        """Ask for every instance.

        Raises:
            ServiceRefused: The service refuses to be asked.
            TemporaryStop: The service has been ill for too long.
            CheckpointError: What is found can't be kept.
        """
        if not self._is_worth_listing():
            self.findings.end_listing(self._wall())
        await self._read_list()
        for absences in range(2):
            await self._look_up_all(self.findings.unanswered(absences))
        self._complete = True

    def verified(self) -> Verified:
        """What it has come to so far."""
        findings, finished = self.findings, self._scope.status.finished_at is not None
        code = 1 if findings.missing else 0 if self._complete and finished else 75
        return Verified(
            instances=findings.wanted,
            total=findings.wanted if self._scope.sample is None else self._scope.total,
            found=findings.found,
            missing=findings.missing,
            statuses=findings.statuses(),
            run_finished=finished,
            complete=self._complete,
            requests=self.requests,
            elapsed_s=self._channel.clock() - self._started_at,
            exit_code=code,
        )

    # --- by the list ----------------------------------------------------------------------------------------------

    def _is_worth_listing(self) -> bool:
        """Whether a page of the list could find more than one of the instances that are looked for."""
        wanted = self.findings.wanted
        return wanted > LIST_FROM and wanted * PER_PAGE > self._scope.total

    async def _read_list(self) -> None:
        """Read the list, again from its start if it breaks off, while that finds more than look-ups would."""
        findings, query = self.findings, self._window()
        patience = min(max(findings.wanted // 10, LEAST_PATIENCE), MOST_PATIENCE)
        per_page = {"per_page": str(PER_PAGE)}
        in_vain = 0
        while findings.listing:
            cursor = findings.cursor
            page = await self._page(query | per_page | ({} if cursor is None else {"cursor": cursor}))
            listed = [] if page is None else [(one.id, one.status or UNTOLD) for one in page.listed]
            following = None if page is None else page.cursor
            fresh, _ = findings.listed(listed, following, self._wall())
            in_vain = 0 if fresh else in_vain + 1
            unanswered = findings.wanted - self.answered
            if not unanswered or in_vain > patience or findings.pages > findings.found_by_list + patience:
                findings.end_listing(self._wall())
            elif page is None and cursor is None and per_page:
                per_page = {}  # perhaps it is the size of the page that is refused
            elif following in (None, cursor):  # the end, or a cursor that leads nowhere
                if findings.pass_found and unanswered > findings.pass_pages:
                    findings.list_again(self._wall())
                else:  # another reading would find nothing, or cost more than look-ups
                    findings.end_listing(self._wall())

    async def _page(self, query: dict[str, str]) -> Page | None:
        """One page of the list; None if the service refuses to give it."""
        found: Page | None = None

        async def attempt() -> Outcome:
            nonlocal found
            async with self._channel.limiter.slot(0) as slot:
                self._note_request()
                reply = await self._channel.transport.list(query, slot.written)
                outcome, found = judge_page(reply)
                if outcome.verdict is Verdict.NOT_SENT:
                    slot.unsent()
            await self._learn(outcome, reply)
            return outcome

        await self._channel.persist(attempt)
        return found

    def _window(self) -> dict[str, str]:
        """The dates between which the list is read: those of the run, for as far as its instances began then."""
        status = self._scope.status
        window = {}
        totals = status.totals
        if status.first_begun_at and totals.existed - totals.existed_in_doubt <= FEW_EXISTED * self._scope.total:
            window["date_start"] = _iso(status.first_begun_at - CLOCK_SKEW_S)
        if status.last_settled_at and status.finished_at:
            window["date_end"] = _iso(status.last_settled_at + CLOCK_SKEW_S)
        return window

    # --- one by one -----------------------------------------------------------------------------------------------

    async def _look_up_all(self, ids: Iterator[str]) -> None:
        """Ask for each of *ids*; the first error ends it."""
        errors: list[BulkwfError] = []

        async def work() -> None:
            try:
                for instance_id in ids:
                    await self._look_up(instance_id)
            except BulkwfError as error:
                errors.append(error)
                workers.cancel_scope.cancel()

        async with anyio.create_task_group() as workers:
            for _ in range(self._concurrency):
                workers.start_soon(work)
        if errors:
            raise errors[0]

    async def _look_up(self, instance_id: str) -> None:
        asked = _alone(instance_id)

        async def attempt() -> Outcome:
            async with self._channel.limiter.slot(0) as slot:
                self._note_request()
                reply = await self._channel.transport.get(instance_id, slot.written)
                outcome = judge_lookup(asked, 0, reply)
                if outcome.verdict is Verdict.NOT_SENT:
                    slot.unsent()
            await self._learn(outcome, reply)
            return outcome

        outcome = await self._channel.persist(attempt)
        if outcome.verdict is Verdict.ABSENT:
            self.findings.absent(instance_id, self._wall())
        else:
            (_, result), *_ = outcome.others
            self.findings.present(instance_id, result.status or UNTOLD, self._wall())

    def _note_request(self) -> None:
        """Before it leaves: one that is on the wire when all is cut off has been sent, too."""
        self.requests += 1
        self.findings.sent(self._wall())

    async def _learn(self, outcome: Outcome, reply: Reply | Fault) -> None:
        if outcome.verdict in (Verdict.DONE, Verdict.ABSENT):
            self._channel.health.well()
            self.trouble = ""
        else:
            self.trouble = outcome.message
        await self._channel.learn(outcome, reply, _keep)


async def _keep(_: Outcome) -> None:
    """Nothing that an answer settles has to be durable before the next request."""


def _alone(instance_id: str) -> Batch:
    """A batch of one instance that is only asked for."""
    return Batch(
        first_row=0,
        rows=1,
        region=b"",
        ids=(instance_id,),
        offsets=(0,),
        bare=True,
        row_shape="instance",
        refused=(),
        retention_s=inf,
    )


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@asynccontextmanager
async def open_verification(
    checkpoint: Path, *, account_id: str | None, token: TokenSource, options: Options, sample: int | None
) -> AsyncIterator[Verification]:
    """Open everything that a verification of *checkpoint* needs.

    The token goes where the options say, never where a file says: the checkpoint must be of the same endpoint.

    Raises:
        ServiceRefused: The checkpoint is of another endpoint or account.
    """
    require_asyncio()
    scope = Scope(checkpoint, read_status(checkpoint), sample)
    header = scope.status.header
    if header.base_url == REHEARSAL:
        raise ServiceRefused(
            f"{checkpoint}: this is the checkpoint of a rehearsal (--emulate). Its service, an emulator, has ended "
            "with the run: there is nothing left to ask."
        )
    account_id = os.environ.get("CLOUDFLARE_ACCOUNT_ID", "").strip() or None if account_id is None else account_id
    target = Target(
        base_url=options.base_url,
        account_id=header.account_id if account_id is None else account_id,
        workflow=header.workflow,
    )
    for what, known, asked, flag in (
        ("endpoint", header.base_url, target.base_url, "--base-url"),
        ("account", header.account_id, target.account_id, "-a"),
    ):
        if known != asked:
            raise ServiceRefused(
                f"{checkpoint}: the checkpoint's {what} is {known!r}, and the one to be asked is {asked!r}. If the "
                f"token is for {known!r}, say so with {flag}. Nothing was sent."
            )
    clock = system_clock()
    async with AsyncExitStack() as parts:
        transport = open_transport(parts, target, token, options, clock)
        findings = Findings.open(scope, clock.wall(), clock.draw)
        parts.callback(findings.close)
        limiter = open_limiter(target, options, clock)
        wall = clock.wall()
        sent = [*read_recent_attempts(checkpoint, wall - REQUEST_PERIOD_S), *findings.attempts(wall - REQUEST_PERIOD_S)]
        paused_until = max(findings.paused_until, scope.status.pause_until or wall)
        restore(limiter, sorted(sent), paused_until, options, wall)

        async def paused(seconds: float) -> None:
            findings.pause(clock.wall() + seconds, clock.wall())

        channel = Channel(
            transport=transport,
            limiter=limiter,
            policy=options.retry,
            health=Health(),
            paused=paused,
            sleep=clock.sleep,
            clock=clock.now,
            draw=clock.draw,
        )
        yield Verification(scope, findings, channel, concurrency=options.rate.concurrency, wall=clock.wall)
