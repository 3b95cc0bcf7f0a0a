"""The live display of a run or a verification."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from bulkwf.cli import messages
from bulkwf.run import Run
from bulkwf.text import counted, printable
from bulkwf.verification import Verification

__all__ = ["Shown", "ShownRun", "ShownVerification", "duration", "show_progress"]

LINE_EVERY_S = 30.0

BAR_EVERY_S = 0.25


def duration(seconds: float) -> str:
    """*seconds* for people: `4.2 s`, `3 min 20 s`, `27 h 46 min`."""
    if seconds < 59.95:  # or it would read as 60.0 s
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


class Shown(Protocol):
    """Work whose progress is shown."""

    def share(self) -> float | None:
        """The share of the work that is done, from 0 to 1; None if unknown."""
        ...

    def facts(self, now: float) -> Iterator[str]:
        """The state of the work as short texts, the most important first; *now* by the loop's clock."""
        ...


@asynccontextmanager
async def show_progress(work: Shown, *, quiet: bool) -> AsyncIterator[None]:
    """Show the progress of *work* while the block lasts: a bar on a terminal, otherwise a line each half minute."""
    if quiet:
        yield
        return
    shown = asyncio.ensure_future(_show_bar(work) if messages.is_terminal() else _say_lines(work))
    try:
        yield
    finally:
        shown.cancel()
        await asyncio.gather(shown, return_exceptions=True)  # an error in the display does not end the work


async def _say_lines(work: Shown) -> None:
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        messages.say("bulkwf: " + "; ".join(work.facts(asyncio.get_running_loop().time())))


async def _show_bar(work: Shown) -> None:
    from rich.console import Console  # noqa: PLC0415 - takes 40 ms, and only a terminal needs it
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)
        while True:
            if messages.wait_written():  # otherwise the terminal is stopped, and frames would fill the queue
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
    """A run whose progress is shown."""

    run: Run

    def share(self) -> float | None:
        """See `Shown.share`."""
        return self.run.progress.read_share

    def facts(self, now: float) -> Iterator[str]:
        """See `Shown.facts`."""
        run, progress, counts = self.run, self.run.progress, self.run.progress.counts
        yield f"{counted(counts.settled, 'row')} settled"
        if progress.read_share is not None:
            yield f"{progress.read_share:.0%} read"
        yield f"{progress.rate(now):,.0f}/s"
        yield from _obstacle(run.last_error, run.bound_by)
        for name in ("existed", "rejected", "invalid"):
            if count := getattr(counts, name):
                yield f"{count:,} {name}"
        left = None if run.last_error else progress.left_s(now)
        if left is not None:
            yield f"{duration(left)} left"


@dataclass
class ShownVerification:
    """A verification whose progress is shown."""

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
        yield f"{verification.answered:,} of {counted(verification.wanted, 'instance')} asked for"
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
