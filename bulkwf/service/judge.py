"""What a reply means for the instances that were sent or looked up: `judge`, `judge_lookup`, `judge_page`. Pure.

Three questions, in this order:

1. Was a complete answer read? If not, the transport has said whether the service may have acted.
2. Is it an answer to *this* request? Only the ids show it: an idle connection can deliver a late copy of an earlier
   answer.
3. What does it say of each id? Ids are matched by value, never by position, and an omitted id proves nothing.
"""

import re
from collections.abc import Sequence
from email.utils import parsedate_to_datetime

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
)
from bulkwf.text import clean

__all__ = ["existence", "judge", "judge_lookup", "judge_page", "rejection", "retry_after_s", "sent_ids"]

ALREADY_EXISTS = 10405
WORKFLOW_NOT_FOUND = 10200
INTERNAL_ERRORS = frozenset({10001})
"""Codes with which the service says that it failed, whatever the HTTP status around them."""
RATE_ERRORS = frozenset({971, 10429})
"""Codes that blame the rate, whatever the HTTP status around them."""
AUTHENTICATION_ERRORS = frozenset({6003, *range(6100, 6200), 9106, 9109, 10000})
"""Codes that blame the credential; some of them come with status 400."""
ROUTE_ERRORS = frozenset({WORKFLOW_NOT_FOUND, 7000, 7003})
"""Codes of a 404 that is about the address, not about an instance."""

_BY_STATUS = {
    **dict.fromkeys((408, 425, 499), Verdict.IN_DOUBT),
    **dict.fromkeys((400, 409, 422), Verdict.BAD_REQUEST),
    **dict.fromkeys((525, 526), Verdict.ORIGIN_TLS),
    401: Verdict.UNAUTHORIZED,
    403: Verdict.UNAUTHORIZED,
    404: Verdict.NO_SUCH_WORKFLOW,
    407: Verdict.FATAL,
    413: Verdict.TOO_LARGE,
    501: Verdict.WRONG_ADDRESS,
}
_BY_FAULT = {
    FaultKind.NOT_SENT: Verdict.NOT_SENT,
    FaultKind.IN_DOUBT: Verdict.IN_DOUBT,
    FaultKind.HANDSHAKE: Verdict.HANDSHAKE,
    FaultKind.FATAL: Verdict.FATAL,
}
_CHALLENGE = re.compile(rb"cdn-cgi/challenge-platform|cf-chl|Just a moment|Attention Required", re.IGNORECASE)
_SECONDS = re.compile("[0-9]+", re.ASCII)
LONGEST_ORDER_S = 1e9
LONGEST_WORD = 100


def judge(batch: Batch, part: Sequence[int], reply: Reply | Fault) -> Judgement:
    """What the reply to a batch create says of the instances at positions *part*."""
    if isinstance(reply, Fault) or not 200 <= reply.status < 300:
        return _judge_failure(batch, part, reply)
    envelope = decode_answer(reply.body)
    if envelope is None or not envelope.success:
        return _judge_failure(batch, part, reply)
    answered = envelope.answered
    if not envelope.refused and [one.id for one in answered] == sent_ids(batch, part) and _alike(answered):
        return Judgement(verdict=Verdict.DONE, created=part, answer=_answer(answered[0]))
    return _match(batch, part, envelope, retry_after_s(reply))


def judge_lookup(batch: Batch, position: int, reply: Reply | Fault) -> Judgement:
    """What the reply to a look-up says of the instance at *position*: `existed`, `ABSENT`, or nothing yet."""
    part = (position,)
    if isinstance(reply, Reply) and 200 <= reply.status < 300:
        found = decode_lookup(reply.body)
        if found is None or found.id not in (None, batch.ids[position]):
            return _unsettled(part, Verdict.CONTRADICTION, reply.status, "no answer to a look-up: " + _excerpt(reply))
        if found.success or _says_how_it_fares(found, reply):
            existed = _result(batch, position, "existed", status=found.status)
            return Judgement(verdict=Verdict.DONE, others=((position, existed),))
    outcome = _failure(part, reply)
    missing = outcome.verdict is Verdict.NO_SUCH_WORKFLOW and outcome.code not in (*ROUTE_ERRORS, ALREADY_EXISTS)
    if isinstance(reply, Reply) and missing:
        told = decode_lookup(reply.body)  # a proxy's 404 has no such envelope
        verdict = Verdict.CONTRADICTION if told is None or told.success else Verdict.ABSENT
        return _unsettled(part, verdict, outcome.code, outcome.message)
    if outcome.verdict in (Verdict.BAD_REQUEST, Verdict.TOO_LARGE):
        return _unsettled(part, Verdict.CONTRADICTION, outcome.code, outcome.message)
    return outcome


