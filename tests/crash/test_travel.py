"""The checkpoint between two sessions: copied, moved, linked, split from its log, restored from an older copy.

The next run either continues and starts no row a second time, or it is refused and sends nothing. Which of the two is
known for each journey, except for an older file with a newer log, where SQLite may or may not see damage.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from command import Running, Service, emulator, until
from torture import scaled, tally

from bulkwf.emulator import read_log
from crash.oracle import COUNT_FLAWS, RULES, Oracle, draw_rows, take_ids, write_list

pytestmark = pytest.mark.slow

LISTS = scaled(4, 200)
STOPS = 4
"""Stops of each list's run, with a journey after each."""


class Journey(NamedTuple):
    """What happens to a checkpoint between two sessions."""

    name: str
    refused: bool | None = False
    """The next run is refused; None: it may be."""
    older: bool = False
    """The checkpoint may lack rows that were started, without any sign of it."""


COPIED = Journey("copied with its log")
MOVED = Journey("moved with its log")
COPIED_ALONE = Journey("copied without its log")
MOVED_ALONE = Journey("moved without its log")
RESTORED = Journey("restored from an older copy", older=True)
MIXED = Journey("an older copy beside the newer log", refused=None, older=True)
LINKED = Journey("linked", refused=True)
LOG_ALONE = Journey("the file deleted, and its log not", refused=True)
EMPTIED = Journey("the file emptied, and its log not", refused=True)
JOURNEYS = (COPIED_ALONE, LINKED, RESTORED, MOVED, EMPTIED, MOVED_ALONE, MIXED, COPIED, LOG_ALONE)


class Traveller:
    """A checkpoint that is copied and moved."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._stops = 0
        self.file = self._place()
        self._older: bytes | None = None

    def travel(self, journey: Journey) -> bool:
        """Send the file on a journey; False if this journey is not possible now."""
        here, log = self.file, _log(self.file)
        older, self._older = self._older, here.read_bytes()
        there = self._place()
        if journey.refused is not False and not log.exists() and journey is not LINKED:
            return False
        if journey in (COPIED, COPIED_ALONE):
            shutil.copy(here, there)
        elif journey in (MOVED, MOVED_ALONE):
            here.rename(there)
        elif journey in (RESTORED, MIXED):
            there.write_bytes(older or self._older)
        elif journey is LINKED:
            os.link(here, there)
        elif journey is EMPTIED:
            there.touch()
        if journey in (COPIED, MOVED, LINKED, MIXED, EMPTIED, LOG_ALONE) and log.exists():
            shutil.copy(log, _log(there))
        if journey is MOVED and log.exists():
            log.unlink()
        self.file = there
        return True

    def come_back(self) -> None:
        """After a refusal: restore the main file as it was before the last journey."""
        self.file = self._place()
        self.file.write_bytes(self._older)

    def _place(self) -> Path:
        self._stops += 1
        folder = Path(f"place-{self._number}-{self._stops}")
        folder.mkdir()
        return folder / "rows.bulkwf"


def _log(file: Path) -> Path:
    return file.with_name(file.name + "-wal")


counted = tally(
    "checkpoints of {lists:,} lists between sessions: "
    + ", ".join(f"{{{journey.name}:,}} {journey.name}" for journey in JOURNEYS)
    + f": {COUNT_FLAWS}"
)


def stop_somewhere(run: Running, service: Service, chance: random.Random, *, kill: bool) -> None:
    """Kill the run, or drain it, soon after it has started an instance."""
    size = service.log.stat().st_size
    until(lambda: service.log.stat().st_size > size or run.process.poll() is not None, "an instance or the end")
    time.sleep(chance.uniform(0.0, 0.1))
    run.signal(signal.SIGKILL if kill else signal.SIGTERM)
    assert run.wait().code in (0, 1, -signal.SIGKILL, 128 + signal.SIGTERM)


@pytest.mark.parametrize("seed", range(LISTS))
def test_a_checkpoint_moved_or_copied_between_sessions_starts_no_row_twice(memory, quick, seed):
    chance = random.Random(seed)
    rows = draw_rows(chance, chance.choice((400, 1_000)))
    name, *_ = write_list(rows)
    oracle = Oracle(rows, older=True)
    with emulator(faults=[*RULES, {"latency_s": [0.0, 0.05], "method": "POST"}], start=quick.start) as service:
        take_ids(service, rows)
        traveller = Traveller(seed)

        def run():
            return "run", name, "-c", traveller.file, *service.flags(), "--batch-size", chance.choice((5, 20))

        for stop in range(STOPS):
            journey = JOURNEYS[(seed * STOPS + stop) % len(JOURNEYS)]
            with quick.start(*run(), "--concurrency", chance.choice((1, 2))) as stopped:
                stop_somewhere(stopped, service, chance, kill=journey.refused is not False or chance.random() < 0.7)
            if not traveller.file.exists() or not traveller.travel(journey):
                continue
            counted[journey.name] += 1
            if journey.refused is False:
                continue
            ended = quick(*run())
            if journey.refused:
                assert ended.code == 4, (journey, ended.err)
                assert " requests" not in ended.err, (journey, ended.err)  # it sent nothing
            if ended.code == 4:
                traveller.come_back()
        ended = quick(*run(), "--concurrency", 16)
        oracle.judge(traveller.file, read_log(service.log))
    counted.update(oracle.flaws, lists=1)
    oracle.assert_flawless()
    assert ended.code == oracle.code, ended.err
