"""The documentation is correct: its blocks run, its links have targets, and its tables agree with the code."""

import contextlib
import json
import re
import sqlite3
from importlib.resources import files
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from documents import CHECKPOINT, DOCUMENTS, ROOT, RUNNABLE, Ran, alike, blocks, failures, query, run

from bulkwf.checkpoint.schema import SCHEMA, SESSIONS
from bulkwf.cli.app import app
from bulkwf.emulator import Rule, parse_script
from bulkwf.events import Event
from bulkwf.service import verdicts

PACKAGE = Path(str(files("bulkwf")))

README_WORDS = 600
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def text_of(name):
    return (ROOT / name).read_text("utf-8")


def table_after(text, heading):
    """The cells of the first table below a heading, without the header."""
    part = text.partition(f"\n{heading}\n")[2]
    lines = re.search(r"(?:^\|.*\|\n)+", part, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- blocks -------------------------------------------------------------------------------------------------------


@each_document
def test_each_block_runs_or_gives_the_reason_why_not(document):
    for block in blocks(document.read_text("utf-8")):
        assert block.language in RUNNABLE or block.settings.get("not-run"), f"line {block.line}: {block.language!r}"
        assert block.settings.get("not-run") != "", f"line {block.line}: no reason is given"


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=[pytest.mark.smoke] if path == ROOT / "README.md" else []) for path in DOCUMENTS],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_commands_programs_and_queries_do_what_is_documented(document, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    assert list(failures(run(document, folder))) == []

    for block in blocks(document.read_text("utf-8")):
        if block.runs and block.language == "sql":
            assert query(folder / CHECKPOINT, block.text), f"line {block.line}: the query finds nothing"
        if block.runs and block.language == "json":
            parsed = values(block.text)
            if block.settings.get("file", "").startswith("faults"):
                parse_script(parsed[0])


def values(text):
    """The values of a JSON block: one, or one per line."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]


@each_document
def test_each_named_make_target_exists(document):
    targets = {*re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)}

    assert set(re.findall(r"(?:\$ |`)make ([a-z-]+)", document.read_text("utf-8"))) <= targets


def test_a_command_that_fails_or_prints_other_text_is_reported():
    [block] = blocks("```console\n$ first\n3 rows\n$ second\n$ echo $?\n1\n```\n")
    first, second, code = block.commands()

    good = [Ran(first, "4 rows\n", 0), Ran(second, "", 1), Ran(code, "1\n", 0)]
    assert list(failures(good)) == []
    assert len(list(failures([Ran(first, "4 lines\n", 0), *good[1:]]))) == 1
    assert len(list(failures([Ran(first, "4 rows\n", 2), *good[1:]]))) == 1


def test_output_with_other_words_differs():
    assert alike("3,376 rows in 33.3 s", "  150 rows in 1 min 2.5 s\n")
    assert alike("34 requests in 2 batches", "1 request in 1 batch\n")
    assert alike("a\n…\nd", "a\nb\nc\nd")
    assert not alike("3,376 rows settled", "3,376 rows done")
    assert not alike("", "one line")


# --- text ---------------------------------------------------------------------------------------------------------


@each_document
def test_each_relative_link_leads_to_a_file_and_a_heading(document):
    text = document.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text("utf-8")), target


def test_the_readme_fits_one_page():
    assert len(text_of("README.md").split()) <= README_WORDS


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_documented_table_of_verdicts_equals_that_of_the_code():
    assert "\n".join(verdicts.table()) in text_of("docs/architecture.md")


@pytest.mark.parametrize("command", ["run", "check", "status", "results", "verify", "emulate"])
def test_exactly_the_flags_of_a_command_are_documented(command):
    arguments = app[command].assemble_argument_collection(default_parameter=app.default_parameter)
    flags = {name for argument in arguments for name in argument.names if name.startswith("--")}
    positional = {"--checkpoint"} if command in ("status", "results", "verify") else set()

    rows = table_after(text_of("docs/cli.md"), f"### `bulkwf {command}`")
    documented = {flag for row in rows for flag in re.findall(r"--[a-z-]+", row[0])}

    assert documented == flags - positional - {"--help", "--version"}


def test_exactly_the_columns_of_the_checkpoint_are_documented():
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA + SESSIONS)
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
        columns = {name: [row[1] for row in db.execute(f"PRAGMA table_info({name})")] for name in names}

    text = text_of("docs/checkpoint.md")
    documented = {
        name: [column for row in table_after(text, f"### `{name}`") for column in re.findall(r"`(\w+)`", row[0])]
        for name in names
    }

    assert documented == columns


def test_exactly_the_keys_of_a_fault_script_are_documented():
    text = text_of("docs/emulator.md")
    headings = ("### Which requests", "### How the request ends", "### What else happens")
    rows = [row for heading in headings for row in table_after(text, heading)]
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row[0])}

    assert documented == {field.encode_name for field in msgspec.structs.fields(Rule)}


def test_each_file_that_the_architecture_names_exists():
    named = re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", text_of("docs/architecture.md"))

    assert [name for name in named if not (PACKAGE / name).exists() and not Path(ROOT, name).exists()] == []


def test_the_table_of_events_has_each_event():
    rows = table_after(text_of("docs/library.md"), "## Observe a run")

    assert {row[0].strip("`") for row in rows} == {event.__name__ for event in get_args(Event)}


def test_each_function_on_the_path_of_a_batch_is_in_its_file():
    rows = table_after(text_of("docs/architecture.md"), "## The path of a batch")
    named = [row[1].strip("`") for row in rows]

    assert len(named) == len(set(named)) == 15
    for file, (_, _, functions, _) in zip(named, rows, strict=True):
        source = (PACKAGE / file).read_text("utf-8")
        for name in re.findall(r"\w+", functions):
            assert re.search(rf"^ *(?:class |def |async def )?{name}\b", source, re.MULTILINE)
