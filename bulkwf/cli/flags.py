"""Flags of the command line, and the layer of settings that they form.

A flag that is not given is None. Its default is in `Options`; the help shows the default from there.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from bulkwf.errors import ConfigError
from bulkwf.options import DEFAULT_BASE_URL
from bulkwf.settings import Given, Layer, default_text, parsed

__all__ = [
    "Account",
    "Inputs",
    "ListFlags",
    "RequestRate",
    "RunFlags",
    "ServiceFlags",
    "TokenFile",
    "default_checkpoint",
    "flag_layer",
    "input_paths",
]

SETTINGS = {
    "account": "account_id",
    "batch_size": "batch.instances",
    "concurrency": "rate.concurrency",
    "drain_timeout": "drain_timeout_s",
    "max_batch_bytes": "batch.bytes",
    "max_outage": "retry.max_outage_s",
    "rate": "rate.instances_per_s",
    "request_rate": "rate.requests_per_5m",
    "timeout": "timeout_s",
}
"""The names of settings that differ from the names of their flags, by flag."""


def _default(flag: str) -> Parameter:
    """Make the help show the default of the setting that *flag* sets."""
    return Parameter(show_default=default_text(SETTINGS.get(flag, flag)))


Inputs = Annotated[str, Parameter(name="INPUT", allow_leading_hyphen=True, negative=())]
"""Files of JSON lines, plain or gzip, read in order as one list; - is standard input."""
Account = Annotated[str | None, Parameter(name=["--account", "-a"])]
TokenFile = Annotated[
    Path | None, Parameter(help="File that holds the API token. It is read again when the service refuses the token.")
]
RequestRate = Annotated[
    str | None,
    Parameter(help="Maximum number of requests in five minutes, as N/5m, or unlimited. The service allows 1200/5m."),
    _default("request_rate"),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ListFlags:
    """Flags that say how the list is read and what may be sent."""

    rate: Annotated[str | None, _default("rate")] = None
    "Maximum number of instances per second, as N/s, or unlimited. The service allows 100/s for each workflow."
    request_rate: RequestRate = None
    batch_size: Annotated[int | None, _default("batch_size")] = None
    "Maximum number of instances per request, 1 to 100."
    max_batch_bytes: Annotated[int | None, _default("max_batch_bytes")] = None
    "Maximum size of a request's body, in bytes."
    row_shape: Annotated[Literal["instance", "params"] | None, _default("row_shape")] = None
    "What a row is: an object with instance_id, params, ..., or the params alone."
    id_template: str | None = None
    "Makes the id of a row that has none from its params: order-{order_id}."
    run_key: str | None = None
    "Prefix of generated ids. By default it is random, and stored in the checkpoint."
    first: int | None = None
    "Number of rows to read, from the beginning of the list. By default all."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServiceFlags:
    """Flags that say how the service is reached, and how long an outage of it may last."""

    base_url: Annotated[str | None, Parameter(show_default=DEFAULT_BASE_URL)] = None
    "The API's address; also from CLOUDFLARE_API_BASE_URL or CLOUDFLARE_BASE_URL."
    concurrency: Annotated[int | None, _default("concurrency")] = None
    "Maximum number of requests in flight at a time."
    max_outage: Annotated[str | None, _default("max_outage")] = None
    "Longest outage of the service, as 90s, 30m or 2h. A longer one ends the command with exit code 75."
    timeout: Annotated[str | None, _default("timeout")] = None
    "Maximum duration of one request, as 90s or 2m."
    proxy: str | None = None
    "URL of an HTTP proxy, without a password; also from BULKWF_PROXY. No other variable is read for it."
    ca_file: Path | None = None
    "PEM file with the certificate authorities to trust instead of the system's."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Flags that say how a run behaves."""

    max_rejects: int | None = None
    "Maximum number of rejected rows: one more stops the run. By default 100, or 1 % of the rows so far if more."
    reject_omitted: bool | None = None
    "Reject the last one or two rows of a list if the service keeps omitting them from its answers. By default the run \
waits for them."
    drain_timeout: Annotated[str | None, _default("drain_timeout")] = None
    "Longest time to wait for answers in flight after the first signal, as 20s."
    in_doubt: Annotated[Literal["stop", "resend"] | None, _default("in_doubt")] = None
    "What to do with rows in doubt whose ids the service may have forgotten."
    fail_on_existed: bool | None = None
    "Exit with 1 if rows existed before the run."
    confirm_existing: Annotated[
        bool | None, Parameter(negative="--no-confirm-existing"), _default("confirm_existing")
    ] = None
    "Look up an omitted id before its row is called existed, and a refused one before rejected."


def flag_layer(*groups: ListFlags | ServiceFlags | RunFlags, **others: Any) -> Layer:
    """The layer of the flags that are given: those in *groups*, and *others* by name.

    Raises:
        ConfigError: A value is malformed; the message names the flag.
    """
    flags = [(field.name, getattr(group, field.name)) for group in groups for field in fields(group)]
    layer: dict[str, Given] = {}
    for flag, value in (*flags, *others.items()):
        if value is not None:
            setting = SETTINGS.get(flag, flag)
            layer[setting] = parsed(setting, value, "--" + flag.replace("_", "-"))
    if "proxy" in layer and "@" in layer["proxy"].value:
        raise ConfigError(
            "--proxy holds a user name or password, which every user of this machine could read. Set BULKWF_PROXY to "
            "the URL instead."
        )
    return layer


def input_paths(inputs: tuple[str, ...]) -> list[str]:
    """The paths of the files that form the list.

    Raises:
        ConfigError: No input is given, an input is an unknown flag, or standard input is named twice.
    """
    for path in inputs:
        if path.startswith("-") and path != "-":
            option = path.partition("=")[0]  # its value may be a secret
            raise ConfigError(
                f"unknown option {option}; see `bulkwf --help`. If it is the name of a file, write ./{option}."
            )
    if not inputs:
        raise ConfigError("no input is named. Give one or more files of JSON lines, or - for standard input.")
    if inputs.count("-") > 1:
        raise ConfigError("standard input can be read only once: give '-' only once.")
    return list(inputs)


def default_checkpoint(paths: list[str], *, emulate: bool) -> Path:
    """The path of the checkpoint if none is given: beside the input. A rehearsal gets a path of its own."""
    if len(paths) > 1 or paths == ["-"]:
        raise ConfigError(
            "standard input, and a list of several files, have no default checkpoint. Name one with -c FILE."
        )
    return Path(paths[0] + (".emulated.bulkwf" if emulate else ".bulkwf"))
