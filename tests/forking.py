"""Processes that are forked from one that has imported bulkwf: the imports take their time only once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

_PATIENCE_S = 60.0
_SCRIPT = """
import gc, json, os, signal, sys, threading
import bulkwf.__main__, bulkwf.check, bulkwf.cli.app, bulkwf.cli.formats, bulkwf.cli.run, bulkwf.cli.verify
import bulkwf.emulator
import bulkwf.transport.http
def hold_at(name, path):
    def stop(*_):
        sys.setprofile(None)
        if threading.current_thread().name.startswith(name):
            with open(path, "w") as file:
                print(threading.get_native_id(), file=file)
            os.kill(os.getpid(), signal.SIGSTOP)
    threading.setprofile(stop)
    stop()
signal.signal(signal.SIGINT, signal.SIG_DFL)
gc.freeze()
def become(ask):
    os.chdir(ask["folder"])
    os.environ.clear()
    os.environ.update(ask["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(ask[name], os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [bulkwf.__main__.__file__, *ask["words"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ask.get("held"):
        hold_at(*ask["held"])
    bulkwf.cli.app.main()
for line in sys.stdin:
    ask = json.loads(line)
    if "child" in ask:
        pid, status = os.waitpid(ask["child"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork() or become(ask)
    print(json.dumps(answer), flush=True)
"""


class Parent:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def fork(self, plan: Mapping[str, Any]) -> "Child":
        """A child that runs the command: `words` in `folder` with `env`, its outputs in the files `out` and `err`.

        `held`, if not None: (name, file). A thread whose name begins with *name* writes its id to the file, then stops
        the process before it does anything else.
        """
        return Child(self, self.ask(plan))

    def ask(self, question: Mapping[str, Any]) -> Any:
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_PATIENCE_S)


class Child:
    """A forked process, with the interface of `subprocess.Popen`."""

    stdin = None

    def __init__(self, parent: Parent, pid: int) -> None:
        self.pid = pid
        self._parent = parent
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._parent.ask({"child": self.pid})
        return self._code

    def wait(self, timeout: float = _PATIENCE_S) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
