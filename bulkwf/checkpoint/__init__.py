"""The checkpoint: one SQLite file that holds the outcome of every row.

Rules:

1. `begin` makes a batch's ids durable before a byte of it is sent.
2. `settle` makes results durable before they are counted, shown or returned. A batch may be settled in several steps.
3. Batches begin in the order of the rows, so the file covers the list from its first row without a gap.
4. One process writes; others may read at any time.
5. Neither params nor credentials are written. The service's messages about rows are stored without the credential.
6. Each record that a later session reads has a checksum; `records`, `attempts` and `sessions` verify it.

One thread writes, through one connection (`commits`, `connection`).
"""

from bulkwf.checkpoint.attempts import Past
from bulkwf.checkpoint.commits import Executor, inline
from bulkwf.checkpoint.errors import damaged, explain
from bulkwf.checkpoint.reading import Status, read_boot, read_results, read_run_past, read_status
from bulkwf.checkpoint.records import Begun
from bulkwf.checkpoint.schema import ANOTHER, Attempt, Interval, RunHeader
from bulkwf.checkpoint.writer import Checkpoint

__all__ = [
    "ANOTHER",
    "Attempt",
    "Begun",
    "Checkpoint",
    "Executor",
    "Interval",
    "Past",
    "RunHeader",
    "Status",
    "damaged",
    "explain",
    "inline",
    "read_boot",
    "read_results",
    "read_run_past",
    "read_status",
]
