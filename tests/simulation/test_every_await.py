"""A run of three batches, ended at each turn of its loop in turn, and resumed until it is complete."""

from dataclasses import replace

import pytest
from torture import scaled

from bulkwf.options import BatchLimits, Options, RateLimits
from simulation.plan import Row, draw_plan
from simulation.play import play_plan

pytestmark = pytest.mark.slow

TROUBLE = (
    {"method": "POST", "request": 1, "status": 503, "when": "after"},
    {"method": "POST", "request": 3, "reset": True, "partial": 2},
    {"method": "POST", "request": 4, "status": 429, "retry_after": 2},
    {"refuse_ids": "^poison-"},
)
"""An answer lost after its execution, a batch created in part, a pause, and a row that is found by halving."""


ROWS = [Row("plain", b'{"params":{"row":%d}}' % n, params=b'{"row":%d}' % n) for n in range(8)]
ROWS.insert(5, Row("poison", b'{"instance_id":"poison-5","params":{"row":5}}', "poison-5", b'{"row":5}'))
PLAN = replace(
    draw_plan(0),
    rows=tuple(ROWS),
    options=Options(
        batch=BatchLimits(instances=3),
        rate=RateLimits(instances_per_s=100, requests_per_5m=100, concurrency=2),
        max_rejects=10,
    ),
    script=TROUBLE,
    stale=0.0,
    refused_connections=0.0,
    healthy_from=1e6,
    travel_s=(0.001, 0.015),
    commit_s=0.004,
    ends=(),
    downtimes_s=(0.2,),
    tokens=1,
)


@pytest.mark.parametrize("end", ["crash", "cancel", "cancel all", "drain", "abort"])
def test_a_run_ended_at_any_turn_resumes_until_it_is_complete(end):
    turn, sessions = 0, 2
    while sessions > 1:
        turn += 1
        sessions = len(play_plan(replace(PLAN, ends=((end, turn),))).sessions)
    assert turn > 60, f"the run ended after {turn} turns"


@pytest.mark.parametrize("first", scaled((31,), range(1, 80, 6)))
def test_a_run_that_crashes_twice_resumes_until_it_is_complete(first):
    for second in range(1, 80, 6):
        play_plan(replace(PLAN, ends=(("crash", first), ("crash", second))))
