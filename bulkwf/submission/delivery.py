"""Delivers one batch: sends it until every instance in it is settled.

A delivery sends a part, judges the answer, and does what the verdict requires for the unsettled instances: send them
in smaller parts until each bad row is alone, or look up the ids that the answer omitted. `BatchRequests` makes the
requests, retries included.

Rules:

1. What has been settled is durable before anything else is done for the batch.
2. The same row is never on the wire twice at one time: a batch's parts go one after another.
3. Nothing is sent again once the service may have forgotten the ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from bulkwf.attempt import Judgement, Verdict
from bulkwf.batching.bad_rows import Search, named_row
from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.body import compose
from bulkwf.errors import ServiceRefused
from bulkwf.service.judge import ALREADY_EXISTS, existence
from bulkwf.service.verdicts import HANDLING, Action
from bulkwf.submission.batch_requests import ABSENCE_GAP_S, BatchRequests, RunContext

__all__ = ["BatchDelivery", "RunContext"]

LOOK_UP_AT_MOST = 2
"""Maximum number of omitted ids that are looked up one by one. If an answer omits more, they are sent once more. If all
are omitted again, one of them, chosen at random, is looked up, and its answer applies to all."""
ABSENCES = 3
"""Number of absences after which a row is rejected. An absence is a look-up that finds no such instance."""
UNANSWERED_ROUNDS = 3
"""Number of unanswered look-ups in a row after which the omitted rows of a batch stay pending."""
PROBE_FROM = 10
"""Minimum number of rows that a refused first batch must have to be probed before it is split."""


class BatchDelivery:
    """Delivers one batch.

    Args:
        run: What the deliveries of the run share.
        state: Which instances of the batch are settled.
        begun_at: When the batch's ids became durable, in Unix time: none of its instances is older.
    """

    def __init__(self, run: RunContext, state: BatchState, begun_at: float) -> None:
        self._run = run
        self._client = run.client
        self._state = state
        self._requests = BatchRequests(run, state, begun_at)
        self._too_large = 0
        """Size of the smallest body of several rows that was refused as too large in the present search, in bytes."""
        self._row_too_large = False
        """Whether a row that was sent alone was refused as too large in the present search."""
        self._created_before = run.journal.progress.counts.created
        """Number of instances that the run had created when an answer last omitted ids; before that, when the delivery
        began."""

    async def deliver(self) -> None:
        """Send what is pending until everything is settled, except instances whose look-ups are not answered.

        Raises:
            ServiceRefused: The service refuses the run as a whole.
            TemporaryStop: The service has been failing for too long.
            CheckpointError: The service may have forgotten the ids of rows that may have been sent.
            Draining: The run is draining.
        """
        batcher, pending = self._run.batcher, sorted(self._state.pending)
        while pending:
            part = batcher.next_part(pending)
            pending = pending[len(part) :]
            refusal = await self._settle(part)
            if refusal is None:
                batcher.created(len(part))
            else:
                await self._find_bad_rows(part, refusal)

    async def _settle(self, part: Sequence[int], *, fresh: bool = False) -> Judgement | None:
        """Send *part* until nothing of it is left to send; returns the refusal if the service refuses what is left."""
        state = self._state
        omitted: frozenset[int] = frozenset()
        attempts = 0
        while part:
            asked = len(part)
            judgement = await self._requests.create(part, fresh=fresh)
            part = judgement.unsettled
            action = HANDLING[judgement.verdict].action
            if judgement.refused and asked > 1:  # the others are not refused with them
                for position in judgement.refused:
                    await self._reject_if_again(position)
                part = [position for position in part if position not in judgement.refused]
                action = Action.CONFIRM
            if not part:
                break
            if action is Action.CONFIRM:
                # An attempt in doubt between two omissions may have created instances that the first one omitted.
                in_a_row = state.attempts == attempts + 1
                part = await self._confirm(part, again=in_a_row and omitted.issuperset(part))
                omitted, attempts = frozenset(part), state.attempts
                if self._requests.unanswered >= UNANSWERED_ROUNDS:
                    self._requests.leave_unknown(part)
                    part = ()
            elif action is Action.SPLIT:
                return judgement
        return None

    # --- refused requests -----------------------------------------------------------------------------------------

    async def _find_bad_rows(self, part: Sequence[int], refusal: Judgement) -> None:
        """Send a refused part in smaller ones, until each bad row is rejected and all others are created."""
        search = self._run.batcher.search(part)
        await self._take_refusal(search, part, refusal)
        if refusal.verdict is Verdict.BAD_REQUEST:
            await self._probe(search, refusal)
        while search.rows:
            await self._try(search, search.next_part())
        if self._too_large and not self._row_too_large:
            self._run.batcher.body_limit.too_large(self._too_large)
        self._too_large, self._row_too_large = 0, False

    async def _try(self, search: Search, part: Sequence[int]) -> None:
        """Try to settle *part*, and report the answer to *search*."""
        refusal = await self._settle(part)
        if refusal is not None:
            await self._take_refusal(search, part, refusal)
        elif search.suspects and len(part) == 1 and self._exists(part[0]):
            search.found(part[0])  # some services refuse a batch for a row that exists
        else:
            search.created(part)

    def _exists(self, position: int) -> bool:
        result = self._state.others.get(position)
        return result is not None and result.outcome == "existed"

    async def _take_refusal(self, search: Search, part: Sequence[int], refusal: Judgement) -> None:
        """Report to *search* which rows of *part* are refused. A row that was refused alone is sent once more."""
        batch, refused = self._state.batch, refusal.unsettled
        if len(refused) < len(part):  # earlier answers have settled the others
            search.created([position for position in part if position not in refused])
        if len(refused) == 1:
            self._row_too_large = self._row_too_large or refusal.verdict is Verdict.TOO_LARGE
            if await self._reject_if_again(refused[0]):
                search.found(refused[0])
            else:
                search.created(refused)
        elif refusal.verdict is Verdict.TOO_LARGE:
            size = len(compose(batch, refused))
            self._too_large = min(self._too_large or size, size)
            search.too_large(refused)
        else:
            search.refused(refused, named_row(refusal.message, refused, batch.ids))

    async def _reject_if_again(self, position: int) -> bool:
        """Send a refused row once more, alone and over a new connection. Settle it if it is refused again.

        A refusal names no id: a late copy of another row's refusal, read from an idle connection, looks the same. The
        same holds for the error that the instance exists. Before the row is rejected, its instance is looked up. If it
        exists, the row is `existed`, whatever the refusals say.

        Returns:
            Whether the row was refused again.
        """
        refusal = await self._settle((position,), fresh=True)
        if refusal is None:  # the first refusal may have been such a copy
            self._client.transport.drop_connections()
            return False
        if refusal.code == ALREADY_EXISTS:
            await self._requests.infer(existence(self._state.batch, (position,)))
            return True
        found = await self._requests.look_up_before_rejection(position)
        if found.verdict is Verdict.ABSENT:
            await self._requests.reject(position, refusal)
        elif found.verdict is Verdict.UNANSWERED:
            self._requests.leave_refused(position)
        return True

    async def _probe(self, search: Search, refusal: Judgement) -> None:
        """Send three rows of a refused first batch alone. If all are rejected with the same code, end the run."""
        run, part = self._run, refusal.unsettled
        async with run.probing:  # one batch at a time, or each open batch would have rows rejected
            counts = run.journal.progress.counts
            if len(part) < PROBE_FROM or counts.created or counts.existed or run.options.max_rejects is not None:
                return
            probes = (part[0], part[len(part) // 2], part[-1])
            for position in probes:
                await self._try(search, (position,))
        if all(self._is_refused(position, refusal.code) for position in probes):
            raise ServiceRefused(
                f"the service refuses the first rows alike: {refusal.message} (code {refusal.code}). {len(probes)} "
                "of them were tried alone; the others stay pending. --max-rejects continues all the same."
            )

    def _is_refused(self, position: int, code: int | None) -> bool:
        """Whether a row was refused alone with *code*; also if it stays pending, as its look-up was not answered."""
        result = self._state.others.get(position)
        if result is None:
            return position in self._state.pending
        return (result.outcome, result.code) == ("rejected", code)

    # --- ids that an answer omitted -------------------------------------------------------------------------------

    async def _confirm(self, omitted: Sequence[int], *, again: bool) -> Sequence[int]:
        """Look up ids that an answer omitted; returns those to send again. *again*: this is the second omission."""
        state = self._state
        if not self._run.options.confirm_existing:
            await self._requests.infer(existence(state.batch, omitted))
            return ()
        created = self._run.journal.progress.counts.created
        idle, self._created_before = created <= self._created_before, created
        if len(omitted) <= LOOK_UP_AT_MOST:
            return [position for position in omitted if await self._is_absent(position, idle=idle)]
        if not again:
            await self._requests.back_off(2)
            return omitted
        asked = omitted[int(self._client.random() * len(omitted)) % len(omitted)]
        if not await self._is_absent(asked, idle=idle) and state.others[asked].outcome == "existed":
            await self._requests.infer(existence(state.batch, [one for one in omitted if one != asked]))
        return [position for position in omitted if position in state.pending]

    async def _is_absent(self, position: int, *, idle: bool) -> bool:
        """Look up an omitted instance; True if it must be sent again. *idle*: see `_reject_if_absent`."""
        judgement = await self._requests.look_up(position)
        if judgement.verdict is Verdict.UNANSWERED:
            return True
        if judgement.verdict is not Verdict.ABSENT:
            return False
        if idle:  # nothing shows that the row is the cause: the queue may be full
            await self._client.pause(replace(judgement, message=self._omission(position)))
            if not (self._run.options.reject_omitted and self._is_last()):
                return True
        return not await self._reject_if_absent(position, judgement, idle=idle)

    async def _reject_if_absent(self, position: int, judgement: Judgement, *, idle: bool) -> bool:
        """Count an absence, and reject the row after `ABSENCES` of them; else wait before the row is sent again.

        Args:
            position: The row.
            judgement: The judgement of the look-up that found no instance.
            idle: Whether the run has created no instance since an answer last omitted ids.

        Returns:
            Whether the row is settled.
        """
        instance, now = self._requests.notes(position), self._client.clock()
        first = instance.absent_at == -inf
        if now - instance.absent_at >= ABSENCE_GAP_S:
            instance.absent_at = now
            instance.absences += 1
        if instance.absences >= ABSENCES:
            # The attempt that omitted the id may have created it, and the look-up may have been too early to see it.
            found = await self._requests.look_up_before_rejection(position)
            if found.verdict is Verdict.ABSENT:
                await self._requests.reject(position, replace(judgement, code=None, message=_OMISSION))
            return found.verdict is not Verdict.UNANSWERED
        if not idle:
            await (self._requests.back_off(1) if first else self._requests.wait(ABSENCE_GAP_S))
        return False

    def _omission(self, position: int) -> str:
        """The reason for a pause: the service creates nothing, and leaves the id at *position* out of each answer."""
        advice = ""
        if not self._run.options.reject_omitted and len(self._state.pending) <= LOOK_UP_AT_MOST:
            advice = "; if the row is one of the last two of the list and stays omitted, --reject-omitted gives it up"
        return (
            f"the service creates no instance any more, and leaves {self._requests.name(position)} out of its answers "
            f"without a reason. Its queue may be full{advice}"
        )

    def _is_last(self) -> bool:
        """Whether the batch holds the last one or two pending rows of a run that has created instances.

        Then no other row can show that the service still creates instances.
        """
        counts, pending = self._run.journal.progress.counts, len(self._state.pending)
        return bool(counts.created) and pending <= LOOK_UP_AT_MOST and counts.pending <= pending


_OMISSION = "the service omits the id from its answers and does not create the instance, without a reason"
