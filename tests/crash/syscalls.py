"""Faults at one chosen system call of the real command, by strace: kill -9, an error once, an error from then on.

strace counts the calls of each thread and of each name by themselves. So a call is named by these two and its number
among them, the thread is held before it does anything, and strace looks at no other: what it counts is exact.
"""

import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

from command import PATIENCE_S, Ended, Forker, Running, until

WRITING = ("open", "openat", "mkdir", "mkdirat", "write", "pwrite64", "ftruncate", "fallocate", "fsync", "fdatasync")
"""The calls that a full disk fails."""
LOCKS = ("fcntl", "flock")
"""Calls that no disk fails: locks are in the kernel alone."""
_OTHERS = (
    *("read", "pread64", "mmap", "access", "faccessat", "stat", "fstat", "newfstatat", "statx"),
    *("fchmod", "fchown", "unlink", "unlinkat", "rename", "renameat2", "close"),
)
_FAILING = {"EIO": (*WRITING, *_OTHERS), "ENOSPC": WRITING}
"""The calls that a disk fails which is broken, or full."""
_STRUCK = re.compile(r"\(INJECTED\)|killed by SIGKILL|^--- SIGSTOP \{", re.MULTILINE)
_HARMED = re.compile(r"\(INJECTED\)|killed by SIGKILL")
_OWN_SOCKETS = "<UNIX-STREAM:"
"""The event loop wakes itself by them; no network fails them."""
_ASTRAY = re.compile(_OWN_SOCKETS + r".*\(INJECTED\)")
_counter = count(1)


class Call(NamedTuple):
    """One system call of a command."""

    thread: str
    """How its thread's name begins."""
    name: str
    number: int
    """Counted from 1 among those of this name in this thread."""


class Fault(NamedTuple):
    """A fault: kill -9 before a call, an error in its place, or errors from this call on."""

    kind: Literal["kill", "once", "lasting"]
    error: str = ""


@dataclass(frozen=True)
class Struck:
    """A command that has ended, and its trace."""

    ended: Ended
    trace: str
    """The calls that strace has seen, a line each."""

    @property
    def hit(self) -> bool:
        """Whether the fault has happened; otherwise the command made fewer calls."""
        return bool(_STRUCK.search(self.trace))

    @property
    def astray(self) -> bool:
        """Whether an error has met the event loop's own sockets."""
        return bool(_ASTRAY.search(self.trace))

    @property
    def harmed(self) -> bool:
        """Whether it was killed, or an error has met it: no call may follow the one from which on all would fail."""
        return bool(_HARMED.search(self.trace)) and not self.astray

    @property
    def calls(self) -> list[tuple[str, int]]:
        """Each call that was made, by its name and its number, but for those on the event loop's own sockets."""
        made, numbers = [], Counter()
        for name, rest in re.findall(r"^(\w+)\((.*)", self.trace, re.MULTILINE):
            numbers[name] += 1
            if _OWN_SOCKETS not in rest:
                made.append((name, numbers[name]))
        return made


@cache
def why_not() -> str:
    """Why faults can't be injected here; empty if they can."""
    if shutil.which("strace") is None:
        return "needs strace"
    with subprocess.Popen(["sleep", "60"]) as process:
        strace = subprocess.Popen(["strace", "-p", str(process.pid)], stderr=subprocess.PIPE, text=True)
        attached = "attached" in strace.stderr.readline()
        process.kill()
        strace.communicate(timeout=PATIENCE_S)
    return "" if attached else "needs strace to be allowed to attach to processes"


def of_checkpoint(checkpoint: Path) -> list[str]:
    """Words that let strace see only calls on a checkpoint, on the files beside it, and on its folder."""
    suffixes = ("", "-wal", "-shm", "-journal")
    made = [
        f"{checkpoint}{new}{suffix}" for new in ("", "-new") for suffix in suffixes
    ]  # it is made under another name
    files = [checkpoint.parent, *made, f"{checkpoint}.lock"]
    return [word for file in files for word in ("-P", str(file))]


def of_sockets(calls: Iterable[str]) -> list[str]:
    """Words that let strace see only *calls*, which no file but a socket meets."""
    return ["-e", "trace=" + ",".join(calls)]


def strike(forker: Forker, command: Sequence[str | Path], seen: Sequence[str], at: Call, fault: Fault | None) -> Struck:
    """Run *command* to its end, with *fault* at a call; None: without a fault, its thread's calls are counted.

    `seen`: words of strace that say which calls count.
    """
    note = Path(f"held-{next(_counter)}").absolute()
    with forker.start(*command, held=(at.thread, str(note))) as run:
        until(lambda: _stopped(run) or _ended(run), "the thread to be held")
        if _ended(run):
            return Struck(run.wait(), "")
        words = [*seen, *(_injection(fault, at.name, f":when={at.number}") if fault else ())]
        with _strace(note.read_text().strip(), words, note.with_suffix(".trace")) as (strace, trace):
            run.signal(signal.SIGCONT)
            if fault and fault.kind == "lasting":
                until(lambda: _STRUCK.search(trace.read_text()) or _ended(run), "the call")
                strace.terminate()
            else:
                run.process.wait()
        traced = trace.read_text()
        if not _ended(run):
            until(lambda: _stopped(run), "the command to be stopped")
            failing = _injection(Fault("once", fault.error), ",".join(f"?{name}" for name in _FAILING[fault.error]))
            with _strace(str(run.process.pid), [*seen, "-f", *failing], note.with_suffix(".rest")) as (_, rest):
                run.signal(signal.SIGCONT)
                run.process.wait()
            traced += rest.read_text()
        struck = Struck(Ended(run.process.wait(), "", ""), traced)
        return struck if struck.astray else replace(struck, ended=run.wait())


def _injection(fault: Fault, calls: str, when: str = "") -> list[str]:
    deed = {"kill": "signal=SIGKILL", "once": f"error={fault.error}", "lasting": "signal=SIGSTOP"}[fault.kind]
    return ["-e", f"inject={calls}:{deed}{when}"]


@contextmanager
def _strace(task: str, words: Sequence[str], trace: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """strace, attached to a thread (to all of a process, with -f); at the end it has ended too."""
    trace.touch()
    strace = subprocess.Popen(
        ["strace", "-yy", "-o", str(trace), *words, "-p", task], stderr=subprocess.PIPE, text=True
    )
    try:
        assert "attached" in (said := strace.stderr.readline()), said
        yield strace, trace
        strace.wait(PATIENCE_S)
    finally:
        strace.kill()
        strace.communicate()


def _ended(run: Running) -> bool:
    return run.process.poll() is not None


def _stopped(run: Running) -> bool:
    """Whether a signal has stopped it, and no process traces it."""
    try:
        return Path(f"/proc/{run.process.pid}/stat").read_text().rpartition(") ")[2].startswith("T")
    except (FileNotFoundError, ProcessLookupError):
        return False
