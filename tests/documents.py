"""Runs the code blocks of the documentation as a reader would run them.

The info string of a block is its language, followed by settings:

    ```console                      `$ command` lines (`> ` continues one) with their output
    ```python                       a program that exits with 0
    ```json                         one JSON value, or one per line
    ```sql                          one query on the checkpoint `orders.jsonl.bulkwf` that returns a row or more
    ```… file="faults.json"         written to this file, for the commands that follow
    ```… not-run="the reason"       not run

All blocks of a document run in one folder and one shell, from top to bottom. The folder holds `orders.jsonl`. A command
must exit with 0, unless `$ echo $?` comes next. Numbers, times and hexadecimal ids may differ from those in the
document, and `…` matches any text.

`python tests/documents.py` writes the present output of the commands into the documents.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from command import emulator, environment

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md")])
RUNNABLE = ("console", "python", "json", "sql")
ROWS = 100
CHECKPOINT = "orders.jsonl.bulkwf"
FOLDER, ADDRESS, ACCOUNT = "/home/ada", "https://api.cloudflare.com/client/v4", "your-account"
"""The folder, the address of the emulator, and the account, as the documents show them."""
TIMEOUT_S = 120
_FENCE = re.compile(r"^( *)```(.*)$")
_SETTING = re.compile(r'([a-z-]+)="([^"]*)"')
_MARK = "\x1e"


@dataclass(frozen=True)
class Command:
    """A command and its documented output; `line` is the number of its first line in the document, from 0."""

    line: int
    text: str
    output: str
    lines: int
    """Number of lines of the command and its output."""


@dataclass
class Block:
    """A fenced block; `line` is the number of its first line of content, from 0."""

    line: int
    language: str
    settings: dict[str, str] = field(default_factory=dict)
    content: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self.content)

    @property
    def runs(self) -> bool:
        return self.language in RUNNABLE and "not-run" not in self.settings

    def commands(self) -> Iterator[Command]:
        """The commands of a console block."""
        starts = [n for n, line in enumerate(self.content) if line.startswith("$ ")]
        assert starts[:1] == [0], f"line {self.line}: a console block begins with a command"
        for start, end in zip(starts, [*starts[1:], len(self.content)], strict=True):
            lines = self.content[start:end]
            command = [lines[0][2:]]
            while len(command) < len(lines) and lines[len(command)].startswith("> "):
                command.append(lines[len(command)][2:])
            output = "".join(line + "\n" for line in lines[len(command) :])
            yield Command(self.line + start, "\n".join(command), output, end - start)


@dataclass(frozen=True)
class Ran:
    """A command that was run."""

    command: Command
    printed: str
    code: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown document."""
    found: list[Block] = []
    inside = False
    for number, line in enumerate(text.splitlines()):
        fence = _FENCE.match(line)
        if fence and not inside:
            language, _, rest = fence[2].strip().partition(" ")
            found.append(Block(number + 1, language, dict(_SETTING.findall(rest))))
            assert _SETTING.sub("", rest).strip() == "", f"line {number + 1}: unknown settings: {rest}"
        elif not fence and inside:
            found[-1].content.append(line)
        inside = inside != bool(fence)
    return found


