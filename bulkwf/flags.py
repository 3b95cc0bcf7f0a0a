"""Flags of the command line, and the `Options` that they make."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bulkwf.errors import ConfigError
from bulkwf.options import DEFAULT_BASE_URL, BatchLimits, Options, RateLimits, RetryPolicy

__all__ = [
    "Inputs",
    "ListFlags",
    "RunFlags",
    "ServiceFlags",
    "default_checkpoint",
    "input_paths",
    "parse_rate",
    "parse_time",
]

Inputs = Annotated[str, Parameter(name="INPUT", allow_leading_hyphen=True, negative=())]
"""Files of JSON lines, plain or gzip, one list in their order; - is standard input."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ListFlags:
    """Flags that say how the list is read and what may be sent."""

    rate: str = "100/s"
    "Instances a second, as N/s, or unlimited. The service allows 100 a workflow."
    request_rate: str = "1000/5m"
    "Requests in five minutes, as N/5m, or unlimited. The service allows 1200 a token."
    batch_size: int = 100
    "At most so many instances a request; the service takes 100."
    max_batch_bytes: int = 1_048_576
    "At most so many bytes a request."
    row_shape: Literal["instance", "params"] = "instance"
    "Whether a row is an object with instance_id, params, ... or the params alone."
    id_template: str | None = None
    "Make the id of a row that has none from its params: order-{order_id}."
    run_key: str | None = None
    "What generated ids begin with; drawn and kept in the checkpoint by default."
    first: int | None = None
    "Read only so many rows."

    def options(self, **others: Any) -> Options:
        """The options that these flags and *others* make."""
        rate = RateLimits(
            instances_per_s=parse_rate("--rate", self.rate, "s"),
            requests_per_5m=parse_rate("--request-rate", self.request_rate, "5m"),
            concurrency=others.pop("concurrency", RateLimits().concurrency),
        )
        return Options(
            batch=BatchLimits(instances=self.batch_size, rows=max(1_000, self.batch_size), bytes=self.max_batch_bytes),
            rate=rate,
            row_shape=self.row_shape,
            id_template=self.id_template,
            run_key=self.run_key,
            first=self.first,
            **others,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServiceFlags:
    """Flags that say how the service is reached, and what is borne from it."""

    base_url: str | None = None
    "The API's address; also from CLOUDFLARE_API_BASE_URL or CLOUDFLARE_BASE_URL."
    concurrency: int = 16
    "Requests on the wire at a time."
    max_outage: str = "30m"
    "End with exit code 75 after so long a failure of the service: 90s, 30m, 2h."
    timeout: str = "60s"
    "The longest a request may take."
    api_token_file: Path | None = None
    "File that holds the API token; read again when the token is refused."
    proxy: str | None = None
    "URL of an HTTP proxy, without a password; also from BULKWF_PROXY. No other variable is read for it."
    ca_file: Path | None = None
    "PEM file of the certificate authorities to trust instead of the system's."

    def settings(self) -> dict[str, Any]:
        """These flags as fields of `Options`."""
        environment = os.environ.get("CLOUDFLARE_API_BASE_URL") or os.environ.get("CLOUDFLARE_BASE_URL")
        return {
            "base_url": environment or DEFAULT_BASE_URL if self.base_url is None else self.base_url,
            "retry": RetryPolicy(max_outage_s=parse_time("--max-outage", self.max_outage)),
            "timeout_s": parse_time("--timeout", self.timeout),
            "proxy": _proxy(self.proxy),
            "ca_file": None if self.ca_file is None else str(self.ca_file),
        }

    def options(self, request_rate: str) -> Options:
        """The options of a command that only asks."""
        rate = RateLimits(
            requests_per_5m=parse_rate("--request-rate", request_rate, "5m"), concurrency=self.concurrency
        )
        return Options(rate=rate, **self.settings())


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Flags that say how a run behaves."""

    max_rejects: int | None = None
    "Stop when more rows are rejected; by default 100 and 1 % of the rows so far."
    reject_omitted: bool = False
    "Reject the last one or two rows of a list that the service keeps leaving out of its answers; by default it waits."
    drain_timeout: str = "20s"
    "The longest to wait for answers after the first signal."
    in_doubt: Literal["stop", "resend"] = "stop"
    "What to do with rows that may have been sent longer ago than the service remembers ids."
    fail_on_existed: bool = False
    "Exit with 1 if rows existed before the run."
    confirm_existing: Annotated[bool, Parameter(negative="--no-confirm-existing")] = True
    "Ask the service before an id that it left out of an answer is called existed."
    new: bool = False
    "Move a finished checkpoint aside and start over."

    def options(self, flags: ListFlags, service: ServiceFlags) -> Options:
        """All flags of a run as one value."""
        return flags.options(
            concurrency=service.concurrency,
            max_rejects=self.max_rejects,
            reject_omitted=self.reject_omitted,
            drain_timeout_s=parse_time("--drain-timeout", self.drain_timeout),
            in_doubt=self.in_doubt,
            fail_on_existed=self.fail_on_existed,
            confirm_existing=self.confirm_existing,
            new=self.new,
            **service.settings(),
        )


def input_paths(inputs: tuple[str, ...]) -> list[str]:
    """The inputs as named, once they make sense."""
    for path in inputs:
        if path.startswith("-") and path != "-":
            option = path.partition("=")[0]  # its value may be a secret
            raise ConfigError(f"unknown option {option}; see `bulkwf --help`. A file of that name is ./{option}.")
    if not inputs:
        raise ConfigError("no input is named. Give one or more files of JSON lines, or - for standard input.")
    if inputs.count("-") > 1:
        raise ConfigError("standard input can be read only once; name - once.")
    return list(inputs)


def default_checkpoint(paths: list[str], *, emulate: bool) -> Path:
    """Where the checkpoint lies if nothing is said: beside the input; a rehearsal's never stands in the run's way."""
    if len(paths) > 1 or paths == ["-"]:
        raise ConfigError("standard input and several inputs need the checkpoint's name: -c FILE.")
    return Path(paths[0] + (".emulated.bulkwf" if emulate else ".bulkwf"))


def parse_rate(flag: str, text: str, unit: str) -> int | None:
    """`100/s` or `1000/5m` as a number; None for `unlimited`."""
    if text == "unlimited":
        return None
    found = re.fullmatch(rf"([0-9]{{1,9}})(?:/{unit})?", text, re.ASCII)
    if found is None or not int(found[1]):
        raise ConfigError(f"{flag} must be a whole number over 0 like 100/{unit}, or unlimited, not {text!r}.")
    return int(found[1])


def parse_time(flag: str, text: str) -> float:
    """`90s`, `30m`, `2h` or `1d` in seconds."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|m|h|d)?", text, re.ASCII)
    if found is None:
        raise ConfigError(f"{flag} must be a time like 90s, 30m or 2h, not {text!r}.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400}[found[2] or "s"]


def _proxy(given: str | None) -> str | None:
    if given is not None and "@" in given:
        raise ConfigError(
            "--proxy holds a user name or password, which every user of this machine could read. Put the URL into "
            "BULKWF_PROXY instead."
        )
    return given or os.environ.get("BULKWF_PROXY") or None
