"""The planted bugs fit the code as it is."""

import ast
import shutil
from pathlib import Path

import pytest

import bulkwf
from mutants.__main__ import plant
from mutants.planted import PLANTED


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_a_bug_can_be_planted(tmp_path, mutant):
    file = tmp_path / "bulkwf" / mutant.file
    file.parent.mkdir(parents=True)
    shutil.copy(Path(bulkwf.__file__).parent / mutant.file, file)
    plant(mutant, tmp_path)
    ast.parse(file.read_text("utf-8"))
