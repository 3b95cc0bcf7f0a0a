"""The tables of a checkpoint, the statements that fill them, and their rows as values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from bulkwf.model import RunState

__all__ = [
    "ANOTHER",
    "APPLICATION_ID",
    "BEGIN",
    "FORMAT",
    "HEADER_FIELDS",
    "IDENTITY",
    "INTERVAL",
    "NOTE",
    "SCHEMA",
    "SESSIONS",
    "SETTLE",
    "Attempt",
    "Interval",
    "RunHeader",
]

FORMAT = 2
ANOTHER = "In another checkpoint (-c) every row starts again, unless it brings its own id or --run-key is the same."
"""Consequence of naming another checkpoint, for error messages."""
APPLICATION_ID = 0x62776B66
"""`bwkf`, in the file's header: distinguishes a checkpoint from other SQLite databases."""

SCHEMA = """
CREATE TABLE run (
  created_at REAL NOT NULL, base_url TEXT NOT NULL, account_id TEXT NOT NULL, workflow TEXT NOT NULL,
  run_key TEXT NOT NULL,          -- what generated ids begin with
  id_scheme TEXT NOT NULL,        -- how rows without an id get one: 'generated' or 'template <text>'
  row_shape TEXT NOT NULL,
  lane TEXT NOT NULL,             -- which of several targets of a run this is; '' if there is one
  first_row INTEGER NOT NULL,     -- the first row of the list that the run takes
  input TEXT NOT NULL,            -- the list's name, for people
  source TEXT NOT NULL,           -- JSON: what the list was when its last rows were begun, see `sources.identity`
  limits TEXT NOT NULL,           -- JSON, for people
  boot_id TEXT NOT NULL,          -- the last boot that wrote to the file; '': not known, times are the system clock's
  booted_at REAL NOT NULL,        -- Unix time at which that boot's clock was zero: times are counted from it
  pause_until REAL,               -- all sending pauses until then (Unix time)
  finished_at REAL,               -- the list was read to its end with every row settled
  crc INTEGER                     -- of all other columns, see `records`; NULL only inside a transaction
);
CREATE TABLE batch (
  first_row INTEGER PRIMARY KEY,  -- counted from 0 over the whole list
  rows INTEGER NOT NULL,          -- blank ones included
  begun_at REAL NOT NULL,
  settled_at REAL,                -- NULL: some of its rows are in doubt
  attempts INTEGER NOT NULL,
  retention_s REAL NOT NULL,      -- the shortest time for which the service remembers one of its ids
  created INTEGER NOT NULL, existed INTEGER NOT NULL,
  existed_in_doubt INTEGER NOT NULL, -- how many of `existed` an earlier attempt of this run may have created
  rejected INTEGER NOT NULL, invalid INTEGER NOT NULL, pending INTEGER NOT NULL,
  answer TEXT,                    -- JSON {status, version_id, workflow_id} that the created instances share
  exceptions TEXT,                -- JSON {offset: {outcome, ...}} of the rows that differ from that
  size INTEGER NOT NULL,          -- bytes and
  digest INTEGER NOT NULL,        -- crc32 of the rows' lines, those of rejected and invalid rows left out
  settled_crc INTEGER NOT NULL,   -- of the columns that settling changes, see `records`
  ids_crc INTEGER NOT NULL,       -- crc32 of `ids`
  begun_crc INTEGER NOT NULL,     -- of `first_row`, `begun_at`, `retention_s` and `ids_crc`
  ids TEXT NOT NULL               -- JSON array, an entry a row, null where nothing is sent; last, because it is large
);
CREATE TABLE attempt (
  id INTEGER PRIMARY KEY, first_row INTEGER NOT NULL, started_at REAL NOT NULL, elapsed_s REAL NOT NULL,
  instances INTEGER NOT NULL,     -- 0 for a look-up
  http_status INTEGER, verdict TEXT NOT NULL, detail TEXT,
  kind TEXT NOT NULL,             -- 'create' or 'look_up'
  bytes INTEGER NOT NULL,         -- of its body
  waited_s REAL NOT NULL,         -- for its slot
  waited_for TEXT,                -- what it waited for last, see `timeline`
  quota TEXT,                     -- what the answer said is left for the token: 'r=<requests>;t=<seconds>', …
  crc INTEGER NOT NULL            -- of all other columns but `id`
);
CREATE VIEW result AS             -- a line a row, blank ones left out: first the rows that differ, then the others
SELECT first_row + CAST(odd.key AS INTEGER) AS row,
  coalesce(json_extract(ids, '$[' || odd.key || ']'), json_extract(odd.value, '$.id')) AS id,
  json_extract(odd.value, '$.outcome') AS outcome, json_extract(odd.value, '$.status') AS status,
  json_extract(odd.value, '$.version_id') AS version_id, json_extract(odd.value, '$.workflow_id') AS workflow_id,
  json_extract(odd.value, '$.code') AS code, json_extract(odd.value, '$.message') AS message
FROM batch, json_each(batch.exceptions) AS odd
UNION ALL
SELECT first_row + item.key, item.value, CASE WHEN answer IS NULL THEN 'pending' ELSE 'created' END,
  json_extract(answer, '$.status'), json_extract(answer, '$.version_id'), json_extract(answer, '$.workflow_id'),
  NULL, NULL
FROM batch, json_each(batch.ids) AS item
WHERE item.value IS NOT NULL
  AND (exceptions IS NULL OR json_type(exceptions, '$."' || item.key || '"') IS NULL);
"""

