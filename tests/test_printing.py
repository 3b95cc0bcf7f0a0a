"""Results and status as data: JSON lines, CSV, filters; no text of a list becomes a formula in a spreadsheet."""

import contextlib
import csv
import io
import json
from dataclasses import fields
from pathlib import Path

import pytest
from command import HERE, Forker, bulkwf, emulator, row, write_rows

from bulkwf.cli.formats import write_csv, write_jsonl
from bulkwf.model import Finding, Result

pytestmark = pytest.mark.slow

FIELDS = [
    "row", "id", "outcome", "status", "code", "message", "attempts", "in_doubt", "version_id", "workflow_id",
]  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Runs a command in a forked process, which is quick to start."""
    with Forker(tmp_path_factory.mktemp("outputs")) as forker:
        yield forker


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A checkpoint with one or two rows of each outcome."""
    with contextlib.chdir(tmp_path_factory.mktemp("mixed")):
        write_rows("before.jsonl", 1, "old")
        formula = '{"instance_id":"=1+1"}\n'
        Path("rows.jsonl").write_text(row(0) + row(0, "old") + "=1+1\n" + row(1) + row(2, "bad") + formula)
        with emulator(faults=[{"refuse_ids": "^bad-"}]) as service:
            assert bulkwf("run", "before.jsonl", *service.flags()).code == 0
            assert bulkwf("run", "rows.jsonl", *service.flags(), "-c", "mixed").code == 1
        return Path("mixed").absolute()


def test_results_lists_every_row_once_in_the_order_of_the_list(mixed, quick):
    lines = quick("results", mixed).lines
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [line["outcome"] for line in lines] == ["created", "existed", "invalid", "created", "rejected", "invalid"]
    assert [line["id"] for line in lines] == ["row-0", "old-0", None, "row-1", "bad-2", "=1+1"]
    assert all(list(line) == FIELDS for line in lines)
    assert lines[0]["status"] == "queued"
    assert lines[0]["workflow_id"]


@pytest.mark.parametrize(
    ("outcome", "rows"),
    [("created", [0, 3]), ("existed", [1]), ("rejected", [4]), ("invalid", [2, 5]), ("pending", [])],
)
def test_results_can_be_limited_to_one_outcome(mixed, outcome, rows, quick):
    ended = quick("results", mixed, "--outcome", outcome)
    assert ended.code == 0
    assert [line["row"] for line in ended.lines] == rows
    as_csv = quick("results", mixed, "--outcome", outcome, "--format", "csv").out
    assert [int(line["row"]) for line in csv.DictReader(io.StringIO(as_csv))] == rows
    assert as_csv.startswith(",".join(FIELDS))  # the header, even where there is no row


def test_csv_equals_json_lines_except_for_the_mark_before_a_formula(mixed, quick):
    lines = quick("results", mixed).lines
    records = list(csv.DictReader(io.StringIO(quick("results", mixed, "--format", "csv").out, newline="")))
    assert records[5]["id"] == "'=1+1"
    records[5]["id"] = records[5]["id"][1:]
    assert records == [{name: "" if value is None else str(value) for name, value in line.items()} for line in lines]


