"""What is known of one batch: which of its instances are settled, and how. Pure."""

from dataclasses import replace
from typing import NamedTuple

import orjson

from bulkwf.attempt import InstanceInfo, Judgement
from bulkwf.batching.lines import fingerprint
from bulkwf.model import Batch, Result
from bulkwf.service.verdicts import HANDLING

__all__ = ["BatchState", "Record"]


class Record(NamedTuple):
    """A ledger as the checkpoint keeps it; see `checkpoint.SCHEMA` for what the fields hold."""

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
    """The account of one batch. Every instance is in exactly one of `created`, `others` and `pending`."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.pending: frozenset[int] | set[int] = frozenset(range(len(batch.ids)))
        self.created: list[int] = []
        self.answer: InstanceInfo | None = None
        self.others: dict[int, Result] = {}
        self.attempts = 0
        self.in_doubt: set[int] = set()
        """The instances that an attempt may have created without our having been told."""
        self._fingerprint: tuple[int, tuple[int, int]] | None = None

    @classmethod
    def resumed(cls, batch: Batch, attempts: int, answer: InstanceInfo | None, exceptions: str | None) -> "BatchState":
        """The ledger of a batch that an earlier session left unsettled: all that is pending is in doubt."""
        ledger = cls(batch)
        ledger.attempts, ledger.answer = attempts, answer
        entries = orjson.loads(exceptions) if exceptions else {}
        default = "pending" if answer is None else "created"
        for position, offset in enumerate(batch.offsets):
            entry = entries.get(str(offset))
            if entry is None and default == "created":
                ledger.created.append(position)
            elif entry is None or entry["outcome"] == "pending":
                ledger.in_doubt.add(position)
            else:
                row, instance_id = batch.first_row + offset, batch.ids[position]
                ledger.others[position] = Result(row=row, id=instance_id, attempts=attempts, **entry)
        ledger.pending = set(ledger.in_doubt)
        return ledger

    def sent(self, judgement: Judgement) -> None:
        """Take in that the batch, or a part of it, was sent."""
        self.attempts += 1
        if HANDLING[judgement.verdict].in_doubt:
            self.in_doubt.update(judgement.unsettled)

    def add(self, outcome: Judgement) -> None:
        """Take in what an attempt has settled."""
        if outcome.created and len(outcome.created) == len(self.batch.ids):
            self.created, self.answer, self.pending = list(outcome.created), outcome.answer, frozenset()
            return
        pending = set(self.pending)
        if outcome.created and (self.answer is None or outcome.answer == self.answer):
            self.answer = outcome.answer
            self.created.extend(outcome.created)
        else:
            self.others.update((position, self._result(position, outcome.answer)) for position in outcome.created)
        for position, result in outcome.others:
            in_doubt = result.outcome == "existed" and position in self.in_doubt
            self.others[position] = replace(result, attempts=self.attempts, in_doubt=in_doubt)
        pending.difference_update(outcome.created, (position for position, _ in outcome.others))
        self.pending = pending

    def settled(self, outcome: Judgement) -> list[Result]:
        """The results that an outcome, already taken in, has added."""
        results = [self._result(position, outcome.answer) for position in outcome.created]
        return results + [self.others[position] for position, _ in outcome.others]

    def refused(self) -> frozenset[int]:
        """Offsets of the rows that are invalid or rejected."""
        if not self.batch.refused and not self.others:
            return frozenset()
        rejected = [result for result in self.others.values() if result.outcome == "rejected"]
        return frozenset(result.row - self.batch.first_row for result in (*self.batch.refused, *rejected))

    def fingerprint(self) -> tuple[int, int]:
        """Size and crc32 of the batch's lines, less those that are refused."""
        dropped = self.refused()
        if self._fingerprint is None or self._fingerprint[0] != len(dropped):
            self._fingerprint = len(dropped), fingerprint(self.batch.region, dropped)
        return self._fingerprint[1]

    def record(self) -> Record:
        """The whole account, for the checkpoint."""
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
        told = answer or InstanceInfo()
        return Result(
            row=self.batch.first_row + self.batch.offsets[position],
            id=self.batch.ids[position],
            outcome="created",
            status=told.status,
            attempts=self.attempts,
            version_id=told.version_id,
            workflow_id=told.workflow_id,
        )

    def _exceptions(self) -> str | None:
        """The rows that are not as `answer` has it: without an answer the others are pending, with one created."""
        first_row, offsets = self.batch.first_row, self.batch.offsets
        entries = {str(r.row - first_row): _entry(r) for r in (*self.batch.refused, *self.others.values())}
        if self.answer is not None:
            entries |= {str(offsets[position]): {"outcome": "pending"} for position in self.pending}
        return orjson.dumps(entries).decode() if entries else None


def _encode_answer(answer: InstanceInfo) -> str:
    told = {"status": answer.status, "version_id": answer.version_id, "workflow_id": answer.workflow_id}
    return orjson.dumps(told).decode()


def _entry(result: Result) -> dict[str, object]:
    """What of a result differs from its batch: the fields that hold something."""
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
