"""The state of one batch: which of its instances are settled, and how. Pure."""

from dataclasses import replace
from typing import NamedTuple

import orjson

from bulkwf.attempt import InstanceInfo, Judgement
from bulkwf.batching.lines import fingerprint
from bulkwf.model import Batch, Result
from bulkwf.service.verdicts import HANDLING

__all__ = ["BatchState", "Record"]


class Record(NamedTuple):
    """A `BatchState` as the checkpoint stores it; see `checkpoint.SCHEMA` for what the fields hold."""

    first_row: int
    rows: int
    complete: bool
    attempts: int
    created: int
    existed: int
    existed_in_doubt: int
    rejected: int
    invalid: int
    pending: int
    answer: str | None
    exceptions: str | None
    size: int
    digest: int


class BatchState:
    """Which instances of a batch are settled, and how. Instances are named by their position in `Batch.ids`.

    Every instance is in exactly one of `created`, `others` and `pending`.

    Attributes:
        batch: The batch.
        pending: The instances that are not settled.
        created: The created instances that `answer` describes.
        answer: What the service said about each of `created`; None if there are none.
        others: The results of all other settled instances, by position.
        attempts: Number of create requests that have held instances of the batch.
        in_doubt: The instances that an attempt may have created though no answer said so.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.pending: frozenset[int] | set[int] = frozenset(range(len(batch.ids)))
        self.created: list[int] = []
        self.answer: InstanceInfo | None = None
        self.others: dict[int, Result] = {}
        self.attempts = 0
        self.in_doubt: set[int] = set()
        self._fingerprint: tuple[int, tuple[int, int]] | None = None

    @classmethod
    def resumed(cls, batch: Batch, attempts: int, answer: InstanceInfo | None, exceptions: str | None) -> "BatchState":
        """The state of a batch of an earlier session, from fields of its `Record`. Pending instances are in doubt."""
        state = cls(batch)
        state.attempts, state.answer = attempts, answer
        entries = orjson.loads(exceptions) if exceptions else {}
        default = "pending" if answer is None else "created"
        for position, offset in enumerate(batch.offsets):
            entry = entries.get(str(offset))
            if entry is None and default == "created":
                state.created.append(position)
            elif entry is None or entry["outcome"] == "pending":
                state.in_doubt.add(position)
            else:
                row, instance_id = batch.first_row + offset, batch.ids[position]
                state.others[position] = Result(row=row, id=instance_id, attempts=attempts, **entry)
        state.pending = set(state.in_doubt)
        return state

    def sent(self, judgement: Judgement) -> None:
        """Note that the batch, or a part of it, was sent."""
        self.attempts += 1
        if HANDLING[judgement.verdict].in_doubt:
            self.in_doubt.update(judgement.unsettled)

    def add(self, judgement: Judgement) -> None:
        """Add what a judgement settles."""
        if judgement.created and len(judgement.created) == len(self.batch.ids):
            self.created, self.answer, self.pending = list(judgement.created), judgement.answer, frozenset()
            return
        pending = set(self.pending)
        if judgement.created and (self.answer is None or judgement.answer == self.answer):
            self.answer = judgement.answer
            self.created.extend(judgement.created)
        else:
            self.others.update((position, self._result(position, judgement.answer)) for position in judgement.created)
        for position, result in judgement.others:
            in_doubt = result.outcome == "existed" and position in self.in_doubt
            self.others[position] = replace(result, attempts=self.attempts, in_doubt=in_doubt)
        pending.difference_update(judgement.created, (position for position, _ in judgement.others))
        self.pending = pending

    def settled(self, judgement: Judgement) -> list[Result]:
        """The results that *judgement* has settled. Call `add(judgement)` first."""
        results = [self._result(position, judgement.answer) for position in judgement.created]
        return results + [self.others[position] for position, _ in judgement.others]

    def refused(self) -> frozenset[int]:
        """Offsets of the rows that are invalid or rejected."""
        if not self.batch.refused and not self.others:
            return frozenset()
        rejected = [result for result in self.others.values() if result.outcome == "rejected"]
        return frozenset(result.row - self.batch.first_row for result in (*self.batch.refused, *rejected))

    def fingerprint(self) -> tuple[int, int]:
        """Size in bytes and crc32 of the batch's lines, without those of refused rows."""
        dropped = self.refused()
        if self._fingerprint is None or self._fingerprint[0] != len(dropped):
            self._fingerprint = len(dropped), fingerprint(self.batch.region, dropped)
        return self._fingerprint[1]

    def record(self) -> Record:
        """The state as the checkpoint stores it."""
        batch, others = self.batch, [result.outcome for result in self.others.values()]
        size, digest = self.fingerprint()
        return Record(
            first_row=batch.first_row,
            rows=batch.rows,
            complete=not self.pending,
            attempts=self.attempts,
            created=len(self.created) + others.count("created"),
            existed=others.count("existed"),
            existed_in_doubt=sum(result.in_doubt for result in self.others.values()),
            rejected=others.count("rejected"),
            invalid=len(batch.refused),
            pending=len(self.pending),
            answer=None if self.answer is None else _encode_answer(self.answer),
            exceptions=self._exceptions(),
            size=size,
            digest=digest,
        )

    def _result(self, position: int, answer: InstanceInfo | None) -> Result:
        info = answer or InstanceInfo()
        return Result(
            row=self.batch.first_row + self.batch.offsets[position],
            id=self.batch.ids[position],
            outcome="created",
            status=info.status,
            attempts=self.attempts,
            version_id=info.version_id,
            workflow_id=info.workflow_id,
        )

    def _exceptions(self) -> str | None:
        """The rows that `answer` does not describe, as JSON. The others are created, or pending without an answer."""
        first_row, offsets = self.batch.first_row, self.batch.offsets
        entries = {str(r.row - first_row): _entry(r) for r in (*self.batch.refused, *self.others.values())}
        if self.answer is not None:
            entries |= {str(offsets[position]): {"outcome": "pending"} for position in self.pending}
        return orjson.dumps(entries).decode() if entries else None


def _encode_answer(answer: InstanceInfo) -> str:
    fields = {"status": answer.status, "version_id": answer.version_id, "workflow_id": answer.workflow_id}
    return orjson.dumps(fields).decode()


def _entry(result: Result) -> dict[str, object]:
    """The fields of a result that are not empty and can't be derived from its batch."""
    values = {
        "outcome": result.outcome,
        "id": result.id if result.outcome == "invalid" else None,
        "status": result.status,
        "code": result.code,
        "message": result.message,
        "in_doubt": result.in_doubt or None,
        "version_id": result.version_id,
        "workflow_id": result.workflow_id,
    }
    return {name: value for name, value in values.items() if value is not None}
