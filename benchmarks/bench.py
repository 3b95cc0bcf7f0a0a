"""What the benchmarks share: processes on cores of their own, measured whole, taken in turn; and medians."""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON = sys.executable
BULKWF = (PYTHON, "-m", "bulkwf")
CORES = sorted(os.sched_getaffinity(0))
CLIENT, SERVER = CORES[0], CORES[-1]
UNDISTURBED = "import gc, runpy; gc.disable(); runpy.run_module('bulkwf', run_name='__main__', alter_sys=True)"
"""The emulator without garbage collection: 30 ms of it, once a minute, would be told as requests that came late."""
ENVIRONMENT = {
    **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "VIRTUAL_ENV") if name in os.environ},
    "CLOUDFLARE_API_TOKEN": "a-token-for-measuring",
    "CLOUDFLARE_ACCOUNT_ID": "acct",
}


@dataclass(frozen=True)
class Line:
    """A line of the table: what was asked, of what, what came out, and what is to be reached."""

    question: str
    case: str
    measured: str
    goal: str = ""
    reached: bool | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """For the plot."""


@dataclass(frozen=True)
class Chosen:
    """How much is measured."""

    scale: float
    """Of the lists' lengths, and of a minute."""
    rounds: int
    """How often each rival has its turn."""


@dataclass(frozen=True)
class Ran:
    """A process from its start to its end, with all that it has started."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    told: str


@dataclass
class Served:
    """A server; `words` is what it said at its end."""

    base_url: str
    words: str = ""


def ran(words: tuple[str, ...], exit_code: int = 0) -> Ran:
    """Run a command on the client's core; it has to end with *exit_code*."""
    inlet, outlet = os.pipe()
    measuring = (PYTHON, "-I", "-S", str(HERE / "measure.py"), str(CLIENT), str(outlet), *words)
    with open(inlet, "rb") as measured:
        process = subprocess.Popen(  # noqa: S603
            measuring, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, pass_fds=(outlet,)
        )
        os.close(outlet)
        told, wrong = process.communicate()
        found = json.loads(measured.read())
    if found.pop("exit_code") != exit_code:
        sys.exit(f"{' '.join(words)} failed: {wrong.decode()}")
    return Ran(**found, told=told.decode())


@contextlib.contextmanager
def serving(*words: str) -> Iterator[Served]:
    """A server on its own core, until the block ends; the first line that it says is its base URL."""
    process = subprocess.Popen(  # noqa: S603
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    os.sched_setaffinity(process.pid, {SERVER})
    served = Served(process.stdout.readline().strip())
    try:
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        told, also = process.communicate()
        served.words = told + also


def fast_server() -> contextlib.AbstractContextManager[Served]:
    """The server that does nothing but answer."""
    return serving(PYTHON, str(HERE / "server.py"))


def busy(served: Served) -> float:
    """What share of its core the fast server has used while it was asked."""
    return json.loads(served.words)["busy"]


def emulator(*flags: str) -> contextlib.AbstractContextManager[Served]:
    """Bulkwf's emulated service, which keeps account of windows."""
    return serving(PYTHON, "-c", UNDISTURBED, "emulate", "--port", "0", *flags)


def worst_window(served: Served) -> int:
    """The most instances that were attempted in any second, by the emulator's count."""
    found = re.search(r"in any second: ([\d,]+)", served.words)
    return int(found[1].replace(",", ""))


def submission(rows: Path, served: Served, checkpoint: Path, *flags: str) -> tuple[str, ...]:
    """The command that submits a list."""
    place = ("-w", "bench", "--base-url", served.base_url, "-c", str(checkpoint))
    return (*BULKWF, "run", str(rows), *place, "--quiet", "--json", *flags)


def limit(rate: int | None) -> tuple[str, ...]:
    """The flags for so many instances a second, None for any number, and any number of requests."""
    return ("--rate", "unlimited" if rate is None else f"{rate}/s", "--request-rate", "unlimited")


def unlimited(rows: Path, served: Served, checkpoint: Path) -> Ran:
    """Submit a list, with a fresh checkpoint, as fast as it goes."""
    return ran(submission(rows, served, fresh(checkpoint), *limit(None)))


def fresh(checkpoint: Path) -> Path:
    """A path where no checkpoint lies any more."""
    for old in checkpoint.parent.glob(checkpoint.name + "*"):
        old.unlink()
    return checkpoint


def in_turn(rivals: Mapping[str, Callable[[], Ran]], rounds: int) -> dict[str, list[Ran]]:
    """A B A B: what the machine does beside it meets all of them."""
    found: dict[str, list[Ran]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, go in rivals.items():
            found[name].append(go())
    return found


def cpu_s(runs: list[Ran]) -> float:
    """The median."""
    return statistics.median(one.cpu_s for one in runs)


def cost_us(runs: list[Ran], rows: int) -> float:
    """The median of the CPU time for a row."""
    return 1e6 * cpu_s(runs) / rows


def rate(runs: list[Ran], rows: int) -> float:
    """Rows a second, start-up included."""
    return rows / wall_s(runs)


def wall_s(runs: list[Ran]) -> float:
    """The median."""
    return statistics.median(one.wall_s for one in runs)


def ratio(runs: list[Ran], of: list[Ran]) -> float:
    """The median of the rounds' ratios of CPU time: a slow minute of the machine is in both."""
    return statistics.median(one.cpu_s / other.cpu_s for one, other in zip(runs, of, strict=True))
