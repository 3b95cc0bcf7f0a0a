"""The settings of a run: the unit, default and bounds of each. No default stands anywhere else."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from bulkwf.errors import ConfigError

__all__ = [
    "DEFAULT_BASE_URL",
    "ID_PATTERN",
    "INSTANCE_PERIOD_S",
    "MIN_BATCH_BYTES",
    "REHEARSAL",
    "REQUEST_PERIOD_S",
    "BatchLimits",
    "Options",
    "RateLimits",
    "RetryPolicy",
    "SettingError",
    "Target",
    "is_run_key",
    "is_target_name",
    "without_password",
]

DEFAULT_BASE_URL = "https://api.cloudflare.com/client/v4"
REHEARSAL = "emulator"
"""Stored as the base URL of a run with --emulate, because the emulator's address differs in each session."""
ID_PATTERN = "[A-Za-z0-9_][A-Za-z0-9_-]"
"""Regular expression of names and ids. Append how many characters may follow the first: `{0,99}` allows 1 to 100."""

SERVICE_BATCH_LIMIT = 100
"""Instances that the service accepts in one batch-create request."""
MIN_BATCH_BYTES = 1_024
"""Lower bound of `BatchLimits.bytes`."""
INSTANCE_PERIOD_S = 1.0
"""Length of the service's window for instances, in seconds: the period of `RateLimits.instances_per_s`."""
REQUEST_PERIOD_S = 300.0
"""Length of the service's window for requests, in seconds: the period of `RateLimits.requests_per_5m`."""
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

NAME_RULE = "1 to 64 of the characters A-Z a-z 0-9 _ - (not starting with -)"
_NAME = re.compile(ID_PATTERN + "{0,63}", re.ASCII)


def is_run_key(text: str) -> bool:
    """Whether generated ids may begin with *text*."""
    return _NAME.fullmatch(text) is not None


def is_target_name(text: str) -> bool:
    """Whether *text* may name an account or a workflow."""
    return _NAME.fullmatch(text) is not None


