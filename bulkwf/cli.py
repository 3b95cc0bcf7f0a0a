"""Commands and flags to `Options`; signals and exit codes.

stdout carries data only; everything else goes to stderr. Each command imports what it needs.
"""

import asyncio
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TextIO

from cyclopts import App, CycloptsError, Parameter

from bulkwf.errors import BulkwfError, ConfigError
from bulkwf.model import RowOutcome, Summary
from bulkwf.options import DEFAULT_BASE_URL, BatchLimits, Options, RateLimits, RetryPolicy

__all__ = ["app", "main"]

EXIT_USAGE = 2
EXIT_SYSTEM = 4
EMULATED_ACCOUNT = "emulated"
EMULATED_ENDPOINT = "emulator"
DESCRIPTORS_BESIDE_SOCKETS = 48

app = App(
    name="bulkwf",
    help="Start one Cloudflare Workflow instance for each row of a list: exactly once, under the limits, resumable.",
    version_flags=["--version"],
    help_on_error=False,
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)

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
    "Instances a request, at most 100."
    max_batch_bytes: int = 1_048_576
    "Bytes a request."
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
            instances_per_s=_rate("--rate", self.rate, "s"),
            requests_per_5m=_rate("--request-rate", self.request_rate, "5m"),
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
class RunFlags:
    """Flags that say how a run behaves."""

    base_url: str | None = None
    "The API's address; also from CLOUDFLARE_API_BASE_URL or CLOUDFLARE_BASE_URL."
    concurrency: int = 16
    "Requests on the wire at a time."
    max_rejects: int | None = None
    "Stop when more rows are rejected; by default 100 and 1 % of the rows so far."
    max_outage: str = "30m"
    "End with exit code 75 after so long a failure of the service: 90s, 30m, 2h."
    timeout: str = "60s"
    "The longest a request may take."
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
    api_token_file: Path | None = None
    "File that holds the API token; read again when the token is refused."
    proxy: str | None = None
    "URL of an HTTP proxy. Proxies named in the environment are not used."
    ca_file: Path | None = None
    "PEM file of the certificate authorities to trust instead of the system's."

    def options(self, flags: ListFlags) -> Options:
        """All flags of a run as one value."""
        environment = os.environ.get("CLOUDFLARE_API_BASE_URL") or os.environ.get("CLOUDFLARE_BASE_URL")
        return flags.options(
            concurrency=self.concurrency,
            base_url=environment or DEFAULT_BASE_URL if self.base_url is None else self.base_url,
            retry=RetryPolicy(max_outage_s=_seconds("--max-outage", self.max_outage)),
            max_rejects=self.max_rejects,
            timeout_s=_seconds("--timeout", self.timeout),
            drain_timeout_s=_seconds("--drain-timeout", self.drain_timeout),
            in_doubt=self.in_doubt,
            fail_on_existed=self.fail_on_existed,
            confirm_existing=self.confirm_existing,
            new=self.new,
            proxy=self.proxy,
            ca_file=None if self.ca_file is None else str(self.ca_file),
        )


# --- commands -----------------------------------------------------------------------------------------------------


@app.command
def run(
    *inputs: Inputs,
    workflow: Annotated[str, Parameter(name=["--workflow", "-w"])],
    account: Annotated[str | None, Parameter(name=["--account", "-a"])] = None,
    checkpoint: Annotated[Path | None, Parameter(name=["--checkpoint", "-c"])] = None,
    emulate: bool = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"])] = False,
    json: bool = False,
    list_flags: ListFlags = ListFlags(),
    run_flags: RunFlags = RunFlags(),
) -> int:
    """Submit a list. The same command again continues where the run was cut off.

    The token comes from CLOUDFLARE_API_TOKEN (or CLOUDFLARE_EMAIL and CLOUDFLARE_API_KEY), or from --api-token-file.

    Parameters
    ----------
    inputs
        Files of JSON lines, plain or gzip, one list in their order; - is standard input.
    workflow
        Name of the workflow.
    account
        Account id; also from CLOUDFLARE_ACCOUNT_ID.
    checkpoint
        File that makes the run resumable; INPUT.bulkwf by default.
    emulate
        Submit to a service emulated in this process: no account, no network.
    quiet
        Show no progress and no summary.
    json
        Print the summary as JSON on stdout.
    """
    paths = _input_paths(inputs)
    options = run_flags.options(list_flags)
    file = checkpoint or _default_checkpoint(paths, emulate=emulate)
    _make_descriptors_last(options.rate.concurrency, ends=2 if emulate else 1)
    session = _Session(paths, workflow, account, file, options, run_flags.api_token_file, emulate=emulate)
    return asyncio.run(session.run(quiet=quiet, as_json=json))


