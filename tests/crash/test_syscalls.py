"""At each system call on the checkpoint and on the sockets: kill -9, an error, a disk that stays full or broken.

After each fault the checkpoint says nothing false, and the same command again finishes the list.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from math import ceil
from pathlib import Path
from typing import NamedTuple

import pytest
from canary import assert_silent_files
from command import Forker, Service, emulator
from torture import TORTURE, tally

from bulkwf.checkpoint import ANOTHER
from bulkwf.emulator import Created, read_log
from crash.oracle import COUNT_FLAWS, Oracle, make_row, write_list
from crash.syscalls import LOCKS, WRITING, Call, Fault, Struck, of_checkpoint, of_sockets, strike, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]

ROWS = 6
FLAGS = ("--batch-size", "2", "--concurrency", "2")
MAIN, WRITER = "MainThread", "bulkwf-checkpoint"
KILL = Fault("kill")
MIDDLE = Call(WRITER, "pwrite64", 6)
"""Where the session before a recovery is killed: batches are begun, and not all of them are settled."""
TORN = "without it the file is damaged"
"""A main file that was split from its log in the middle of a fold may be refused."""
NETWORK_ERRORS = {
    "socket": "EMFILE",
    "connect": "ECONNREFUSED",
    "getsockopt": "ENOBUFS",
    "sendto": "EPIPE",
    "sendmsg": "EPIPE",
    "recvfrom": "ECONNRESET",
}
"""The calls that communicate with the service, and how each may fail."""
Faults = Callable[[str], list[Fault]]
"""The faults that a call of that name may have."""


class Scene(NamedTuple):
    """Where faults are injected: a first session or one after a kill; calls on the checkpoint or on sockets."""

    recovery: bool
    sockets: bool = False


class Trial:
    """Runs with faults, each over a list of its own, against one emulator; and what was wrong with them."""

    def __init__(self, forker: Forker, service: Service) -> None:
        self.struck = Counter[str]()
        self.flaws = Counter[str]()
        self.wrong: list[str] = []
        self._forker = forker
        self._service = service
        self._numbers = count(1)

    def calls(self, scene: Scene) -> list[Call]:
        """The calls of a session without a fault."""
        made = []
        for thread in (MAIN,) if scene.sockets else (MAIN, WRITER):
            with self._run() as (_, run):
                calls = self._session(scene, run, Call(thread, "", 0), None).calls
            made += [Call(thread, name, number) for name, number in calls]
        return made

    def strike(self, scene: Scene, at: Call, fault: Fault, *, split: bool = False) -> bool:
        """Inject a fault into one session and check the result; False if the session ended before the call.

        split: afterwards the log is deleted.
        """
        with self._run() as (oracle, run), _named(f"{scene}, {at}, {fault}, {split=}"):
            struck = self._session(scene, run, at, fault)
            said = _legal(struck, scene, fault)
            if split:
                _split("disk")
            else:
                shutil.copytree("disk", "copy")
                pending = oracle.look(Path("copy/rows.bulkwf"), self._begun(oracle))
                if pending and struck.ended.code == 0:
                    said += f"it ends with 0, and {pending} rows are pending\n"
            again = self._forker(*run)
            if split and again.code == 4 and TORN in again.err:
                self.struck["torn"] += 1
                return struck.hit
            if again.code:
                said += f"the same command again ends with {again.code}: {again.err}"
            oracle.judge(Path("disk/rows.bulkwf"), self._begun(oracle))
            assert_silent_files(Path("disk"))
            said += "".join(f"{file} is left behind" for file in Path("disk").iterdir() if file.suffix != ".bulkwf")
            self.flaws += oracle.flaws
            if said or oracle.problems:
                self.wrong.append(
                    "\n".join([f"{scene}, {at}, {fault}, {split=}", said, *oracle.problems, struck.ended.err])
                )
        self.struck[fault.kind] += struck.harmed
        return struck.hit

    @contextlib.contextmanager
    def _run(self) -> Iterator[tuple[Oracle, list[str]]]:
        """A folder with a list of its own, and the command that runs it."""
        number = next(self._numbers)
        folder = Path(f"run-{number}")
        Path(folder, "disk").mkdir(parents=True)
        with contextlib.chdir(folder):
            rows = [make_row("own" if n % 2 else "plain", number * ROWS + n) for n in range(ROWS)]
            (name, *_) = write_list(rows)
            yield Oracle(rows), ["run", name, "-c", "disk/rows.bulkwf", *self._service.flags(), *FLAGS]
        shutil.rmtree(folder)

    def _session(self, scene: Scene, run: list[str], at: Call, fault: Fault | None) -> Struck:
        seen = of_checkpoint(Path("disk/rows.bulkwf").absolute())
        if scene.recovery:
            assert strike(self._forker, run, seen, MIDDLE, KILL).hit
        return strike(self._forker, run, of_sockets(NETWORK_ERRORS) if scene.sockets else seen, at, fault)

    def _begun(self, oracle: Oracle) -> list[Created]:
        ours = {row.crc for row in oracle.rows}
        return [one for one in read_log(self._service.log) if one.crc in ours]


def _split(folder: str) -> None:
    """Delete everything of a checkpoint except its main file."""
    for file in Path(folder).iterdir():
        if file.name != "rows.bulkwf":
            file.unlink()


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        error.add_note(what)
        raise


def _legal(struck: Struck, scene: Scene, fault: Fault) -> str:
    """What is wrong with a session's end; empty if it is right."""
    code, err = struck.ended.code, struck.ended.err
    if struck.astray:
        return ""
    legal = {-9} if fault.kind == "kill" else {0, 75} if scene.sockets else {0, 4}
    if code not in (legal if struck.hit else {0}):
        return f"it ends with {code}\n"
    if code == 4 and f"bulkwf: {Path('disk/rows.bulkwf').absolute()}: " not in err:
        return "it does not name the checkpoint as the cause\n"
    if "name another place with -c" in err and ANOTHER not in err:
        return "it advises another checkpoint, and does not say that rows then start again\n"
    return ""


