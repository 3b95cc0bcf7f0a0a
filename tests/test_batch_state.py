"""The account of one batch: each instance is in one place at all times, and the record holds all of it."""

from zlib import crc32

import orjson
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.attempt import InstanceInfo, Judgement, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.model import Batch, Result
from bulkwf.service.judge import existence, rejection

LINES = [b"row %d" % n for n in range(16)]
FIRST_ROW = 500
REFUSED = Result(row=FIRST_ROW + 3, id="bad id", outcome="invalid", code="bad_id", message="the id")
NAMELESS = Result(row=FIRST_ROW + 7, id=None, outcome="invalid", code="not_json", message="no JSON")
OFFSETS = [n for n in range(16) if n not in (0, 3, 7)]
"""Row 0 is blank, 3 and 7 are refused."""


def new_batch(refused=(REFUSED, NAMELESS), offsets=OFFSETS):
    return Batch(
        first_row=FIRST_ROW,
        rows=len(LINES),
        region=b"".join(line + b"\n" for line in LINES),
        ids=[f"id-{n}" for n in offsets],
        offsets=offsets,
        bare=False,
        row_shape="instance",
        refused=refused,
        retention_s=60.0,
    )


def created(positions, answer=InstanceInfo("queued")):  # noqa: B008 - frozen
    return Judgement(verdict=Verdict.DONE, created=positions, answer=answer)


def told_otherwise(batch, position, answer):
    result = Result(
        row=batch.first_row + batch.offsets[position],
        id=batch.ids[position],
        outcome="created",
        status=answer.status,
        version_id=answer.version_id,
        workflow_id=answer.workflow_id,
    )
    return Judgement(verdict=Verdict.DONE, others=((position, result),))


def join(*outcomes, **others):
    return Judgement(
        verdict=Verdict.DONE,
        created=[position for one in outcomes for position in one.created],
        others=tuple(other for one in outcomes for other in one.others),
        **others,
    )


def unordered(record):
    return record._replace(exceptions=orjson.loads(record.exceptions or "null"))


def resumed(ledger):
    record = ledger.record()
    answer = None if record.answer is None else InstanceInfo(**orjson.loads(record.answer))
    return BatchState.resumed(ledger.batch, record.attempts, answer, record.exceptions)


ANSWERS = st.builds(
    InstanceInfo,
    st.sampled_from(["queued", "running", None]),
    st.sampled_from([None, "v1"]),
    st.sampled_from([None, "w"]),
)


@st.composite
def histories(draw):
    """A batch, and what one attempt after another settles of it."""
    batch = new_batch()
    pending = list(range(len(batch.ids)))
    steps = []
    for _ in range(draw(st.integers(0, 4))):
        doubtful = draw(st.sets(st.sampled_from(pending))) if pending else set()
        part = draw(st.lists(st.sampled_from(pending), unique=True)) if pending else []
        kinds = [draw(st.sampled_from("cceror")) for _ in part]
        outcome = join(
            created([p for p, kind in zip(part, kinds, strict=True) if kind == "c"]),
            *(existence(batch, (p,)) for p, kind in zip(part, kinds, strict=True) if kind == "e"),
            *(
                rejection(batch, p, draw(st.none() | st.integers(0, 9)), draw(st.sampled_from(["", "why"])))
                for p, kind in zip(part, kinds, strict=True)
                if kind == "r"
            ),
            *(told_otherwise(batch, p, draw(ANSWERS)) for p, kind in zip(part, kinds, strict=True) if kind == "o"),
            answer=draw(ANSWERS) if "c" in kinds else None,
        )
        pending = [p for p in pending if p not in part]
        steps.append((doubtful, outcome))
    return batch, steps


@given(histories())
def test_each_instance_is_pending_created_or_otherwise_settled_at_all_times(history):
    batch, steps = history
    ledger = BatchState(batch)
    everything = list(range(len(batch.ids)))
    for attempts, (doubtful, outcome) in enumerate(steps, 1):
        ledger.attempts = attempts
        ledger.in_doubt.update(doubtful)
        ledger.add(outcome)

        assert sorted([*ledger.pending, *ledger.created, *ledger.others]) == everything
        results = ledger.settled(outcome)
        assert [r.row for r in results] == [
            batch.first_row + batch.offsets[p] for p in [*outcome.created, *(p for p, _ in outcome.others)]
        ]
        assert all(r.attempts == attempts for r in results)
        record = ledger.record()
        assert record.created + record.existed + record.rejected + record.pending == len(everything)
        assert (record.invalid, record.complete) == (2, not ledger.pending)
        assert record.existed_in_doubt == sum(
            ledger.others[p].in_doubt for p in ledger.others if ledger.others[p].outcome == "existed"
        )