SESSIONS = """
CREATE TABLE session (            -- one row a process
  id INTEGER PRIMARY KEY, started_at REAL NOT NULL,
  ended_at REAL,                  -- NULL: under way, or the process was killed
  exit_code INTEGER,              -- of the command, where it is known
  reason TEXT,                    -- finished, drained, cancelled, killed or the class of the error; NULL: not known
  pid INTEGER NOT NULL, host TEXT NOT NULL,
  log_lost INTEGER NOT NULL DEFAULT FALSE, -- the next session did not find what this one had written last
  crc INTEGER                     -- of all other columns; NULL only inside a transaction
);
CREATE TABLE timeline (           -- a row for each ten seconds or more of a session
  session INTEGER NOT NULL, started_at REAL NOT NULL, length_s REAL NOT NULL,
  states TEXT NOT NULL,           -- JSON {state: seconds}: paused, outage, instances, requests, quota, places, disk,
                                  -- source, service, idle; at each instant, the first one that applies counts
  created INTEGER NOT NULL, attempts INTEGER NOT NULL,
  errors INTEGER NOT NULL,        -- attempts that settled nothing
  latency_p50_s REAL, latency_p90_s REAL, latency_p99_s REAL -- of all attempts' elapsed_s
);
"""

BEGIN = """
INSERT INTO batch (first_row, rows, settled_at, attempts, created, existed, existed_in_doubt, rejected, invalid,
  pending, answer, exceptions, size, digest, settled_crc, begun_at, retention_s, ids_crc, begun_crc, ids)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
SETTLE = """
UPDATE batch SET rows = ?, settled_at = ?, attempts = ?, created = ?, existed = ?, existed_in_doubt = ?, rejected = ?,
  invalid = ?, pending = ?, answer = ?, exceptions = ?, size = ?, digest = ?, settled_crc = ? WHERE first_row = ?
"""
NOTE = """
INSERT INTO attempt
  (first_row, started_at, elapsed_s, instances, http_status, verdict, detail, kind, bytes, waited_s, waited_for, quota,
  crc)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
INTERVAL = """
INSERT INTO timeline (session, started_at, length_s, states, created, attempts, errors, latency_p50_s, latency_p90_s,
  latency_p99_s) VALUES ((SELECT max(id) FROM session), ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHeader:
    """The run that a checkpoint belongs to. A run continues it only if it has the same values in `IDENTITY`."""

    base_url: str
    account_id: str
    workflow: str
    run_key: str
    id_scheme: str
    row_shape: str
    input: str
    limits: str
    lane: str = ""
    first_row: int = 0
    source: str = ""


IDENTITY = ("base_url", "account_id", "workflow", "run_key", "id_scheme", "row_shape", "lane", "first_row")
HEADER_FIELDS = tuple(field.name for field in fields(RunHeader))


class Attempt(NamedTuple):
    """One request, as table `attempt` stores it."""

    first_row: int
    started_at: float
    elapsed_s: float
    instances: int
    http_status: int | None
    verdict: str
    detail: str | None
    kind: str = "create"
    bytes: int = 0
    waited_s: float = 0.0
    waited_for: str | None = None
    quota: str | None = None
    """The token's quota, if the answer reported it; see `limits.quota.quota_text`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A part of a session, as the timeline stores it.

    Attributes:
        length_s: Length, in seconds.
        seconds: Time in each state, in seconds; states that did not occur are left out.
        created: Instances created.
        attempts: Attempts that ended.
        errors: Attempts that ended and settled nothing.
        latency_s: Median, 90th and 99th percentile of the times until the answers, in seconds; empty without answers.
    """

    length_s: float
    seconds: Mapping[RunState, float]
    created: int
    attempts: int
    errors: int
    latency_s: Sequence[float]