FULL_WIDTH = ["\uff1d1", "\uff0b1", "\uff0d1", "\uff20A"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", *FULL_WIDTH])
@pytest.mark.parametrize("kind", [Result, Finding])
def test_no_column_is_a_formula_in_a_spreadsheet(kind, text):
    columns = [column.name for column in fields(kind)]
    file = io.BytesIO()
    write_csv([kind(**dict.fromkeys(columns, text))], file, kind)  # a foreign checkpoint may hold text in any of them
    (record,) = csv.DictReader(io.StringIO(file.getvalue().decode(), newline=""))
    assert record == dict.fromkeys(columns, "'" + text)


def test_a_negative_number_is_not_a_formula():
    file = io.BytesIO()
    write_csv([Result(row=-1, id="a", outcome="rejected", code=-2)], file)
    (record,) = csv.DictReader(io.StringIO(file.getvalue().decode(), newline=""))
    assert (record["row"], record["code"]) == ("-1", "-2")


FINDING_FIELDS = ["row", "id", "outcome", "status", "message"]


@pytest.mark.parametrize("rows", [0, 1, 2_500])
def test_findings_are_written_with_their_own_columns(rows):
    findings = [Finding(row=number, id=f"-{number}", outcome="missing", message="=gone") for number in range(rows)]
    lines, table = io.BytesIO(), io.BytesIO()
    write_jsonl(iter(findings), lines)
    write_csv(iter(findings), table, Finding)
    findings = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert all(list(one) == FINDING_FIELDS for one in findings)
    assert [(one["row"], one["id"], one["status"]) for one in findings] == [(n, f"-{n}", None) for n in range(rows)]
    reader = csv.DictReader(io.StringIO(table.getvalue().decode(), newline=""))
    assert reader.fieldnames == FINDING_FIELDS
    assert list(reader) == [
        {"row": str(n), "id": f"'-{n}", "outcome": "missing", "status": "", "message": "'=gone"} for n in range(rows)
    ]


def test_csv_quotes_separators_quotes_and_newlines():
    message = 'a "b", c\nd; é\u2028'
    file = io.BytesIO()
    write_csv([Result(row=0, id="a", outcome="rejected", message=message)], file)
    (record,) = csv.DictReader(io.StringIO(file.getvalue().decode(), newline=""))
    assert record["message"] == message


@pytest.mark.parametrize("rows", [0, 1, 999, 1_000, 1_001, 2_500])
def test_paged_writing_loses_and_repeats_nothing(rows):
    results = [Result(row=number, id=f"row-{number}", outcome="created") for number in range(rows)]
    lines, table = io.BytesIO(), io.BytesIO()
    write_jsonl(iter(results), lines)
    write_csv(iter(results), table)
    assert [json.loads(line)["row"] for line in lines.getvalue().splitlines()] == list(range(rows))
    records = csv.DictReader(io.StringIO(table.getvalue().decode(), newline=""))
    assert [int(record["row"]) for record in records] == list(range(rows))


def test_results_are_written_page_by_page_as_they_are_read():
    class Full(io.BytesIO):
        def write(self, data):
            raise BrokenPipeError

    drawn = []

    def results():
        for number in range(1_000_000):
            drawn.append(number)
            yield Result(row=number, id="a", outcome="created")

    for write in (write_jsonl, write_csv):
        drawn.clear()
        with pytest.raises(BrokenPipeError):
            write(results(), Full())
        assert len(drawn) == 1_000


def test_status_shows_the_run_and_its_counts(mixed, quick):
    ended = quick("status", mixed)
    assert ended.err == ""
    assert "run of rows.jsonl to workflow resize, account acct, http://127.0.0.1:" in ended.out
    assert "finished 20" in ended.out
    counts = [line.split() for line in ended.out.splitlines()[2:7]]
    assert counts == [["created", "2"], ["existed", "1"], ["rejected", "1"], ["invalid", "2"], ["pending", "0"]]


def test_status_as_json_has_the_same_counts(mixed, quick):
    status = quick("status", mixed, "--json").summary
    assert status["header"]["workflow"] == "resize"
    assert status["finished_at"] > status["created_at"]
    totals = {"created": 2, "existed": 1, "existed_in_doubt": 0, "rejected": 1, "invalid": 2, "pending": 0}
    assert status["counts"] == totals
    assert status["rows"] == 6


def test_the_pending_rows_of_a_stopped_run_can_be_listed(folder, quick):
    rows = write_rows("rows.jsonl", 250)
    with emulator(faults=[{"from": 2, "status": 407}]) as service:
        assert quick("run", rows, *service.flags(), "--concurrency", "1").code == 3
    settled = [line["row"] for line in quick("results", "rows.jsonl.bulkwf").lines]
    pending = [line["row"] for line in quick("results", "rows.jsonl.bulkwf", "--outcome", "pending").lines]
    assert settled == list(range(100))
    assert pending == list(range(100, 100 + len(pending)))
    assert len(pending) in (100, 150)  # rows that were not begun are not in the checkpoint


def test_results_of_an_empty_list_are_empty(folder, quick):
    Path("rows.jsonl").touch()
    assert quick("run", "rows.jsonl", *HERE, "-c", "done").code == 0
    assert quick("results", "done").out == ""
    assert quick("results", "done", "--format", "csv").out.splitlines() == [",".join(FIELDS)]
