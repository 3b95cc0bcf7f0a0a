"""What holds for every test: nothing of the machine's environment reaches it."""

import os
import platform
import sysconfig
from pathlib import Path

import pytest
from hypothesis import settings
from node import NOT_TESTED
from real_engine.engine import running
from torture import add_up, own_figures

import bulkwf

settings.register_profile("bulkwf", deadline=None, print_blob=True)
settings.register_profile("quick", settings.get_profile("bulkwf"), max_examples=20)
settings.load_profile("bulkwf")

REQUIRED = os.environ.get("BULKWF_REQUIRE_ALL") == "1"
"""Set where everything that a test may need is there, root too: then a skip is a failure."""
INSTALLED = os.environ.get("BULKWF_INSTALLED") == "1"
"""Set where the tests are those of an installed wheel, not of the tree."""
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A test that is skipped where nothing may be skipped has failed."""
    report = yield
    # Those that lack Node share one line of the summary.
    if report.skipped and isinstance(report.longrepr, tuple) and NOT_TESTED in report.longrepr[2]:
        report.longrepr = ("tests", None, report.longrepr[2])
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, and BULKWF_REQUIRE_ALL is set: {report.longrepr}"
    return report


def pytest_sessionstart():
    """Tests of an installed wheel import nothing else."""
    found = Path(bulkwf.__file__)
    if INSTALLED and not found.is_relative_to(sysconfig.get_path("purelib")):
        pytest.exit(f"BULKWF_INSTALLED is set, and the tests import {found}", returncode=4)


_others = []
"""What the worker processes of pytest-xdist have counted."""


def pytest_sessionfinish(session):
    """A worker process sends what it has counted to the one that prints it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = own_figures()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker process has ended; one that has crashed sends nothing."""
    _others.append(getattr(node, "workeroutput", {}).get("figures", [[], []]))


def pytest_terminal_summary(terminalreporter):
    """What was tested, and what the harnesses have counted."""
    terminalreporter.section("figures")
    terminalreporter.line(f"{Path(bulkwf.__file__).parent} with Python {platform.python_version()}")
    for line in add_up([own_figures(), *_others]):
        terminalreporter.line(line)


@pytest.fixture(autouse=True)
def hermetic(monkeypatch):
    """No credential, account, address or proxy of the machine that runs the tests."""
    for name in list(os.environ):
        if name.startswith(("CLOUDFLARE_", "BULKWF_")) or name.upper() in _PROXIES:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def real_engine():
    """Cloudflare's own Workflows engine: one process for all tests, started when the first one asks for it."""
    with running() as engine:
        yield engine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which is also the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