def _says_how_it_fares(found: Lookup, reply: Reply) -> bool:
    """Whether a look-up that the service calls failed tells the instance's status all the same.

    The service is known to answer 200 with `success: false`, code 10001 and a complete result.
    """
    codes = {error.code for error in decode_errors(reply.body) or ()}
    return found.status is not None and bool(codes) and codes <= INTERNAL_ERRORS


def judge_page(reply: Reply | Fault) -> tuple[Judgement, Page | None]:
    """What the reply to a request for a page of the list says, and the page; `BAD_REQUEST` if there can be none."""
    if isinstance(reply, Reply) and 200 <= reply.status < 300:
        page = decode_page(reply.body)
        if page is not None:
            return Judgement(verdict=Verdict.DONE), page
        if decode_errors(reply.body) == ():
            return _unsettled((), Verdict.BAD_REQUEST, reply.status, "no list: " + _excerpt(reply)), None
    return _failure((), reply), None


def existence(batch: Batch, part: Sequence[int]) -> Judgement:
    """The outcome that settles *part* as `existed`."""
    others = tuple((position, _result(batch, position, "existed")) for position in part)
    return Judgement(verdict=Verdict.DONE, others=others)


def rejection(batch: Batch, position: int, code: int | None, message: str) -> Judgement:
    """The outcome that settles one instance as `rejected`."""
    return Judgement(verdict=Verdict.DONE, others=((position, _refusal(batch, position, code, message)),))


def retry_after_s(reply: Reply) -> float | None:
    """The pause that a reply orders: seconds in ASCII digits, or an HTTP date held against the reply's own.

    Of several headers that give seconds, the longest counts.
    """
    text = reply.headers.get("retry-after", "").strip()
    orders = [order.strip() for order in text.split(",")]
    if all(_SECONDS.fullmatch(order) for order in orders):
        return min(max(float(order) for order in orders), LONGEST_ORDER_S)
    until = _http_date(text)
    if until is None:
        return None
    now = _http_date(reply.headers.get("date", "")) or reply.received_at
    return max(0.0, until - now)


# --- a complete answer --------------------------------------------------------------------------------------------


def sent_ids(batch: Batch, part: Sequence[int]) -> Sequence[str]:
    """The ids of the instances at positions *part*."""
    return batch.ids if len(part) == len(batch.ids) else [batch.ids[position] for position in part]


def _alike(answered: Sequence[Answered]) -> bool:
    first = answered[0]
    status, version, workflow = first.status, first.version_id, first.workflow_id
    for one in answered:  # a generator would take three times as long
        if one.status != status or one.version_id != version or one.workflow_id != workflow:
            return False
    return True


def _answer(one: Answered) -> InstanceInfo:
    return InstanceInfo(_word(one.status), _word(one.version_id), _word(one.workflow_id))


def _word(given: str | None) -> str | None:
    """What the service calls something, fit for a terminal and for a million rows."""
    return None if given is None else clean(given, LONGEST_WORD)


def _match(batch: Batch, part: Sequence[int], envelope: Envelope, after_s: float | None) -> Judgement:
    """Match an answer that differs from the request, id by id."""
    position_of = {batch.ids[position]: position for position in part}
    common = _answer(envelope.answered[0]) if envelope.answered else None
    created: list[int] = []
    others: list[tuple[int, Result]] = []
    for one in envelope.answered:
        position = position_of.pop(one.id, None)
        if position is None:
            message = f"the answer names the id {clean(one.id, 100)!r}, which was not sent or is named twice"
            return _unsettled(part, Verdict.CONTRADICTION, None, message)
        if _answer(one) == common:
            created.append(position)
        else:
            others.append((position, _created(batch, position, one)))
    verdict = Verdict.OMITTED
    for refused in envelope.refused:
        position = _refused_position(batch, part, refused)
        if position is None or position_of.pop(batch.ids[position], None) is None:
            message = "the answer refuses an instance that was not sent, or that it also calls created"
            return _unsettled(part, Verdict.CONTRADICTION, refused.code, message)
        if refused.code in INTERNAL_ERRORS or refused.code in RATE_ERRORS:
            position_of[batch.ids[position]] = position
            if refused.code in RATE_ERRORS:  # wins over an internal error: the rate concerns all batches
                verdict = Verdict.THROTTLED
            elif verdict is Verdict.OMITTED:
                verdict = Verdict.IN_DOUBT
        else:
            others.append((position, _refusal(batch, position, refused.code, clean(refused.message))))
    unsettled = tuple(sorted(position_of.values()))
    return Judgement(
        verdict=verdict if unsettled else Verdict.DONE,
        created=created,
        answer=common,
        others=tuple(others),
        unsettled=unsettled,
        message=f"the answer leaves out {len(unsettled)} of {len(part)} ids" if unsettled else "",
        retry_after_s=after_s if verdict is Verdict.THROTTLED else None,
    )


