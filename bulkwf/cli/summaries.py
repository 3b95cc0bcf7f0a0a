"""What a run, a verification, a check or a checkpoint has come to, as lines for people."""

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from bulkwf.check import CheckReport
from bulkwf.checkpoint import Status, read_results
from bulkwf.cli.display import duration
from bulkwf.cli.shell import shell_command
from bulkwf.model import Summary
from bulkwf.options import Options
from bulkwf.run import Run
from bulkwf.text import clean
from bulkwf.verification import Verified

__all__ = ["check_lines", "status_lines", "summary_lines", "verified_lines", "when"]

FAILURES_READ = 10_000

FAILURES_SHOWN = 10

EXAMPLES_SHOWN = 3


def summary_lines(run: Run, summary: Summary) -> Iterator[str]:
    """What the run has come to."""
    if summary.complete and not summary.rows:
        yield "the list is empty: there was nothing to do"
        return
    if summary.complete and not summary.settled_now:
        yield "nothing new: every row of the list was settled by an earlier run"
        if summary.rejected or summary.invalid:
            yield "rows that were refused stay so, corrected or not: submit corrected ones as a list of their own"
    for name in ("created", "existed", "rejected", "invalid", "pending"):
        count = getattr(summary, name)
        if count or name == "created":
            doubt = ""
            if name == "existed" and summary.existed_in_doubt:
                doubt = f"  ({summary.existed_in_doubt:,} of them after an attempt of this run whose answer was lost)"
            yield f"{name:>9}  {count:>12,}{doubt}"
    paused = f", {duration(summary.paused_s)} of it paused" if summary.paused_s else ""
    rate = summary.settled_now / max(summary.elapsed_s, 1e-9)
    yield (
        f"{summary.settled_now:,} rows settled in {duration(summary.elapsed_s)}{paused}: {rate:,.1f}/s, "
        f"{summary.attempts:,} requests"
    )
    if not summary.complete and run.progress.read_share is not None:
        yield f"{run.progress.read_share:.0%} of the list has been begun"
    if run.checkpoint is not None:
        if summary.rejected or summary.invalid:
            yield from _failures(run, run.checkpoint)
        yield f"checkpoint: {run.checkpoint}"


def _failures(run: Run, checkpoint: Path) -> Iterator[str]:
    """Why rows failed: each reason with its count and the first places."""
    counts: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], list[str]] = {}
    read = 0
    for outcome in ("rejected", "invalid"):
        for result in islice(read_results(checkpoint, outcome=outcome), FAILURES_READ):
            read += 1
            message = result.message or ""
            key = (outcome, str(result.code))
            counts[key] += 1
            examples = places.setdefault(key, [])
            if len(examples) < EXAMPLES_SHOWN:
                examples.append(f"    {run.where(result.row)}: {message}")
    for key, count in counts.most_common(FAILURES_SHOWN):
        outcome, code = key
        yield f"{outcome}, {code}: {count:,}{'' if read < FAILURES_READ else ' or more'}"
        yield from places[key]
    command = shell_command(["bulkwf", "results", str(checkpoint), "--outcome", "rejected"])
    yield f"all of them: {command} (or invalid)"


def verified_lines(verified: Verified) -> Iterator[str]:
    """What a verification has come to."""
    drawn = "" if verified.instances == verified.total else f", drawn at random from {verified.total:,}"
    yield f"{verified.instances:,} instances{drawn}"
    for status, count in verified.statuses.items():
        yield f"{count:>12,}  {clean(status)}"
    yield f"{verified.missing:>12,}  missing"
    if verified.unknown:
        yield f"{verified.unknown:>12,}  unknown: the service does not answer when it is asked for them"
    unasked = verified.instances - verified.found - verified.missing - verified.unknown
    if unasked:
        yield f"{unasked:>12,}  not asked for yet"
    yield f"{verified.requests:,} requests in {duration(verified.elapsed_s)}"
    if not verified.run_finished:
        yield "the run is not finished: what it has not created yet was not looked for"


def check_lines(report: CheckReport, options: Options) -> Iterator[str]:
    """What a check has found."""
    for place, reason in report.examples:
        yield f"{place}: {reason}"
    refused = report.invalid.total()
    more = refused + report.duplicates - len(report.examples)
    if more > 0:
        yield f"… and {more:,} more"
    yield f"{report.rows:,} rows: {report.instances:,} can be sent, {refused:,} are invalid"
    for code, count in report.invalid.most_common():
        yield f"  {code}: {count:,}"
    if report.duplicates:
        yield f"{report.duplicates:,} rows have the id of an earlier row: a run calls them existing, or invalid"
    least_s, limit = report.shortest_s(options)
    yield f"{report.batches:,} requests; at least {duration(least_s)}, bound by {limit}"


def status_lines(status: Status) -> Iterator[str]:
    """What a checkpoint says of its run."""
    header, counts = status.header, status.counts
    state = "not finished" if status.finished_at is None else f"finished {when(status.finished_at)}"
    place = f"workflow {header.workflow}, account {header.account_id}, {header.base_url}"
    yield clean(f"run of {header.input} to {place}", 1_000)
    yield f"begun {when(status.created_at)}, {state}"
    for name in ("created", "existed", "rejected", "invalid", "pending"):
        yield f"{name:>9}  {getattr(counts, name):>12,}"
    yield f"{status.rows:,} lines of the list begun in {status.batches:,} batches, {status.attempts:,} requests"
    if status.batches_in_doubt:
        yield f"{status.batches_in_doubt:,} batches in doubt: the same `bulkwf run` as before settles them"
    if status.pause_until is not None and status.pause_until > time.time():
        yield f"all sending pauses until {when(status.pause_until)}"


def when(unix_s: float) -> str:
    """A time of day for people, in the local zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
