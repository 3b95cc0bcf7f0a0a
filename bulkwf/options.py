"""Every knob of a run: its unit, its default and its bounds."""

import re
from dataclasses import dataclass, field
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
    "Target",
    "is_run_key",
    "is_target_name",
]

DEFAULT_BASE_URL = "https://api.cloudflare.com/client/v4"
REHEARSAL = "emulator"
"""What the checkpoint of a run with --emulate has for a base URL: its real one is another each time."""
ID_PATTERN = "[A-Za-z0-9_][A-Za-z0-9_-]"
"""The first two characters that names and ids may have; bound the second one by `{0,99}` or the like."""

SERVICE_BATCH_LIMIT = 100
"""Instances that the service takes in one batch-create request."""
MIN_BATCH_BYTES = 1_024
"""Lower bound of `BatchLimits.bytes`."""
INSTANCE_PERIOD_S = 1.0
"""The service's window for instances, and what `RateLimits.instances_per_s` counts in."""
REQUEST_PERIOD_S = 300.0
"""The service's window for requests, and what `RateLimits.requests_per_5m` counts in."""
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

_TARGET_NAME = re.compile(ID_PATTERN + "{0,63}", re.ASCII)
_RUN_KEY = re.compile(ID_PATTERN + "{0,63}", re.ASCII)


def is_run_key(text: str) -> bool:
    """Whether generated ids may begin with *text*."""
    return _RUN_KEY.fullmatch(text) is not None