def normalized(text: str) -> str:
    """*text* without alignment and plurals, and with placeholders for numbers, times and hexadecimal ids."""
    text = re.sub(r"\b(?=[a-f-]*[0-9])[0-9a-f]{8,}(-[0-9a-f]{4,12})*\b", "<hex>", text)
    text = re.sub(r"[0-9][0-9,.]*(?<![,.])", "0", text)
    text = re.sub(r"\b0 (batch|instance|line|request|row)(?:es|s)?\b", r"0 \1", text)
    text = re.sub(r"0 (h|min|s)\b( 0 (min|s)\b)*", "<time>", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def alike(documented: str, printed: str) -> bool:
    """Whether *printed* agrees with the document."""
    pattern = ".*".join(re.escape(part.strip("\n")) for part in normalized(documented).split("…"))
    return re.fullmatch(pattern, normalized(printed), re.DOTALL) is not None


def run(document: Path, folder: Path) -> list[Ran]:
    """Run the console and Python blocks of *document* in *folder*, in one shell, against an emulator of their own."""
    prepare(folder, document)
    commands = list(commands_of(document))
    if not commands:
        return []
    script = []
    for command in commands:
        mark = f"printf '{_MARK}'"
        script.append(f"{mark}\n(exit ${{code:-0}})\n{command.text}\ncode=$?\n{mark}; echo $code")
    with contextlib.chdir(folder.parent), emulator() as service:
        changes = {"CLOUDFLARE_API_BASE_URL": service.base_url, "CLOUDFLARE_ACCOUNT_ID": ACCOUNT}
        env = environment(changes)
        path = f"{folder / 'programs'}:{Path(sys.executable).parent}:{env['PATH']}"
        with (folder / "printed").open("w") as file:
            shell = subprocess.Popen(
                ["bash", "-c", "\n".join(script)],
                cwd=folder,
                env={**env, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            shell.wait(TIMEOUT_S)
        finally:  # ends also what the document has left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
    printed = (folder / "printed").read_text("utf-8").replace(str(folder), FOLDER).replace(service.base_url, ADDRESS)
    pieces = printed.split(_MARK)[1:]
    assert len(pieces) == 2 * len(commands), f"the shell ended before its last command:\n{printed}"
    codes = [int(piece.partition("\n")[0]) for piece in pieces[1::2]]
    return [Ran(*parts) for parts in zip(commands, pieces[::2], codes, strict=True)]


def commands_of(document: Path) -> Iterator[Command]:
    """The commands of a document; one for each program in it."""
    for number, block in enumerate(blocks(document.read_text("utf-8"))):
        if block.runs and block.language == "console":
            yield from block.commands()
        elif block.runs and block.language == "python" and "file" not in block.settings:
            yield Command(block.line, f"python block-{number}.py", "…", 0)


def prepare(folder: Path, document: Path) -> None:
    """Write the files that the commands of *document* need."""
    rows = ({"instance_id": f"order-{n}", "params": {"order_id": n}} for n in range(1, ROWS + 1))
    (folder / "orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for number, block in enumerate(blocks(document.read_text("utf-8"))):
        if "file" in block.settings or block.language == "python":
            (folder / block.settings.get("file", f"block-{number}.py")).write_text(block.text, "utf-8")
    python = folder / "programs" / "python"
    python.parent.mkdir()
    command = shlex.join([sys.executable, "-W", "error"])
    python.write_text(f'#!/bin/sh\nexec {command} "$@"\n', "utf-8")
    python.chmod(0o755)


def failures(ran: Sequence[Ran]) -> Iterator[str]:
    """The differences from the documents."""
    following = [*(one.command.text for one in ran), ""][1:]
    for one, after in zip(ran, following, strict=True):
        where = f"line {one.command.line + 1}: $ {one.command.text}"
        if one.code and after != "echo $?":
            yield f"{where}\nends with {one.code}:\n{one.printed}"
        elif not alike(one.command.output, one.printed):
            yield f"{where}\nis documented to print\n{one.command.output}\nand prints\n{one.printed}"


def query(checkpoint: Path, sql: str) -> list[tuple[object, ...]]:
    """The rows that a query returns."""
    with contextlib.closing(sqlite3.connect(f"{checkpoint.as_uri()}?mode=ro", uri=True)) as db:
        return db.execute(sql).fetchall()


def update(document: Path, ran: Sequence[Ran]) -> None:
    """Write the printed output into *document* where it differs."""
    lines = document.read_text("utf-8").splitlines()
    for one in reversed(ran):
        command = one.command
        if command.lines and not alike(command.output, one.printed):
            typed = command.text.count("\n") + 1
            lines[command.line + typed : command.line + command.lines] = one.printed.rstrip("\n").splitlines()
    document.write_text("\n".join(lines) + "\n", "utf-8")


def main(names: Sequence[str]) -> None:
    """Update the named documents, or all."""
    for document in [Path(name).resolve() for name in names] or DOCUMENTS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "folder")
            folder.mkdir()
            ran = run(document, folder)
        for failure in failures(ran):
            print(f"{document.relative_to(ROOT)}, {failure}")
        update(document, ran)


if __name__ == "__main__":
    main(sys.argv[1:])