class SettingError(ConfigError):
    """A setting's value is malformed or out of bounds.

    Attributes:
        setting: Name of the field. The message begins with it.
        problem: The rest of the message: what is wrong, and which values are allowed.
    """

    def __init__(self, message: str, *, setting: str = "", problem: str = "") -> None:  # pickle gives the message alone
        super().__init__(message)
        self.setting = setting
        self.problem = problem

    @classmethod
    def of(cls, setting: str, problem: str) -> "SettingError":
        """The error of a field's value."""
        return cls(f"{setting} {problem}", setting=setting, problem=problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How rows are grouped into batches; each batch is one request. `bulkwf.batching.batcher` applies these limits."""

    instances: int = SERVICE_BATCH_LIMIT
    """Maximum number of instances per request, 1 to 100. Batches are smaller where that uses the rate better."""
    rows: int = 1_000
    """Maximum number of rows per batch, blank and invalid rows included. At least `instances`."""
    bytes: int = 1_048_576
    """Maximum size of a request's body, in bytes; at least 1024. A single row that is larger is sent alone.

    1 MiB is the documented limit of the service's binding; that of its REST endpoint is not documented.
    """
    linger_s: float = 0.5
    """Longest time that a partly filled batch waits for more rows from a slow source, in seconds."""

    def __post_init__(self) -> None:
        _require("instances", 1 <= self.instances <= SERVICE_BATCH_LIMIT, "1 to 100", self.instances)
        _require("rows", self.rows >= self.instances, f"at least {self.instances}", self.rows)
        _require("bytes", self.bytes >= MIN_BATCH_BYTES, f"at least {MIN_BATCH_BYTES}", self.bytes)
        _require("linger_s", self.linger_s >= 0, "at least 0 s", self.linger_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """What may be sent, counted in sliding windows."""

    instances_per_s: int | None = 100
    """Maximum number of instances in any second; None is no limit. The service allows 100 per workflow and 300 per
    account."""
    requests_per_5m: int | None = 1_000
    """Maximum number of requests in any five minutes; None is no limit.

    The service allows 1,200 per token. Beyond that it blocks every call of the token for five minutes: the default
    leaves room for other tools that use the token.
    """
    concurrency: int = 16
    """Maximum number of requests in flight at a time, 1 to 1000."""

    def __post_init__(self) -> None:
        rate, quota = self.instances_per_s, self.requests_per_5m
        _require("instances_per_s", rate is None or rate >= 1, "at least 1", rate)
        _require("requests_per_5m", quota is None or quota >= 1, "at least 1", quota)
        _require("concurrency", 1 <= self.concurrency <= 1_000, "1 to 1000", self.concurrency)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How retries are spaced while the service is failing. No row is given up because the service fails."""

    base_s: float = 0.5
    """Base of the backoff, in seconds: retry n of a batch, n from 0, waits for a time drawn evenly from
    0 to min(`max_wait_s`, `base_s` · 2ⁿ)."""
    max_wait_s: float = 60.0
    """Upper bound of the backoff, in seconds. At least `base_s`."""
    max_outage_s: float = 1_800.0
    """Longest outage, in seconds: if nothing is settled for longer while requests fail, or if the service orders a
    longer pause, the run ends with `TemporaryStop`."""

    def __post_init__(self) -> None:
        _require("base_s", self.base_s > 0, "more than 0 s", self.base_s)
        _require("max_wait_s", self.max_wait_s >= self.base_s, f"at least {self.base_s} s", self.max_wait_s)
        _require("max_outage_s", self.max_outage_s >= 0, "at least 0 s", self.max_outage_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a run behaves: everything but its rows, its target, its credential and its checkpoint."""

    batch: BatchLimits = field(default_factory=BatchLimits)
    """How rows are grouped into requests."""
    rate: RateLimits = field(default_factory=RateLimits)
    """How many instances and requests may be sent in a period, and how many requests at a time."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """How retries are spaced, and how long an outage may last."""
    row_shape: Literal["instance", "params"] = "instance"
    """What a row is: `instance`, an object with the API's own keys (`instance_id`, `params`, ...), or `params`, the
    params alone."""
    id_template: str | None = None
    """Makes the id of a row that has none, from fields of its params: `"order-{order_id}"`. None: ids are generated
    from the run key, the row's number and its content."""
    run_key: str | None = None
    """What generated ids begin with, 1 to 64 characters. None: a random key, kept in the checkpoint."""
    max_rejects: int | None = None
    """Maximum number of rejected rows: one more ends the run with `ServiceRefused`. None: 100, or 1 % of the rows begun
    so far if that is more."""
    reject_omitted: bool = False
    """Whether the last one or two rows of a list are rejected when the service keeps omitting them from its answers
    without an error. False: the run waits for them, and ends with `TemporaryStop` after `max_outage_s`."""
    confirm_existing: bool = True
    """Whether an instance is looked up before its row becomes `existed` because answers omitted its id, or `rejected`
    because answers refused it. False: the rows become so at once, though the answers may be wrong."""
    in_doubt: Literal["stop", "resend"] = "stop"
    """What to do with rows in doubt whose ids the service may have forgotten since: `stop` ends the run, `resend`
    sends them again and risks that they run twice."""
    fail_on_existed: bool = False
    """Whether rows that existed before the run make the exit code 1."""
    first: int | None = None
    """Number of rows of the list to read, from its beginning. None: all of them."""
    timeout_s: float = 60.0
    """Maximum duration of one request, from its start to the last byte of the answer, in seconds."""
    drain_timeout_s: float = 20.0
    """Longest time that a run waits for answers in flight once it drains, in seconds."""
    proxy: str | None = field(default=None, repr=False)  # it may hold a password
    """URL of an HTTP proxy. None: no proxy, whatever the environment says (HTTPS_PROXY is not used)."""
    ca_file: str | Path | None = None
    """Path of a PEM file with the certificate authorities to trust instead of the system's."""

    def __post_init__(self) -> None:
        _require("row_shape", self.row_shape in ("instance", "params"), "instance or params", self.row_shape)
        _require("in_doubt", self.in_doubt in ("stop", "resend"), "stop or resend", self.in_doubt)
        _require("max_rejects", self.max_rejects is None or self.max_rejects >= 0, "at least 0", self.max_rejects)
        _require("first", self.first is None or self.first >= 0, "at least 0", self.first)
        _require("timeout_s", self.timeout_s > 0, "more than 0 s", self.timeout_s)
        _require("drain_timeout_s", self.drain_timeout_s >= 0, "at least 0 s", self.drain_timeout_s)
        _require("run_key", self.run_key is None or is_run_key(self.run_key), NAME_RULE, self.run_key)
        if self.proxy is not None:
            _check_proxy(self.proxy)

    def __repr__(self) -> str:
        """All settings, without the user name and password that the proxy's URL may hold."""
        shown = {one.name: getattr(self, one.name) for one in fields(self)}
        if self.proxy is not None:
            shown["proxy"] = without_password(self.proxy)
        return f"Options({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The workflow whose instances are created, and the API that creates them."""

    account_id: str
    """Id of the account."""
    workflow: str
    """Name of the workflow."""
    base_url: str = DEFAULT_BASE_URL
    """Address of the API; slashes at its end are dropped. https only, except on this machine's loopback."""

    def __post_init__(self) -> None:
        _require("workflow", is_target_name(self.workflow), NAME_RULE, self.workflow)
        _require("account_id", is_target_name(self.account_id), NAME_RULE, self.account_id)
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        _check_base_url(self.base_url)

    @property
    def instances_path(self) -> str:
        """Path of the workflow's instances below the base URL, without a slash at its end."""
        return f"/accounts/{self.account_id}/workflows/{self.workflow}/instances"

    @property
    def loopback(self) -> bool:
        """Whether the target is on this machine."""
        return urlsplit(self.base_url).hostname in LOOPBACK_HOSTS


def without_password(proxy: str) -> str:
    """Host and port of a proxy's URL."""
    return urlsplit(proxy).netloc.rpartition("@")[2]


def _check_proxy(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not (good and url.isprintable() and " " not in url):  # never quoted: it may hold a password
        raise SettingError.of("proxy", "must be like http://proxy.example:8080. What was given is not shown here.")


def _check_base_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        problem = f"{url!r} can't be read: {error}. Give a URL like {DEFAULT_BASE_URL}."
        raise SettingError.of("base_url", problem) from None
    if parts.username is not None or parts.password is not None:
        raise SettingError.of("base_url", "holds a user name or password. Give the address alone.")
    # `urlsplit` silently drops newlines and tabs: the URL that was checked would not be the one that is called.
    plain = url.isprintable() and " " not in url and not parts.query and not parts.fragment
    _require("base_url", bool(host) and plain, f"like {DEFAULT_BASE_URL}", url)
    if parts.scheme != "https" and not (parts.scheme == "http" and host in LOOPBACK_HOSTS):
        raise SettingError.of(
            "base_url",
            f"{url!r} would send the token and the rows unencrypted. Use https "
            "(http is accepted for localhost, 127.0.0.1 and [::1] only).",
        )


def _require(setting: str, good: bool, rule: str, value: object) -> None:
    if not good:
        raise SettingError.of(setting, f"must be {rule}, not {value!r}.")
