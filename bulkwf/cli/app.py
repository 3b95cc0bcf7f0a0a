"""The commands. Only data goes to stdout, everything else goes to stderr. Each command imports what it needs."""

import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from bulkwf.cli import messages, output, process
from bulkwf.cli.flags import (
    Account,
    Inputs,
    ListFlags,
    RequestRate,
    RunFlags,
    ServiceFlags,
    TokenFile,
    default_checkpoint,
    flag_layer,
    input_paths,
)
from bulkwf.errors import BulkwfError, ConfigError, SystemRefused
from bulkwf.model import RowOutcome
from bulkwf.options import DEFAULT_BASE_URL
from bulkwf.settings import Given, Settings, environment, parse_rate
from bulkwf.text import counted

__all__ = ["app", "main"]

EXIT_USAGE = 2
EXIT_SYSTEM = 4
EXIT_BUG = 70
SETTLE_S = 0.2
"""Longest wait for earlier messages before data is written, in seconds: both may go to the same terminal."""

EMULATED = {"account_id": Given("emulated", "--emulate")}
"""The layer of settings that replaces the environment if --emulate is given."""

app = App(
    name="bulkwf",
    help="Start one Cloudflare Workflow instance for each row of a list: exactly once, under the limits, resumable.",
    version_flags=["--version"],
    help_on_error=False,
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)


@app.command
def run(
    *inputs: Inputs,
    workflow: Annotated[str, Parameter(name=["--workflow", "-w"])],
    account: Account = None,
    checkpoint: Annotated[Path | None, Parameter(name=["--checkpoint", "-c"])] = None,
    new: bool = False,
    emulate: bool = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"])] = False,
    json: bool = False,
    list_flags: ListFlags = ListFlags(),
    run_flags: RunFlags = RunFlags(),
    service_flags: ServiceFlags = ServiceFlags(),
    api_token_file: TokenFile = None,
) -> int:
    """Submit a list. Run the same command again to continue an interrupted run.

    The token comes from CLOUDFLARE_API_TOKEN (or CLOUDFLARE_EMAIL and CLOUDFLARE_API_KEY), or from --api-token-file.

    Parameters
    ----------
    inputs
        Files of JSON lines, plain or gzip, read in order as one list; - is standard input.
    workflow
        Name of the workflow.
    account
        Account id; also from CLOUDFLARE_ACCOUNT_ID.
    checkpoint
        File that makes the run resumable; INPUT.bulkwf by default.
    new
        Move a finished checkpoint aside and start over.
    emulate
        Submit to a service emulated in this process: no account, no network.
    quiet
        Show no progress and no summary.
    json
        Print the summary as JSON on stdout.
    """
    from bulkwf.cli.run import Session, raise_descriptor_limit  # noqa: PLC0415

    paths = input_paths(inputs)
    flags = flag_layer(list_flags, run_flags, service_flags, workflow=workflow, account=account)
    settings = Settings(flags, EMULATED if emulate else environment(os.environ))
    options, target = settings.options(), settings.target()
    file = checkpoint or default_checkpoint(paths, emulate=emulate)
    raise_descriptor_limit(options.rate.concurrency, ends=2 if emulate else 1)
    session = Session(paths, target, file, options, api_token_file, emulate=emulate, new=new)
    summary = process.run(session.run(quiet=quiet))
    if json:
        name = os.fsencode(file).decode("utf-8", "replace")
        return _print_last(_json_line({**asdict(summary), "checkpoint": name}), summary.exit_code)
    return summary.exit_code


@app.command
def check(*inputs: Inputs, list_flags: ListFlags = ListFlags()) -> int:
    """Validate a list without a network, and estimate how long its run will take.

    Parameters
    ----------
    inputs
        Files of JSON lines, plain or gzip, read in order as one list; - is standard input.
    """
    from bulkwf.batching.ids import IdScheme  # noqa: PLC0415
    from bulkwf.check import check_list  # noqa: PLC0415
    from bulkwf.cli.signals import until_signalled  # noqa: PLC0415
    from bulkwf.cli.summaries import check_lines  # noqa: PLC0415
    from bulkwf.sources import open_source  # noqa: PLC0415

    options = Settings(flag_layer(list_flags)).options()
    source = open_source(input_paths(inputs), stop=options.first)
    scheme = IdScheme(options.run_key or "0", options.id_template)
    report = process.run(until_signalled(check_list(source, scheme, options)))
    if isinstance(report, signal.Signals):
        return 128 + report
    messages.say(*check_lines(report, options))
    return 0 if report.good else 1


