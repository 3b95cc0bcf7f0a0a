"""Cloudflare's own Workflows engine as a process: miniflare and workerd from npm, behind the documented REST paths.

`worker.mjs` lists which parts of an answer come from the engine. One process takes some 6,600 instances, with three
open files each, and a restart loses instances that sleep. So one process serves all tests without a restart; each group
of tests has its own workflow.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from command import ACCOUNT, PATIENCE_S, TOKEN, until
from node import installed

WORKFLOWS = ("bulk", "listed", "filtered", "counted", "paged", "airports", "verified")
_HERE = Path(__file__).parent
_MEMORY = Path("/dev/shm")
_ROOM = 2 << 30
"""Space that its state needs, in bytes: 130 KB an instance."""
_RAISED = ("sh", "-c", 'ulimit -n "$(ulimit -Hn)" && exec "$@"', "sh")
"""Prefix of a command that lets it open as many files as the system allows."""


@dataclass(frozen=True)
class Engine:
    """Address of the engine, and what its requests need."""

    base_url: str
    token: str = TOKEN
    account: str = ACCOUNT
    workflow: str = WORKFLOWS[0]


@contextlib.contextmanager
def running() -> Iterator[Engine]:
    """Run the engine until the block ends; skips the test where there is no Node."""
    packages = installed(_HERE / "package.json")
    state = Path(tempfile.mkdtemp(prefix="bulkwf-engine-", dir=_roomy()))
    try:
        with (state / "out").open("wb") as out, (state / "err").open("wb") as err:
            process = subprocess.Popen(
                [*_RAISED, "node", _HERE / "serve.mjs", packages, state, *WORKFLOWS],
                env={"PATH": os.environ["PATH"], "HOME": str(state), "TMPDIR": str(state), "TOKEN": TOKEN},
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        try:
            until(lambda: (state / "out").read_text().endswith("\n") or process.poll() is not None, "the engine")
            assert process.poll() is None, (state / "err").read_text()
            yield Engine((state / "out").read_text().strip())
        finally:
            _stop(process)
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _roomy() -> Path | None:
    """A folder in memory, if it has room: the engine creates 400 instances a second there, and 40 on a disk."""
    return _MEMORY if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM else None


def _stop(process: subprocess.Popen) -> None:
    """Close its stdin, which ends it and its runtime; if it does not end, kill both."""
    process.stdin.close()
    try:
        assert process.wait(PATIENCE_S) == 0, "the engine did not end well"
    except (AssertionError, subprocess.TimeoutExpired):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
