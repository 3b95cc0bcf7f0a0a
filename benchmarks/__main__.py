"""`python benchmarks` answers all questions; `python benchmarks speed limiter` some of them.

Prints a table. With `--keep`, the table and a plot are written beside this file.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from bench import CLIENT, HERE, SERVER, Chosen, Line

QUESTIONS = ("speed", "growth", "resume", "limiter", "faults", "badrows")
PACKAGES = ("aiohttp", "orjson", "msgspec", "anyio", "tenacity", "cloudflare", "httpx")


def main() -> int:
    """Returns the exit code: 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", help=", ".join(QUESTIONS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the lists' lengths; 0.01 is a rehearsal")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each rival")
    parser.add_argument("--folder", type=Path, help="folder that keeps the lists; by default they are deleted")
    parser.add_argument("--keep", action="store_true", help="write results.md, results.png and badrows.png")
    given = parser.parse_args()
    questions = given.questions or QUESTIONS
    if not set(questions).issubset(QUESTIONS):
        parser.error(f"the questions are {', '.join(QUESTIONS)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        lines = []
        for line in answers(questions, folder, Chosen(given.scale, given.rounds)):
            lines.append(line)
            print(row(line), flush=True)
    circumstances = f"{machine()}. {time.strftime('%Y-%m-%d')}, {time.monotonic() - began:,.0f} s."
    print(circumstances)
    if given.keep:
        keep(lines, circumstances)
    return any(line.reached is False for line in lines)


def answers(questions: Sequence[str], folder: Path, chosen: Chosen) -> Iterator[Line]:
    """The lines of the table, each as soon as it is measured."""
    for name in questions:
        yield from import_module(name).measure(folder, chosen)


def keep(lines: Sequence[Line], circumstances: str) -> None:
    """Write the table and the plot."""
    from plot import draw, draw_bad_rows  # noqa: PLC0415 - slow, and optional

    head = "| question | of | measured | goal | reached |\n|---|---|---|---|---|\n"
    table = head + "\n".join(map(row, lines))
    (HERE / "results.md").write_text(f"# Results\n\n{circumstances}\n\n{table}\n", "utf-8")
    draw(lines, HERE / "results.png")
    draw_bad_rows(lines, HERE / "badrows.png")


def row(line: Line) -> str:
    """A line of a Markdown table."""
    reached = {None: "", True: "yes", False: "**no**"}[line.reached]
    return f"| {line.question} | {line.case} | {line.measured} | {line.goal} | {reached} |"


def machine() -> str:
    """The machine and the versions that were measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    information = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in information if line.startswith("model name")), "?")
    return (
        f"{model}, {os.cpu_count()} cores, client on core {CLIENT}, server on core {SERVER}; {platform.system()} "
        f"{platform.release()}; Python {platform.python_version()}, {packages}"
    )


if __name__ == "__main__":
    sys.exit(main())
