"""The benchmarks run to their end and say what they should; what they measure on a small list means nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("curl") is None, reason="one rival is curl")
def test_a_rehearsal_of_the_benchmarks_answers_every_question(tmp_path):
    words = [sys.executable, "benchmarks", "--scale", "0.002", "--rounds", "1", "--folder", str(tmp_path / "lists")]

    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert ran.stderr == ""
    assert ran.returncode == 1  # goals are for lists of some length
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ran.stdout.splitlines() if "|" in line]
    assert {line[0] for line in lines} == {
        "(a) CPU",
        "(a) instances/s",
        "(b) memory",
        "(c) resume: the checkpoint",
        "(c) resume: with the list",
        "(d) limiter",
        "(e) a service that is not well",
        "(f) growth",
    }
    assert sum(line[0] == "(d) limiter" for line in lines) == 7
    assert "Python 3." in ran.stdout.splitlines()[-1]
