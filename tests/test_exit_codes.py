"""The exit code of a run or a verification, as `bulkwf.errors.exit_code` and the documents define it."""

import re
import signal
from itertools import product
from pathlib import Path

import pytest

from bulkwf.cli.app import EXIT_BUG
from bulkwf.errors import (
    BulkwfError,
    CheckpointError,
    ConfigError,
    InputError,
    ServiceRefused,
    SystemRefused,
    TemporaryStop,
    exit_code,
)

ROOT = Path(__file__).parents[1]
ERRORS = {ConfigError: 2, ServiceRefused: 3, InputError: 4, CheckpointError: 4, SystemRefused: 4, TemporaryStop: 75}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
BOTH = (False, True)
MEANINGS = {
    0: "every row created or existed",
    1: "some rows rejected or invalid",
    2: "usage or configuration",
    3: "the service refuses the run",
    4: "input unreadable, or checkpoint locked",
    70: "a bug in bulkwf",
    75: "temporary",
}


@pytest.mark.parametrize(("error", "code"), ERRORS.items())
def test_an_error_decides_the_exit_code_whatever_else_is_true(error, code):
    for complete, failed, number in product(BOTH, BOTH, (None, *SIGNALS)):
        assert exit_code(complete=complete, failed=failed, error=error("why"), signal=number) == code


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_a_signal_decides_the_exit_code_of_a_run_that_is_not_complete(number, code):
    assert {exit_code(complete=False, failed=failed, signal=number) for failed in BOTH} == {code}


@pytest.mark.parametrize("failed", BOTH)
def test_a_run_that_is_not_complete_exits_with_75_without_an_error_or_a_signal(failed):
    assert exit_code(complete=False, failed=failed) == 75


@pytest.mark.parametrize("number", [None, *SIGNALS])
@pytest.mark.parametrize(("failed", "code"), [(False, 0), (True, 1)])
def test_a_complete_run_exits_with_0_or_1_even_if_a_signal_came_at_its_end(failed, code, number):
    assert exit_code(complete=True, failed=failed, signal=number) == code


def test_every_error_that_ends_a_run_has_a_code_in_the_table():
    assert set(BulkwfError.__subclasses__()) == set(ERRORS)
    assert {error.exit_code for error in ERRORS} <= set(MEANINGS)


TABLE = re.compile(r"^\| exit .*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)


def documented():
    """The table in the documents: each exit code with its meaning."""
    texts = [file.read_text("utf-8") for file in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    [table] = [found for text in texts for found in TABLE.findall(text)]
    return dict([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())


def test_the_documents_list_each_exit_code_with_its_meaning():
    [(codes, signals)] = [row for row in documented().items() if "/" in row[0]]
    others = {int(code): meaning for code, meaning in documented().items() if "/" not in code}

    assert list(others) == list(MEANINGS)
    assert [code for code, words in MEANINGS.items() if words not in others[code]] == []
    assert EXIT_BUG in others
    names = re.findall(r"SIG[A-Z]+", signals)
    assert {signal.Signals[name]: int(code) for name, code in zip(names, codes.split("/"), strict=True)} == SIGNALS