@app.command
def status(checkpoint: Path, *, json: bool = False) -> int:
    """Show the state of a run from its checkpoint, also while the run is in progress.

    Parameters
    ----------
    checkpoint
        The run's checkpoint.
    json
        Print it as JSON.
    """
    from bulkwf.checkpoint import read_status  # noqa: PLC0415
    from bulkwf.cli.summaries import status_lines  # noqa: PLC0415

    found = read_status(checkpoint)
    for line in [_json_line(asdict(found))] if json else status_lines(found):
        output.write_line(line)
    return 0


@app.command
def results(
    checkpoint: Path,
    *,
    outcome: RowOutcome | None = None,
    format: Literal["jsonl", "csv"] = "jsonl",  # noqa: A002
) -> int:
    """Print the outcome of each row, in row order.

    Parameters
    ----------
    checkpoint
        The run's checkpoint.
    outcome
        Only rows with this outcome; by default all but the pending ones.
    format
        JSON lines, or CSV with a header.
    """
    from bulkwf.checkpoint import read_results  # noqa: PLC0415
    from bulkwf.cli.formats import write_csv, write_jsonl  # noqa: PLC0415

    write = write_csv if format == "csv" else write_jsonl
    write(read_results(checkpoint, outcome=outcome), output.data())
    return 0