@app.command
def check(*inputs: Inputs, list_flags: ListFlags = ListFlags()) -> int:
    """Validate a list without any network, and say how long it will take against which limit.

    Parameters
    ----------
    inputs
        Files of JSON lines, plain or gzip, one list in their order; - is standard input.
    """
    from bulkwf.batching import IdScheme  # noqa: PLC0415
    from bulkwf.checking import check_list  # noqa: PLC0415
    from bulkwf.console import check_lines, say  # noqa: PLC0415
    from bulkwf.sources import open_source  # noqa: PLC0415

    options = list_flags.options()
    source = open_source(_input_paths(inputs), first=options.first, rate=options.rate.instances_per_s)
    report = asyncio.run(check_list(source, IdScheme(options.run_key or "0", options.id_template), options))
    for line in check_lines(report, options):
        say(line)
    return 0 if report.good else 1


@app.command
def status(checkpoint: Path, *, json: bool = False) -> int:
    """Show what a checkpoint says of its run, also while the run is under way.

    Parameters
    ----------
    checkpoint
        The run's checkpoint.
    json
        Print it as JSON.
    """
    from bulkwf.checkpoint import read_status  # noqa: PLC0415
    from bulkwf.console import status_lines  # noqa: PLC0415

    found = read_status(checkpoint)
    lines = [_json_line(asdict(found))] if json else list(status_lines(found))
    sys.stdout.writelines(line + "\n" for line in lines)
    return 0


@app.command
def results(
    checkpoint: Path,
    *,
    outcome: RowOutcome | None = None,
    format: Literal["jsonl", "csv"] = "jsonl",  # noqa: A002
) -> int:
    """Print what has become of each row, in the order of the rows.

    Parameters
    ----------
    checkpoint
        The run's checkpoint.
    outcome
        Only the rows that came to this; by default all but the pending ones.
    format
        JSON lines, or CSV with a header.
    """
    from bulkwf.checkpoint import read_results  # noqa: PLC0415
    from bulkwf.printing import write_csv, write_jsonl  # noqa: PLC0415

    write = write_csv if format == "csv" else write_jsonl
    write(read_results(checkpoint, outcome=outcome), sys.stdout.buffer)
    return 0


@app.command
def emulate(
    *,
    host: str = "127.0.0.1",
    port: int = 8787,
    workflow: tuple[str, ...] = (),
    rate: str = "100/s",
    request_rate: str = "1200/5m",
    max_queued: int | None = None,
    faults: Path | None = None,
    log: Path | None = None,
) -> int:
    """Serve the emulated service on this machine until stopped; its base URL is printed on stdout.

    Parameters
    ----------
    host
        Address to listen on.
    port
        Port to listen on; 0 takes a free one.
    workflow
        Names of the workflows that exist; by default every name does.
    rate
        Instances a second that a workflow takes, as N/s, or unlimited.
    request_rate
        Requests in five minutes that a token has, as N/5m, or unlimited.
    max_queued
        Instances that fit the queue; more are left out of the answer and not created.
    faults
        Script of faults: a JSON list of rules.
    log
        File that each created id is written to before it is answered.
    """
    from bulkwf.emulator import FaultScriptError, serve  # noqa: PLC0415

    service = _service(_rate("--rate", rate, "s"), _rate("--request-rate", request_rate, "5m"), max_queued, workflow)
    try:
        script = faults.read_text("utf-8") if faults is not None else ()
        asyncio.run(_until_signalled(serve(service, started=_print_line, faults=script, host=host, port=port, log=log)))
    except (FaultScriptError, UnicodeDecodeError) as error:
        raise ConfigError(f"{faults}: {error}") from None
    except (OSError, OverflowError) as error:
        raise ConfigError(f"can't serve: {error}") from None
    _say(
        f"{service.created:,} instances created in {service.requests:,} requests; the most attempted in any second: "
        f"{service.worst_window:,}; requests refused for a limit: {service.overruns.total():,}"
    )
    return 0


