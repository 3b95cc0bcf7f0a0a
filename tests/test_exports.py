"""What a program may import, and that it comes with its types."""

import importlib
import pkgutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from command import environment

import bulkwf

MODULES = [found.name for found in pkgutil.walk_packages(bulkwf.__path__, "bulkwf.") if not found.name.endswith("__")]


def test_the_public_names_are_these_and_no_others():
    """A name that goes away breaks programs; one that comes has to be kept: change this list on purpose only."""
    assert bulkwf.__all__ == [
        "BatchLimits",
        "BulkwfError",
        "CheckpointError",
        "ConfigError",
        "Counts",
        "Fault",
        "FaultKind",
        "InputError",
        "Instance",
        "Observer",
        "Options",
        "Progress",
        "RateLimits",
        "Reply",
        "Request",
        "RequestKind",
        "Result",
        "Results",
        "RetryPolicy",
        "ServiceRefused",
        "Slot",
        "Summary",
        "SystemRefused",
        "TemporaryStop",
        "Transport",
        "read_results",
        "submit_all",
        "submit_stream",
    ]


@pytest.mark.parametrize("name", bulkwf.__all__)
def test_each_public_name_is_there_and_says_what_it_is(name):
    assert getattr(bulkwf, name).__doc__


@pytest.mark.parametrize("module", MODULES)
def test_each_name_that_a_module_offers_is_there(module):
    found = importlib.import_module(module)

    assert all(hasattr(found, name) for name in getattr(found, "__all__", ()))


def test_the_walk_over_the_modules_has_met_them():
    assert {"bulkwf.submission.engine", "bulkwf.sources.files", "bulkwf.checkpoint.writer"} <= set(MODULES)


def test_the_commands_that_tests_start_import_the_package_that_the_tests_import(tmp_path):
    words = (sys.executable, "-c", "import bulkwf; print(bulkwf.__file__)")

    found = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True).stdout

    assert Path(found.strip()).samefile(bulkwf.__file__)


def test_the_package_ships_the_mark_of_its_types():
    assert files(bulkwf).joinpath("py.typed").is_file()
