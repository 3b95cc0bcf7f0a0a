"""Verifies that the service holds the instances which a checkpoint calls created or existed.

Two kinds of requests: pages of the workflow's list, a hundred instances each in any order, and look-ups of one id.

Rules:

1. The list proves that an instance exists, never that it is missing: the list may skip instances, repeat pages or lose
   its place. An instance that the list has not shown is looked up. If it is absent, it is looked up again some seconds
   after all other look-ups. If it is absent again, it is missing.
2. The list is read once, within the dates of the run, and only while that is cheaper than look-ups. A request for the
   list costs as much as a look-up, and each instance that it finds saves a look-up. The number of requests minus the
   number of instances found is the list's debt. When the debt exceeds a tenth of the look-ups that are left, no more
   pages are read (`list_pays`). No other rule is needed for a list that holds other runs' instances, repeats pages, has
   no end or fails.
3. A request that fails repeatedly while the service answers others is given up. If it was a look-up, the instance is
   unknown. If it was for a page, its tries add to the debt.
4. What was found is stored (`VerificationStore`), so that the next verification can continue an interrupted one.
"""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from math import inf

import anyio

from bulkwf.attempt import Fault, Judgement, Reply, Request, RequestKind, Verdict
from bulkwf.clock import UNKNOWN_BOOT, Boot
from bulkwf.errors import BulkwfError, exit_code
from bulkwf.model import Batch
from bulkwf.options import Target
from bulkwf.service.judge import judge_lookup, judge_page
from bulkwf.service.requests import get_instance, list_instances
from bulkwf.service.responses import Page
from bulkwf.service.verdicts import HANDLING
from bulkwf.submission.client import ServiceClient
from bulkwf.submission.retries import LookUpTries
from bulkwf.verification.journal import VerificationJournal
from bulkwf.verification.report import VerificationReport, Verified
from bulkwf.verification.scope import Scope
from bulkwf.verification.store import VerificationStore

__all__ = ["Verification", "list_pays"]

PER_PAGE = 100
"""Instances requested per page: the maximum that the service is known to return."""
LIST_FROM = 11
"""The list is read only if at least this many instances are to be verified."""
LEAST_DEBT = 10
"""The list is read on while its debt is at most this, in requests, however few instances are left."""
FEW_EXISTED = 0.01
"""If more than this share of the rows existed before the run, instances that began before it are listed, too."""
CLOCK_SKEW_S = 3_600.0
"""How far the service's clock and this machine's may differ, in seconds."""
CONFIRM_AFTER_S = 3.0
"""Wait before absent instances are looked up again, in seconds: look-ups may lag behind what the service holds."""
NO_STATUS = "unknown"


