"""What a verification looks for: the rows that a checkpoint calls created or existed, or a random sample of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bulkwf.checkpoint import Status, read_results
from bulkwf.errors import CheckpointError
from bulkwf.model import Result

__all__ = ["Scope", "draw_positions", "wanted"]


@dataclass(frozen=True, slots=True)
class Scope:
    """What is to be verified.

    Attributes:
        path: The checkpoint.
        status: The checkpoint's status.
        sample: Size of a random sample of the instances; None for all of them.
    """

    path: Path
    status: Status
    sample: int | None

    @property
    def total(self) -> int:
        """Rows that the checkpoint calls created or existed."""
        return self.status.counts.created + self.status.counts.existed

    @property
    def run(self) -> str:
        """Identifies the run: when it was created, and its run key."""
        return f"{self.status.created_at!r} {self.status.header.run_key}"


def wanted(scope: Scope, random: Callable[[], float]) -> Iterator[Result]:
    """The results whose instances are to be verified, in the order of the rows.

    Args:
        scope: What is to be verified.
        random: Returns a random number from 0 to 1, to draw the sample.

    Raises:
        CheckpointError: The sample is empty, or the checkpoint can't be read.
    """
    found = (result for result in read_results(scope.path) if result.outcome in ("created", "existed"))
    if scope.sample is None:
        yield from found
        return
    if scope.sample < 1:
        raise CheckpointError("a sample has at least one instance.")
    next_position = 0
    for position in sorted(draw_positions(min(scope.sample, scope.total), scope.total, random)):
        # A run under way may have more rows by now than `total`, never fewer.
        yield from islice(found, position - next_position, position - next_position + 1)
        next_position = position + 1


def draw_positions(number: int, total: int, random: Callable[[], float]) -> set[int]:
    """*number* different positions from 0 to *total* - 1; every set of that size is equally likely."""
    positions: set[int] = set()
    for top in range(total - number, total):  # Floyd's algorithm: draws *number* times, never one position twice
        position = min(top, int(random() * (top + 1)))
        positions.add(top if position in positions else position)
    return positions