# --- a run's session ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Session:
    """One run of the command: from the open checkpoint to the exit code."""

    paths: list[str]
    workflow: str
    account: str | None
    checkpoint: Path
    options: Options
    token_file: Path | None
    emulate: bool

    async def run(self, *, quiet: bool, as_json: bool) -> int:
        """Run, show, and say what to do next; returns the exit code."""
        from bulkwf.api import open_run  # noqa: PLC0415
        from bulkwf.console import say, show_progress, summary_lines  # noqa: PLC0415

        error: BulkwfError | None = None
        async with AsyncExitStack() as stack:
            endpoint = await stack.enter_async_context(self._endpoint())
            opened = await stack.enter_async_context(open_run(self.paths, checkpoint=self.checkpoint, **endpoint))
            signals = stack.enter_context(_Signals(opened.drain, opened.abort))
            try:
                async with show_progress(opened, quiet=quiet):
                    summary = await opened.finish()
            except BulkwfError as stopped:
                error, summary = stopped, stopped.summary or Summary()
            code = _exit_code(summary, error, signals.received)
            if not quiet:
                for line in summary_lines(opened, summary):
                    say(line)
        if error is not None:
            say(f"bulkwf: {error}")
        if not summary.complete:
            say(f"bulkwf: {_stopped_by(signals.received)}To continue, run:\n  {_resume_command()}")
        if as_json:
            return _print_last(
                _json_line({**asdict(replace(summary, exit_code=code)), "checkpoint": str(self.checkpoint)}), code
            )
        return code

    @asynccontextmanager
    async def _endpoint(self) -> AsyncIterator[dict[str, Any]]:
        """Where to: the service, or one emulated in this process."""
        if not self.emulate:
            yield {
                "workflow": self.workflow,
                "account_id": self.account,
                "token": _credential(self.token_file),
                "options": self.options,
            }
            return
        from bulkwf.emulator import emulate as serve_here  # noqa: PLC0415

        rate = self.options.rate
        service = _service(rate.instances_per_s, rate.requests_per_5m and max(1_200, rate.requests_per_5m))
        async with serve_here(service) as emulator:
            yield {
                "workflow": self.workflow,
                "account_id": self.account or EMULATED_ACCOUNT,
                "token": lambda: {"Authorization": "Bearer emulated"},
                "options": replace(self.options, base_url=emulator.base_url, proxy=None),
                "known_as": EMULATED_ENDPOINT,
            }


