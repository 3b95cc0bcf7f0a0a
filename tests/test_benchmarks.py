"""The benchmarks run to their end and answer their questions. Figures of a small list mean nothing."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from torture import scaled

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ANSWERS = {
    "faults": {"(e) a failing service": 1},
    "speed": {"(a) CPU": 4, "(a) instances/s": 3},
    "growth": {"(b) memory": 1, "(f) growth": 1},
    "resume": {"(c) resume: the checkpoint": 2, "(c) resume: with the list": 2},
    "limiter": {"(d) limiter": 7},
    "badrows": {"(g) bad rows": 14},
}
"""The lines of the table that answer each question."""
ASKED = scaled(["faults", "badrows"], list(ANSWERS))


@pytest.mark.skipif(shutil.which("curl") is None, reason="one rival is curl")
@pytest.mark.parametrize("question", ASKED)
def test_a_rehearsal_of_the_benchmarks_answers_each_question(tmp_path, question):
    small = ["--scale", "0.002", "--rounds", "1", "--folder", str(tmp_path / "lists")]
    arguments = [sys.executable, "benchmarks", question, *small]

    ran = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert ran.stderr == ""
    assert ran.returncode in (0, 1)  # goals are for longer lists
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ran.stdout.splitlines() if "|" in line]
    assert Counter(line[0] for line in lines) == ANSWERS[question]
    assert "Python 3." in ran.stdout.splitlines()[-1]
