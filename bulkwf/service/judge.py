"""What a reply means for the instances that were sent or looked up: `judge`, `judge_lookup`, `judge_page`. Pure.

Three questions, in this order:

1. Was a complete answer read? If not, the transport has said whether the service may have acted.
2. Is it an answer to *this* request? Only the ids show it: an idle connection can deliver a late copy of an earlier
   answer.
3. What does it say about each id? Ids are matched by value, never by position, and an omitted id proves nothing. An
   answer settles only what it names by id as created or as existing: no row is rejected here.

*part* is always a sequence of positions in `Batch.ids`: the instances that one request carried.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard

from bulkwf.attempt import Fault, FaultKind, InstanceInfo, Judgement, Reply, Verdict
from bulkwf.model import Batch, Result, RowOutcome
from bulkwf.service.responses import (
    Answered,
    Envelope,
    Lookup,
    Page,
    Refused,
    ServiceError,
    decode_answer,
    decode_errors,
    decode_lookup,
    decode_page,
    retry_after_s,
)
from bulkwf.text import clean

__all__ = [
    "ALREADY_EXISTS",
    "INTERNAL_ERRORS",
    "existence",
    "judge",
    "judge_lookup",
    "judge_page",
    "rejection",
    "sent_ids",
]

ALREADY_EXISTS = 10405
WORKFLOW_NOT_FOUND = 10200
INTERNAL_ERRORS = frozenset({10001})
"""Error codes of a failure inside the service, whatever the HTTP status is."""
RATE_ERRORS = frozenset({971, 10429})
"""Error codes of an exceeded rate, whatever the HTTP status is."""
SERVICE_ERRORS = INTERNAL_ERRORS | RATE_ERRORS
"""Error codes that say nothing about the row that they are given for."""
AUTHENTICATION_ERRORS = frozenset({6003, *range(6100, 6200), 9106, 9109, 10000})
"""Error codes of a refused credential; some of them come with status 400."""
ROUTE_ERRORS = frozenset({WORKFLOW_NOT_FOUND, 7000, 7003})
"""Error codes of a 404 that is about the address, not about an instance."""
REFUSALS = frozenset({400, 409, 422})
"""HTTP statuses that refuse the content of the request."""

_BY_STATUS = {
    **dict.fromkeys((408, 425, 499), Verdict.IN_DOUBT),
    **dict.fromkeys(REFUSALS, Verdict.BAD_REQUEST),
    **dict.fromkeys((525, 526), Verdict.ORIGIN_TLS),
    401: Verdict.UNAUTHORIZED,
    403: Verdict.UNAUTHORIZED,
    404: Verdict.NO_SUCH_WORKFLOW,
    407: Verdict.FATAL,
    413: Verdict.TOO_LARGE,
    501: Verdict.WRONG_ADDRESS,
}
"""Verdict by HTTP status, where no error code decides. Without an entry, 5xx is IN_DOUBT, and others WRONG_ADDRESS."""
_BY_FAULT = {
    FaultKind.NOT_SENT: Verdict.NOT_SENT,
    FaultKind.IN_DOUBT: Verdict.IN_DOUBT,
    FaultKind.HANDSHAKE: Verdict.HANDSHAKE,
    FaultKind.FATAL: Verdict.FATAL,
}
_CHALLENGE = re.compile(rb"cdn-cgi/challenge-platform|cf-chl|Just a moment|Attention Required", re.IGNORECASE)
MAX_WORD_CHARACTERS = 100
"""Maximum number of characters of a status or an id from the service. Longer ones are cut."""


def judge(batch: Batch, part: Sequence[int], reply: Reply | Fault) -> Judgement:
    """What the reply to a batch create says about the instances at positions *part*."""
    if not _is_success(reply):
        return _judge_failed_create(part, reply)
    envelope = decode_answer(reply.body)
    if envelope is None or not envelope.success:
        return _judge_failed_create(part, reply)
    answered = envelope.answered
    if not envelope.refused and [one.id for one in answered] == sent_ids(batch, part) and _alike(answered):
        return Judgement(verdict=Verdict.DONE, created=part, answer=_info(answered[0]))
    return _match(batch, part, envelope, reply)


def judge_lookup(batch: Batch, position: int, reply: Reply | Fault) -> Judgement:
    """What the reply to a look-up says about the instance at *position*: `existed`, `ABSENT`, or nothing."""
    part = (position,)
    if _is_success(reply):
        found = decode_lookup(reply.body)
        # An answer need not name the id. Then its status distinguishes it from a late copy of an answer to a batch.
        empty = found is not None and found.success and found.id is None and found.status is None
        if found is None or empty or found.id not in (None, batch.ids[position]):
            message = "not an answer to this look-up: " + _excerpt(reply)
            return _unsettled(part, reply, Verdict.CONTRADICTION, reply.status, message)
        if found.success or _failed_but_found(found, reply):
            existed = _result(batch, position, "existed", status=found.status)
            return Judgement(verdict=Verdict.DONE, others=((position, existed),))
    failure = _failure(part, reply)
    if failure.verdict in (Verdict.BAD_REQUEST, Verdict.TOO_LARGE):  # a look-up has no rows to blame
        return replace(failure, verdict=Verdict.CONTRADICTION)
    if (
        isinstance(reply, Reply)
        and failure.verdict is Verdict.NO_SUCH_WORKFLOW
        and failure.code not in (*ROUTE_ERRORS, ALREADY_EXISTS)
    ):
        envelope = decode_lookup(reply.body)  # only the service's own 404 has one
        is_absent = envelope is not None and not envelope.success
        return replace(failure, verdict=Verdict.ABSENT if is_absent else Verdict.CONTRADICTION)
    return failure


def judge_page(reply: Reply | Fault) -> tuple[Judgement, Page | None]:
    """Judge the reply to a request for a page of the list of instances.

    Returns:
        (judgement, page). The page is None unless the verdict is `DONE`. The verdict `BAD_REQUEST` means that the
        service can't list instances.
    """
    if _is_success(reply):
        page = decode_page(reply.body)
        if page is not None:
            return Judgement(verdict=Verdict.DONE), page
        if decode_errors(reply.body) == ():
            message = "the answer holds no list: " + _excerpt(reply)
            return _unsettled((), reply, Verdict.BAD_REQUEST, reply.status, message), None
    return _failure((), reply), None


def existence(batch: Batch, part: Sequence[int]) -> Judgement:
    """The judgement that settles *part* as `existed`."""
    others = tuple((position, _result(batch, position, "existed")) for position in part)
    return Judgement(verdict=Verdict.DONE, others=others)


def rejection(batch: Batch, position: int, code: int | None, message: str) -> Judgement:
    """The judgement that settles one instance as `rejected`."""
    result = _result(batch, position, "rejected", code=code, message=message)
    return Judgement(verdict=Verdict.DONE, others=((position, result),))


def _is_success(reply: Reply | Fault) -> TypeGuard[Reply]:
    return isinstance(reply, Reply) and 200 <= reply.status < 300


# --- a complete answer --------------------------------------------------------------------------------------------


def sent_ids(batch: Batch, part: Sequence[int]) -> Sequence[str]:
    """The ids of the instances at positions *part*."""
    return batch.ids if len(part) == len(batch.ids) else [batch.ids[position] for position in part]


def _alike(answered: Sequence[Answered]) -> bool:
    """Whether the answer says the same about all instances."""
    first = answered[0]
    status, version, workflow = first.status, first.version_id, first.workflow_id
    for one in answered:  # a generator would take three times as long
        if one.status != status or one.version_id != version or one.workflow_id != workflow:
            return False
    return True


def _info(one: Answered) -> InstanceInfo:
    return InstanceInfo(_word(one.status), _word(one.version_id), _word(one.workflow_id))


def _word(given: str | None) -> str | None:
    """A status or an id from the service, made printable and cut to `MAX_WORD_CHARACTERS`."""
    return None if given is None else clean(given, MAX_WORD_CHARACTERS)


def _match(batch: Batch, part: Sequence[int], envelope: Envelope, reply: Reply) -> Judgement:
    """The judgement of a complete answer: match it with the request, id by id."""
    ids = [batch.ids[position] for position in part]
    contradiction = _contradiction(ids, envelope)
    if contradiction is not None:
        return _unsettled(part, reply, Verdict.CONTRADICTION, contradiction.code, contradiction.message)
    position_of: dict[str | None, int] = dict(zip(ids, part, strict=True))
    common = _info(envelope.answered[0]) if envelope.answered else None
    created: list[int] = []
    others: list[tuple[int, Result]] = []
    failures: set[int | None] = set()
    blamed: dict[int, Refused] = {}
    for one in envelope.answered:
        position = position_of.pop(one.id)
        if _info(one) == common:
            created.append(position)
        else:
            others.append((position, _created(batch, position, one)))
    for refused in envelope.refused:
        if refused.code in SERVICE_ERRORS:
            failures.add(refused.code)
        elif refused.code == ALREADY_EXISTS and refused.id is not None:  # without its id it may be another request's
            position = position_of.pop(refused.id)
            others.append((position, _result(batch, position, "existed")))
        else:
            blamed[position_of[_refused_id(ids, refused)]] = refused
    settled = Judgement(
        verdict=Verdict.DONE, created=created, answer=common, others=tuple(others), elapsed_s=reply.elapsed_s
    )
    unsettled = tuple(sorted(position_of.values()))
    if not unsettled:
        return settled
    if blamed and not failures:
        first = next(iter(blamed.values()))
        verdict, code, message = Verdict.BAD_REQUEST, first.code, clean(first.message)
    else:
        verdict, code = _verdict_of_omission(failures), None
        message = f"the answer leaves out {len(unsettled)} of {len(part)} ids"
    return replace(
        settled,
        verdict=verdict,
        unsettled=unsettled,
        refused=tuple(sorted(blamed)),
        code=code,
        message=message,
        retry_after_s=retry_after_s(reply),
    )


def _contradiction(ids: Sequence[str], envelope: Envelope) -> ServiceError | None:
    """Why a complete answer can't be the answer to a request with these ids; None if it can."""
    left = set(ids)
    for one in envelope.answered:
        if one.id not in left:
            name = clean(one.id, 100)
            return ServiceError(None, f"the answer names the id {name!r}, which was not sent or is named twice")
        left.remove(one.id)
    for refused in envelope.refused:
        refused_id = _refused_id(ids, refused)
        if refused_id not in left:
            message = "the answer refuses an instance that was not sent, or that it has named before"
            return ServiceError(refused.code, message)
        if refused.code not in SERVICE_ERRORS:
            left.remove(refused_id)
    return None


