"""`python -m mutants`: plants each bug into a copy of the project, and names the harness that catches it.

`python -m mutants NAME…` plants only the bugs whose names hold one of these words.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants.planted import PLANTED, Mutant

ROOT = Path(__file__).parents[2]
SEEDS = "200"
MODULES = ("bad_rows", "judge", "retry", "batcher", "client", "delivery", "limiter", "payload", "transport", "verdicts")
HARNESSES = (
    ("simulation", ("tests/simulation/test_simulation.py",)),
    ("every await", ("tests/simulation/test_every_await.py",)),
    ("engine", ("tests/test_engine.py",)),
    ("restarts", ("tests/test_restarts.py",)),
    ("modules", tuple(f"tests/test_{name}.py" for name in MODULES)),
    ("budget", ("tests/test_budget.py",)),
    ("checkpoint", tuple(f"tests/test_{name}.py" for name in ("checkpoint", "sessions", "place"))),
    ("verification", tuple(f"tests/test_{name}.py" for name in ("verification_store", "request_log", "verification"))),
    ("travel", ("tests/crash/test_travel.py",)),
    ("network", ("tests/test_network.py",)),
    ("wire", ("tests/test_wire.py",)),
    ("uplink", ("tests/uplink",)),
    ("library", ("tests/test_api.py",)),
    ("output", ("tests/test_output.py",)),
    ("messages", ("tests/test_messages.py",)),
    ("signals", ("tests/crash/test_signals.py",)),
    ("fuzz", ("tests/test_fuzz.py",)),
    ("ends", ("tests/test_uncancelled.py", "tests/test_sources.py", "tests/test_ends.py")),
)
LONGEST_S = 300.0
"""Upper bound of a harness's time, in seconds. A bug that makes it hang counts as caught."""


def main() -> int:
    """Returns the exit code: 1 if a bug was not caught."""
    words = sys.argv[1:]
    planted = [mutant for mutant in PLANTED if not words or any(word in mutant.name for word in words)]
    caught = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, (catcher, seconds) in zip(planted, pool.map(hunt, planted), strict=True):
            caught += catcher is not None
            sys.stdout.write(f"{mutant.name:<48} {catcher or 'NOT CAUGHT'} ({seconds:.0f} s)\n")
            sys.stdout.flush()
    sys.stdout.write(f"{caught} of {len(planted)} caught\n")
    return 0 if caught == len(planted) else 1


def hunt(mutant: Mutant) -> tuple[str | None, float]:
    """The harness that catches the bug, None if none does, and how long that took in seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        plant(mutant, copy)
        known_first = sorted(HARNESSES, key=lambda harness: harness[0] != mutant.by)
        catcher = next((name for name, tests in known_first if not passes(copy, tests)), None)
    return catcher, time.monotonic() - began


def plant(mutant: Mutant, copy: Path) -> None:
    """Put the bug in its place."""
    file = copy / "bulkwf" / mutant.file
    text = file.read_text("utf-8")
    assert text.count(mutant.was) == 1, f"{mutant.name}: {mutant.file} is no longer what it was written for"
    file.write_text(text.replace(mutant.was, mutant.becomes), "utf-8")


def passes(copy: Path, tests: tuple[str, ...]) -> bool:
    """Whether these tests find nothing."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "BULKWF_SEEDS": SEEDS}
    with tempfile.TemporaryFile() as output:
        running = subprocess.Popen(
            words, cwd=copy, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = running.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)  # with all that it has started
            running.wait()
        output.seek(0)
        assert code in (0, 1, 2), output.read().decode()
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
