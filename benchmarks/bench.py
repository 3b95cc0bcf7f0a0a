"""What the benchmarks share: a list of rows, the service in a process of its own, and the command."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BULKWF = (sys.executable, "-m", "bulkwf")


@dataclass
class Service:
    """An emulated service; `words` is what it said at its end."""

    base_url: str
    log: Path
    words: str = ""

    @property
    def worst_window(self) -> int:
        """The most instances that were attempted in any second."""
        found = re.search(r"in any second: ([\d,]+)", self.words)
        return int(found[1].replace(",", "")) if found else -1

    @property
    def refused(self) -> int:
        """Requests that were refused for a limit."""
        found = re.search(r"refused for a limit: ([\d,]+)", self.words)
        return int(found[1].replace(",", "")) if found else -1


@contextmanager
def service(folder: Path, *flags: str) -> Iterator[Service]:
    """Serve until the block ends."""
    log = folder / "created.log"
    command = (*BULKWF, "emulate", "--port", "0", "--log", str(log), *flags)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603
    try:
        served = Service(process.stdout.readline().strip(), log)
        yield served
    finally:
        process.terminate()
        served.words = process.communicate()[1]


def write_rows(path: Path, numbers: Iterator[int] | range, row_bytes: int) -> Path:
    """Rows with ids, of about *row_bytes* each."""
    with path.open("w", encoding="utf-8") as file:
        for number in numbers:
            row = {"instance_id": f"order-{number:09d}", "params": {"order_id": number, "note": "größer", "pad": ""}}
            row["params"]["pad"] = "x" * max(0, row_bytes - len(json.dumps(row)))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def run(rows: Path, served: Service, *flags: str) -> tuple[dict, int]:
    """Submit *rows*; the summary, and the peak memory in KiB."""
    command = (*BULKWF, "run", str(rows), "-w", "bench", "--base-url", served.base_url, "--json", "--quiet", *flags)
    environment = os.environ | {"CLOUDFLARE_API_TOKEN": "bench", "CLOUDFLARE_ACCOUNT_ID": "bench"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)  # noqa: S603
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"bulkwf run ended with {process.returncode}")
    return json.loads(printed), usage.ru_maxrss
