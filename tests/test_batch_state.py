"""The state of one batch: each instance is in one place at all times, and the record holds all of it."""

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


def answered_otherwise(batch, position, answer):
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


def resumed(state):
    record = state.record()
    answer = None if record.answer is None else InstanceInfo(**orjson.loads(record.answer))
    return BatchState.resumed(state.batch, record.attempts, answer, record.exceptions)


ANSWERS = st.builds(
    InstanceInfo,
    st.sampled_from(["queued", "running", None]),
    st.sampled_from([None, "v1"]),
    st.sampled_from([None, "w"]),
)


@st.composite
def histories(draw):
    """A batch, and what each attempt settles of it."""
    batch = new_batch()
    pending = list(range(len(batch.ids)))
    steps = []
    for _ in range(draw(st.integers(0, 4))):
        in_doubt = draw(st.sets(st.sampled_from(pending))) if pending else set()
        part = draw(st.lists(st.sampled_from(pending), unique=True)) if pending else []
        kinds = [draw(st.sampled_from("cceror")) for _ in part]
        judgement = join(
            created([p for p, kind in zip(part, kinds, strict=True) if kind == "c"]),
            *(existence(batch, (p,)) for p, kind in zip(part, kinds, strict=True) if kind == "e"),
            *(
                rejection(batch, p, draw(st.none() | st.integers(0, 9)), draw(st.sampled_from(["", "why"])))
                for p, kind in zip(part, kinds, strict=True)
                if kind == "r"
            ),
            *(answered_otherwise(batch, p, draw(ANSWERS)) for p, kind in zip(part, kinds, strict=True) if kind == "o"),
            answer=draw(ANSWERS) if "c" in kinds else None,
        )
        pending = [p for p in pending if p not in part]
        steps.append((in_doubt, judgement))
    return batch, steps


@given(histories())
def test_each_instance_is_in_exactly_one_place_at_all_times(history):
    batch, steps = history
    state = BatchState(batch)
    everything = list(range(len(batch.ids)))
    for attempts, (in_doubt, judgement) in enumerate(steps, 1):
        state.attempts = attempts
        state.in_doubt.update(in_doubt)
        state.add(judgement)

        assert sorted([*state.pending, *state.created, *state.others]) == everything
        results = state.settled(judgement)
        assert [r.row for r in results] == [
            batch.first_row + batch.offsets[p] for p in [*judgement.created, *(p for p, _ in judgement.others)]
        ]
        assert all(r.attempts == attempts for r in results)
        record = state.record()
        assert record.created + record.existed + record.rejected + record.pending == len(everything)
        assert (record.invalid, record.complete) == (2, not state.pending)
        assert record.existed_in_doubt == sum(
            state.others[p].in_doubt for p in state.others if state.others[p].outcome == "existed"
        )


@given(histories())
def test_resumed_state_has_the_same_record_and_pending_rows_in_doubt(history):
    batch, steps = history
    state = BatchState(batch)
    for attempts, (in_doubt, judgement) in enumerate(steps, 1):
        state.attempts = attempts
        state.in_doubt.update(in_doubt)
        state.add(judgement)

    again = resumed(state)

    assert unordered(again.record()) == unordered(state.record())
    assert set(again.pending) == set(state.pending) == again.in_doubt
    assert sorted(again.created) == sorted(state.created)
    assert {p: (r.outcome, r.row, r.id, r.code, r.message, r.in_doubt, r.status) for p, r in again.others.items()} == {
        p: (r.outcome, r.row, r.id, r.code, r.message, r.in_doubt, r.status) for p, r in state.others.items()
    }


def test_new_state_has_everything_pending_and_nothing_in_doubt():
    state = BatchState(new_batch())

    record = state.record()

    assert (record.pending, record.complete, record.answer) == (13, False, None)
    assert (record.first_row, record.rows) == (FIRST_ROW, 16)
    assert state.in_doubt == set()


def test_batch_of_invalid_rows_alone_is_complete():
    record = BatchState(new_batch(offsets=[])).record()

    assert (record.complete, record.pending, record.invalid) == (True, 0, 2)


def test_batch_that_one_answer_settles_has_no_exceptions():
    state = BatchState(new_batch(refused=()))
    state.add(created(range(13), InstanceInfo("queued", "v", "w")))

    record = state.record()

    assert (record.created, record.complete, record.exceptions) == (13, True, None)
    assert orjson.loads(record.answer) == {"status": "queued", "version_id": "v", "workflow_id": "w"}


def test_instances_created_with_another_answer_keep_it():
    state = BatchState(new_batch())
    state.add(created([0, 1], InstanceInfo("queued", "v1")))
    state.add(created([2], InstanceInfo("queued", "v1")))
    later = created([3], InstanceInfo("queued", "v2"))
    state.add(later)

    assert (state.created, state.answer, list(state.others)) == ([0, 1, 2], InstanceInfo("queued", "v1"), [3])
    assert state.record().created == 4
    assert state.settled(later)[0].version_id == "v2"
    assert resumed(state).others[3].version_id == "v2"


def test_only_existed_instances_in_doubt_are_marked_in_doubt():
    state = BatchState(new_batch())
    state.in_doubt.update({0, 2})
    state.add(join(existence(state.batch, (0, 1)), rejection(state.batch, 2, 5, "why")))

    assert [state.others[p].in_doubt for p in (0, 1, 2)] == [True, False, False]
    assert state.record().existed_in_doubt == 1


def test_record_names_exceptions_and_pending_rows_by_their_offset():
    state = BatchState(new_batch())
    state.add(join(created(range(10)), rejection(state.batch, 10, 5, "why"), answer=InstanceInfo("queued")))

    assert orjson.loads(state.record().exceptions) == {
        "3": {"outcome": "invalid", "id": "bad id", "code": "bad_id", "message": "the id"},
        "7": {"outcome": "invalid", "code": "not_json", "message": "no JSON"},
        str(OFFSETS[10]): {"outcome": "rejected", "code": 5, "message": "why"},
        str(OFFSETS[11]): {"outcome": "pending"},
        str(OFFSETS[12]): {"outcome": "pending"},
    }


def test_fingerprint_covers_the_lines_that_are_not_refused():
    state = BatchState(new_batch())
    kept = [line for n, line in enumerate(LINES) if n not in (3, 7)]
    assert state.fingerprint() == fingerprint_of(kept)

    state.add(rejection(state.batch, 0, 5, "why"))
    state.add(existence(state.batch, (1,)))

    kept.remove(LINES[OFFSETS[0]])
    assert state.fingerprint() == fingerprint_of(kept)
    assert (state.record().size, state.record().digest) == fingerprint_of(kept)


def fingerprint_of(lines):
    data = b"".join(line + b"\n" for line in lines)
    return len(data), crc32(data)
