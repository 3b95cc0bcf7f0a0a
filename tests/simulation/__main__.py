"""Plays seeds: `python -m simulation 17` one, with all that happened; `python -m simulation 0 100000` many."""

import sys
import time

from simulation.play import play, play_many


def tell(done: int, broken: int, began: float) -> None:
    """How far it has come."""
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
            tell(done, broken, began)
    tell(done, broken, began)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
