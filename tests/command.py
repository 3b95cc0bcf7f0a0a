"""The real command and the real emulator as processes: what the black-box tests run on.

Whatever a test starts ends with it, and every command that ends is held to two rules: no traceback on stderr, and
neither the token nor a row's params on an output or in a checkpoint.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

from canary import PARAMS, TOKEN, assert_silent, assert_silent_files
from forking import Child, Parent

from bulkwf import read_results
from bulkwf.emulator import read_log

COMMAND = [sys.executable, "-m", "bulkwf"]
ACCOUNT = "acct"
UNLIMITED = ("--rate", "unlimited", "--request-rate", "unlimited")
HERE = ("-w", "resize", "--emulate", *UNLIMITED)
"""Flags of a run against the emulator inside its own process."""
PATIENCE_S = 60.0
"""Upper bound of a wait, in seconds. Only a test that fails waits this long."""
_INHERITED = ("PATH", "HOME", "TMPDIR", "VIRTUAL_ENV", "COVERAGE_PROCESS_CONFIG", "PYTHONPATH")
UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
"""Runs a command so that the modes of files apply to root, too. (Another user might not reach the interpreter of a
checkout in a home folder.)"""

_LAUNCH = """
import json, os, resource, signal, sys
plan = json.loads(sys.argv[1])
for number in (signal.SIGINT, signal.SIGHUP):  # a shell that runs the tests in the background ignores them
    signal.signal(number, signal.SIG_IGN if number in plan["ignored"] else signal.SIG_DFL)
if plan["limits"]:  # then coverage can't write its data
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
for name, most in plan["limits"]:
    resource.setrlimit(name, (most, most))
