"""Scripted faults: what the emulator does wrong, and for which request. Pure: chance is an argument.

A script is a JSON list of rules. A rule is one object: some keys select requests, the others say what happens to them.

    [{"request": 7, "status": 500, "when": "after"},
     {"every": 10, "method": "POST", "status": 429, "retry_after": 2},
     {"contains_id": "order-13", "times": 2, "reset": true},
     {"chance": 0.02, "latency_s": [0.1, 0.5]}]

Which requests (a rule applies where all of its selectors apply; without selectors, to every request):

    request: n             the n-th request, counted from 1
    every: n               each n-th request
    from: a, to: b         the requests a to b, both included
    after_s, until_s       requests while the emulator has run for at least, and for less than, this time in seconds
    method: "POST"         requests of that method; request, every, from and to then count only these
    contains_id: "x"       batches that send this id
    chance: p              each request with probability p
    times: n               at most n requests

How the request ends (a rule has at most one ending; of several rules with an ending, the first decides):

    status: s              an answer with this status. From 400 on, and with `code`, its body is the error envelope
                           (`success: false`)
      code, message        ... with this error
      html: true           ... with a page of HTML instead, as from the edge in front of the service
      body: "text"         ... with this text instead, which need not be JSON
      headers: {...}       ... with these headers
      retry_after: 30      ... with a Retry-After header; "date+30" becomes the HTTP date 30 s from now, and any
                           other text is sent unchanged
    reset: true            the connection is reset
    close: true            the connection is closed without an answer
    hang: true             no answer
    truncate: n            the service's own answer, cut after n bytes of its body
    raw: "text"            these characters on the connection, which is then closed
    twice: true            the service's own answer, twice

    when: "before"         the request is not executed (default for status, reset, close, hang and raw)
    when: "after"          the request is executed (default for truncate and twice)
    partial: k             the first k instances of the batch are created

What else happens, alone or with an ending, and added up over the rules:

    latency_s: t           the request takes t seconds, or [low, high]; with `when: "after"` it is executed first
    omit: ids              neither created nor named in the answer; `ids` is true for all ids, a number for the
                           first n, or a regular expression for those that match
    omit_created: ids      created, but not named
    lose: ids              named as created, but not created
    fail: ids              created, and end with an error
    foreign: n or [ids]    the answer also names n made-up ids, or these ids, which were not sent
    repeat: ids            the answer names these twice
    refuse_ids: "regex"    a batch with an id that matches is refused with 400
    revoke_token: true     from this request on, its token is refused
    disconnect: true       the connection is closed after the answer
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Literal

import msgspec
import orjson

from bulkwf.emulator import answers
from bulkwf.emulator.answers import Answer, refusal
from bulkwf.emulator.state import Tampering

Which = bool | int | str
Draw = Callable[[], float]
Manner = Literal["reply", "reset", "close", "hang", "truncate", "raw", "twice"]
_ENDINGS: tuple[Manner, ...] = ("reset", "close", "hang", "truncate", "raw", "twice")
_OWN_ANSWER: frozenset[Manner] = frozenset({"truncate", "twice"})
_CODES = {
    400: answers.BODY_REFUSED,
    401: answers.NOT_AUTHENTICATED,
    403: answers.NOT_AUTHORIZED,
    404: answers.WORKFLOW_NOT_FOUND,
    429: answers.THROTTLED,
}
_PAGE = "<!DOCTYPE html>\n<html><head><title>Just a moment...</title></head><body>Ray ID: 0</body></html>\n"


class FaultScriptError(ValueError):
    """The script is invalid. The message names the rule and the reason."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One rule of a script. The module's docstring describes every key."""

    request: int | None = None
    every: int | None = None
    from_: int | None = msgspec.field(name="from", default=None)
    to: int | None = None
    after_s: float | None = None
    until_s: float | None = None
    method: Literal["GET", "POST"] | None = None
    contains_id: str | None = None
    chance: float | None = None
    times: int | None = None

    status: int | None = None
    code: int | None = None
    message: str = "a scripted fault"
    html: bool = False
    body: str | None = None
    headers: dict[str, str] = {}
    retry_after: int | str | None = None
    reset: bool = False
    close: bool = False
    hang: bool = False
    truncate: int | None = None
    raw: str | None = None
    twice: bool = False
    when: Literal["before", "after"] | None = None
    partial: int | None = None

    latency_s: float | tuple[float, float] = 0.0
    omit: Which = False
    omit_created: Which = False
    lose: Which = False
    fail: Which = False
    foreign: int | list[str] = 0
    repeat: Which = False
    refuse_ids: str | None = None
    revoke_token: bool = False
    disconnect: bool = False

    def manners(self) -> list[Manner]:
        """The endings that this rule names."""
        named: list[Manner] = ["reply"] if self.status is not None else []
        return named + [manner for manner in _ENDINGS if not _idle(getattr(self, manner))]