def _verdict_of_omission(failures: set[int | None]) -> Verdict:
    """The verdict of a complete answer that leaves instances out. *failures*: the error codes given for these."""
    if failures & RATE_ERRORS:  # decides before an internal error: the rate concerns all batches
        return Verdict.THROTTLED
    return Verdict.IN_DOUBT if failures else Verdict.OMITTED


def _refused_id(ids: Sequence[str], refused: Refused) -> str | None:
    """The id that an error is about: the one it names, or else the one at its index in the request."""
    if refused.id is None and refused.index is not None and 0 <= refused.index < len(ids):
        return ids[refused.index]
    return refused.id


# --- a failure ----------------------------------------------------------------------------------------------------


def _judge_failed_create(part: Sequence[int], reply: Reply | Fault) -> Judgement:
    failure = _failure(part, reply)
    if len(part) == 1 and failure.code == ALREADY_EXISTS and failure.verdict is not Verdict.THROTTLED:
        return replace(failure, verdict=Verdict.BAD_REQUEST)  # it names no id, and may be another request's answer
    return failure


def _failure(part: Sequence[int], reply: Reply | Fault) -> Judgement:
    """The judgement of a request that failed as a whole."""
    if isinstance(reply, Fault):
        return _unsettled(part, reply, _BY_FAULT[reply.kind], None, reply.message)
    errors = decode_errors(reply.body)
    main = _main_error(errors or ())
    code = main.code if main.code is not None else reply.status
    message = main.message or _excerpt(reply)
    if 300 <= reply.status < 400:
        location = clean(reply.headers.get("location", "?"))
        message = f"HTTP {reply.status}, a redirect to {location}, which is not followed"
    return _unsettled(part, reply, _failure_verdict(reply, errors), code, message)


