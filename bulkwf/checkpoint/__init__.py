"""The checkpoint: one SQLite file that knows what has become of every row.

Rules:

1. `begin` makes a batch's ids durable before a byte of it goes to the network.
2. `settle` makes results durable before they are counted, shown or returned; it may come several times for one batch.
3. Batches begin in the order of the rows, so the file covers the list's rows from the first one without a gap.
4. One process writes, others may read at any time.
5. Neither params nor credentials are written. What the service says of a row is kept, less the credential.
6. Each record is sealed with a checksum, and verified wherever it is read (`records`).

All writing goes through one connection in one thread. What queues up during one commit makes the next one, so the cost
of a commit is shared by as many batches as happen to wait for it.
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
