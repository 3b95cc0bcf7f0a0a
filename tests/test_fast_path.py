"""The fast path: its judgement is always that of `judge`."""

import json
import tracemalloc

import pytest
from test_judge import ALL, BATCH, IDS, good, named, new_batch, reply

from bulkwf.attempt import Verdict
from bulkwf.service.fast_path import MAX_FRAMES, FastJudge
from bulkwf.service.judge import judge

OTHERS = new_batch(ids=["w", "x", "y", "z"])


def same_for(judging, *replies, batch=BATCH):
    judgements = [judging(batch, ALL, one) for one in replies]
    assert judgements == [judge(batch, ALL, one) for one in replies]
    return judgements


def test_answer_that_differs_from_the_frame_in_ids_alone_is_not_decoded(monkeypatch):
    judging = FastJudge()
    first = judging(BATCH, ALL, good(named(*IDS, version_id="v1")))
    monkeypatch.setattr("bulkwf.service.judge.decode_answer", lambda body: pytest.fail("decoded"))

    again = judging(OTHERS, ALL, good(named(*OTHERS.ids, version_id="v1")))

    assert (again.verdict, again.created, again.answer) == (Verdict.DONE, ALL, first.answer)


@pytest.mark.parametrize(
    "result",
    [
        named(*IDS, version_id="v2"),
        named("b", "a", "c", "d"),
        named(*IDS[:3]),
        named(*IDS, "e"),
        [*named(*IDS[:3]), {"id": "d", "status": "running"}],
    ],
)
def test_answer_that_differs_from_the_frame_is_judged_by_judge(result):
    judging = FastJudge()
    same_for(judging, good(named(*IDS)), good(result), good(named(*IDS)))
    same_for(judging, good(named(*OTHERS.ids)), good(result), batch=OTHERS)


@pytest.mark.parametrize("field", ['"name":"%s","id":"%s"', '"id":"%s","name":"%s"'])
def test_text_of_an_id_in_another_field_is_not_taken_for_the_id(field):
    def answer(names, ids):
        items = ",".join("{" + field % pair + "}" for pair in zip(names, ids, strict=True))
        return reply(200, b'{"success":true,"result":[%b]}' % items.encode())

    escaped = [f"\\u{ord(one):04x}" for one in IDS]
    judging = FastJudge()
    same_for(judging, answer(IDS, IDS), answer(IDS, escaped), answer(escaped, IDS))
    same_for(judging, answer(OTHERS.ids, IDS), answer(IDS, OTHERS.ids), answer(OTHERS.ids, escaped), batch=OTHERS)


def test_answer_that_is_not_utf_8_can_make_a_frame():
    body = good(named(*IDS)).body.replace(b'"messages": []', b'"messages": "\xff"')

    judgements = same_for(FastJudge(), reply(200, body), reply(200, body))

    assert judgements[0].created == ALL


@pytest.mark.parametrize("odd", ["escaped", "far"])
def test_making_a_frame_of_an_odd_answer_takes_little_memory(odd):
    ids = [f"id-{number}" for number in range(100)]
    items = json.dumps(named(*ids))
    items = (
        items.replace('"id-1"', '"\\u0069d-1"')
        if odd == "escaped"
        else items.replace("{", '{"x": "' + "x" * 10_000 + '",')
    )
    answer, judging = reply(200, b'{"success":true,"result":%b}' % items.encode()), FastJudge()
    tracemalloc.start()
    try:
        judgement = judging(new_batch(ids), range(100), answer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert len(judgement.created) == 100
    assert peak < 10 * len(answer.body)


def test_number_of_frames_is_bounded_when_no_two_answers_are_alike(monkeypatch):
    made = []
    monkeypatch.setattr("bulkwf.service.fast_path._frame", lambda *given: made.append(given))
    judging = FastJudge()
    for number in range(MAX_FRAMES + 5):
        judging(BATCH, ALL, good(named(*IDS, version_id=f"v{number}")))

    assert len(made) == MAX_FRAMES