@app.command
def verify(
    checkpoint: Path,
    *,
    sample: int | None = None,
    account: Account = None,
    request_rate: RequestRate = None,
    format: Literal["jsonl", "csv"] = "jsonl",  # noqa: A002
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"])] = False,
    json: bool = False,
    service_flags: ServiceFlags = ServiceFlags(),
    api_token_file: TokenFile = None,
) -> int:
    """Check that the service holds the instances of a run. Prints the missing, errored and unknown ones.

    Exit code 0: none is missing. 1: some are missing. 75: not finished; run the same command again to continue it. The
    findings are kept in a file beside the checkpoint until the verification is finished.

    Parameters
    ----------
    checkpoint
        The run's checkpoint.
    sample
        Check only this many instances, drawn at random. Default: all.
    account
        Account id. Default: CLOUDFLARE_ACCOUNT_ID, else the checkpoint's account.
    format
        Output format: JSON lines, or CSV with a header.
    quiet
        Show no progress and no summary.
    json
        Print one JSON object: the counts, and the instances as `problems`.
    """
    from bulkwf.cli.formats import write_csv, write_jsonl, write_report  # noqa: PLC0415
    from bulkwf.cli.run import raise_descriptor_limit  # noqa: PLC0415
    from bulkwf.cli.verify import VerifySession  # noqa: PLC0415
    from bulkwf.model import Finding  # noqa: PLC0415

    if sample is not None and sample < 1:
        raise ConfigError(f"--sample must be a whole number over 0, not {sample}.")
    sample = None if sample is None else min(sample, sys.maxsize)
    settings = Settings(flag_layer(service_flags, account=account, request_rate=request_rate), environment(os.environ))
    options = settings.options()
    raise_descriptor_limit(options.rate.concurrency, ends=1)
    account_id, base_url = settings.get("account_id"), settings.get("base_url") or DEFAULT_BASE_URL
    session = VerifySession(checkpoint, account_id, base_url, options, api_token_file, sample)
    with settings.naming_origins():
        report = process.run(session.run(quiet=quiet))
    messages.wait_written(SETTLE_S)
    try:
        if json:
            write_report(report.counts, report.problems(), output.data())
        elif format == "csv":
            write_csv(report.problems(), output.data(), Finding)
        else:
            write_jsonl(report.problems(), output.data())
        output.finish()
    except output.ReaderGone:  # the exit code still says what was found
        pass
    report.discard()
    return report.counts.exit_code


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
        Instances per second that a workflow accepts, as N/s, or unlimited.
    request_rate
        Requests in five minutes that a token may send, as N/5m, or unlimited.
    max_queued
        Capacity of the queue; more instances are omitted from the answer and not created.
    faults
        Script of faults: a JSON list of rules.
    log
        File that each created id is written to before it is answered.
    """
    from bulkwf.cli.run import emulated_service  # noqa: PLC0415
    from bulkwf.cli.signals import until_signalled  # noqa: PLC0415
    from bulkwf.emulator import FaultScriptError, serve  # noqa: PLC0415

    rates = parse_rate("--rate", rate, "s"), parse_rate("--request-rate", request_rate, "5m")
    service = emulated_service(*rates, max_queued, workflow)
    try:
        script = faults.read_text("utf-8") if faults is not None else ()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--faults {faults}: the script can't be read: {error}.") from None
    try:
        process.run(
            until_signalled(serve(service, started=output.write_line, faults=script, host=host, port=port, log=log))
        )
    except FaultScriptError as error:
        raise ConfigError(f"--faults {faults}: {error}") from None
    except output.OutputError as error:
        _say(f"the base URL can't be written to standard output: {error.strerror}.")
        return EXIT_SYSTEM
    except (OSError, OverflowError) as error:
        raise ConfigError(f"can't listen on {host}, port {port}, or write the log: {error}.") from None
    _say(
        f"{counted(service.created, 'instance')} created in {counted(service.requests, 'request')}; the most attempted "
        f"in any second: {service.worst_window:,}; requests refused for a limit: {service.overruns.total():,}"
    )
    return 0


# --- the process ---------------------------------------------------------------------------------------------------


def _print_last(text: str, code: int) -> int:
    """Print a run's summary; returns *code*, or `EXIT_SYSTEM` if *code* is 0 and the system can't write the summary."""
    messages.wait_written(SETTLE_S)
    try:
        output.write_line(text)
    except output.ReaderGone:
        return code
    except output.OutputError as error:
        _say(f"the summary can't be written: {error.strerror}.")
        return code or EXIT_SYSTEM
    return code


def _json_line(value: Any) -> str:
    import orjson  # noqa: PLC0415

    return orjson.dumps(value).decode()


def _say(text: str) -> None:
    messages.say(f"bulkwf: {text}")


def _call(arguments: list[str]) -> int:
    try:
        code = app(arguments, exit_on_error=False, print_error=False)
        return code if isinstance(code, int) else 0
    except CycloptsError as error:
        _say(f"{error} See `bulkwf --help`.")
        return EXIT_USAGE
    except BulkwfError as error:
        _say(str(error))
        return error.exit_code
    except (OSError, SystemExit):
        raise
    except Exception as error:  # noqa: BLE001 - exit code 1 would say that the run has finished
        messages.say(*traceback.format_exc().splitlines())
        name = type(error).__name__
        _say(f"this is a bug in bulkwf ({name}): report it with the lines above. To continue, run the same command.")
        return EXIT_BUG


def _open_closed_standard_files() -> None:
    """Open /dev/null in place of each closed standard file. Otherwise the next opened file would get its number.

    Reading a closed stdin and writing to a closed stdout still fail. Messages to a closed stderr are lost.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115 - open to the end


def main() -> None:
    """Run the command that the process was called with, and exit with its code."""
    code = 0
    try:
        _open_closed_standard_files()
        output.take_over()
        messages.take_over()
        process.watch_signals()
        code = _call(sys.argv[1:])
        output.finish()
    except KeyboardInterrupt:  # the command does not handle signals, or not yet
        output.abandon()
        code = 128 + signal.SIGINT
    except output.ReaderGone:
        pass  # `| head` is no error
    except SystemRefused as error:
        _say(str(error))
        code = error.exit_code
    except output.OutputError as error:
        _say(f"standard output can't be written: {error.strerror}. It is incomplete: run the same command again.")
        code = code or EXIT_SYSTEM
    except OSError as error:
        _say(f"the system refuses what the command needs: {error}.")
        code = EXIT_SYSTEM
    process.exit_now(code)
