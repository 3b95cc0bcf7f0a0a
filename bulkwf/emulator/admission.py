"""Decides which requests are admitted, by token, account, workflow and rates. Pure: `now` is an argument.

Docstrings name the evidence for each rule, as in `state.py`.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from bulkwf.emulator import answers
from bulkwf.emulator.answers import Answer, refusal
from bulkwf.emulator.limits import Limits, RequestLimit, SlidingWindow

_WORKFLOW = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_BEARER = re.compile(r"Bearer +([A-Za-z0-9._~+/-]+=*)")


class Target(NamedTuple):
    """The account and workflow that a request is for."""

    account: str
    workflow: str


class Caller(NamedTuple):
    """Authentication headers of a request; None where there is none."""

    authorization: str | None = None
    api_key: str | None = None
    """Value of X-Auth-Key. It belongs to the earlier scheme, in which X-Auth-Email is sent with it."""


def _one_second() -> SlidingWindow:
    return SlidingWindow(1.0)


@dataclass(frozen=True, slots=True)
class _Rates:
    """The instances of the last second for one workflow: all that were attempted, and those that were admitted."""

    seen: SlidingWindow = field(default_factory=_one_second)
    admitted: SlidingWindow = field(default_factory=_one_second)


class Admission:
    """Counts every request and refuses those that break a rule.

    `workflows` and `tokens`: the names that are accepted; None accepts any. `account`: the one account that is
    accepted; None accepts any.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        workflows: Iterable[str] | None = None,
        account: str | None = None,
        tokens: Iterable[str] | None = None,
    ) -> None:
        self.limits = limits
        self.workflows = None if workflows is None else set(workflows)
        self.account = account
        self.tokens = None if tokens is None else set(tokens)

        self.requests = 0
        """Number of requests, refused ones included."""
        self.gets = 0
        """Number of GET requests."""
        self.worst_window = 0
        """Maximum number of instances attempted in any second for one workflow, refused ones included."""
        self.overruns: Counter[str] = Counter()
        """Number of 429 answers by limit: instances, account, requests, queue."""

        self._revoked: set[str] = set()
        self._requests: dict[str, RequestLimit] = {}
        self._accounts: defaultdict[str, SlidingWindow] = defaultdict(_one_second)
        self._rates: defaultdict[Target, _Rates] = defaultdict(_Rates)

    def revoke(self, caller: Caller) -> None:
        """Refuse the token of `caller` from now on."""
        token = self._token(caller)
        if isinstance(token, str):
            self._revoked.add(token)

    def admit(self, caller: Caller, target: Target, now: float, *, instances: int, asks: bool) -> Answer | None:
        """Count one request and the instances that it attempts; return the answer that refuses it, or None.

        `asks`: whether the request only reads. `now`: the time at which the request had arrived completely.
        """
        self.requests += 1
        self.gets += asks
        if instances:
            seen = self._rates[target].seen.add(now, instances)
            self.worst_window = max(self.worst_window, seen)
        token = self._token(caller)
        if isinstance(token, Answer):
            return token
        return (
            self._over_request_limit(token, now)
            or self._unknown_place(target)
            or self._over_creation_rate(target, instances, now)
        )

    def rate_headers(self, caller: Caller, now: float) -> dict[str, str]:
        """The rate limit headers of answers to `caller`; none where requests are not limited."""
        token = self._token(caller)
        if isinstance(token, Answer) or self.limits.requests_per_5m is None:
            return {}
        return self._request_limit(token, self.limits.requests_per_5m).headers(now)

    def _token(self, caller: Caller) -> str | Answer:
        """The token of `caller`, or the answer that refuses it.

        Believed: a malformed header is answered by a 400 with code 6003, a missing or wrong token by a 401 with 10000.
        """
        if caller.authorization is None:
            token = caller.api_key or ""
        elif match := _BEARER.fullmatch(caller.authorization):
            token = match[1]
        else:
            return refusal(400, answers.HEADERS_REFUSED, "Invalid request headers")
        known = bool(token) if self.tokens is None else token in self.tokens
        if not known or token in self._revoked:
            return refusal(401, answers.NOT_AUTHENTICATED, "Authentication error")
        return token

    def _unknown_place(self, target: Target) -> Answer | None:
        """The answer that refuses an unknown account or workflow, or None. Believed: its statuses and codes."""
        if self.account is not None and target.account != self.account:
            return refusal(403, answers.NOT_AUTHORIZED, "Unauthorized to access requested resource")
        known = self.workflows is None or target.workflow in self.workflows
        if not known or not _WORKFLOW.fullmatch(target.workflow):
            return refusal(404, answers.WORKFLOW_NOT_FOUND, "workflows.api.error.workflow.not_found")
        return None

    def _over_request_limit(self, token: str, now: float) -> Answer | None:
        """The answer if the token exceeds its request limit, or None.

        Documented: the limit, the block and Retry-After. Believed: the code and its message.
        """
        if self.limits.requests_per_5m is None:
            return None
        blocked_s = self._request_limit(token, self.limits.requests_per_5m).admit(now)
        if not blocked_s:
            return None
        message = "Please wait and consider throttling your request speed"
        return self.throttled("requests", answers.THROTTLED, message, blocked_s)

    def _over_creation_rate(self, target: Target, n: int, now: float) -> Answer | None:
        """The answer if `n` more instances exceed a rate, or None.

        Documented: the rates; each instance of a batch counts; a batch that exceeds a rate is answered by a 429.
        Unknown; our choice: ids that exist already count, too; a refused batch creates nothing and does not count.
        """
        if not n:
            return None
        workflow, account = self._rates[target].admitted, self._accounts[target.account]
        message = "workflows.api.error.instance.creation_rate_exceeded"
        for name, window, limit in (
            ("instances", workflow, self.limits.instances_per_s),
            ("account", account, self.limits.account_instances_per_s),
        ):
            if limit is not None and window.count(now) + n > limit:
                return self.throttled(name, answers.CREATING_TOO_FAST, message, window.room_in_s(now, n, limit))
        workflow.add(now, n)
        account.add(now, n)
        return None

    def throttled(self, limit: str, code: int, message: str, wait_s: float) -> Answer:
        """Count and return a 429. Documented: only a 429 has Retry-After; it is in whole seconds, rounded up."""
        self.overruns[limit] += 1
        return refusal(429, code, message, {"Retry-After": str(max(1, math.ceil(wait_s)))})

    def _request_limit(self, token: str, limit: int) -> RequestLimit:
        if token not in self._requests:
            self._requests[token] = RequestLimit(limit)
        return self._requests[token]
