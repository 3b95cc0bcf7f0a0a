"""The service's rules, on an injected clock. Pure: it knows nothing of HTTP, sockets, files or the time of day.

Docstrings name the evidence for each rule. *Documented*: the service's own pages say so. *Measured*: the vendor's local
engine does so. *Believed*: public records agree on it. *Unknown; our choice*: there is no evidence.
"""

import math
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Literal

import msgspec
import orjson

from bulkwf.emulator import answers
from bulkwf.emulator.admission import Admission, Caller, Target
from bulkwf.emulator.answers import Answer, refusal, success
from bulkwf.emulator.batch import MAX_INSTANCES, BodyRefusedError, Item, read_batch
from bulkwf.emulator.instances import Instances, QueryRefusedError, read_query
from bulkwf.emulator.limits import Limits

_ALREADY_EXISTS = "workflows.api.error.instance.already_exists"
_NOT_FOUND = "workflows.api.error.instance.not_found"


class _Deletion(msgspec.Struct):
    instances: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_INSTANCES)]


@dataclass(frozen=True, slots=True)
class Reading:
    """The content of a body: its instances or the answer that refuses it, and the number of instances attempted."""

    items: Sequence[Item]
    attempted: int
    refusal: Answer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tampering:
    """How a scripted fault changes one creation. All ids are the request's, except those in `also_named`.

    An id is *named* if the answer lists it as created.
    """

    withheld: frozenset[str] = frozenset()
    """Neither created nor named."""
    hidden: frozenset[str] = frozenset()
    """Created, but not named."""
    lost: frozenset[str] = frozenset()
    """Named, but not created."""
    failing: frozenset[str] = frozenset()
    """Created; they end with an error."""
    repeated: frozenset[str] = frozenset()
    """Named twice, if they are named at all."""
    also_named: tuple[str, ...] = ()
    """Named, as if created, after the others."""


@dataclass(frozen=True, slots=True)
class Creation:
    """The answer to one batch, and the instances that were created, in the request's order."""

    answer: Answer
    created: Sequence[Item] = ()


