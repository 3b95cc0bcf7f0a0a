"""Plays seeds: `python -m simulation 17` one, with all that happened; `python -m simulation 0 100000` many."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from simulation.play import Broken, play

CHUNK = 250


def main() -> int:
    """Returns the exit code: 1 if a promise was broken."""
    numbers = [int(word) for word in sys.argv[1:]]
    if len(numbers) == 1:
        sys.stdout.write(play(numbers[0]) + "\n")
        return 0
    first, last = numbers
    began, done, broken = time.monotonic(), 0, 0
    with ProcessPoolExecutor() as pool:
        for count, reports in pool.map(_play_chunk, _chunks(first, last)):
            done, broken = done + count, broken + len(reports)
            news = [*reports, f"{done:,} seeds, {broken} broken, {time.monotonic() - began:,.0f} s"]
            sys.stdout.write("\n".join(news) + "\n")
            sys.stdout.flush()
    return 1 if broken else 0


def _chunks(first: int, last: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK, last)) for start in range(first, last, CHUNK))


def _play_chunk(seeds: range) -> tuple[int, list[str]]:

    reports = []
    for seed in seeds:
        try:
            play(seed)
        except Broken as error:
            reports.append(str(error))
        except Exception as error:  # noqa: BLE001 (what no oracle foresaw is a finding too)
            reports.append(f"seed {seed}: {error!r}")
    return len(seeds), reports


if __name__ == "__main__":
    sys.exit(main())
