"""Whether the instances that a checkpoint calls created or existed are really there.

Two ways of asking: the workflow's list, a hundred instances a request and in whatever order the service likes, and one
look-up an id.

Rules:

1. The list only ever shows that instances are there. It may skip some, repeat a page or lose its place: what it has
   not shown is asked for by id, and only an instance that was asked for twice, the second time after all others, and
   was not there is missing. One whose look-ups fail while others are answered is unknown.
2. The list is read while a page of it finds more than a look-up each would: a list that holds mostly other runs'
   instances, or goes round in circles, is given up.
3. What was found is kept in a file (`Findings`): a verification that is cut off goes on where it was.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from math import inf
from pathlib import Path

import anyio

from bulkwf.batch_state import BatchState
from bulkwf.checkpoint import read_boot, read_run_past, read_status
from bulkwf.client import OutageTracker, ServiceClient
from bulkwf.credentials import TokenSource
from bulkwf.errors import BulkwfError, ServiceRefused, exit_code
from bulkwf.events import AttemptFinished
from bulkwf.judge import judge_lookup, judge_page
from bulkwf.model import Batch, Fault, Judgement, Reply, Request, RequestKind, Verdict
from bulkwf.options import REHEARSAL, Options, Target
from bulkwf.payload import Page
from bulkwf.requests import get_instance, list_instances
from bulkwf.retry import LOOK_UP_TRIES
from bulkwf.verdicts import HANDLING
from bulkwf.verification.store import Findings, Scope, read_past
from bulkwf.windows import Said, quota_text
from bulkwf.wiring import open_limiter, open_transport, require_asyncio, restore, system_clock

__all__ = ["Verification", "Verified", "open_verification"]

PER_PAGE = 100
"""The most instances a page that the service is known to give."""
LIST_FROM = 10
"""So few instances are looked up one by one at once."""
LEAST_PATIENCE, MOST_PATIENCE = 10, 1_000
"""Pages that may be read in vain: a tenth of the requests that look-ups would take, within these bounds."""
FEW_EXISTED = 0.01
"""With more than this share of rows that existed before the run, the list is not limited to the run's own time."""
CLOCK_SKEW_S = 3_600.0
CONFIRM_AFTER_S = 1.0
"""Before an instance that is absent is asked for again: a copy of the service's data may lag behind."""
LIST_TRIES = 3
"""So often in a row may a page of the list fail; then look-ups, as many as the patience with it, go first."""
UNTOLD = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a verification has come to.

    Attributes:
        instances: Rows whose instances were looked for.
        total: Rows that the checkpoint calls created or existed; more than `instances` if a sample was drawn.
        found: How many of `instances` the service holds.
        missing: How many it does not.
        unknown: How many it does not answer for, while it answers for others. 0 while not all were asked for.
        statuses: The instances found, by the workflow status that the service names.
        run_finished: The run had come to its end.
        asked_for_all: All of `instances` were asked for.
        complete: That, and none is unknown.
        requests: Of this session.
        elapsed_s: Length of this session.
        exit_code: What the command line exits with.
    """

    instances: int
    total: int
    found: int
    missing: int
    unknown: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    run_finished: bool
    asked_for_all: bool
    complete: bool
    requests: int
    elapsed_s: float
    exit_code: int


class VerificationJournal:
    """Keeps in the findings what a verification's requests count for the limits.

    Args:
        findings: Where to.
        wall: Unix time in seconds, as the findings count it.

    Attributes:
        requests: Requests of this session.
        answers: How many of them the service has answered as it should.
        last_error: What the last request failed for, while none has succeeded since; empty otherwise.
    """

    def __init__(self, findings: Findings, wall: Callable[[], float]) -> None:
        self.requests = 0
        self.answers = 0
        self.last_error = ""
        self._findings = findings
        self._wall = wall

    def sending(self) -> None:
        """Count a request before it leaves: one that is on the wire when the process is killed has been sent, too."""
        self.requests += 1
        self._findings.sent(self._wall())

    async def record(self, attempt: AttemptFinished, state: BatchState | None) -> None:
        """See `client.AttemptJournal.record`. No answer must be durable before the next request."""
        assert state is None
        now, reply, judgement = self._wall(), attempt.reply, attempt.judgement
        if isinstance(reply, Reply) and (quota := quota_text(reply.headers)) is not None:
            self._findings.said(Said(now, now - reply.elapsed_s, quota))
        if judgement.verdict in (Verdict.DONE, Verdict.ABSENT):
            self.answers += 1
            self.last_error = ""
        else:
            self.last_error = judgement.message
        if attempt.pause_s is not None:
            await self.pause(attempt.pause_s)

    async def pause(self, seconds: float) -> None:
        """See `client.AttemptJournal.pause`."""
        now = self._wall()
        self._findings.pause(now + seconds, now)


class Verification:
    """Asks for every instance of a scope.

    Args:
        target: The workflow.
        scope: What is to be verified.
        findings: What was found so far, and where more goes.
        client: Makes the requests.
        journal: The client's.
        concurrency: Look-ups at a time.
        wall: Unix time in seconds, as the findings count it.
        run_shift_s: What to add to the run's times to have them by the system's clock.
    """

    def __init__(
        self,
        target: Target,
        scope: Scope,
        findings: Findings,
        client: ServiceClient,
        journal: VerificationJournal,
        *,
        concurrency: int,
        wall: Callable[[], float],
        run_shift_s: float = 0.0,
    ) -> None:
        self.findings = findings
        self._target = target
        self._scope = scope
        self._client = client
        self._journal = journal
        self._concurrency = concurrency
        self._wall = wall
        self._run_shift_s = run_shift_s
        self._started_at = client.clock()
        self._asked_for_all = False
        self._asking_others = anyio.Lock()
        self._list_is_ill = False

    @property
    def last_error(self) -> str:
        """What the last request failed for, while none has succeeded since; empty otherwise."""
        return self._journal.last_error

    @property
    def bound_by(self) -> str:
        """What the next request waits for, in words."""
        return self._client.limiter.bound_by

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
        findings = self.findings
        if not self._is_worth_listing():
            findings.end_listing(self._wall())
        while findings.listing:
            await self._read_list()
            if findings.listing:  # the list is ill: go on without it for a while
                detour = list(islice(findings.unanswered(0), self._patience))
                await self._look_up_all(iter(detour))
                if not detour:
                    findings.end_listing(self._wall())
        await self._look_up_all(findings.unanswered(0))
        await self._look_up_all(findings.unanswered(0))  # again those whose look-ups failed
        if self.answered < findings.wanted:  # absent so far
            if not findings.found:
                await self._page({"per_page": "1"})  # is there such a workflow at all?
            await self._client.sleep(CONFIRM_AFTER_S)
            await self._look_up_all(findings.unanswered(1))
        self._asked_for_all = True

    def verified(self, error: BulkwfError | None = None, signal: int | None = None) -> Verified:
        """What it has come to so far.

        Args:
            error: What ended it.
            signal: Number of the signal that ended it.
        """
        findings, finished = self.findings, self._scope.status.finished_at is not None
        unknown = findings.wanted - self.answered if self._asked_for_all else 0
        complete = self._asked_for_all and not unknown
        missing = findings.missing > 0
        return Verified(
            instances=findings.wanted,
            total=findings.wanted if self._scope.sample is None else self._scope.total,
            found=findings.found,
            missing=findings.missing,
            unknown=unknown,
            statuses=findings.statuses(),
            run_finished=finished,
            asked_for_all=self._asked_for_all,
            complete=complete,
            requests=self._journal.requests,
            elapsed_s=self._client.clock() - self._started_at,
            exit_code=exit_code(
                complete=(complete and finished) or (missing and signal is None),
                failed=missing,
                error=error,
                signal=None if complete else signal,
            ),
        )

    # --- by the list ----------------------------------------------------------------------------------------------

    def _is_worth_listing(self) -> bool:
        """Whether a page of the list could find more than one of the instances that are looked for."""
        wanted = self.findings.wanted
        return wanted > LIST_FROM and wanted * PER_PAGE > self._scope.total

    @property
    def _patience(self) -> int:
        return min(max(self.findings.wanted // 10, LEAST_PATIENCE), MOST_PATIENCE)

    async def _read_list(self) -> None:
        """Read the list, again from its start if it breaks off, while that finds more than look-ups would."""
        findings, query = self.findings, self._window()
        per_page = {"per_page": str(PER_PAGE)}
        in_vain = 0
        while findings.listing:
            cursor = findings.cursor
            page = await self._page(query | per_page | ({} if cursor is None else {"cursor": cursor}))
            listed = [] if page is None else [(one.id, one.status or UNTOLD) for one in page.listed]
            following = None if page is None else page.cursor
            if self._list_is_ill:
                return
            fresh, _ = findings.listed(listed, following, self._wall())
            in_vain = 0 if fresh else in_vain + 1
            unanswered = findings.wanted - self.answered
            if not unanswered or in_vain > self._patience or findings.pages > findings.found_by_list + self._patience:
                findings.end_listing(self._wall())
            elif page is None and cursor is None and per_page:
                per_page = {}  # perhaps it is the size of the page that is refused
            elif following in (None, cursor):  # the end, or a cursor that leads nowhere
                if findings.pass_found and unanswered > findings.pass_pages:
                    findings.list_again(self._wall())
                else:  # another reading would find nothing, or cost more than look-ups
                    findings.end_listing(self._wall())

    async def _page(self, query: dict[str, str]) -> Page | None:
        """One page of the list; None if the service refuses to give it, or if the list alone may be ill."""
        found: Page | None = None
        failures = 0

        def judge(reply: Reply | Fault) -> Judgement:
            nonlocal found
            outcome, found = judge_page(reply)
            return outcome

        async def attempt() -> Judgement:
            nonlocal failures
            request = list_instances(self._target, query)
            outcome = await self._attempt(RequestKind.LIST, request, judge)
            failures += HANDLING[outcome.verdict].in_doubt
            self._list_is_ill = failures >= LIST_TRIES
            if self._list_is_ill or outcome.verdict is Verdict.WRONG_ADDRESS:
                return replace(outcome, verdict=Verdict.BAD_REQUEST)
            return outcome

        await self._client.with_retries(attempt)
        return found

    def _window(self) -> dict[str, str]:
        """The dates between which the list is read: those of the run, for as far as its instances began then."""
        status = self._scope.status
        window = {}
        counts = status.counts
        if status.first_begun_at and counts.existed - counts.existed_in_doubt <= FEW_EXISTED * self._scope.total:
            window["date_start"] = _iso(status.first_begun_at + self._run_shift_s - CLOCK_SKEW_S)
        if status.last_settled_at and status.finished_at:
            window["date_end"] = _iso(status.last_settled_at + self._run_shift_s + CLOCK_SKEW_S)
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
        failures, answers = 0, self._journal.answers

        async def attempt() -> Judgement:
            nonlocal failures, answers
            outcome = await self._ask_for(instance_id)
            if not HANDLING[outcome.verdict].lookup_failed:
                return outcome
            failures, since, answers = failures + 1, answers, self._journal.answers
            if failures % LOOK_UP_TRIES == 0 and await self._answers_others(since):
                return replace(outcome, verdict=Verdict.UNANSWERED)
            return outcome

        outcome = await self._client.with_retries(attempt)
        if outcome.verdict is Verdict.UNANSWERED:
            return
        if outcome.verdict is Verdict.ABSENT:
            self.findings.absent(instance_id, self._wall())
        else:
            (_, result), *_ = outcome.others
            self.findings.present(instance_id, result.status or UNTOLD, self._wall())

    async def _ask_for(self, instance_id: str) -> Judgement:
        """One look-up."""
        asked, request = _alone(instance_id), get_instance(self._target, instance_id)
        return await self._attempt(RequestKind.LOOK_UP, request, lambda reply: judge_lookup(asked, 0, reply))

    async def _answers_others(self, answers: int) -> bool:
        """Whether the service has answered anything since it had answered *answers* requests; asks, if need be."""
        async with self._asking_others:
            if self._journal.answers == answers:
                known = self.findings.any_found()
                if known is None:
                    await self._page({"per_page": "1"})
                else:
                    await self._ask_for(known)
        return self._journal.answers > answers

    async def _attempt(
        self, kind: RequestKind, request: Request, judge: Callable[[Reply | Fault], Judgement]
    ) -> Judgement:
        """One request."""

        def sending() -> Request:
            self._journal.sending()
            return request

        judgement = await self._client.attempt(kind, sending, judge)
        if judgement.verdict in (Verdict.DONE, Verdict.ABSENT):
            self._client.outage.success()
        return judgement


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
    target = _target(scope, account_id, options)
    clock = system_clock()
    async with AsyncExitStack() as parts:
        transport = open_transport(parts, target, token, options, clock)
        findings = Findings.open(scope, clock.wall(), clock.draw, clock.boot())
        parts.callback(findings.close)
        limiter = open_limiter(target, options, clock)
        run_shift_s = clock.boot().shift_s(read_boot(checkpoint))
        clock = clock.counted_by(findings.boot)
        wall = clock.wall()
        since = wall - limiter.memory_s
        past = read_run_past(checkpoint, since, findings.boot).joined(read_past(checkpoint, since, findings.boot))
        restore(limiter, past, options, wall)

        journal = VerificationJournal(findings, clock.wall)
        client = ServiceClient(
            transport=transport,
            limiter=limiter,
            policy=options.retry,
            outage=OutageTracker(),
            journal=journal,
            sleep=clock.sleep,
            clock=clock.now,
            random=clock.draw,
        )
        yield Verification(
            target,
            scope,
            findings,
            client,
            journal,
            concurrency=options.rate.concurrency,
            wall=clock.wall,
            run_shift_s=run_shift_s,
        )


def _target(scope: Scope, account_id: str | None, options: Options) -> Target:
    """Where the checkpoint's instances are, if that is where the caller means to ask."""
    header = scope.status.header
    if header.base_url == REHEARSAL:
        raise ServiceRefused(
            f"{scope.path}: this is the checkpoint of a rehearsal (--emulate). Its service, an emulator, has ended "
            "with the run: there is nothing left to ask."
        )
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
                f"{scope.path}: the checkpoint's {what} is {known!r}, and the one to be asked is {asked!r}. If the "
                f"token is for {known!r}, say so with {flag}. Nothing was sent."
            )
    return target
