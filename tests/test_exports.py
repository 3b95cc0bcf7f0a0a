"""The public names, and that the package ships its types."""

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
    """Removing a name breaks programs, and a new name must be kept: change this list only on purpose."""
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
def test_each_public_name_exists_and_has_a_docstring(name):
    assert getattr(bulkwf, name).__doc__


@pytest.mark.parametrize("module", MODULES)
def test_each_name_in_all_exists(module):
    found = importlib.import_module(module)

    assert all(hasattr(found, name) for name in getattr(found, "__all__", ()))


def test_every_module_is_checked():
    assert {"bulkwf.submission.engine", "bulkwf.sources.files", "bulkwf.checkpoint.writer"} <= set(MODULES)


def test_started_commands_import_the_tested_package(tmp_path):
    words = (sys.executable, "-c", "import bulkwf; print(bulkwf.__file__)")

    found = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True).stdout

    assert Path(found.strip()).samefile(bulkwf.__file__)


def test_the_package_ships_py_typed():
    assert files(bulkwf).joinpath("py.typed").is_file()
