"""The records of the run and of its batches: sealed with checksums, which are verified wherever a record is read.

A batch has three checksums: `settled_crc` covers the columns that `SETTLE` changes, `begun_crc` those that only
`BEGIN` writes. `ids_crc` covers the ids, which are most of the file and are seldom read. The first two also cover
`first_row`, so that records which have changed places are found.

A checksum finds damage, not forgery. So ids and names that will be sent are also checked against their rules: nothing
else may get into a URL or into the body of a request.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple
from zlib import crc32

import msgspec
import orjson

from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.ids import ids_are_good
from bulkwf.checkpoint.errors import Damage
from bulkwf.checkpoint.schema import HEADER_FIELDS, RunHeader
from bulkwf.clock import Boot
from bulkwf.model import Counts
from bulkwf.options import is_run_key, is_target_name

__all__ = [
    "Begun",
    "RunRecord",
    "Survey",
    "begun_row",
    "checksum",
    "read_batch",
    "read_batches",
    "read_run",
    "seal_run",
    "settled_row",
    "survey",
]

PAGE_BATCHES = 1_000
YEAR_9999 = 253_370_000_000
BEFORE_ALL = -(2**63)
"""Less than the number of any row that a file can hold."""

_encode = msgspec.msgpack.Encoder().encode
_Number = Annotated[int, msgspec.Meta(ge=0)]


def checksum(values: Sequence[Any]) -> int:
    """crc32 of *values* and their types. The types must be those that SQLite returns."""
    return crc32(_encode(values))


# --- batches ------------------------------------------------------------------------------------------------------


class Begun(NamedTuple):
    """The record of a batch. See `schema.SCHEMA` for what the fields hold."""

    first_row: _Number
    rows: Annotated[int, msgspec.Meta(ge=1)]
    settled_at: float | None
    attempts: _Number
    created: _Number
    existed: _Number
    existed_in_doubt: _Number
    rejected: _Number
    invalid: _Number
    pending: _Number
    answer: str | None
    exceptions: str | None
    size: _Number
    digest: _Number
    settled_crc: int
    begun_at: float
    retention_s: float
    ids_crc: int
    begun_crc: int
    ids: str | None
    """None if they were not read."""

    @property
    def settled(self) -> bool:
        """Whether no row of the batch is in doubt."""
        return self.settled_at is not None

    @property
    def whole(self) -> bool:
        """Whether `size` and `digest` cover all rows of the batch: none is rejected or invalid."""
        return not self.rejected + self.invalid

    def instance_ids(self) -> list[str | None]:
        """The id of each row; None for a row that is not sent.

        Raises:
            Damage: The ids do not match their checksum, or break the rules of ids.
        """
        assert self.ids is not None, "they were not read"
        if crc32(self.ids.encode()) != self.ids_crc:
            raise Damage(f"the ids of the batch at row {self.first_row} do not match their checksum")
        ids: list[str | None] = msgspec.json.decode(self.ids, type=list[str | None])
        sent = [one for one in ids if one is not None]
        if len(ids) != self.rows or (sent and not ids_are_good(sent)):
            raise Damage(f"the batch at row {self.first_row} has ids that no run writes")
        return ids

    def verify(self) -> None:
        """Raises `Damage` unless the record is what a run has written. The ids are not verified."""
        begun = (self.first_row, self.begun_at, self.retention_s, self.ids_crc)
        if checksum(self[:14]) != self.settled_crc or checksum(begun) != self.begun_crc:
            raise Damage(f"the record of the batch at row {self.first_row} does not match its checksum")
        if self.whole and self.size < self.rows:
            raise Damage(f"the batch at row {self.first_row} has fewer bytes than lines")


_COLUMNS = ", ".join(Begun._fields[:-1])
IDS_IN_DOUBT = "CASE WHEN settled_at IS NULL THEN ids END"


def read_batches(db: sqlite3.Connection, ids: str = "NULL", page: int = PAGE_BATCHES) -> Iterator[Begun]:
    """The batches in the order of their rows, each one verified except for its ids.

    They are read in pages, because a long query would keep the writer's log from being folded into the file.

    Args:
        db: The checkpoint.
        ids: SQL expression for the ids of a batch: `ids` reads them, `NULL` does not.
        page: Number of batches read at a time.

    Raises:
        ValueError: A record is damaged, or missing.
    """
    query = f"SELECT {_COLUMNS}, {ids} FROM batch WHERE first_row > ? ORDER BY first_row LIMIT ?"  # noqa: S608 - ours
    after, expected = BEFORE_ALL, 0
    while found := db.execute(query, (after, page)).fetchall():
        for begun in msgspec.convert(found, list[Begun]):
            begun.verify()
            if begun.first_row != expected:
                raise Damage(
                    f"rows {expected} to {begun.first_row - 1} are missing"
                    if begun.first_row > expected
                    else f"row {begun.first_row} stands in two batches"
                )
            after, expected = begun.first_row, begun.first_row + begun.rows
            yield begun


def read_batch(db: sqlite3.Connection, row: int) -> Begun:
    """The batch that holds *row*, verified, with its ids.

    Raises:
        ValueError: The record is damaged, or missing.
    """
    query = f"SELECT {_COLUMNS}, ids FROM batch WHERE first_row <= ? ORDER BY first_row DESC LIMIT 1"  # noqa: S608
    found = msgspec.convert(db.execute(query, (row,)).fetchall(), list[Begun])
    if not found or row >= found[0].first_row + found[0].rows:
        raise Damage(f"row {row} is missing")
    found[0].verify()
    return found[0]


def begun_row(state: BatchState, now: float) -> tuple[Any, ...]:
    """The parameters of statement `BEGIN`.

    Args:
        state: A new batch.
        now: When its ids become durable, in Unix time.
    """
    batch = state.batch
    ids: Sequence[str | None] = batch.ids
    if len(ids) < batch.rows:
        ids = [None] * batch.rows
        for offset, instance_id in zip(batch.offsets, batch.ids, strict=True):
            ids[offset] = instance_id
    text = orjson.dumps(ids)
    begun = (batch.first_row, float(now), float(batch.retention_s), crc32(text))
    return (*_settled_columns(state, now), *begun[1:], checksum(begun), text.decode())


def settled_row(state: BatchState, now: float) -> tuple[Any, ...]:
    """The parameters of statement `SETTLE`.

    Args:
        state: A batch, some of whose rows have been settled.
        now: Unix time.
    """
    first_row, *others = _settled_columns(state, now)
    return (*others, first_row)


def _settled_columns(state: BatchState, now: float) -> tuple[Any, ...]:
    """The columns of a batch from `first_row` to `settled_crc`."""
    first_row, rows, complete, *others = state.record()
    columns = (first_row, rows, float(now) if complete else None, *others)
    return (*columns, checksum(columns))


# --- the run ------------------------------------------------------------------------------------------------------


class RunRecord(NamedTuple):
    """What a checkpoint says about its run. Times are Unix time."""

    header: RunHeader
    boot: Boot
    created_at: float
    pause_until: float | None
    finished_at: float | None


def seal_run(db: sqlite3.Connection) -> None:
    """Seal the run's record. To be called in the transaction that has changed it."""
    values, _ = _run_values(db)
    db.execute("UPDATE run SET crc = ?", (checksum(list(values.values())),))


