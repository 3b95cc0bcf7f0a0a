"""Checkpoints of earlier runs."""

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

from bulkwf.attempt import InstanceInfo, Judgement, Verdict
from bulkwf.batching.batch_state import BatchState
from bulkwf.checkpoint import Begun, Checkpoint, RunHeader, inline
from bulkwf.checkpoint.records import checksum, seal_run
from bulkwf.checkpoint.sessions import seal_sessions
from bulkwf.model import Batch, Result, RowOutcome
from fakes.deliveries import make_batch
from fakes.transports import TARGET
from fakes.virtual_time import wall


def memory_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, in memory where that is possible: for tests that are not about the disk."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


HEADER = RunHeader(
    base_url="https://api.example/client/v4",
    account_id=TARGET.account,
    workflow=TARGET.workflow,
    run_key="key",
    id_scheme="generated",
    row_shape="instance",
    input="rows.jsonl",
    limits="{}",
)


async def write_run(
    path: Path,
    rows: int,
    *,
    others: Mapping[int, RowOutcome] | None = None,
    in_doubt: bool = False,
    data: bytes | None = None,
    finished: bool = True,
    at: float | None = None,
    header: RunHeader = HEADER,
) -> None:
    """Add *rows* rows in batches of 100 to the checkpoint of a run: created, except those in `others`.

    `in_doubt`: earlier attempts may have created them. `data`: the lines of the list, if the rows are one batch.
    """
    at = wall() if at is None else at
    others = others or {}
    checkpoint = Checkpoint.open(path, header, now=at, executor=inline)
    try:
        first = sum(begun.rows for begun in checkpoint.begun())
        for start in range(first, first + rows, 100):
            state = BatchState(make_batch(min(100, first + rows - start), first_row=start, data=data))
            await checkpoint.begin(state, at)
            state.attempts += 1
            state.in_doubt = set(state.pending) if in_doubt else set()
            state.add(_settling(state.batch, others))
            await checkpoint.settle(state, at)
        if finished:
            await checkpoint.finish(at)
    finally:
        await checkpoint.aclose()


def reseal(path: Path) -> None:
    """Recompute the checksums of a checkpoint that was changed by hand."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        fields = Begun._fields
        for found in db.execute(f"SELECT rowid, {', '.join(fields)} FROM batch").fetchall():
            rowid, values = found[0], dict(zip(fields, found[1:], strict=True))
            values["ids_crc"] = crc32(str(values["ids"]).encode("utf-8", "surrogatepass"))
            begun = [values[name] for name in ("first_row", "begun_at", "retention_s", "ids_crc")]
            settled = [values[name] for name in fields[: fields.index("settled_crc")]]
            crcs = (checksum(settled), values["ids_crc"], checksum(begun))
            db.execute(f"UPDATE batch SET settled_crc = ?, ids_crc = ?, begun_crc = ? WHERE rowid = {rowid}", crcs)
        for rowid, *attempt, _ in db.execute("SELECT * FROM attempt").fetchall():
            db.execute(f"UPDATE attempt SET crc = ? WHERE id = {rowid}", (checksum(attempt),))
        db.execute("UPDATE session SET crc = NULL")
        seal_sessions(db)
        seal_run(db)


def _settling(batch: Batch, others: Mapping[int, RowOutcome]) -> Judgement:
    rows = {position: batch.first_row + offset for position, offset in enumerate(batch.offsets)}
    settled = [
        (position, Result(row=row, id=batch.ids[position], outcome=others[row]))
        for position, row in rows.items()
        if others.get(row, "pending") != "pending"
    ]
    return Judgement(
        verdict=Verdict.DONE,
        created=[position for position, row in rows.items() if row not in others],
        others=settled,
        answer=InstanceInfo("queued", "v1", "w1"),
    )
