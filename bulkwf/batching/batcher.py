"""Decides where a batch ends. `run` and `check` both use it, so `check` counts the requests that `run` makes. Pure.

A batch ends with the first of these:

1. It holds as many instances as one request may carry: the batch limit; or fewer, if that uses the rate better or while
   bad rows are frequent.
2. It holds as many rows as a batch may have, blank and invalid rows included.
3. The next row would make it larger than the maximum size in bytes.
4. The list ends, or the source is slow and the linger time is over.

Blank and invalid rows are not sent, so the batch takes further rows in their place.
"""

from collections.abc import Sequence
from math import inf
from typing import Protocol

from bulkwf.batching.bad_rows import BadRowRate, Search
from bulkwf.batching.body_limit import BodyLimit
from bulkwf.batching.ids import IdScheme
from bulkwf.batching.lines import Cut
from bulkwf.batching.packer import Packer
from bulkwf.model import Batch, Slice
from bulkwf.options import INSTANCE_PERIOD_S, REQUEST_PERIOD_S, Options, RateLimits

__all__ = ["ITEM_OVERHEAD_BYTES", "Batcher", "even_share", "request_cost"]

ITEM_OVERHEAD_BYTES = 130
"""Upper bound of what a request adds to each row, in bytes: the id, its key, separators and the outer brackets."""
LEAST_REQUEST_COST = 5.0
MOST_REQUEST_COST = 1_000.0
"""Bounds of `request_cost`, in instances."""


def even_share(instances: int, rate: RateLimits) -> int:
    """How many instances each batch should hold to use the rate best, if at most *instances* fit into one request.

    At a rate of 100 instances a second, batches of 68 would use only 68 of them in each second; batches of 50 use all.
    Smaller batches need more requests, so they are used only if they gain more than 5 %.
    """
    most, quota = rate.instances_per_s, rate.requests_per_5m
    if most is None or instances >= most:
        return most or instances
    requests_per_s = inf if quota is None else quota * INSTANCE_PERIOD_S / REQUEST_PERIOD_S

    def used(size: int) -> float:
        return min(most // size, requests_per_s) * size

    even = most // -(-most // instances)
    return even if used(even) > 1.05 * used(instances) else instances


def request_cost(rate: RateLimits) -> float:
    """The cost of one request: how many instances the limits admit in the time in which they admit one request.

    At least `LEAST_REQUEST_COST`: a request takes a round trip, whatever the limits are.
    """
    if rate.instances_per_s is None:
        return MOST_REQUEST_COST
    if rate.requests_per_5m is None:
        return LEAST_REQUEST_COST
    cost = rate.instances_per_s * REQUEST_PERIOD_S / (rate.requests_per_5m * INSTANCE_PERIOD_S)
    return min(max(cost, LEAST_REQUEST_COST), MOST_REQUEST_COST)


class RowSource(Protocol):
    """Gives rows, as `sources.Source` does."""

    async def peek(
        self, max_rows: int, max_bytes: int, max_wait_s: float | None = None, *, joining: bool = False
    ) -> Cut:
        """The next rows that fit into both bounds; 0 rows at the end of the list. See `sources.Source.peek`."""
        ...

    def take(self, found: Cut) -> Slice:
        """Take the rows *found* by the last `peek`."""
        ...


class Batcher:
    """Cuts a list into batches.

    Args:
        source: The list.
        scheme: How rows get ids.
        options: The batch limits, the rate and the row shape.
        linger_s: Longest time to wait for more rows once a batch has some, in seconds; None waits until it is full.

    Attributes:
        body_limit: The maximum size of a request's body, unless one row alone is larger. Batches that have begun keep
            their size.
        bad_rows: How frequent bad rows are in the run: batches are smaller while they are frequent.
    """

    def __init__(self, source: RowSource, scheme: IdScheme, options: Options, *, linger_s: float | None) -> None:
        self.body_limit = BodyLimit(options.batch.bytes)
        self._source = source
        self._scheme = scheme
        self._row_shape = options.row_shape
        self._rate = options.rate
        self.bad_rows = BadRowRate(options.batch.instances)
        self._max_rows = options.batch.rows
        self._linger_s = linger_s

    async def next(self) -> Batch | None:
        """The next rows as a batch; None at the end of the list.

        Raises:
            InputError: The list can't be read further. All rows before the fault have been returned.
        """
        packer = Packer(self._scheme, self._row_shape)
        while True:
            rows, size = self._room(packer)
            if rows <= 0 or size <= 0:
                break
            found = await self._source.peek(rows, size, self._linger_s, joining=packer.rows > 0)
            if found.bound == "bytes":
                found = await self._even(packer.instances, found, size)
            if not found.rows or (packer.rows and found.size > size):
                break
            packer.add(self._source.take(found), found)
            if found.rows < rows:  # bound by bytes, by the linger, or by the end of the list
                break
        return packer.pack() if packer.rows else None

    def created(self, rows: int) -> None:
        """*rows* rows were accepted in one request, the first one that held them."""
        self.bad_rows.created(rows)
        self.body_limit.passed()

    def next_part(self, pending: Sequence[int]) -> Sequence[int]:
        """The first *pending* instances of a batch, as many as one request may carry.

        That is all of them, unless the batch was begun at a higher rate or before bad rows were found.
        """
        return pending[: self._max_instances]

    def search(self, rows: Sequence[int]) -> Search:
        """A search for the bad rows of a refused request that holds *rows*."""
        return Search(rows, self.bad_rows, request_cost(self._rate))

    @property
    def _max_instances(self) -> int:
        return even_share(self.bad_rows.limit, self._rate)

    def _room(self, packer: Packer) -> tuple[int, int]:
        """How many rows, and how many bytes of rows, still fit into a batch."""
        # Small requests: at most half of the bytes may go to ids, so that there is always room for a row.
        max_bytes = self.body_limit.size
        instances = min(self._max_instances, max_bytes // (2 * ITEM_OVERHEAD_BYTES))
        rows = min(instances - packer.instances, self._max_rows - packer.rows)
        return rows, max_bytes - packer.size - instances * ITEM_OVERHEAD_BYTES

    async def _even(self, instances: int, found: Cut, max_bytes: int) -> Cut:
        """Fewer of the rows *found* if that uses the rate better; the batch holds *instances* instances already."""
        share = even_share(instances + found.rows, self._rate) - instances
        return await self._source.peek(share, max_bytes) if 0 < share < found.rows else found
