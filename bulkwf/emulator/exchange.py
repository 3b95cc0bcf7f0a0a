"""Answers one request by the service's rules and the fault script. Pure: no socket, no waiting.

The server, and every test without a network, processes each request in these steps:

    arrival = exchange.arrive(call)            # the request has been read completely
    ... wait for arrival.delay_s ...
    outgoing = exchange.execute(arrival)
    ... wait for outgoing.delay_s, then send what outgoing describes ...
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bulkwf.emulator import answers
from bulkwf.emulator.admission import Caller, Target
from bulkwf.emulator.answers import Answer, refusal
from bulkwf.emulator.batch import Item
from bulkwf.emulator.faults import NO_FAULT, Draw, Facts, Fault, Manner, Rule, decide
from bulkwf.emulator.state import Creation, Reading, Service

_PATH = re.compile(
    r"/accounts/(?P<account>[^/]+)/workflows/(?P<workflow>[^/]+)"
    r"(?P<below>/instances(?:/batch/delete|/(?P<id>[^/]+))?)?"
)
_Kind = Literal["create", "create_one", "list", "get", "counts", "delete", "delete_batch"]
_POSTS: Mapping[str, _Kind] = {
    "/instances": "create_one",
    "/instances/batch": "create",
    "/instances/batch/delete": "delete_batch",
}
_OF_AN_INSTANCE: Mapping[str, _Kind] = {"GET": "get", "DELETE": "delete"}
_NO_BATCH = Reading((), 0)


@dataclass(frozen=True, slots=True)
class Call:
    """A request that has arrived. `path` is decoded; it does not include the base URL's path."""

    method: str
    path: str
    caller: Caller
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class _Route:
    """What a request asks for: its kind, the workflow, and the instance's id if there is one."""

    kind: _Kind
    target: Target
    id: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and all that was decided when it arrived."""

    number: int
    """Position of the request among all requests, from 1."""
    call: Call
    route: _Route | None
    reading: Reading
    fault: Fault
    refusal: Answer | None

    @property
    def delay_s(self) -> float:
        """Time until the request is executed, in seconds."""
        return self.fault.latency_before_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """What is sent on the connection, and what the service has done before."""

    manner: Manner
    """How the request ends. "reply": `answer` is sent. "truncate": the status and headers of `answer`, then `data`."""
    answer: Answer | None = None
    """The whole answer with all its headers; None if no answer is sent."""
    data: bytes = b""
    """For "truncate", the part of the answer's body that is sent; for "raw", the bytes that are sent."""
    delay_s: float = 0.0
    """Time from the execution of the request until the answer is sent, in seconds."""
    disconnects: bool = False
    """Whether the connection is closed afterwards."""
    own: Answer | None = None
    """The service's own answer, whether it is sent or not; None if the request was not executed."""
    created: Sequence[Item] = ()
    """The instances that the request has created."""


class Exchange:
    """A service behind a fault script.

    `draw`: returns a random number in [0, 1), for the script's chances. `wall`: Unix time in seconds, for HTTP dates.
    """

    def __init__(self, service: Service, rules: Sequence[Rule], *, draw: Draw, wall: Callable[[], float]) -> None:
        self.service = service
        self.fired = [0] * len(rules)
        """Number of requests to which each rule of the script has applied, in the order of the rules."""

        self._rules = rules
        self._draw = draw
        self._wall = wall
        self._started_at = service.clock()
        self._number = 0
        self._number_of_method: Counter[str] = Counter()

    def arrive(self, call: Call) -> Arrival:
        """Count a request for the limits and for the script, and decide what happens to the request."""
        route = _find_route(call.method, call.path)
        reading = _NO_BATCH
        if route is not None and route.kind == "create":
            reading = self.service.read(call.body)
        elif route is not None and route.kind == "create_one":
            reading = self.service.read_one(call.body)
        self._number += 1
        self._number_of_method[call.method] += 1
        fault = self._decide(call.method, reading) if self._rules else NO_FAULT
        if fault.revokes_token:
            self.service.revoke(call.caller)
        refused = None
        if route is not None:
            refused = self.service.admit(call.caller, route.target, reading.attempted, asks=call.method == "GET")
        return Arrival(self._number, call, route, reading, fault, refused or reading.refusal)

    def execute(self, arrival: Arrival) -> Outgoing:
        """Execute a request, unless the script prevents it, and return what is to be sent."""
        fault = arrival.fault
        if not fault.ending.executes:
            return _outgoing(fault)
        creation = self._perform(arrival)
        headers = {**self.service.rate_headers(arrival.call.caller), **creation.answer.headers}
        return _outgoing(fault, replace(creation.answer, headers=headers), creation.created)

    def _decide(self, method: str, reading: Reading) -> Fault:
        elapsed_s = self.service.clock() - self._started_at
        ids = [item.id for item in reading.items]
        facts = Facts(method, self._number, self._number_of_method[method], elapsed_s, self._wall(), ids)
        fault = decide(self._rules, facts, self.fired, self._draw)
        for rule in fault.rules:
            self.fired[rule] += 1
        return fault

    def _perform(self, arrival: Arrival) -> Creation:
        """The service's own answer, and what it has created."""
        service, route, call = self.service, arrival.route, arrival.call
        if route is None:
            return Creation(refusal(404, answers.NO_ROUTE, f"Could not route to {call.path}"))
        if arrival.refusal is not None:
            return Creation(arrival.refusal)
        match route.kind:
            case "create" | "create_one":
                return self._create(arrival, route)
            case "get":
                answer = service.get_instance(route.target, route.id, simple=call.query.get("simple") == "true")
            case "list":
                answer = service.list_instances(route.target, call.query)
            case "counts":
                answer = service.workflow_counts(route.target)
            case "delete":
                answer = service.delete_instance(route.target, route.id)
            case "delete_batch":
                answer = service.delete_batch(route.target, call.body)
        return Creation(answer)

    def _create(self, arrival: Arrival, route: _Route) -> Creation:
        fault = arrival.fault
        if fault.refused_id:
            message = f"workflows.api.error.body: instance {fault.refused_id!r} is refused"
            return Creation(refusal(400, answers.BODY_REFUSED, message))
        create = self.service.create if route.kind == "create" else self.service.create_one
        return create(route.target, arrival.reading.items, fault.tampering)


def _outgoing(fault: Fault, own: Answer | None = None, created: Sequence[Item] = ()) -> Outgoing:
    """What is to be sent: the service's own answer, changed or replaced by the script's ending."""
    ending = fault.ending
    manner, data, disconnects = ending.manner, ending.raw, fault.disconnects
    if manner == "truncate" and own is not None:
        data = own.body[: ending.at_byte]
        if len(data) == len(own.body):  # nothing is cut away
            manner, data, disconnects = "reply", b"", True
    return Outgoing(
        manner=manner,
        answer=own if ending.own_answer else ending.reply,
        data=data,
        delay_s=fault.latency_after_s,
        disconnects=disconnects,
        own=own,
        created=created,
    )


def _find_route(method: str, path: str) -> _Route | None:
    """The route of a request; None if there is none.

    Documented: the routes. Unknown; our choice: any other method or path is answered by a 404 with code 7003.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    target = Target(match["account"], match["workflow"])
    if method == "POST":
        kind = _POSTS.get(match["below"])
        return None if kind is None else _Route(kind, target)
    if match["id"]:
        kind = _OF_AN_INSTANCE.get(method)
        return None if kind is None else _Route(kind, target, match["id"])
    if method != "GET" or match["below"] not in (None, "/instances"):
        return None
    return _Route("list" if match["below"] else "counts", target)