def _idle(value: object) -> bool:
    return value is None or value is False  # 0 and "" are values: `truncate: 0` cuts the whole body away


@dataclass(frozen=True, slots=True)
class Facts:
    """The properties of a request that decide which rules apply to it."""

    method: str
    number: int
    """Position of the request among all requests, from 1."""
    number_of_method: int
    """Position of the request among those of its method, from 1."""
    elapsed_s: float
    """How long the emulator has run, on the service's clock, in seconds."""
    wall_s: float
    """Unix time in seconds, for HTTP dates."""
    ids: Sequence[str] = ()
    """The ids that the request sends."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ends."""

    manner: Manner = "reply"
    reply: Answer | None = None
    """The script's answer; None if no answer or the service's own answer is sent."""
    at_byte: int = 0
    raw: bytes = b""
    creates: int | None = 0
    """Number of instances of the batch that are created nevertheless, the first ones; None for all."""

    @property
    def own_answer(self) -> bool:
        """Whether the service's own answer is sent."""
        return self.reply is None and self.manner in ("reply", *_OWN_ANSWER)

    @property
    def executes(self) -> bool:
        """Whether the request is executed, in whole or in part."""
        return self.own_answer or self.creates != 0


NO_ENDING = Ending(creates=None)
"""The service's own answer, unchanged."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Everything that the script does to one request. `rules`: the indexes of the rules that apply."""

    rules: tuple[int, ...] = ()
    ending: Ending = NO_ENDING
    latency_before_s: float = 0.0
    latency_after_s: float = 0.0
    tampering: Tampering = field(default_factory=Tampering)
    refused_id: str | None = None
    revokes_token: bool = False
    disconnects: bool = False


NO_FAULT = Fault()


def parse_script(script: str | bytes | Sequence[Rule | Mapping[str, object]]) -> tuple[Rule, ...]:
    """The rules of a script: JSON text, or a list of rules. Raises `FaultScriptError`."""
    if isinstance(script, str | bytes):
        try:
            script = orjson.loads(script)
        except orjson.JSONDecodeError as error:
            raise FaultScriptError(f"the fault script is not JSON: {error}") from None
    if not isinstance(script, list | tuple):
        raise FaultScriptError("the fault script is not a list of rules")
    return tuple(_rule(number, rule) for number, rule in enumerate(script, 1))


def _rule(number: int, given: object) -> Rule:
    try:
        rule = given if isinstance(given, Rule) else msgspec.convert(given, Rule)
    except msgspec.ValidationError as error:
        raise FaultScriptError(f"rule {number}: {error}") from None
    for problem in _problems(rule):
        raise FaultScriptError(f"rule {number}: {problem}")
    return rule


def _problems(rule: Rule) -> list[str]:
    """The errors in a rule, except wrong types of its keys."""
    manners = rule.manners()
    checks = {
        "it does nothing: no key says what happens to the request": manners or _has_effect(rule),
        f"a request ends in one way, not in {len(manners)}: {', '.join(manners)}": len(manners) < 2,
        "request, every, from, to and times count from 1": all(
            n is None or n >= 1 for n in (rule.request, rule.every, rule.from_, rule.to, rule.times)
        ),
        "chance is between 0 and 1": rule.chance is None or 0 <= rule.chance <= 1,
        "omit, omit_created, lose, fail, repeat and foreign are not negative": all(
            not isinstance(n, int) or n >= 0 for n in (*_choices(rule), rule.foreign)
        ),
        "status is between 200 and 599": rule.status is None or 200 <= rule.status <= 599,
        "truncate and partial are not negative": min(rule.truncate or 0, rule.partial or 0) >= 0,
        "latency_s is a time, or [low, high] with 0 <= low <= high": 0 <= min(_span(rule)) == _span(rule)[0],
        "code, message, html, body, headers and retry_after need a status": "reply" in manners
        or not (rule.code or rule.html or rule.body or rule.headers or rule.retry_after),
        "partial needs a way to end the request, and no `when`": rule.partial is None
        or (manners and rule.when is None),
        "`when` needs a way to end the request, or latency_s": rule.when is None or manners or rule.latency_s,
        "truncate and twice give the service's own answer: `when` is after, or left out": rule.when != "before"
        or not _OWN_ANSWER.intersection(manners),
    }
    patterns = [p for p in (*_choices(rule), rule.refuse_ids) if isinstance(p, str)]
    return [problem for problem, fine in checks.items() if not fine] + [
        f"{pattern!r} is not a regular expression" for pattern in patterns if not _compiles(pattern)
    ]


def _has_effect(rule: Rule) -> bool:
    other = rule.foreign or rule.refuse_ids or rule.revoke_token or rule.disconnect
    return bool(rule.latency_s or any(_choices(rule)) or other)


def _choices(rule: Rule) -> tuple[Which, ...]:
    """The values of the keys that select some of the ids sent."""
    return rule.omit, rule.omit_created, rule.lose, rule.fail, rule.repeat