def _failure_verdict(reply: Reply, errors: tuple[ServiceError, ...] | None) -> Verdict:
    """The verdict of a request that failed as a whole. *errors* is None if the reply's body is not a JSON object."""
    codes = {error.code for error in errors or ()}
    if reply.status == 429 or codes & RATE_ERRORS:
        return Verdict.THROTTLED
    if 200 <= reply.status < 300:
        return Verdict.IN_DOUBT if codes & INTERNAL_ERRORS else Verdict.CONTRADICTION
    if reply.status < 500 and codes & AUTHENTICATION_ERRORS:
        return Verdict.UNAUTHORIZED
    if errors is None and _is_challenge(reply):
        return Verdict.CHALLENGED
    if not errors and reply.status in REFUSALS:
        # Only the service's own errors make a row bad. This answer comes from elsewhere: a proxy, a captive portal.
        return Verdict.CONTRADICTION
    return _BY_STATUS.get(reply.status, Verdict.IN_DOUBT if reply.status >= 500 else Verdict.WRONG_ADDRESS)


def _is_challenge(reply: Reply) -> bool:
    """Whether a reply that is not JSON is a page that blocks programs at the edge."""
    if reply.status != 503:
        return reply.status == 403
    return "cf-mitigated" in reply.headers or _CHALLENGE.search(reply.body[:65_536]) is not None


