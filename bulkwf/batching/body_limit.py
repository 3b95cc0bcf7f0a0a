"""How large a request body may be, learned from refusals. Pure."""

from bulkwf.options import MIN_BATCH_BYTES

__all__ = ["BodyLimit"]

FIRST_WAIT = 8
LONGEST_WAIT = 1_024
"""How many batches must be accepted before the limit is doubled: at first, and at most."""


class BodyLimit:
    """The maximum size of a request body.

    A body is too large if it is refused, and all its rows are accepted in smaller bodies. Then the limit is halved. It
    is doubled again after a number of batches, as the refusal may have been an error. If that makes bodies too large
    again, the next attempt to double it comes after twice that number.

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
        self._doubled = False

    def too_large(self, size: int) -> None:
        """A body of *size* bytes was too large."""
        if size > self.size or self.size == MIN_BATCH_BYTES:  # it was begun under an earlier limit; or no limit helps
            return
        if self._doubled:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        self.size, self._passed, self._doubled = max(MIN_BATCH_BYTES, size // 2), 0, False

    def passed(self) -> None:
        """A batch was accepted whole."""
        self._passed += 1
        if self.size < self._most and self._passed >= self._wait:
            self.size, self._passed, self._doubled = min(2 * self.size, self._most), 0, True
