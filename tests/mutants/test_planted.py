"""The planted bugs fit the code as it is."""

import ast
import shutil

import pytest

from mutants.__main__ import ROOT, plant
from mutants.planted import PLANTED


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_a_bug_can_be_planted(tmp_path, mutant):
    shutil.copytree(ROOT / "bulkwf", tmp_path / "bulkwf", ignore=shutil.ignore_patterns("__pycache__"))
    plant(mutant, tmp_path)
    ast.parse((tmp_path / "bulkwf" / mutant.file).read_text("utf-8"))