@given(histories())
def test_a_ledger_resumed_from_its_record_has_the_same_record_and_doubts_all_that_is_pending(history):
    batch, steps = history
    ledger = BatchState(batch)
    for attempts, (doubtful, outcome) in enumerate(steps, 1):
        ledger.attempts = attempts
        ledger.in_doubt.update(doubtful)
        ledger.add(outcome)

    again = resumed(ledger)

    assert unordered(again.record()) == unordered(ledger.record())
    assert set(again.pending) == set(ledger.pending) == again.in_doubt
    assert sorted(again.created) == sorted(ledger.created)
    assert {p: (r.outcome, r.row, r.id, r.code, r.message, r.in_doubt, r.status) for p, r in again.others.items()} == {
        p: (r.outcome, r.row, r.id, r.code, r.message, r.in_doubt, r.status) for p, r in ledger.others.items()
    }


def test_a_fresh_ledger_has_everything_pending_and_nothing_in_doubt():
    ledger = BatchState(new_batch())

    record = ledger.record()

    assert (record.pending, record.complete, record.answer) == (13, False, None)
    assert (record.first_row, record.rows) == (FIRST_ROW, 16)
    assert ledger.in_doubt == set()


def test_a_batch_of_refused_rows_alone_is_complete_from_the_first():
    record = BatchState(new_batch(offsets=[])).record()

    assert (record.complete, record.pending, record.invalid) == (True, 0, 2)


def test_a_batch_that_one_answer_settles_needs_no_exceptions():
    ledger = BatchState(new_batch(refused=()))
    ledger.add(created(range(13), InstanceInfo("queued", "v", "w")))

    record = ledger.record()

    assert (record.created, record.complete, record.exceptions) == (13, True, None)
    assert orjson.loads(record.answer) == {"status": "queued", "version_id": "v", "workflow_id": "w"}


def test_instances_created_later_under_another_answer_keep_their_own():
    ledger = BatchState(new_batch())
    ledger.add(created([0, 1], InstanceInfo("queued", "v1")))
    ledger.add(created([2], InstanceInfo("queued", "v1")))
    later = created([3], InstanceInfo("queued", "v2"))
    ledger.add(later)

    assert (ledger.created, ledger.answer, list(ledger.others)) == ([0, 1, 2], InstanceInfo("queued", "v1"), [3])
    assert ledger.record().created == 4
    assert ledger.settled(later)[0].version_id == "v2"
    assert resumed(ledger).others[3].version_id == "v2"


def test_only_an_instance_that_may_have_been_created_before_is_existed_in_doubt():
    ledger = BatchState(new_batch())
    ledger.in_doubt.update({0, 2})
    ledger.add(join(existence(ledger.batch, (0, 1)), rejection(ledger.batch, 2, 5, "why")))

    assert [ledger.others[p].in_doubt for p in (0, 1, 2)] == [True, False, False]
    assert ledger.record().existed_in_doubt == 1


def test_the_record_names_what_differs_and_what_is_pending_by_its_place_in_the_batch():
    ledger = BatchState(new_batch())
    ledger.add(join(created(range(10)), rejection(ledger.batch, 10, 5, "why"), answer=InstanceInfo("queued")))

    assert orjson.loads(ledger.record().exceptions) == {
        "3": {"outcome": "invalid", "id": "bad id", "code": "bad_id", "message": "the id"},
        "7": {"outcome": "invalid", "code": "not_json", "message": "no JSON"},
        str(OFFSETS[10]): {"outcome": "rejected", "code": 5, "message": "why"},
        str(OFFSETS[11]): {"outcome": "pending"},
        str(OFFSETS[12]): {"outcome": "pending"},
    }


def test_the_fingerprint_is_that_of_the_lines_that_are_not_refused():
    ledger = BatchState(new_batch())
    kept = [line for n, line in enumerate(LINES) if n not in (3, 7)]
    assert ledger.fingerprint() == fingerprint_of(kept)

    ledger.add(rejection(ledger.batch, 0, 5, "why"))
    ledger.add(existence(ledger.batch, (1,)))

    kept.remove(LINES[OFFSETS[0]])
    assert ledger.fingerprint() == fingerprint_of(kept)
    assert (ledger.record().size, ledger.record().digest) == fingerprint_of(kept)


def fingerprint_of(lines):
    data = b"".join(line + b"\n" for line in lines)
    return len(data), crc32(data)
