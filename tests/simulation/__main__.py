"""Plays seeds: `python -m simulation 17` prints all that happens; `python -m simulation 0 100000` plays many."""

import sys
import time

from simulation.play import play, play_many


def print_progress(done: int, broken: int, began: float) -> None:
    """Print the progress."""
    sys.stdout.write(f"{done:,} seeds, {broken} broken, {time.monotonic() - began:,.0f} s\n")
    sys.stdout.flush()


def main() -> int:
    """Returns the exit code: 1 if a promise was broken."""
    numbers = [int(word) for word in sys.argv[1:]]
    if len(numbers) == 1:
        sys.stdout.write(play(numbers[0]) + "\n")
        return 0
    began, done, broken = time.monotonic(), 0, 0
    for number, (count, wrong) in enumerate(play_many(range(*numbers)), 1):
        done, broken = done + count, broken + (wrong is not None)
        if wrong:
            sys.stdout.write(f"{wrong}\n")
        if wrong or number % 40 == 0:
            print_progress(done, broken, began)
    print_progress(done, broken, began)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