@pytest.fixture
def trial(quick, memory):
    with emulator(start=quick.start) as service:
        yield Trial(quick, service)


counted = tally(
    "faults at single system calls: {kill:,} by kill -9, {once:,} with an error, {lasting:,} with a disk full or "
    "broken from there on; {torn:,} files without their logs were refused: " + COUNT_FLAWS
)


def sweep(trial: Trial, scene: Scene, faults: Faults, sample: int) -> None:
    """Inject a fault at every call; in `make test` at some of them, spread evenly."""
    calls = trial.calls(scene)
    if not TORTURE:
        plans = sorted(((fault, at) for at in calls for fault in faults(at.name)), key=lambda plan: plan[0])
        for number, (fault, at) in enumerate(plans[:: ceil(len(plans) / sample)]):
            trial.strike(scene, at, fault, split=bool(number % 2) and not scene.sockets)
        return
    for (thread, name), times in Counter((at.thread, at.name) for at in calls).items():
        for fault in faults(name):
            numbers = count(1)  # sessions differ a little: the last one is untouched
            while trial.strike(scene, Call(thread, name, number := next(numbers)), fault) or number < times:
                if fault is KILL and not scene.sockets:
                    trial.strike(scene, Call(thread, name, number), fault, split=True)


def disk_faults(name: str) -> list[Fault]:
    """The faults of a call on the checkpoint."""
    errors = [] if name in LOCKS else ["EIO", "ENOSPC"] if name in WRITING else ["EIO"]
    return [KILL, *(Fault(kind, error) for error in errors for kind in ("once", "lasting"))]


def network_faults(name: str) -> list[Fault]:
    """The faults of a call on a socket."""
    return [KILL, Fault("once", NETWORK_ERRORS[name])]


SESSIONS = pytest.mark.parametrize("recovery", [False, True], ids=["the first session", "a recovery"])


@SESSIONS
def test_a_fault_at_any_system_call_on_the_checkpoint_loses_no_row(trial, recovery):
    sweep(trial, Scene(recovery), disk_faults, sample=18)
    hold(trial)


@SESSIONS
def test_a_fault_at_any_system_call_on_a_socket_loses_no_row(trial, recovery):
    sweep(trial, Scene(recovery, sockets=True), network_faults, sample=16)
    hold(trial)


def hold(trial: Trial) -> None:
    counted.update(trial.struck + trial.flaws)
    assert trial.struck.total()
    assert not trial.wrong, "\n\n".join(trial.wrong)