def is_target_name(text: str) -> bool:
    """Whether *text* may name an account or a workflow."""
    return _TARGET_NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How rows are grouped. `bulkwf.batcher` applies these limits.

    Attributes:
        instances: Upper bound of the instances in a request, 1 to 100; fewer are sent where those fill the rate better.
        rows: Upper bound of the rows in a batch, blank and invalid ones included.
        bytes: Upper bound of a request's body, in bytes, unless one row alone is larger. 1 MiB is the documented limit
            of the Workers binding; the REST endpoint's is not documented.
        linger_s: Send a batch that a slow source has filled in part after this many seconds.
    """

    instances: int = SERVICE_BATCH_LIMIT
    rows: int = 1_000
    bytes: int = 1_048_576
    linger_s: float = 0.5

    def __post_init__(self) -> None:
        _require(1 <= self.instances <= SERVICE_BATCH_LIMIT, "batch size", "1 to 100", self.instances)
        _require(self.rows >= self.instances, "rows a batch", f"at least {self.instances}", self.rows)
        _require(self.bytes >= MIN_BATCH_BYTES, "bytes a batch", f"at least {MIN_BATCH_BYTES}", self.bytes)
        _require(self.linger_s >= 0, "linger", "at least 0 s", self.linger_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """What may be sent, counted in sliding windows.

    Attributes:
        instances_per_s: Instances in any second; None is no limit. The service allows 100 a workflow, 300 an account.
        requests_per_5m: Requests in any five minutes; None is no limit. The service allows 1,200 a token, and blocks
            every call of that token for five minutes when it is overrun: the default leaves room for other tools.
        concurrency: Requests on the wire at one time.
    """

    instances_per_s: int | None = 100
    requests_per_5m: int | None = 1_000
    concurrency: int = 16

    def __post_init__(self) -> None:
        _require(
            self.instances_per_s is None or self.instances_per_s >= 1,
            "rate",
            "at least 1/s",
            self.instances_per_s,
        )
        _require(
            self.requests_per_5m is None or self.requests_per_5m >= 1,
            "request rate",
            "at least 1/5m",
            self.requests_per_5m,
        )
        _require(1 <= self.concurrency <= 1_000, "concurrency", "1 to 1000", self.concurrency)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long bulkwf waits for a service that is ill. A row is never given up because of it.

    Attributes:
        base_s: The n-th wait in a row is drawn from 0 to `base_s` · 2ⁿ seconds (full jitter) …
        max_wait_s: … but never from more than so many.
        max_outage_s: After so many seconds of failure with nothing settled the run ends with `TemporaryStop`.
    """

    base_s: float = 0.5
    max_wait_s: float = 60.0
    max_outage_s: float = 1_800.0

    def __post_init__(self) -> None:
        _require(self.base_s > 0, "backoff", "more than 0 s", self.base_s)
        _require(self.max_wait_s >= self.base_s, "longest backoff", f"at least {self.base_s} s", self.max_wait_s)
        _require(self.max_outage_s >= 0, "longest outage", "at least 0 s", self.max_outage_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything about a run that is not its rows, its target or its credentials.

    Attributes:
        base_url: The API's address. https only, except on this machine's loopback.
        batch: How rows are grouped.
        rate: What may be sent.
        retry: How long to wait for an ill service.
        row_shape: `instance`: a row is an object with the API's own keys. `params`: a row is the params.
        id_template: Makes an id for a row that has none, from its params: `"order-{order_id}"`.
        run_key: What generated ids begin with; None draws one, and keeps it in the checkpoint.
        max_rejects: The run stops when more rows than this are rejected. None: 100 and 1 % of the rows so far.
        reject_omitted: Reject the last row, or two, of a list that the service keeps leaving out of its answers without
            a reason. Otherwise the run waits, and ends with `TemporaryStop` after `max_outage_s`.
        confirm_existing: Ask the service before an id that it left out of its answer is called `existed`.
        in_doubt: What to do with rows that may have been sent so long ago that the service may have forgotten their
            ids: `stop`, or `resend` and risk that they run twice.
        fail_on_existed: Let rows that existed before the run make the exit code 1.
        new: Move a finished checkpoint aside and start over.
        first: Read only this many rows of the list.
        timeout_s: The longest a request may take.
        drain_timeout_s: The longest to wait for answers once the run is told to stop.
        proxy: URL of an HTTP proxy. Proxies named in the environment are not used.
        ca_file: PEM file of the certificate authorities to trust instead of the system's.
    """

    base_url: str = DEFAULT_BASE_URL
    batch: BatchLimits = field(default_factory=BatchLimits)
    rate: RateLimits = field(default_factory=RateLimits)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    row_shape: Literal["instance", "params"] = "instance"
    id_template: str | None = None
    run_key: str | None = None
    max_rejects: int | None = None
    reject_omitted: bool = False
    confirm_existing: bool = True
    in_doubt: Literal["stop", "resend"] = "stop"
    fail_on_existed: bool = False
    new: bool = False
    first: int | None = None
    timeout_s: float = 60.0
    drain_timeout_s: float = 20.0
    proxy: str | None = None
    ca_file: str | None = None

    def __post_init__(self) -> None:
        _require(self.row_shape in ("instance", "params"), "row shape", "instance or params", self.row_shape)
        _require(self.in_doubt in ("stop", "resend"), "in-doubt", "stop or resend", self.in_doubt)
        _require(self.max_rejects is None or self.max_rejects >= 0, "max-rejects", "at least 0", self.max_rejects)
        _require(self.first is None or self.first >= 0, "first", "at least 0 rows", self.first)
        _require(self.timeout_s > 0, "timeout", "more than 0 s", self.timeout_s)
        _require(self.drain_timeout_s >= 0, "drain timeout", "at least 0 s", self.drain_timeout_s)
        if self.proxy is not None:
            _check_proxy(self.proxy)
        if self.run_key is not None:
            _require(
                is_run_key(self.run_key),
                "run key",
                "1 to 64 of the characters A-Z a-z 0-9 _ -, not starting with -",
                self.run_key,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The workflow that instances are started of: one line of limits belongs to one target."""

    base_url: str
    account_id: str
    workflow: str

    def __post_init__(self) -> None:
        rule = "1 to 64 of the characters A-Z a-z 0-9 _ -, not starting with -"
        _require(is_target_name(self.workflow), "workflow name", rule, self.workflow)
        _require(is_target_name(self.account_id), "account id", rule, self.account_id)
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


def _check_proxy(url: str) -> None:
    # Never quoted: the address of a proxy may hold a password.
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    _require(good and url.isprintable() and " " not in url, "proxy", "like http://proxy.example:8080", "what was given")


def _check_base_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"base URL {url!r} can't be read: {error}. Give one like {DEFAULT_BASE_URL}.") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError("base URL holds a user name or password; give the address alone.")
    # `urlsplit` drops newlines and tabs without a word; what it checked would not be what is called.
    plain = url.isprintable() and " " not in url and not parts.query and not parts.fragment
    _require(bool(host) and plain, "base URL", f"like {DEFAULT_BASE_URL}", url)
    if parts.scheme != "https" and not (parts.scheme == "http" and host in LOOPBACK_HOSTS):
        raise ConfigError(
            f"base URL {url!r} would send the token and the rows unencrypted; use https "
            "(http is accepted for localhost, 127.0.0.1 and [::1] only)."
        )


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {rule}, not {value!r}.")