class Service:
    """One Cloudflare Workflows service.

    `workflows`, `account`, `tokens`: those that exist; None if all do.
    `existing`: what happens to an id that is taken. "skip": it is skipped and left out of the result, as documented.
    "refuse": the whole batch is refused, as earlier documentation said. "duplicate": it is created twice. No service
    should do that; tests use it to check that duplicates are found.
    `result_shape`: "array", or the newer "object", `{created, errors}`, which only the binding is known to return.
    `queued_s`: time that an instance is queued before it is complete. It only affects the queue, statuses and times.
    `epoch`: Unix time at which the clock was 0, for the dates in answers.
    """

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float],
        *,
        workflows: Iterable[str] | None = None,
        account: str | None = None,
        tokens: Iterable[str] | None = None,
        existing: Literal["skip", "refuse", "duplicate"] = "skip",
        result_shape: Literal["array", "object"] = "array",
        queued_s: float = math.inf,
        epoch: float = 0.0,
    ) -> None:
        self.limits = limits
        self.clock = clock
        self.admission = Admission(limits, workflows=workflows, account=account, tokens=tokens)
        self.existing = existing
        self.result_shape = result_shape
        self.queued_s = queued_s
        self.epoch = epoch

        self.created = 0
        """Number of instances created. An id counts each time it is created."""

        self._ids_given = 0
        self._workflows: dict[Target, Instances] = {}

    # ── For tests ──

    def ids(self, target: Target) -> list[str]:
        """The ids that are taken now, in the order of their first creation."""
        return self._workflow(target).ids(self.clock())

    def holds(self, target: Target, id_: str) -> bool:
        """Whether `id_` is taken now."""
        return self._workflow(target).taken(id_, self.clock())

    @property
    def requests(self) -> int:
        """Number of requests, refused ones included."""
        return self.admission.requests

    @property
    def gets(self) -> int:
        """Number of GET requests."""
        return self.admission.gets

    @property
    def worst_window(self) -> int:
        """Maximum number of instances attempted in any second for one workflow, refused ones included."""
        return self.admission.worst_window

    @property
    def overruns(self) -> Counter[str]:
        """Number of 429 answers by limit: instances, account, requests, queue."""
        return self.admission.overruns

    # ── Admission ──

    def admit(self, caller: Caller, target: Target, instances: int = 0, *, asks: bool = False) -> Answer | None:
        """Count a request that arrives now; return the answer that refuses it, or None."""
        return self.admission.admit(caller, target, self.clock(), instances=instances, asks=asks)

    def rate_headers(self, caller: Caller) -> dict[str, str]:
        """The rate limit headers of answers to `caller`."""
        return self.admission.rate_headers(caller, self.clock())

    def revoke(self, caller: Caller) -> None:
        """Refuse the token of `caller` from now on."""
        self.admission.revoke(caller)

    # ── Creation ──

    def read(self, body: bytes) -> Reading:
        """Read the body of a batch-create request. Believed: an invalid batch is answered by a 400 with code 10002."""
        if len(body) > self.limits.max_body_bytes:
            return Reading((), 0, refusal(413, answers.BODY_REFUSED, "Request Entity Too Large"))
        try:
            items = read_batch(body, self._new_id, self.limits.max_params_bytes)
        except BodyRefusedError as error:
            message = f"workflows.api.error.body: {error}"
            return Reading((), error.instances, refusal(400, answers.BODY_REFUSED, message))
        return Reading(items, len(items))

    def create(self, target: Target, items: Sequence[Item], tampering: Tampering | None = None) -> Creation:
        """Create an instance for each item whose id is free, all at this moment.

        Documented: an id that is taken is skipped, and left out of the result without an error. Measured: if a batch
        has an id twice, only the first item is used; the result has the request's order.
        """
        changes = tampering or Tampering()
        now = self.clock()
        workflow = self._workflow(target)
        if self.existing == "refuse" and any(workflow.taken(item.id, now) for item in items):
            return Creation(refusal(400, answers.ALREADY_EXISTS, _ALREADY_EXISTS))
        chosen, errors = self._choose(workflow, items, changes.withheld, now)
        room = self._room(workflow, now)
        if room is not None and room < len(chosen):
            if self.limits.when_full == "refuse":
                message = "workflows.api.error.queue_full"
                return Creation(self.admission.throttled("queue", answers.CREATING_TOO_FAST, message, 1.0))
            del chosen[room:]
        named = [item.id for item in chosen if item.id not in changes.hidden]
        named.extend([id_ for id_ in named if id_ in changes.repeated])
        named.extend(changes.also_named)
        created = [item for item in chosen if item.id not in changes.lost]
        if created:
            workflow.begin(created, now, self.limits.retention_s, changes.failing)
            self.created += len(created)
        return Creation(self._created_answer(workflow, named, errors), created)

    def read_one(self, body: bytes) -> Reading:
        """Read the body of a request for one instance: one item of a batch, without the array around it."""
        reading = self.read(b"[" + body + b"]")
        if len(reading.items) > 1:
            return Reading(
                (), 0, refusal(400, answers.BODY_REFUSED, "workflows.api.error.body: more than one instance")
            )
        return reading

    def create_one(self, target: Target, items: Sequence[Item], tampering: Tampering | None = None) -> Creation:
        """Create one instance. Believed: an id that is taken is answered by a 400 with code 10405."""
        if self.existing == "skip" and self.holds(target, items[0].id):
            return Creation(refusal(400, answers.ALREADY_EXISTS, _ALREADY_EXISTS))
        creation = self.create(target, items, tampering)
        result = creation.answer.json()["result"]
        named = result["created"] if isinstance(result, dict) else result
        if creation.answer.status != HTTPStatus.OK or not named:
            failed = refusal(500, answers.INTERNAL_ERROR, "workflows.api.error.internal_server")
            return Creation(creation.answer if result is None else failed, creation.created)
        return Creation(success(orjson.dumps(named[0]).decode()), creation.created)

    def _choose(
        self, workflow: Instances, items: Sequence[Item], withheld: frozenset[str], now: float
    ) -> tuple[list[Item], list[tuple[int, str, int]]]:
        """The items to create, and (index, id, code) of each other item that is not withheld."""
        chosen: list[Item] = []
        errors: list[tuple[int, str, int]] = []
        skip_taken = self.existing != "duplicate"
        met: set[str] = set()
        for index, item in enumerate(items):
            id_ = item.id
            if id_ in met:
                errors.append((index, id_, answers.DUPLICATE_IN_BATCH))
                continue
            met.add(id_)
            if id_ in withheld:
                continue
            if skip_taken and workflow.taken(id_, now):
                errors.append((index, id_, answers.ALREADY_EXISTS))
            else:
                chosen.append(item)
        return chosen, errors

    def _room(self, workflow: Instances, now: float) -> int | None:
        """Number of instances that the queue can still take; None if there is no limit."""
        most = self.limits.max_queued
        return None if most is None else max(0, most - workflow.queue.count(now))

    def _created_answer(
        self, workflow: Instances, named: Sequence[str], errors: Sequence[tuple[int, str, int]]
    ) -> Answer:
        created = workflow.fragment(named)
        if self.result_shape == "array":
            return success(created)
        reasons = {answers.ALREADY_EXISTS: "already_exists", answers.DUPLICATE_IN_BATCH: "duplicate_in_batch"}
        listed = [
            {"index": i, "id": id_, "code": code, "message": f"instance.{reasons[code]}"} for i, id_, code in errors
        ]
        return success(f'{{"created":{created},"errors":{orjson.dumps(listed).decode()}}}')

    # ── Reading ──

    def get_instance(self, target: Target, id_: str, *, simple: bool = False) -> Answer:
        """One instance, without its steps if `simple`. The emulator runs nothing, and keeps no params."""
        now = self.clock()
        workflow = self._workflow(target)
        if not workflow.taken(id_, now):
            return _no_instance()
        instance = workflow.describe(id_, now)
        if not simple:
            instance["steps"] = []
        return success(orjson.dumps(instance).decode())

    def list_instances(self, target: Target, query: Mapping[str, str]) -> Answer:
        """A page of the instances; see `instances.read_query` for the query."""
        try:
            listed, info = self._workflow(target).page(read_query(query), self.clock())
        except QueryRefusedError as error:
            return refusal(400, answers.BODY_REFUSED, str(error))
        return success(orjson.dumps(listed).decode(), orjson.dumps(info).decode())

    def workflow_counts(self, target: Target) -> Answer:
        """The workflow, with the number of its instances by status."""
        described = self._workflow(target).description(target.workflow, self.clock())
        return success(orjson.dumps(described).decode())

    # ── Removal ──

    def delete_instance(self, target: Target, id_: str) -> Answer:
        """Delete one instance. Measured: the content of the answer."""
        if not self._workflow(target).forget(id_, self.clock()):
            return _no_instance()
        return success('{"success":true}')

    def delete_batch(self, target: Target, body: bytes) -> Answer:
        """Delete several instances. Measured: the answer lists each id as deleted or not found."""
        try:
            ids = msgspec.json.decode(body, type=_Deletion).instances
        except (msgspec.DecodeError, RecursionError) as error:
            return refusal(400, answers.BODY_REFUSED, f"workflows.api.error.body: {error}")
        workflow, now = self._workflow(target), self.clock()
        gone = {id_ for id_ in ids if workflow.forget(id_, now)}
        missing = {"code": answers.INSTANCE_NOT_FOUND, "message": _NOT_FOUND}
        result = {
            "deleted": [{"id": id_} for id_ in ids if id_ in gone],
            "errors": [{"id": id_, **missing} for id_ in ids if id_ not in gone],
        }
        return success(orjson.dumps(result).decode())

    # ── Parts ──

    def _new_id(self) -> str:
        """A new id for an instance without one, as documented. Our choice: it looks like a UUID and counts up."""
        self._ids_given += 1
        return f"00000000-0000-4000-8000-{self._ids_given:012x}"

    def _workflow(self, target: Target) -> Instances:
        if target not in self._workflows:
            names = [f"{target.account}/{target.workflow}/{kind}" for kind in ("workflow", "version")]
            workflow_id, version_id = (str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in names)
            self._workflows[target] = Instances(workflow_id, version_id, self.queued_s, self.epoch)
        return self._workflows[target]


def _no_instance() -> Answer:
    return refusal(404, answers.INSTANCE_NOT_FOUND, _NOT_FOUND)
