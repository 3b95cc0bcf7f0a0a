"""What a seed determines: the list, the limits, the faults, and how sessions end."""

import json
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

import canary

from bulkwf.emulator import Limits
from bulkwf.options import BatchLimits, Options, RateLimits, RetryPolicy

RowKind = Literal["own", "plain", "blank", "bad", "poison", "taken", "twin"]
End = Literal["crash", "cancel", "drain", "abort"]

POISON = "poison"
TAKEN = "taken"
REFUSAL_INSIDE = (
    '{"success":true,"errors":[],"messages":[],"result":'
    '{"created":[],"errors":[{"index":0,"code":10002,"message":"a scripted fault"}]}}'
)
"""An answer that refuses the first instance of a request without naming its id."""


@dataclass(frozen=True)
class Row:
    """One line of the list.

    `id`: None where the row has none. `twin_of`: the row whose id it repeats.
    """

    kind: RowKind
    line: bytes
    id: str | None = None
    params: bytes = b""
    twin_of: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that happens in one seed's world.

    `healthy_from`: when the faults end, in virtual seconds. `ends`: how each session ends, as (what, turn of the loop);
    later sessions end by themselves. `clock_steps_s`: how far the machine's clock is set forward before each further
    session; None is a reboot with the right time.
    """

    seed: int
    rows: tuple[Row, ...]
    options: Options
    limits: Limits
    queued_s: float
    script: tuple[dict[str, Any], ...]
    stale: float
    refused_connections: float
    healthy_from: float
    travel_s: tuple[float, float]
    commit_s: float
    ends: tuple[tuple[End, int], ...]
    downtimes_s: tuple[float, ...]
    tokens: int = 1
    lag_s: float = 0.0
    """How long look-ups do not find a new instance, in seconds."""
    handshakes: float = 0.0
    """Probability that a TLS handshake fails, while there are faults."""
    unanswered: str = "^$"
    """Pattern of the ids whose look-ups fail, while there are faults."""
    clock_steps_s: tuple[float | None, ...] = ()
    bad: str = f"^{POISON}-"
    """Pattern of the ids that are always refused."""
    refusals: Literal["named", "nameless", "misleading"] = "named"
    """Which row a refusal names: the bad one, none, or the first of the request."""
    bad_together: frozenset[int] = frozenset()
    """Rows that are refused only if they come in one request."""


def draw_plan(seed: int) -> Plan:
    """The plan of a seed."""
    chance = random.Random(seed)
    healthy_from = chance.choice((5.0, 60.0, 600.0, 4_000.0))
    options, limits = _limits(chance)
    script, stale, refused = _faults(chance, healthy_from)
    tokens = 1
    if chance.random() < 0.1:
        tokens = 3
        script += tuple({"request": chance.randint(1, 40), "revoke_token": True} for _ in range(2))
    plan = Plan(
        seed=seed,
        rows=_rows(chance, 2_000 if chance.random() < 0.02 else 400 if chance.random() < 0.3 else 60),
        options=options,
        limits=limits,
        queued_s=chance.choice((5.0, 300.0, 3_600.0)),
        script=script,
        stale=stale,
        refused_connections=refused,
        healthy_from=healthy_from,
        travel_s=chance.choice(((0.001, 0.002), (0.001, 0.015), (0.05, 0.4))),
        commit_s=chance.choice((0.0, 0.0005, 0.004, 0.3)),
        ends=_ends(chance),
        downtimes_s=tuple(chance.choice((0.0, 0.2, 3.0, 400.0)) for _ in range(12)),
        tokens=tokens,
    )
    # Drawn last, so that the draws before are the same as without these.
    plan = replace(
        plan,
        script=script + _odd_answers(chance, healthy_from, tokens),
        lag_s=chance.choice((0.0, 0.0, 0.0, 3.0, 9.0)),
        handshakes=chance.choice((0.0, 0.0, 0.0, 0.05, 0.5)),
        unanswered=chance.choice(("^$", "^$", "^$", "1$", "[02468]$")),
    )
    if chance.random() < 0.5:
        steps = tuple(chance.choice((0.0, 0.0, 30.0, 3_600.0, -3_600.0, None)) for _ in range(12))
        plan = replace(plan, clock_steps_s=steps)
    if limits.requests_per_5m is not None and chance.random() < 0.3:  # another tool uses the same token
        left = min(limits.requests_per_5m, chance.choice((2, 3)) * options.rate.concurrency + 1)
        crashes: tuple[tuple[End, int], ...] = tuple(("crash", chance.randint(10, 150)) for _ in range(4))
        plan = replace(plan, limits=replace(limits, requests_per_5m=left), ends=plan.ends + crashes)
    if chance.random() < 0.5:
        plan = replace(plan, **_bad_rows(chance, plan))
    # A search is not stored. Where another tool leaves a session fewer requests than a search takes, none would end.
    crowded = plan.limits.requests_per_5m != plan.options.rate.requests_per_5m
    if chance.random() < 0.3 and not crowded:
        plan = replace(plan, script=plan.script + _false_refusals(chance, plan))
    return plan


def _bad_rows(chance: random.Random, plan: Plan) -> dict[str, Any]:
    """Bad rows beside those that stand alone: groups, rows that are bad only together, refusals at random."""
    script, rows, bad = plan.script, plan.rows, plan.bad
    shared = {row.twin_of for row in rows}
    usual = [number for number, row in enumerate(rows) if row.kind in ("own", "plain") and number not in shared]
    if usual and chance.random() < 0.5:
        first = chance.randrange(len(usual))
        group = "|".join(map(str, usual[first : first + chance.choice((2, 10, 30))]))
        bad += f"|^id-({group})$|-({group})-[0-9a-f]{{8}}$"
    if chance.random() < 0.5:
        rule = {"method": "POST", "status": 400, "code": 10002, "chance": chance.choice((0.02, 0.3))}
        script += ({**rule, "until_s": plan.healthy_from},)
    together = frozenset(chance.sample(usual, 2)) if len(usual) > 1 and chance.random() < 0.5 else frozenset()
    refusals = chance.choice(("named", "nameless", "nameless", "misleading"))
    return {"script": script, "bad": bad, "refusals": refusals, "bad_together": together}


def _false_refusals(chance: random.Random, plan: Plan) -> tuple[dict[str, Any], ...]:
    """Refusals that are about no row, or that come after the service has acted."""
    possible: list[dict[str, Any]] = [
        {"status": 409, "code": 10001, "when": "after"},
        {"status": 413, "code": 10002},
        {"status": 413, "html": True},
        {"status": 200, "body": REFUSAL_INSIDE},
    ]
    if not plan.lag_s:  # else a look-up soon after such an answer does not show what was created
        possible += [
            {"status": 400, "code": 10002, "when": "after"},
            {"status": 200, "body": REFUSAL_INSIDE, "when": "after"},
        ]
    script = tuple(
        {"method": "POST", **rule, "chance": chance.choice((0.02, 0.2)), "until_s": plan.healthy_from}
        for rule in possible
        if chance.random() < 0.3
    )
    if chance.random() < 0.3:  # a service that refuses a batch for an id that is taken
        taken = [row.id for row in plan.rows if row.kind == TAKEN]
        script += tuple({"method": "POST", "contains_id": id_, "status": 409, "code": 10405} for id_ in taken)
    return script


def _odd_answers(chance: random.Random, until_s: float, tokens: int) -> tuple[dict[str, Any], ...]:
    """Answers that refuse the whole run, now and then: an edge that restarts, a route that is not there yet."""
    possible: tuple[dict[str, Any], ...] = (
        {"status": 401, "code": 10000},
        {"status": 403, "code": 9109},
        {"status": 404, "code": 10200},
        {"status": 302, "body": "", "headers": {"location": "https://elsewhere.example/"}},
        {"status": 405},
        {"status": 501},
        {"status": 403, "html": True},
        {"status": 200, "body": "<html>ok</html>"},
        {"status": 400, "body": "<html>bad request</html>"},
        {"status": 403, "code": 971},
    )
    return tuple(
        {**rule, "chance": chance.choice((0.01, 0.05, 0.2)), "until_s": until_s}
        for rule in possible
        if chance.random() < 0.1 and (tokens == 1 or rule["status"] not in (401, 403))  # each of these uses up a token
    )


def _rows(chance: random.Random, most: int) -> tuple[Row, ...]:
    usual = chance.choice(("own", "plain"))
    odd = chance.choice((0.0, 0.02, 0.2))
    rows: list[Row] = []
    for number in range(chance.randint(1, most)):
        kind: RowKind = usual
        if chance.random() < odd:
            kind = chance.choice(("own", "plain", "blank", "bad", "poison", "taken", "twin"))
        rows.append(_row(chance, kind, number, rows))
    return tuple(rows)


def _row(chance: random.Random, kind: RowKind, number: int, before: list[Row]) -> Row:
    if kind == "blank":
        return Row(kind, b"")
    if kind == "bad":
        return Row(kind, chance.choice((b"nonsense", b"[1]", b'{"instance_id":"a b"}', b'{"other":1}', b'{"params":}')))
    params = json.dumps({"row": number, "big": 10**30 + number, "secret": canary.PARAMS}).encode()
    if kind == "plain":
        return Row(kind, b'{"params":%b}' % params, params=params)
    twin_of, id_ = None, f"{kind if kind in (POISON, TAKEN) else 'id'}-{number}"
    if kind == "twin":
        others = [n for n, row in enumerate(before) if row.kind == "own"]
        if not others:
            return _row(chance, "own", number, before)
        twin_of = chance.choice(others)
        id_ = before[twin_of].id or ""
    return Row(kind, b'{"instance_id":"%b","params":%b}' % (id_.encode(), params), id_, params, twin_of)


def _limits(chance: random.Random) -> tuple[Options, Limits]:
    rate = chance.choice((None, 7, 20, 100))
    requests = chance.choice((None, None, 20, 100, 1_000))
    queue = chance.choice((None, None, None, 0, 30))
    options = Options(
        batch=BatchLimits(instances=chance.choice((1, 3, 10, 100)), bytes=chance.choice((1_024, 4_096, 1_048_576))),
        rate=RateLimits(instances_per_s=rate, requests_per_5m=requests, concurrency=chance.choice((1, 2, 5, 16))),
        retry=RetryPolicy(max_outage_s=chance.choice((20.0, 1_800.0, 7_200.0))),
        max_rejects=10_000,
    )
    limits = Limits(
        instances_per_s=rate,
        account_instances_per_s=None,
        requests_per_5m=requests,
        max_queued=queue,
        when_full=chance.choice(("omit", "refuse")),
    )
    return options, limits


def _faults(chance: random.Random, until_s: float) -> tuple[tuple[dict[str, Any], ...], float, float]:
    """The fault script of a world, the probability that copies come late, and that of refused connections."""
    possible: tuple[dict[str, Any], ...] = (
        {"status": 500, "when": "before"},
        {"status": 503, "when": "after"},
        {"status": 200, "code": 10001, "when": "after"},
        {"status": 502, "html": True, "partial": chance.randint(0, 5)},
        {"reset": True, "when": "before"},
        {"reset": True, "when": "after"},
        {"close": True, "partial": chance.randint(1, 9)},
        {"hang": True, "when": chance.choice(("before", "after"))},
        {"truncate": chance.randint(0, 200)},
        {"foreign": 1},
        {"repeat": 1},
        {"status": 429, "retry_after": chance.choice((0, 2, 30, 400))},
        {"status": 429, "retry_after": "date+20", "when": "after"},
        {"status": 429, "html": True},
        {"omit": chance.choice((True, 1, 2, 5))},
        {"omit_created": chance.choice((True, 1, 2, 5))},
        {"latency_s": [0.0, chance.choice((0.5, 5.0, 90.0))]},
        {"latency_s": [0.0, 30.0], "when": "after"},
    )
    script = tuple(
        {**rule, "chance": chance.choice((0.01, 0.05, 0.2, 0.6)), "until_s": until_s}
        for rule in possible
        if chance.random() < 0.25
    )
    stale = chance.choice((0.0, 0.0, 0.05, 0.3))
    return script, stale, chance.choice((0.0, 0.0, 0.05, 0.5))


def _ends(chance: random.Random) -> tuple[tuple[End, int], ...]:
    kinds: tuple[End, ...] = ("crash", "crash", "crash", "cancel", "drain", "abort")
    number = chance.choice((0, 1, 1, 2, 3, 8))
    return tuple((chance.choice(kinds), int(10 ** chance.uniform(0.0, 3.6)) + 1) for _ in range(number))