def read_run(db: sqlite3.Connection) -> RunRecord:
    """The run's record, verified.

    Raises:
        ValueError: It is damaged, or missing.
    """
    values, crc = _run_values(db)
    if checksum(list(values.values())) != crc:
        raise Damage("the record of the run does not match its checksum")
    header = msgspec.convert({name: values[name] for name in HEADER_FIELDS}, RunHeader)
    named = is_run_key(header.run_key) and is_target_name(header.account_id) and is_target_name(header.workflow)
    if not named or header.row_shape not in ("instance", "params"):
        raise Damage("the record of the run has a run key, a row shape or a name that no run writes")
    created_at, pause_until, finished_at = map(_moment, map(values.get, ("created_at", "pause_until", "finished_at")))
    boot = Boot(*msgspec.convert((values["boot_id"], values["booted_at"]), tuple[str, float]))
    if not abs(boot.at) < YEAR_9999:
        raise Damage("it holds a time outside the range of valid dates")
    return RunRecord(header, boot, created_at or 0.0, pause_until, finished_at)


def _run_values(db: sqlite3.Connection) -> tuple[dict[str, Any], Any]:
    """The columns of the run's record by name, and its checksum."""
    cursor = db.execute("SELECT * FROM run")
    found = cursor.fetchall()
    if len(found) != 1:
        raise Damage(f"it has {len(found)} records of its run")
    values = dict(zip((column[0] for column in cursor.description), found[0], strict=True))
    crc = values.pop("crc")
    return values, crc


def _moment(stored: Any) -> float | None:
    """*stored* as Unix time; None if it is None. Raises `Damage` if it is negative, or not before the year 9999."""
    if stored is not None and not 0 <= stored < YEAR_9999:
        raise Damage("it holds a time outside the range of valid dates")
    return None if stored is None else float(stored)


# --- all of it ----------------------------------------------------------------------------------------------------


class Survey(NamedTuple):
    """The run's record, and the totals of all batches.

    Attributes:
        run: The run's record.
        counts: Rows by outcome.
        rows: Lines of the list that have been begun.
        batches: Number of batches.
        in_doubt: (first row, instances) of each batch that is not settled.
        first_begun_at: When the first batch was begun, in Unix time; None if none was.
        last_settled_at: When a batch was last settled; None if none was.
    """

    run: RunRecord
    counts: Counts
    rows: int
    batches: int
    in_doubt: list[tuple[int, int]]
    first_begun_at: float | None
    last_settled_at: float | None


def survey(db: sqlite3.Connection) -> Survey:
    """Read and verify the run's record and all batches, with the ids of those in doubt.

    Raises:
        ValueError: A record is damaged, or missing.
    """
    run, in_doubt = read_run(db), []
    rows = batches = created = existed = existed_in_doubt = rejected = invalid = pending = 0
    begun_at: float | None = None
    settled_at: float | None = None
    for begun in read_batches(db, IDS_IN_DOUBT):
        created += begun.created  # making a `Counts` for each batch would take a tenth of the time to open a large file
        existed += begun.existed
        existed_in_doubt += begun.existed_in_doubt
        rejected += begun.rejected
        invalid += begun.invalid
        pending += begun.pending
        rows += begun.rows
        batches += 1
        if begun_at is None or begun.begun_at < begun_at:
            begun_at = begun.begun_at
        if begun.settled_at is None:
            begun.instance_ids()
            in_doubt.append((begun.first_row, begun.pending))
        elif settled_at is None or begun.settled_at > settled_at:
            settled_at = begun.settled_at
    counts = Counts(
        created=created,
        existed=existed,
        existed_in_doubt=existed_in_doubt,
        rejected=rejected,
        invalid=invalid,
        pending=pending,
    )
    return Survey(run, counts, rows, batches, in_doubt, _moment(begun_at), _moment(settled_at))
