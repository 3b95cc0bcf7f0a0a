"""Shared by the benchmarks: processes on separate cores, measured in turn, and medians."""

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
"""The emulator without garbage collection, which takes 30 ms once a minute and would make requests seem late."""
ENVIRONMENT = {
    **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "VIRTUAL_ENV") if name in os.environ},
    "CLOUDFLARE_API_TOKEN": "a-token-for-measuring",
    "CLOUDFLARE_ACCOUNT_ID": "acct",
}


@dataclass(frozen=True)
class Line:
    """A line of the table: the question, the case, the figure and the goal."""

    question: str
    case: str
    measured: str
    goal: str = ""
    reached: bool | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """For the plot."""


@dataclass(frozen=True)
class Chosen:
    """The amount that is measured."""

    scale: float
    """Factor of the lists' lengths, and of a minute."""
    rounds: int
    """Number of measurements of each rival."""


@dataclass(frozen=True)
class Ran:
    """A process that has ended; the times include those of its children."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    output: str


@dataclass
class Served:
    """A server; `output` is what it printed at its end."""

    base_url: str
    output: str = ""


def ran(command: tuple[str, ...], exit_code: int = 0) -> Ran:
    """Run a command on the client's core. It must end with *exit_code*."""
    inlet, outlet = os.pipe()
    measuring = (PYTHON, "-I", "-S", str(HERE / "measure.py"), str(CLIENT), str(outlet), *command)
    with open(inlet, "rb") as measured:
        process = subprocess.Popen(  # noqa: S603
            measuring, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, pass_fds=(outlet,)
        )
        os.close(outlet)
        output, errors = process.communicate()
        found = json.loads(measured.read())
    if found.pop("exit_code") != exit_code:
        sys.exit(f"{' '.join(command)} failed: {errors.decode()}")
    return Ran(**found, output=output.decode())


@contextlib.contextmanager
def serving(*command: str) -> Iterator[Served]:
    """A server on its own core while the block lasts. The first line that it prints is its base URL."""
    process = subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    os.sched_setaffinity(process.pid, {SERVER})
    served = Served(process.stdout.readline().strip())
    try:
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        served.output = "".join(process.communicate())


def fast_server() -> contextlib.AbstractContextManager[Served]:
    """A server that only answers."""
    return serving(PYTHON, str(HERE / "server.py"))


def busy(served: Served) -> float:
    """The share of its core that the fast server used while requests came."""
    return json.loads(served.output)["busy"]


def emulator(*flags: str) -> contextlib.AbstractContextManager[Served]:
    """The emulator of bulkwf, which counts the instances of each window."""
    return serving(PYTHON, "-c", UNDISTURBED, "emulate", "--port", "0", *flags)


def worst_window(served: Served) -> int:
    """The most instances that were attempted in any second, by the emulator's count."""
    found = re.search(r"in any second: ([\d,]+)", served.output)
    return int(found[1].replace(",", ""))


def submission(rows: Path, served: Served, checkpoint: Path, *flags: str) -> tuple[str, ...]:
    """The command that submits a list."""
    place = ("-w", "bench", "--base-url", served.base_url, "-c", str(checkpoint))
    return (*BULKWF, "run", str(rows), *place, "--quiet", "--json", *flags)


def limit(rate: int | None) -> tuple[str, ...]:
    """The flags for a rate in instances per second (None is unlimited) and unlimited requests."""
    return ("--rate", "unlimited" if rate is None else f"{rate}/s", "--request-rate", "unlimited")


def unlimited(rows: Path, served: Served, checkpoint: Path) -> Ran:
    """Submit a list with a new checkpoint and no limits."""
    return ran(submission(rows, served, fresh(checkpoint), *limit(None)))


def fresh(checkpoint: Path) -> Path:
    """*checkpoint*, once the files of an earlier one are deleted."""
    for old in checkpoint.parent.glob(checkpoint.name + "*"):
        old.unlink()
    return checkpoint


def in_turn(rivals: Mapping[str, Callable[[], Ran]], rounds: int) -> dict[str, list[Ran]]:
    """Run the rivals in turn (A B A B), so that other load of the machine affects all of them."""
    found: dict[str, list[Ran]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, go in rivals.items():
            found[name].append(go())
    return found


def cpu_s(runs: list[Ran]) -> float:
    """The median of the CPU time, in seconds."""
    return statistics.median(one.cpu_s for one in runs)


def cost_us(runs: list[Ran], rows: int) -> float:
    """The median of the CPU time of a row, in microseconds."""
    return 1e6 * cpu_s(runs) / rows


def rate(runs: list[Ran], rows: int) -> float:
    """Rows per second, start-up included."""
    return rows / wall_s(runs)


def wall_s(runs: list[Ran]) -> float:
    """The median of the elapsed time, in seconds."""
    return statistics.median(one.wall_s for one in runs)


def ratio(runs: list[Ran], of: list[Ran]) -> float:
    """The median of the rounds' ratios of CPU time. A slow minute of the machine affects both."""
    return statistics.median(one.cpu_s / other.cpu_s for one, other in zip(runs, of, strict=True))