def list_pays(debt: int, unanswered: int) -> bool:
    """Whether another page of the list is expected to cost less than look-ups.

    Args:
        debt: Number of requests for the list minus number of instances that they found, never below 0.
        unanswered: Number of instances that were not found yet.
    """
    return unanswered > 0 and debt <= max(LEAST_DEBT, unanswered // 10)


class Verification:
    """Asks the service for every instance of a scope.

    Args:
        target: The workflow.
        scope: What is to be verified.
        store: What was found so far, and where more is stored.
        client: Makes the requests.
        journal: The client's journal.
        concurrency: Maximum number of look-ups at a time.
        wall: Unix time in seconds, by the store's clock.
        boot: This boot, by the system's clock.
        run_boot: The boot by which the checkpoint counts its times.
    """

    def __init__(
        self,
        target: Target,
        scope: Scope,
        store: VerificationStore,
        client: ServiceClient,
        journal: VerificationJournal,
        *,
        concurrency: int,
        wall: Callable[[], float],
        boot: Boot = UNKNOWN_BOOT,
        run_boot: Boot = UNKNOWN_BOOT,
    ) -> None:
        self.store = store
        self._target = target
        self._scope = scope
        self._client = client
        self._journal = journal
        self._concurrency = concurrency
        self._wall = wall
        self._boot = boot
        self._run_boot = run_boot
        self._started_at = client.clock()
        self._asked_for_all = False
        self._probing = anyio.Lock()

    # --- counts ---------------------------------------------------------------------------------------------------

    @property
    def last_error(self) -> str:
        """Why the last request failed; empty once one has succeeded."""
        return self._journal.last_error

    @property
    def bound_by(self) -> str:
        """What the next request waits for, in words."""
        return self._client.limiter.bound_by

    @property
    def wanted(self) -> int:
        """Rows whose instances are looked for."""
        return self.store.wanted

    @property
    def answered(self) -> int:
        """Rows for which it is known whether the service holds their instances."""
        return self.store.answered

    @property
    def missing(self) -> int:
        """Rows whose instances the service does not hold."""
        return self.store.missing

    async def report(self, error: BulkwfError | None = None, signal: int | None = None) -> VerificationReport:
        """Report what was found so far.

        Args:
            error: The error that ended the verification; None if there was none.
            signal: Number of the signal that ended the verification; None if there was none.
        """
        store, finished = self.store, self._scope.status.finished_at is not None
        statuses = await store.statuses()  # after all pending writes: the counts do not change any more
        unknown = store.wanted - store.answered if self._asked_for_all else 0
        complete = self._asked_for_all and not unknown
        missing = store.missing > 0
        counts = Verified(
            instances=store.wanted,
            total=store.wanted if self._scope.sample is None else self._scope.total,
            found=store.found,
            missing=store.missing,
            unknown=unknown,
            statuses=statuses,
            run_finished=finished,
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
        return VerificationReport(
            counts=counts,
            asked_for_all=self._asked_for_all,
            store=store.path,
            checkpoint=self._scope.path,
            ended_at=self._wall(),
            run_shift_s=store.boot.shift_s(self._run_boot),
        )

    # --- the verification -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ask the service for every instance.

        Raises:
            ServiceRefused: The service refuses the verification.
            TemporaryStop: The service has been failing for too long.
            CheckpointError: What was found can't be stored.
        """
        if self.store.listing:
            await self._read_list()
        await self._look_up_all(absences=0)
        await self._look_up_all(absences=0)  # once more, for those whose look-ups failed
        if self.answered < self.wanted:
            if not self.store.found:
                await self._page({"per_page": "1"})  # raises if there is no such workflow
            await self._client.sleep(CONFIRM_AFTER_S)
            await self._look_up_all(absences=1)
        self._asked_for_all = True

    # --- the list -------------------------------------------------------------------------------------------------

    async def _read_list(self) -> None:
        """Read the list until it ends or look-ups are cheaper."""
        store, query = self.store, self._window() | {"per_page": str(PER_PAGE)}
        # If the sample is smaller than 1 in `PER_PAGE`, a page shows less than one instance of it, on average.
        more = store.wanted >= LIST_FROM and store.wanted * PER_PAGE > self._scope.total
        while more and list_pays(store.debt, store.wanted - store.answered):
            cursor, sent = store.cursor, self._journal.requests
            verdict, page = await self._page(query | ({} if cursor is None else {"cursor": cursor}))
            if page is not None:
                listed, following = [(one.id, one.status or NO_STATUS) for one in page.listed], page.cursor
                more = following is not None
            else:  # a refused cursor has expired: start over; after a failure: the same page again
                refused = verdict is not Verdict.UNANSWERED
                listed, following = [], None if refused else cursor
                more = cursor is not None or not refused
            await store.listed(listed, following, self._journal.requests - sent, self._wall())
        await store.end_listing(self._wall())

    def _window(self) -> dict[str, str]:
        """Query parameters for the run's dates: its start if few rows existed before it, its end if it is finished."""
        status, shift_s = self._scope.status, self._boot.shift_s(self._run_boot)
        window = {}
        counts = status.counts
        if status.first_begun_at and counts.existed - counts.existed_in_doubt <= FEW_EXISTED * self._scope.total:
            window["date_start"] = _iso(status.first_begun_at + shift_s - CLOCK_SKEW_S)
        if status.last_settled_at and status.finished_at:
            window["date_end"] = _iso(status.last_settled_at + shift_s + CLOCK_SKEW_S)
        return window

    async def _page(self, query: dict[str, str]) -> tuple[Verdict, Page | None]:
        """Request a page of the list until it is answered; the verdict, and the page or None if there is none."""
        found: Page | None = None

        async def attempt() -> Judgement:
            nonlocal found
            judgement, found = await self._ask_for_page(query)
            if judgement.verdict is Verdict.WRONG_ADDRESS:  # the list alone may have another address
                return replace(judgement, verdict=Verdict.BAD_REQUEST)
            return judgement

        judgement = await self._until_answered(
            attempt, lambda verdict: HANDLING[verdict].in_doubt, partial(self._probe, list_fails=True)
        )
        return judgement.verdict, found

    async def _ask_for_page(self, query: dict[str, str]) -> tuple[Judgement, Page | None]:
        """Make one request for a page of the list."""
        found: Page | None = None

        def judge(reply: Reply | Fault) -> Judgement:
            nonlocal found
            judgement, found = judge_page(reply)
            return judgement

        judgement = await self._attempt(RequestKind.LIST, list_instances(self._target, query), judge)
        return judgement, found

    # --- look-ups -------------------------------------------------------------------------------------------------

    async def _look_up_all(self, absences: int) -> None:
        """Look up each instance that was not found yet, and was absent *absences* times; stop at the first error."""
        errors: list[BulkwfError] = []
        sender, receiver = anyio.create_memory_object_stream[str](0)

        async def feed() -> None:
            async with sender, aclosing(self.store.unanswered(absences)) as ids:
                async for instance_id in ids:
                    await sender.send(instance_id)

        async def work() -> None:
            async for instance_id in receiver:
                await self._look_up(instance_id)

        async def until_error(step: Callable[[], Awaitable[None]]) -> None:
            try:
                await step()
            except BulkwfError as error:
                errors.append(error)
                tasks.cancel_scope.cancel()

        async with receiver, anyio.create_task_group() as tasks:
            tasks.start_soon(until_error, feed)
            for _ in range(self._concurrency):
                tasks.start_soon(until_error, work)
        if errors:
            raise errors[0]

    async def _look_up(self, instance_id: str) -> None:
        judgement = await self._until_answered(
            partial(self._ask_for, instance_id),
            lambda verdict: HANDLING[verdict].lookup_failed,
            partial(self._probe, list_fails=False),
        )
        if judgement.verdict is Verdict.UNANSWERED:
            return
        if judgement.verdict is Verdict.ABSENT:
            await self.store.absent(instance_id, self._wall())
        else:
            (_, result), *_ = judgement.others
            await self.store.present(instance_id, result.status or NO_STATUS, self._wall())

    async def _ask_for(self, instance_id: str) -> Judgement:
        """Make one request for an instance."""
        asked, request = _alone(instance_id), get_instance(self._target, instance_id)
        return await self._attempt(RequestKind.LOOK_UP, request, lambda reply: judge_lookup(asked, 0, reply))

    # --- requests of both kinds -----------------------------------------------------------------------------------

    async def _until_answered(
        self,
        attempt: Callable[[], Awaitable[Judgement]],
        failed: Callable[[Verdict], bool],
        probe: Callable[[], Awaitable[object]],
    ) -> Judgement:
        """Make attempts until one is answered, or until they fail while the service answers others (`UNANSWERED`).

        Args:
            attempt: Makes one attempt.
            failed: Whether an attempt with this verdict has failed.
            probe: Makes a different request, to find out whether the service answers others.
        """
        tries, answers = LookUpTries(), self._journal.answers

        async def guarded() -> Judgement:
            nonlocal answers
            judgement = await attempt()
            if not failed(judgement.verdict):
                return judgement
            since, answers = answers, self._journal.answers
            if tries.failed() and await self._answers_others(since, probe):
                return replace(judgement, verdict=Verdict.UNANSWERED)
            return judgement

        return await self._client.with_retries(guarded)

    async def _answers_others(self, answers: int, probe: Callable[[], Awaitable[object]]) -> bool:
        """Whether the service has answered more than *answers* requests; sends a probe first if it has not."""
        async with self._probing:
            if self._journal.answers == answers:
                await probe()
        return self._journal.answers > answers

    async def _probe(self, *, list_fails: bool) -> None:
        """Make one request that the service should answer: look up an instance that it holds, or request a page.

        Args:
            list_fails: Requests for the list fail, so look up any instance if none is known to be held.
        """
        instance_id = await self.store.any_id(found=not list_fails)
        if instance_id is None:
            await self._ask_for_page({"per_page": "1"})
        else:
            await self._ask_for(instance_id)

    async def _attempt(
        self, kind: RequestKind, request: Request, judge: Callable[[Reply | Fault], Judgement]
    ) -> Judgement:
        """Make one request."""

        def sending() -> Request:
            self._journal.sending()
            return request

        judgement = await self._client.attempt(kind, sending, judge)
        if judgement.verdict in (Verdict.DONE, Verdict.ABSENT):
            self._client.outage.success()
        return judgement


def _alone(instance_id: str) -> Batch:
    """A batch of one instance, to judge a look-up of it."""
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
