"""Draw `run.svg`, the picture in the README: the live display of a run, as a terminal of 80 columns shows it.

It starts `bulkwf run --emulate` in tmux, copies what the terminal shows about half-way, and draws that text. It takes
about 20 s and needs tmux. To make the picture again, from the root of a checkout, after `make demo`:

    .venv/bin/python docs/draw_run.py

Look at the picture before you commit it: it shows what this machine did.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

TARGET = Path(__file__).with_name("run.svg")
COMMAND = "bulkwf run orders.jsonl -w fulfil --emulate"
COLUMNS, LINES = 80, 12
ROWS = 3_376
WAIT_S = 17.0
"""About half of the run, at 100 instances per second."""

FONT = 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace'
CELL, LINE, EDGE = 9.6, 22, 16
"""Width of a character, height of a line, and margin, in pixels."""


def tmux(folder: str, *words: str) -> str:
    """Run a command of a tmux server of our own; returns what it prints."""
    command = ["tmux", "-S", f"{folder}/tmux", "-f", os.devnull, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def captured() -> str:
    """What the terminal shows, with its colours, up to the last line that is not empty."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        rows = ({"instance_id": f"order-{n}", "params": {"order_id": n}} for n in range(1, ROWS + 1))
        Path(folder, "orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        shell = f"cd {folder} && PATH={shlex.quote(programs)} PS1='$ ' TERM=xterm-256color exec bash --norc"
        tmux(folder, "new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), shell)
        try:
            tmux(folder, "send-keys", COMMAND, "Enter")
            time.sleep(WAIT_S)
            return tmux(folder, "capture-pane", "-e", "-p").rstrip()
        finally:
            tmux(folder, "kill-server")


def drawn(screen: str) -> Iterator[str]:
    """The lines of an SVG that shows *screen*, a text with the terminal's colour codes."""
    lines = [Text.from_ansi(line) for line in screen.splitlines()]
    width, height = COLUMNS * CELL + 2 * EDGE, len(lines) * LINE + 2 * EDGE
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
    yield f"<title>{escape(COMMAND)}</title>"
    yield f'<rect width="100%" height="100%" rx="8" fill="{MONOKAI.background_color.hex}"/>'
    yield f"<g font-family='{FONT}' font-size='16' xml:space='preserve'>"
    console = Console(width=COLUMNS)
    for number, line in enumerate(lines):
        column = 0
        for text, style, _ in line.render(console):
            color = (
                MONOKAI.foreground_color if style is None or style.color is None else style.color.get_truecolor(MONOKAI)
            )
            x, y, length = EDGE + column * CELL, EDGE + (number + 0.75) * LINE, cell_len(text) * CELL
            if text.strip():
                place = f'x="{x:g}" y="{y:g}" textLength="{length:g}" lengthAdjust="spacingAndGlyphs"'
                yield f'<text {place} fill="{color.hex}">{escape(text)}</text>'
            column += cell_len(text)
    yield "</g>"
    yield "</svg>"


if __name__ == "__main__":
    TARGET.write_text("\n".join(drawn(captured())) + "\n", "utf-8")