class _Signals:
    """The first signal drains, the second aborts."""

    _WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, drain: Any, abort: Any) -> None:
        self._drain = drain
        self._abort = abort
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        for number in self._WATCHED:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                asyncio.get_running_loop().add_signal_handler(number, self._receive, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._WATCHED:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _receive(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            _say(f"{number.name}: the answers in flight are still read; a second signal stops at once")
            self._drain()
        else:
            self._abort()


def _exit_code(summary: Summary, error: BulkwfError | None, received: signal.Signals | None) -> int:
    if error is not None:
        return error.exit_code
    if received is not None and not summary.complete:
        return 128 + received
    return summary.exit_code


def _stopped_by(received: signal.Signals | None) -> str:
    return f"stopped by {received.name}. " if received is not None else ""


def _resume_command() -> str:
    program = sys.argv[0]
    if program.endswith("__main__.py"):
        words = [sys.executable, "-m", "bulkwf"]
    else:
        found = shutil.which("bulkwf")
        words = ["bulkwf" if found and os.path.realpath(found) == os.path.realpath(program) else program]
    # --new would refuse the unfinished checkpoint that this run leaves.
    return shlex.join([*words, *(word for word in sys.argv[1:] if word != "--new")])


async def _until_signalled(serving: Any) -> None:
    task = asyncio.ensure_future(serving)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return


def _service(rate: int | None, request_rate: int | None, max_queued: int | None = None, workflows: Any = ()) -> Any:
    import time  # noqa: PLC0415

    from bulkwf.emulator import Limits, Service  # noqa: PLC0415

    limits = Limits(
        instances_per_s=rate,
        account_instances_per_s=None if rate is None else max(300, rate),
        requests_per_5m=request_rate,
        max_queued=max_queued,
    )
    return Service(limits, time.monotonic, workflows=set(workflows) or None)


# --- flags --------------------------------------------------------------------------------------------------------


def _input_paths(inputs: tuple[str, ...]) -> list[str]:
    for path in inputs:
        if path.startswith("-") and path != "-":
            option = path.partition("=")[0]  # its value may be a secret
            raise ConfigError(f"unknown option {option}; see `bulkwf --help`. A file of that name is ./{option}.")
    if not inputs:
        raise ConfigError("no input is named. Give one or more files of JSON lines, or - for standard input.")
    if inputs.count("-") > 1:
        raise ConfigError("standard input can be read only once; name - once.")
    return list(inputs)


def _default_checkpoint(paths: list[str], *, emulate: bool) -> Path:
    if len(paths) > 1 or paths == ["-"]:
        raise ConfigError("standard input and several inputs need the checkpoint's name: -c FILE.")
    return Path(paths[0] + (".emulated.bulkwf" if emulate else ".bulkwf"))


def _rate(flag: str, text: str, unit: str) -> int | None:
    if text == "unlimited":
        return None
    found = re.fullmatch(rf"([0-9]{{1,9}})(?:/{unit})?", text, re.ASCII)
    if found is None or not int(found[1]):
        raise ConfigError(f"{flag} must be a whole number over 0 like 100/{unit}, or unlimited, not {text!r}.")
    return int(found[1])


def _seconds(flag: str, text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|m|h|d)?", text, re.ASCII)
    if found is None:
        raise ConfigError(f"{flag} must be a time like 90s, 30m or 2h, not {text!r}.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400}[found[2] or "s"]


def _credential(token_file: Path | None) -> Any:
    from bulkwf.api import bearer, environment_credential  # noqa: PLC0415
    from bulkwf.transport import check_secret  # noqa: PLC0415

    if token_file is None:
        return environment_credential

    def read() -> Mapping[str, str]:
        try:
            text = token_file.read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds a non-ASCII character"
            raise ConfigError(f"--api-token-file {token_file}: the token can't be read: {reason}.") from None
        return bearer(check_secret(f"--api-token-file {token_file}", text))

    return read


def _make_descriptors_last(concurrency: int, ends: int) -> None:
    """Let the process open as many files as the run needs, if the system allows it; *ends*: sockets a request."""
    import resource  # noqa: PLC0415

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = concurrency * ends + DESCRIPTORS_BESIDE_SOCKETS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        fitting = (allowed - DESCRIPTORS_BESIDE_SOCKETS) // ends
        lower = f"Lower --concurrency to {fitting} or less, or raise" if fitting > 0 else "Raise"
        raise ConfigError(
            f"the run may need {needed} open files, and this process may have {allowed}. {lower} the limit (ulimit -n)."
        )


# --- the process --------------------------------------------------------------------------------------------------


def _print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _print_last(text: str, code: int) -> int:
    """Print a run's summary; returns the exit code. What the run has come to outweighs who could be told of it."""
    try:
        _print_line(text)
    except OSError as error:
        _drop(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _say(f"the summary can't be written: {error.strerror}.")
            return code or EXIT_SYSTEM
    return code


def _json_line(value: Any) -> str:
    import orjson  # noqa: PLC0415

    return orjson.dumps(value).decode()


def _say(text: str) -> None:
    try:
        sys.stderr.write(f"bulkwf: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return


def _call(words: list[str]) -> int:
    try:
        code = app(words, exit_on_error=False, print_error=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except CycloptsError as error:
        _say(f"{error} See `bulkwf --help`.")
        return EXIT_USAGE
    except BulkwfError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _hold_standard_files() -> None:
    """Fill the places of standard files that are closed: the next file to be opened would be taken for one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY)  # reading from it fails, as from a closed one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - there is no path; as long as we live
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _drop(file: TextIO) -> None:
    """Let what *file* still holds go nowhere, so that Python does not fail over it on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def main() -> None:
    """The command's entry: runs it and exits with its code."""
    _hold_standard_files()
    try:
        code = _call(sys.argv[1:])
    except BrokenPipeError:
        code = 0  # whoever reads our output has enough of it (`| head`)
    except OSError as error:
        _say(f"the output, or a temporary file, can't be written: {error}.")
        code = EXIT_SYSTEM
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError:
            _drop(file)
    sys.exit(code)
