"""What a person sees: the live bar or a line now and then, the summary, the report of a check. All of it on stderr."""

import asyncio
import os
import shlex
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from bulkwf import messages
from bulkwf.api import Run
from bulkwf.checking import CheckReport
from bulkwf.checkpoint import Status, read_results
from bulkwf.model import Summary
from bulkwf.options import Options
from bulkwf.payload import clean, printable
from bulkwf.verification import Verification, Verified

__all__ = [
    "Shown",
    "ShownRun",
    "ShownVerification",
    "check_lines",
    "duration",
    "shell_command",
    "show_progress",
    "status_lines",
    "summary_lines",
    "verified_lines",
    "when",
]

LINE_EVERY_S = 30.0
BAR_EVERY_S = 0.25
FAILURES_READ = 10_000
FAILURES_SHOWN = 10
EXAMPLES_SHOWN = 3


def duration(seconds: float) -> str:
    """*seconds* for people: `4.2 s`, `3 min 20 s`, `27 h 46 min`."""
    if seconds < 59.95:  # or it would read as 60.0 s
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def shell_command(words: Iterable[str]) -> str:
    """*words* as a command for a shell, of characters that can be printed alone."""
    return " ".join(shlex.quote(word) if word.isprintable() else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    r"""*word*, with its odd bytes as `\xHH`: bash, zsh and ksh read that between `$'` and `'`."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(plain)}'"


# --- while it runs ------------------------------------------------------------------------------------------------


class Shown(Protocol):
    """Work under way, as it is shown."""

    def share(self) -> float | None:
        """How much of it is done, from 0 to 1; None if that is unknown."""
        ...

    def facts(self, now: float) -> Iterator[str]:
        """What is worth knowing now, the most important first."""
        ...


@asynccontextmanager
async def show_progress(work: Shown, *, quiet: bool) -> AsyncIterator[None]:
    """Show how *work* goes while the block lasts: a live bar on a terminal, else a line every half minute."""
    if quiet:
        yield
        return
    shown = asyncio.ensure_future(_show_bar(work) if messages.is_terminal() else _say_lines(work))
    try:
        yield
    finally:
        shown.cancel()
        await asyncio.gather(shown, return_exceptions=True)  # what goes wrong in the display does not end the work


async def _say_lines(work: Shown) -> None:
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        messages.say("bulkwf: " + "; ".join(work.facts(asyncio.get_running_loop().time())))


async def _show_bar(work: Shown) -> None:
    from rich.console import Console  # noqa: PLC0415 - 40 ms that only a terminal is worth
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)
        while True:
            if messages.wait_written():  # else the terminal is stopped, and frames would pile up
                share = work.share()
                bar.update(
                    task,
                    total=None if share is None else 1.0,
                    completed=share or 0.0,
                    description=printable(" · ".join(work.facts(asyncio.get_running_loop().time()))),
                    refresh=True,
                )
            await asyncio.sleep(BAR_EVERY_S)


@dataclass(frozen=True)
class ShownRun:
    """A run as it is shown."""

    run: Run

    def share(self) -> float | None:
        """See `Shown.share`."""
        return self.run.progress.read_share

    def facts(self, now: float) -> Iterator[str]:
        """See `Shown.facts`."""
        run, progress, counts = self.run, self.run.progress, self.run.progress.counts
        yield f"{counts.settled:,} rows settled"
        if progress.read_share is not None:
            yield f"{progress.read_share:.0%} read"
        yield f"{progress.rate(now):,.0f}/s"
        yield from _obstacle(run.last_error, run.bound_by)
        for name in ("existed", "rejected", "invalid"):
            if count := getattr(counts, name):
                yield f"{count:,} {name}"
        left = progress.left_s(now)
        if left is not None:
            yield f"{duration(left)} left"


@dataclass
class ShownVerification:
    """A verification as it is shown."""

    verification: Verification

    def __post_init__(self) -> None:
        self._began_with = self.verification.answered
        self._began_at = asyncio.get_running_loop().time()

    def share(self) -> float | None:
        """See `Shown.share`."""
        return self.verification.answered / max(self.verification.wanted, 1)

    def facts(self, now: float) -> Iterator[str]:
        """See `Shown.facts`."""
        verification = self.verification
        yield f"{verification.answered:,} of {verification.wanted:,} instances asked for"
        if verification.missing:
            yield f"{verification.missing:,} missing"
        yield from _obstacle(verification.last_error, verification.bound_by)
        rate = (verification.answered - self._began_with) / max(now - self._began_at, 1e-9)
        if rate:
            yield f"{duration((verification.wanted - verification.answered) / rate)} left"


def _obstacle(last_error: str, bound_by: str) -> Iterator[str]:
    if last_error:
        yield f"failing: {last_error}"
    elif bound_by:
        yield f"limit: {bound_by}"


# --- at the end ---------------------------------------------------------------------------------------------------


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
        yield f"the service has ordered silence until {when(status.pause_until)}"


def when(unix_s: float) -> str:
    """A time of day for people, in the local zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