os.execv(sys.argv[2], sys.argv[2:])
"""
_MEASURE = """
import os, sys
pid = os.fork()
if not pid:
    os.execv(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    print(usage.ru_maxrss, file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""
_counter = count(1)


# --- lists --------------------------------------------------------------------------------------------------------


def row(number: int, prefix: str = "row") -> str:
    """One row, with an id of its own."""
    return json.dumps({"instance_id": f"{prefix}-{number}", "params": {"n": number, "secret": PARAMS}}) + "\n"


def write_rows(path: str | Path, rows: int, prefix: str = "row", start: int = 0) -> str:
    """Write a file of *rows* rows; returns its name."""
    Path(path).write_text("".join(row(number, prefix) for number in range(start, start + rows)), "utf-8")
    return str(path)


def ids(rows: int, prefix: str = "row") -> set[str]:
    """The ids of a list that `write_rows` wrote."""
    return {f"{prefix}-{number}" for number in range(rows)}


# --- a command that has ended -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str
    peak_mb: float = 0.0
    """Peak memory, if it was measured."""

    @property
    def summary(self) -> dict[str, Any]:
        """The output of `run --json` or `status --json`."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The output of `results`."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def resume_command(self) -> str:
        """The printed command that continues the run."""
        found = re.search(r"(?:To continue(?: later)?, run|Fix this, then resume with):\n  (.+)\n", self.err)
        assert found, self.err
        return found[1]


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment of a command: credentials of the tests, and no way to the real service."""
    own = {
        "CLOUDFLARE_API_TOKEN": TOKEN,
        "CLOUDFLARE_ACCOUNT_ID": ACCOUNT,
        "CLOUDFLARE_API_BASE_URL": "http://127.0.0.1:9",
        "TERM": "xterm",
    }
    inherited = {name: value for name, value in os.environ.items() if name in _INHERITED}
    return {name: value for name, value in {**inherited, **own, **(changes or {})}.items() if value is not None}


def bulkwf(
    *arguments: str | Path,
    env: Mapping[str, str | None] | None = None,
    stdin: Any = subprocess.DEVNULL,
    text: str | None = None,
    stdout: Any = subprocess.PIPE,
    stderr: Any = subprocess.PIPE,
    limits: Mapping[int, int] | None = None,
    prefix: Sequence[str] = (),
    timeout_s: float = PATIENCE_S,
) -> Ended:
    """Run the command to its end. `text` is its standard input; `limits` are resource limits, soft and hard."""
    before = [*(_launched(limits) if limits else ()), *prefix]
    done = subprocess.run(
        [*before, *COMMAND, *map(str, arguments)],
        env=environment(env),
        stdin=None if text is not None else stdin,
        input=None if text is None else text.encode(),
        stdout=stdout,
        stderr=stderr,
        timeout=timeout_s,
        check=False,
    )
    return _checked(Ended(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode()))


def measured(*arguments: str | Path, stdin: Any = subprocess.DEVNULL, timeout_s: float = PATIENCE_S) -> Ended:
    """Run the command to its end, and measure its peak memory: a smaller process starts it."""
    file = Path(f"peak-{next(_counter)}")
    measure = [sys.executable, "-S", "-c", _MEASURE, str(file)]
    ended = bulkwf(*arguments, stdin=stdin, prefix=measure, timeout_s=timeout_s)
    return Ended(ended.code, ended.out, ended.err, int(file.read_text()) / 1_024)


class Forker(Parent):
    """Runs commands as `bulkwf` does, each in a process of its own, but imports Python's modules only once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __call__(self, *arguments: str | Path, env: Mapping[str, str | None] | None = None) -> Ended:
        with self.start(*arguments, env=env) as run:
            return run.wait()

    def start(
        self,
        *arguments: str | Path,
        env: Mapping[str, str | None] | None = None,
        held: tuple[str, str] | None = None,
    ) -> "Running":
        """Start a command. `held`: see `Parent.fork`."""
        out, err = (self._folder / f"{next(_counter)}" for _ in range(2))
        out.touch()
        err.touch()
        plan = {"folder": os.getcwd(), "env": environment(env), "out": str(out), "err": str(err)}  # noqa: PTH109
        return _Forked(self.fork(plan | {"words": list(map(str, arguments)), "held": held}), out, err)


def shell(line: str, env: Mapping[str, str | None] | None = None) -> Ended:
    """Run a shell command line to its end; `bulkwf` in it is the command under test."""
    line = f'bulkwf() {{ {shlex.join(COMMAND)} "$@"; }}; {line}'
    done = subprocess.run(
        ["bash", "-c", line], env=environment(env), capture_output=True, timeout=PATIENCE_S, check=False, text=True
    )
    return _checked(Ended(done.returncode, done.stdout, done.stderr))


def _launched(limits: Mapping[int, int] | None = None, ignored: Sequence[int] = ()) -> list[str]:
    """The arguments before a command that give it resource limits, and signals as in an interactive shell."""
    plan = json.dumps({"limits": list((limits or {}).items()), "ignored": list(ignored)})
    return [sys.executable, "-S", "-c", _LAUNCH, plan]


def _checked(ended: Ended) -> Ended:
    assert "Traceback" not in ended.err, ended.err
    assert "never retrieved" not in ended.err, ended.err
    assert_silent(ended.out, "stdout")
    assert_silent(ended.err, "stderr")
    assert_silent_files(Path())
    return ended


# --- a command under way ------------------------------------------------------------------------------------------


def until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Wait until *condition* returns a true value, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain for: {what}"
        time.sleep(0.005)
    return found


class Running:
    """A command under way, with its outputs in files."""

    def __init__(
        self,
        *arguments: str | Path,
        env: Mapping[str, str | None] | None = None,
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = None,
        stderr: Any = None,
        ignored: Sequence[int] = (),
        limits: Mapping[int, int] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        number = next(_counter)
        self._out, self._err = Path(f"{number}.out").absolute(), Path(f"{number}.err").absolute()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, *_launched(limits, ignored), *COMMAND, *map(str, arguments)],
                env=environment(env),
                stdin=stdin,
                stdout=out if stdout is None else stdout,
                stderr=err if stderr is None else stderr,
            )

    @property
    def err(self) -> str:
        """Its stderr so far."""
        return self._err.read_text()

    def says(self, text: str) -> str:
        """Wait until *text* is on its stderr."""
        return until(lambda: text in self.err and self.err, f"{text!r} on stderr")

    def catches(self, number: int) -> bool:
        """Whether the command handles the signal now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return bool(int(re.search(r"SigCgt:\s+([0-9a-f]+)", status)[1], 16) >> (number - 1) & 1)

    def listens(self, number: int = signal.SIGTERM) -> None:
        """Wait until the command handles the signal."""
        until(lambda: self.catches(number), f"a handler of {signal.Signals(number).name}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = PATIENCE_S) -> Ended:
        """Wait for its end."""
        code = self.process.wait(timeout_s)
        return _checked(Ended(code, self._out.read_text(), self.err))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


class _Forked(Running):
    def __init__(self, process: Child, out: Path, err: Path) -> None:
        self.process, self._out, self._err = process, out, err


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """The ends of a full pipe."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4_096)
    os.set_blocking(writer, True)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


@dataclass
class Terminal:
    """A command that has run on a terminal and ended."""

    code: int
    screen: str
    out: str


def open_terminal(columns: int = 160) -> tuple[int, int]:
    """The two ends of a terminal: the test's, and the command's."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


def on_terminal(*arguments: str | Path, env: Mapping[str, str | None] | None = None, columns: int = 160) -> Terminal:
    """Run the command to its end with a terminal as its stderr, and its stdout in a file."""
    ours, theirs = open_terminal(columns)
    out = Path(f"{next(_counter)}.out")
    with out.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            env=environment(env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=theirs,
        )
    os.close(theirs)
    try:
        seen = b"".join(_screen(ours))
        code = process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    screen = seen.decode()
    ended = _checked(Ended(code, out.read_text(), screen))
    return Terminal(ended.code, screen, ended.out)


def _screen(descriptor: int) -> Iterator[bytes]:
    """The output on a terminal until its other end is closed."""
    while select.select([descriptor], [], [], PATIENCE_S)[0]:
        try:
            data = os.read(descriptor, 65_536)
        except OSError:  # EIO: the other end is closed
            return
        if not data:
            return
        yield data
    raise AssertionError("the command was silent for too long")


# --- the service --------------------------------------------------------------------------------------------------


class Service:
    """An emulator in a process of its own."""

    def __init__(self, base_url: str, log: Path, running: Running) -> None:
        self.base_url = base_url
        self.log = log
        self._running = running

    def flags(self, workflow: str = "resize") -> tuple[str, ...]:
        """Flags of a run against it."""
        return ("-w", workflow, "--base-url", self.base_url, *UNLIMITED)

    @property
    def created(self) -> Counter[str]:
        """How many times each id was created."""
        return Counter(one.id for one in read_log(self.log))

    @property
    def created_params(self) -> Counter[str | None]:
        """How many instances were created with each params, by the checksum of the params."""
        return Counter(one.crc for one in read_log(self.log))

    def has_created(self, instances: int) -> None:
        """Wait until *instances* instances were created."""
        until(lambda: self.created.total() >= instances, f"{instances} instances created")

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Stop the process while the block lasts: it answers nothing."""
        self._running.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._running.signal(signal.SIGCONT)

    def stop(self) -> Ended:
        """End the process; its output holds its counts."""
        self._running.signal(signal.SIGTERM)
        return self._running.wait()


@contextlib.contextmanager
def emulator(
    *flags: str,
    faults: Sequence[Mapping[str, Any]] = (),
    limited: bool = False,
    start: Callable[..., Running] = Running,
) -> Iterator[Service]:
    """An emulator in a process of its own, without limits unless `limited`, on a free port."""
    number = next(_counter)
    log, script = Path(f"created-{number}.jsonl").absolute(), Path(f"faults-{number}.json").absolute()
    log.touch()
    script.write_text(json.dumps(faults), "utf-8")
    arguments = ["emulate", "--port", "0", "--log", log, "--faults", script, *(() if limited else UNLIMITED), *flags]
    with start(*arguments) as running:
        base_url = until(lambda: running._out.read_text().strip(), "the emulator's base URL")
        yield Service(base_url, log, running)


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    """A base URL where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


# --- outcomes --------------------------------------------------------------------------------------


def outcomes(checkpoint: str | Path) -> Counter[str]:
    """The number of rows of a checkpoint with each outcome, pending ones included."""
    settled = Counter(result.outcome for result in read_results(checkpoint))
    pending = sum(1 for _ in read_results(checkpoint, outcome="pending"))
    return settled + Counter(pending=pending)
