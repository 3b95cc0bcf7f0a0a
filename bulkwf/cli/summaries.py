"""The lines that a run, a verification, a check and a status print for people."""

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from bulkwf.check import CheckReport
from bulkwf.checkpoint import Status, read_results
from bulkwf.cli.display import duration
from bulkwf.cli.shell import shell_command
from bulkwf.model import RowOutcome, Summary
from bulkwf.options import Options
from bulkwf.run import Run
from bulkwf.text import clean, counted
from bulkwf.verification import Verified

__all__ = ["check_lines", "status_lines", "summary_lines", "verified_lines", "when"]

FAILURES: tuple[RowOutcome, ...] = ("rejected", "invalid")
FAILURES_READ = 10_000
"""Maximum number of failed rows of each outcome that are read to count the reasons."""
REASONS_SHOWN = 10
EXAMPLES_SHOWN = 3
"""Number of rows that are shown for each reason."""
SHOWN_PAUSE_S = 0.05
"""Shortest pause that is shown, in seconds. A shorter one would be shown as 0.0 s."""


def summary_lines(run: Run, summary: Summary) -> Iterator[str]:
    """The counts of a run, its speed, and why rows failed."""
    if summary.complete and not summary.rows:
        yield "the list is empty: there was nothing to do"
        return
    if summary.complete and not summary.settled_now:
        yield "nothing new: every row of the list was settled by an earlier run"
    yield from _outcome_lines(summary)
    paused = f", {duration(summary.paused_s)} of it paused" if summary.paused_s >= SHOWN_PAUSE_S else ""
    rate = summary.settled_now / max(summary.elapsed_s, 1e-9)
    yield (
        f"{counted(summary.settled_now, 'row')} settled in {duration(summary.elapsed_s)}{paused}: {rate:,.1f}/s, "
        f"{counted(summary.attempts, 'request')}"
    )
    if not summary.complete and run.progress.read_share is not None:
        yield f"{run.progress.read_share:.0%} of the list was read"
    if run.checkpoint is not None:
        yield from _failure_lines(run, run.checkpoint, summary)
        yield f"checkpoint: {run.checkpoint}"


def _outcome_lines(summary: Summary) -> Iterator[str]:
    for name in ("created", "existed", "rejected", "invalid", "pending"):
        count = getattr(summary, name)
        if count or name == "created":
            doubt = ""
            if name == "existed" and summary.existed_in_doubt:
                doubt = f"  ({summary.existed_in_doubt:,} of them after an attempt of this run whose answer was lost)"
            yield f"{name:>9}  {count:>12,}{doubt}"


def _failure_lines(run: Run, checkpoint: Path, summary: Summary) -> Iterator[str]:
    """Each reason for which rows failed, with its count and its first rows; then what to do about these rows."""
    outcomes = [name for name in FAILURES if getattr(summary, name)]
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    read = 0
    for outcome in outcomes:
        for result in islice(read_results(checkpoint, outcome=outcome), FAILURES_READ):
            read += 1
            reason = f"{outcome}, {result.code}"
            counts[reason] += 1
            shown = examples.setdefault(reason, [])
            if len(shown) < EXAMPLES_SHOWN:
                shown.append(f"    {run.where(result.row)}: {result.message or ''}")
    for reason, count in counts.most_common(REASONS_SHOWN):
        yield f"{reason}: {counted(count, 'row')}{'' if read < FAILURES_READ else ' or more'}"
        yield from examples[reason]
    for outcome in outcomes:
        yield f"all {outcome} rows: {shell_command(['bulkwf', 'results', str(checkpoint), '--outcome', outcome])}"
    if outcomes:
        yield "next: correct these rows, and submit them in a list of their own"


def verified_lines(verified: Verified) -> Iterator[str]:
    """The counts of a verification."""
    drawn = "" if verified.instances == verified.total else f", drawn at random from {verified.total:,}"
    yield f"{counted(verified.instances, 'instance')}{drawn}"
    for status, count in verified.statuses.items():
        yield f"{count:>12,}  {clean(status)}"
    yield f"{verified.missing:>12,}  missing"
    if verified.unknown:
        yield f"{verified.unknown:>12,}  unknown: the service does not answer look-ups of them"
    unasked = verified.instances - verified.found - verified.missing - verified.unknown
    if unasked:
        yield f"{unasked:>12,}  not asked for yet"
    yield f"{counted(verified.requests, 'request')} in {duration(verified.elapsed_s)}"
    if not verified.run_finished:
        yield "the run is not finished: rows that it has not settled yet were not looked for"


def check_lines(report: CheckReport, options: Options) -> Iterator[str]:
    """The problems of a list, its counts, and the shortest time that it can take."""
    for place, reason in report.examples:
        yield f"{place}: {reason}"
    invalid = report.invalid.total()
    more = invalid + report.duplicates - len(report.examples)
    if more > 0:
        yield f"… and {more:,} more"
    yield f"{counted(report.rows, 'row')}: {report.instances:,} can be sent, {invalid:,} invalid"
    for code, count in report.invalid.most_common():
        yield f"  {code}: {count:,}"
    if report.duplicates:
        have = "row has" if report.duplicates == 1 else "rows have"
        yield f"{report.duplicates:,} {have} the id of an earlier row: the outcome will be existed, or invalid"
    least_s, limit = report.shortest_s(options)
    yield f"{counted(report.batches, 'request')}; at least {duration(least_s)}, bound by {limit}"


def status_lines(status: Status) -> Iterator[str]:
    """The state of a run, as its checkpoint stores it."""
    header, counts = status.header, status.counts
    state = "not finished" if status.finished_at is None else f"finished {when(status.finished_at)}"
    place = f"workflow {header.workflow}, account {header.account_id}, {header.base_url}"
    yield clean(f"run of {header.input} to {place}", 1_000)
    yield f"started {when(status.created_at)}, {state}"
    for name in ("created", "existed", "rejected", "invalid", "pending"):
        yield f"{name:>9}  {getattr(counts, name):>12,}"
    batches, requests = counted(status.batches, "batch"), counted(status.attempts, "request")
    yield f"{counted(status.rows, 'line')} of the list in {batches}, {requests}"
    if status.batches_in_doubt:
        doubt = counted(status.batches_in_doubt, "batch")
        yield f"{doubt} in doubt: run the same `bulkwf run` command again to settle their rows"
    if status.pause_until is not None and status.pause_until > time.time():
        yield f"all sending is paused until {when(status.pause_until)}"


def when(unix_s: float) -> str:
    """Date and time in the local time zone, for display."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
