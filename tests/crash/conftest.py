"""What the crash tests share."""

from pathlib import Path

import pytest
from command import Forker
from fakes import memory_folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Runs a command in a forked process."""
    with Forker(tmp_path_factory.mktemp("outputs")) as forker:
        yield forker


@pytest.fixture
def memory(monkeypatch):
    """An empty folder in memory, also the working directory. Data that the system has accepted survives a kill."""
    with memory_folder() as name:
        monkeypatch.chdir(name)
        yield Path(name)