def _refused_position(batch: Batch, part: Sequence[int], refused: Refused) -> int | None:
    if refused.id is not None:
        return next((position for position in part if batch.ids[position] == refused.id), None)
    if refused.index is not None and 0 <= refused.index < len(part):
        return part[refused.index]
    return None


# --- a failure ----------------------------------------------------------------------------------------------------


def _judge_failure(batch: Batch, part: Sequence[int], reply: Reply | Fault) -> Judgement:
    outcome = _failure(part, reply)
    if len(part) == 1 and outcome.code == ALREADY_EXISTS and outcome.verdict is not Verdict.THROTTLED:
        return Judgement(
            verdict=Verdict.DONE, others=((part[0], _refusal(batch, part[0], outcome.code, outcome.message)),)
        )
    return outcome


def _failure(part: Sequence[int], reply: Reply | Fault) -> Judgement:
    if isinstance(reply, Fault):
        return _unsettled(part, _BY_FAULT[reply.kind], None, reply.message, elapsed_s=reply.elapsed_s)
    errors = decode_errors(reply.body)
    told = _main_error(errors or ())
    code = told.code if told.code is not None else reply.status
    message = told.message or _excerpt(reply)
    if 300 <= reply.status < 400:
        message = (
            f"HTTP {reply.status}, a redirect to {clean(reply.headers.get('location', '?'))}, which is not followed"
        )
    verdict = _failure_verdict(reply, errors)
    return _unsettled(part, verdict, code, message, retry_after_s(reply), reply.elapsed_s)


def _failure_verdict(reply: Reply, errors: tuple[ServiceError, ...] | None) -> Verdict:
    codes = {error.code for error in errors or ()}
    if reply.status == 429 or codes & RATE_ERRORS:
        return Verdict.THROTTLED
    if 200 <= reply.status < 300:
        return Verdict.IN_DOUBT if codes & INTERNAL_ERRORS else Verdict.CONTRADICTION
    if reply.status < 500 and codes & AUTHENTICATION_ERRORS:
        return Verdict.UNAUTHORIZED
    if errors is None and reply.status in (403, 503) and _is_challenge(reply):
        return Verdict.CHALLENGED
    if not errors and reply.status in (400, 409, 422):
        # Only the service's own word makes a row bad; this is somebody else's: a proxy's, a captive portal's.
        return Verdict.CONTRADICTION
    verdict = _BY_STATUS.get(reply.status)
    return verdict or (Verdict.IN_DOUBT if reply.status >= 500 else Verdict.WRONG_ADDRESS)


def _is_challenge(reply: Reply) -> bool:
    if reply.status == 403 or "cf-mitigated" in reply.headers:
        return True
    return _CHALLENGE.search(reply.body[:65_536]) is not None


def _main_error(errors: Sequence[ServiceError]) -> ServiceError:
    """The error that decides: one that blames the rate, or else the credential; else the first."""
    for blamed in (RATE_ERRORS, AUTHENTICATION_ERRORS):
        for error in errors:
            if error.code in blamed:
                return error
    return errors[0] if errors else ServiceError()


def _excerpt(reply: Reply) -> str:
    text = clean(reply.body[:400].decode("utf-8", "replace"), 120)
    ray = clean(reply.headers.get("cf-ray", ""), 60)
    return f"HTTP {reply.status}{', cf-ray ' + ray if ray else ''}: {text or 'an empty body'}"


def _unsettled(
    part: Sequence[int],
    verdict: Verdict,
    code: int | None,
    message: str,
    after_s: float | None = None,
    elapsed_s: float = 0.0,
) -> Judgement:
    return Judgement(
        verdict=verdict, unsettled=part, code=code, message=message, retry_after_s=after_s, elapsed_s=elapsed_s
    )


def _http_date(text: str) -> float | None:
    if not text.isascii() or not text.endswith("GMT"):
        return None
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


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


def _refusal(batch: Batch, position: int, code: int | None, message: str) -> Result:
    if code == ALREADY_EXISTS:
        return _result(batch, position, "existed")
    return _result(batch, position, "rejected", code=code, message=message)


def _created(batch: Batch, position: int, one: Answered) -> Result:
    return Result(
        row=batch.first_row + batch.offsets[position],
        id=one.id,
        outcome="created",
        status=_word(one.status),
        version_id=_word(one.version_id),
        workflow_id=_word(one.workflow_id),
    )