def _failed_but_found(found: Lookup, reply: Reply) -> bool:
    """Whether a look-up that the service calls failed gives the instance's status all the same.

    The service is known to answer 200 with `success: false`, code 10001 and a complete result.
    """
    codes = {error.code for error in decode_errors(reply.body) or ()}
    return found.status is not None and bool(codes) and codes <= INTERNAL_ERRORS


def _main_error(errors: Sequence[ServiceError]) -> ServiceError:
    """The error to report: the first about the rate; else the first about the credential; else the first one."""
    for blamed in (RATE_ERRORS, AUTHENTICATION_ERRORS):
        for error in errors:
            if error.code in blamed:
                return error
    return errors[0] if errors else ServiceError()


def _excerpt(reply: Reply) -> str:
    """Status, `cf-ray` and beginning of an answer, in one line."""
    text = clean(reply.body[:400].decode("utf-8", "replace"), 120)
    ray = clean(reply.headers.get("cf-ray", ""), 60)
    return f"HTTP {reply.status}{', cf-ray ' + ray if ray else ''}: {text or 'an empty body'}"


def _unsettled(
    part: Sequence[int], reply: Reply | Fault, verdict: Verdict, code: int | None, message: str
) -> Judgement:
    """The judgement of a reply that settles nothing."""
    return Judgement(
        verdict=verdict,
        unsettled=part,
        code=code,
        message=message,
        retry_after_s=retry_after_s(reply) if isinstance(reply, Reply) else None,
        elapsed_s=reply.elapsed_s,
    )


# --- results ------------------------------------------------------------------------------------------------------


def _result(
    batch: Batch,
    position: int,
    outcome: RowOutcome,
    *,
    status: str | None = None,
    code: int | None = None,
    message: str | None = None,
) -> Result:
    return Result(
        row=batch.first_row + batch.offsets[position],
        id=batch.ids[position],
        outcome=outcome,
        status=_word(status),
        code=code,
        message=message,
    )


def _created(batch: Batch, position: int, one: Answered) -> Result:
    return Result(
        row=batch.first_row + batch.offsets[position],
        id=one.id,
        outcome="created",
        status=_word(one.status),
        version_id=_word(one.version_id),
        workflow_id=_word(one.workflow_id),
    )
