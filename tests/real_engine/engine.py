"""Cloudflare's own Workflows engine as a process: miniflare and workerd from npm, behind the documented REST paths.

`worker.mjs` says what of an answer is the engine's and what is its own. One process holds some 6,600 instances, with
three open files each, and a restart leaves those that sleep behind. So one process serves all tests, and nothing stops
it in between; its workflows keep the tests apart.
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
"""Bytes of its state: 130 KB an instance."""
_RAISED = ("sh", "-c", 'ulimit -n "$(ulimit -Hn)" && exec "$@"', "sh")
"""Before a command: it may open as many files as the system permits."""


@dataclass(frozen=True)
class Engine:
    """Where the engine is, and what it takes."""

    base_url: str
    token: str = TOKEN
    account: str = ACCOUNT
    workflow: str = WORKFLOWS[0]


@contextlib.contextmanager
def running() -> Iterator[Engine]:
    """The engine, until the block ends; skips the test where there is no Node."""
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
    """In memory it begins 400 instances a second, on a disk 40; a container's /dev/shm may be tiny."""
    return _MEMORY if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM else None


def _stop(process: subprocess.Popen) -> None:
    """The end of its stdin ends it, and the runtime that it has started; where it can't, they are ended together."""
    process.stdin.close()
    try:
        assert process.wait(PATIENCE_S) == 0, "the engine did not end well"
    except (AssertionError, subprocess.TimeoutExpired):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
