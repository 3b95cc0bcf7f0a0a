"""How large a request body may be, learned from refusals. Pure."""

from bulkwf.options import MIN_BATCH_BYTES

__all__ = ["BodyLimit"]

FIRST_WAIT = 8
LONGEST_WAIT = 1_024


class BodyLimit:
    """The maximum size of a request body.

    A refusal as too large says nothing about later bodies by itself: one row may be its cause, and a server on the path
    may refuse a body once. So the limit is halved only after all rows of the refused body were accepted in smaller
    ones, and it is doubled again after a number of batches. This number doubles each time that the limit is halved: a
    server with a lower limit of its own refuses few bodies in a run.

    Args:
        most: The size that the user allows, in bytes.

    Attributes:
        size: The present limit, in bytes; at least `MIN_BATCH_BYTES`.
    """

    def __init__(self, most: int) -> None:
        self.size = most
        self._most = most
        self._wait = FIRST_WAIT
        self._passed = 0

    def too_large(self, size: int) -> None:
        """A body of *size* bytes was refused as too large, and all its rows were accepted in smaller bodies."""
        if size // 2 < self.size:
            self.size = max(MIN_BATCH_BYTES, size // 2)
            self._wait, self._passed = min(2 * self._wait, LONGEST_WAIT), 0

    def passed(self) -> None:
        """A batch was accepted whole."""
        self._passed += 1
        if self.size < self._most and self._passed >= self._wait:
            self.size, self._passed = min(2 * self.size, self._most), 0
