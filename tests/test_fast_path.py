"""The fast path: it may never say other than `judge`."""

import json
import tracemalloc

import pytest
from test_judge import ALL, BATCH, IDS, good, named, new_batch, reply

from bulkwf.attempt import Verdict
from bulkwf.service.fast_path import MOST_FRAMES, FastJudge
from bulkwf.service.judge import judge

OTHERS = new_batch(ids=["w", "x", "y", "z"])


def same_for(judging, *replies, batch=BATCH):
    judgements = [judging(batch, ALL, told) for told in replies]
    assert judgements == [judge(batch, ALL, told) for told in replies]
    return judgements


def test_an_answer_that_differs_from_a_known_one_only_in_its_ids_is_not_decoded(monkeypatch):
    judging = FastJudge()
    first = judging(BATCH, ALL, good(named(*IDS, version_id="v1")))
    monkeypatch.setattr("bulkwf.service.judge.decode_answer", lambda body: pytest.fail("decoded"))

    again = judging(OTHERS, ALL, good(named(*OTHERS.ids, version_id="v1")))

    assert (again.verdict, again.created, again.answer) == (Verdict.DONE, ALL, first.answer)


@pytest.mark.parametrize(
    "told",
    [
        named(*IDS, version_id="v2"),
        named("b", "a", "c", "d"),
        named(*IDS[:3]),
        named(*IDS, "e"),
        [*named(*IDS[:3]), {"id": "d", "status": "running"}],
    ],
)
def test_an_answer_that_differs_from_the_known_one_is_judged_as_without_it(told):
    judging = FastJudge()
    same_for(judging, good(named(*IDS)), good(told), good(named(*IDS)))
    same_for(judging, good(named(*OTHERS.ids)), good(told), batch=OTHERS)


@pytest.mark.parametrize("field", ['"name":"%s","id":"%s"', '"id":"%s","name":"%s"'])
def test_the_bytes_of_an_id_in_another_field_are_not_taken_for_it(field):
    def answer(names, ids):
        items = ",".join("{" + field % pair + "}" for pair in zip(names, ids, strict=True))
        return reply(200, b'{"success":true,"result":[%b]}' % items.encode())

    escaped = [f"\\u{ord(one):04x}" for one in IDS]
    judging = FastJudge()
    same_for(judging, answer(IDS, IDS), answer(IDS, escaped), answer(escaped, IDS))
    same_for(judging, answer(OTHERS.ids, IDS), answer(IDS, OTHERS.ids), answer(OTHERS.ids, escaped), batch=OTHERS)


def test_an_answer_with_bytes_that_are_no_utf_8_is_known_too():
    body = good(named(*IDS)).body.replace(b'"messages": []', b'"messages": "\xff"')

    judgements = same_for(FastJudge(), reply(200, body), reply(200, body))

    assert judgements[0].created == ALL


@pytest.mark.parametrize("odd", ["escaped", "far"])
def test_learning_an_answer_that_escapes_an_id_takes_little_memory(odd):
    ids = [f"id-{number}" for number in range(100)]
    items = json.dumps(named(*ids))
    items = (
        items.replace('"id-1"', '"\\u0069d-1"')
        if odd == "escaped"
        else items.replace("{", '{"x": "' + "x" * 10_000 + '",')
    )
    told, judging = reply(200, b'{"success":true,"result":%b}' % items.encode()), FastJudge()
    tracemalloc.start()
    try:
        judgement = judging(new_batch(ids), range(100), told)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert len(judgement.created) == 100
    assert peak < 10 * len(told.body)


def test_answers_that_are_never_alike_are_not_learnt_without_end(monkeypatch):
    learnt = []
    monkeypatch.setattr("bulkwf.service.fast_path._frame", lambda *given: learnt.append(given))
    judging = FastJudge()
    for number in range(MOST_FRAMES + 5):
        judging(BATCH, ALL, good(named(*IDS, version_id=f"v{number}")))

    assert len(learnt) == MOST_FRAMES