def _span(rule: Rule) -> tuple[float, float]:
    return rule.latency_s if isinstance(rule.latency_s, tuple) else (rule.latency_s, rule.latency_s)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def decide(rules: Sequence[Rule], facts: Facts, fired: Sequence[int], draw: Draw) -> Fault:
    """Decide what happens to the request that `facts` describes.

    `fired`: how often each rule has applied so far. `draw`: returns a random number in [0, 1), for `chance` and
    `latency_s`; for `chance`, it is called only if the rule's other selectors match.
    """
    applying = [i for i, rule in enumerate(rules) if _applies(rule, facts, fired[i], draw)]
    if not applying:
        return NO_FAULT
    chosen = [rules[i] for i in applying]
    ending = next((_ending(rule, facts) for rule in chosen if rule.manners()), NO_ENDING)
    latencies = [(rule.when == "after", _latency(rule, draw)) for rule in chosen]
    return Fault(
        rules=tuple(applying),
        ending=ending,
        latency_before_s=sum(latency for after, latency in latencies if not after),
        latency_after_s=sum(latency for after, latency in latencies if after),
        tampering=_tampering(chosen, ending, facts.ids),
        refused_id=next((id_ for rule in chosen for id_ in _refused(rule, facts.ids)), None),
        revokes_token=any(rule.revoke_token for rule in chosen),
        disconnects=any(rule.disconnect for rule in chosen),
    )


def _applies(rule: Rule, facts: Facts, fired: int, draw: Draw) -> bool:
    n = facts.number if rule.method is None else facts.number_of_method
    return (
        rule.method in (None, facts.method)
        and rule.request in (None, n)
        and (rule.every is None or n % rule.every == 0)
        and (rule.from_ is None or n >= rule.from_)
        and (rule.to is None or n <= rule.to)
        and (rule.after_s is None or facts.elapsed_s >= rule.after_s)
        and (rule.until_s is None or facts.elapsed_s < rule.until_s)
        and (rule.contains_id is None or rule.contains_id in facts.ids)
        and (rule.refuse_ids is None or bool(_refused(rule, facts.ids)))
        and (rule.times is None or fired < rule.times)
        and (rule.chance is None or draw() < rule.chance)
    )


def _latency(rule: Rule, draw: Draw) -> float:
    lo, hi = _span(rule)
    return lo if lo == hi else lo + (hi - lo) * draw()


def _refused(rule: Rule, ids: Sequence[str]) -> list[str]:
    return [] if rule.refuse_ids is None else _pick(rule.refuse_ids, ids)


def _pick(which: Which, ids: Sequence[str]) -> list[str]:
    if isinstance(which, str):
        pattern = re.compile(which)
        return [id_ for id_ in ids if pattern.search(id_)]
    if which is True:
        return list(ids)
    return list(ids[:which])


def _tampering(rules: Sequence[Rule], ending: Ending, ids: Sequence[str]) -> Tampering:
    def picked(*choices: Which) -> frozenset[str]:
        return frozenset(id_ for which in choices for id_ in _pick(which, ids))

    withheld = picked(*(rule.omit for rule in rules))
    if ending.creates is not None:
        withheld = withheld.union(ids[ending.creates :])
    return Tampering(
        withheld=withheld,
        hidden=picked(*(rule.omit_created for rule in rules)),
        lost=picked(*(rule.lose for rule in rules)),
        failing=picked(*(rule.fail for rule in rules)),
        repeated=picked(*(rule.repeat for rule in rules)),
        also_named=tuple(id_ for rule in rules for id_ in _foreign(rule)),
    )


def _foreign(rule: Rule) -> list[str]:
    if isinstance(rule.foreign, list):
        return rule.foreign
    return [f"foreign-{n}" for n in range(1, rule.foreign + 1)]


def _ending(rule: Rule, facts: Facts) -> Ending:
    manner = rule.manners()[0]
    creates = rule.partial
    if creates is None and manner not in _OWN_ANSWER and rule.when != "after":
        creates = 0
    reply = _reply(rule, facts.wall_s) if manner == "reply" else None
    return Ending(manner, reply, rule.truncate or 0, (rule.raw or "").encode(), creates)


def _reply(rule: Rule, wall_s: float) -> Answer:
    status = rule.status or 0
    headers = dict(rule.headers)
    if rule.retry_after is not None:
        headers["Retry-After"] = _retry_after(rule.retry_after, wall_s)
    if rule.html:
        return Answer(status, _PAGE.encode(), {"Content-Type": "text/html; charset=UTF-8"} | headers)
    if rule.body is not None:
        return Answer(status, rule.body.encode(), headers)
    return refusal(status, rule.code or _CODES.get(status, answers.INTERNAL_ERROR), rule.message, headers)


def _retry_after(value: int | str, wall_s: float) -> str:
    match = re.fullmatch(r"date\+([0-9]+)", str(value))
    return formatdate(wall_s + int(match[1]), usegmt=True) if match else str(value)
