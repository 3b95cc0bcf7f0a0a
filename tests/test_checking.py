"""`bulkwf check`: invalid rows, duplicate ids, and the duration of a run, without a network."""

import gzip
import re
import resource
from pathlib import Path

import pytest
from command import UNLIMITED, Forker, bulkwf, measured, row, write_rows

from bulkwf import check as checking
from bulkwf.batching.ids import IdScheme
from bulkwf.check import check_list
from bulkwf.options import Options, RateLimits
from bulkwf.sources import open_source

pytestmark = pytest.mark.slow

NO_ONE = dict.fromkeys(("CLOUDFLARE_API_TOKEN", "CLOUDFLARE_ACCOUNT_ID"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Runs a command in a forked process, which is quick to start."""
    with Forker(tmp_path_factory.mktemp("outputs")) as forker:
        yield forker


def write(path, text):
    Path(path).write_text(text)


def write_copies(path, rows):
    """Write a file of *rows* rows with the same id; returns its name."""
    write(path, '{"instance_id":"order-1"}\n' * rows)
    return path


async def report_of(*paths, options=None):
    options = options or Options()
    source = open_source(list(paths), stop=options.first)
    try:
        return await check_list(source, IdScheme("0", options.id_template), options)
    finally:
        await source.aclose()


def test_a_valid_list_exits_with_0_without_credentials_or_files(folder, quick):
    rows = write_rows("rows.jsonl", 1_000)
    ended = quick("check", rows, env=NO_ONE)
    assert ended.code == 0
    assert "1,000 rows: 1,000 can be sent, 0 invalid" in ended.err
    assert "10 requests; at least 10.0 s, bound by 100 instances/s" in ended.err
    assert [file.name for file in folder.iterdir()] == ["rows.jsonl"]


def test_invalid_rows_are_counted_by_reason_and_named_by_their_place(folder, quick):
    Path("a.jsonl").write_text(row(0) + "nonsense\n" + '{"instance_id":"a b"}\n')
    Path("b.jsonl").write_text(row(1) + "\n" + '{"instance_ids":"a"}\n' + '{"instance_id":"c d"}')
    ended = quick("check", "a.jsonl", "b.jsonl")
    assert ended.code == 1
    assert "6 rows: 2 can be sent, 4 invalid" in ended.err
    assert "  bad_id: 2\n" in ended.err
    places = re.findall(r"^([ab]\.jsonl:\d+): ", ended.err, re.MULTILINE)
    assert places == ["a.jsonl:2", "a.jsonl:3", "b.jsonl:3", "b.jsonl:4"]


def test_duplicate_ids_are_found_across_the_list_with_both_places(folder, quick):
    write_rows("a.jsonl", 3_000)
    Path("b.jsonl").write_text(row(5_000) + row(7) + row(5_000) + row(2_999))
    ended = quick("check", "a.jsonl", "b.jsonl")
    assert ended.code == 1
    assert "3 rows have the id of an earlier row" in ended.err
    found = dict(re.findall(r"^(\S+): the id '\S+' is that of (\S+) already", ended.err, re.MULTILINE))
    assert found == {"b.jsonl:2": "a.jsonl:8", "b.jsonl:3": "b.jsonl:1", "b.jsonl:4": "a.jsonl:3000"}


async def test_an_id_that_occurs_three_times_counts_twice(folder):
    write("rows.jsonl", row(1) + row(2) + row(1) + row(1))
    report = await report_of("rows.jsonl")
    assert report.duplicates == 2
    assert not report.good
    assert not report.invalid


async def test_ids_made_by_a_template_are_checked_for_duplicates(folder):
    write("rows.jsonl", '{"params":{"n":1}}\n{"instance_id":"row-1"}\n{"params":{"n":"1"}}\n')
    report = await report_of("rows.jsonl", options=Options(id_template="row-{n}"))
    assert report.duplicates == 2
    assert (await report_of("rows.jsonl")).good


async def test_one_duplicate_among_a_hundred_thousand_ids_is_found(folder):
    write("rows.jsonl", "".join(map(row, range(120_000))) + row(3))
    report = await report_of("rows.jsonl")
    assert report.duplicates == 1
    assert report.examples == [("rows.jsonl:120001", "the id 'row-3' is that of rows.jsonl:4 already")]


async def test_only_the_first_examples_are_kept_and_the_rest_is_counted(folder):
    write("rows.jsonl", "nonsense\n" * 5_000)
    report = await report_of("rows.jsonl")
    assert report.invalid.total() == 5_000
    assert len(report.examples) == 20
    assert report.examples[0][0] == "rows.jsonl:1"
    assert "… and 4,980 more" in bulkwf("check", "rows.jsonl").err


@pytest.mark.parametrize(
    ("instances", "requests", "seconds", "limit"),
    [
        (100, 1_000, 10.0, "100 instances/s"),
        (None, 1_000, 3.0, "1,000 requests/5 min"),
        (100, 100, 30.0, "100 requests/5 min"),
        (None, None, 0.0, "no limit"),
    ],
)
async def test_the_shortest_time_is_that_of_the_binding_limit(folder, instances, requests, seconds, limit):
    options = Options(rate=RateLimits(instances_per_s=instances, requests_per_5m=requests))
    report = await report_of(write_rows("rows.jsonl", 1_000), options=options)
    assert report.shortest_s(options) == (seconds, limit)


async def test_batches_are_counted_as_a_run_cuts_them(folder):
    text = "x" * 15_000
    write("rows.jsonl", "".join(f'{{"params":"{text}"}}\n' for _ in range(1_000)))
    report = await report_of("rows.jsonl")
    assert report.batches == 20  # 68 rows fit into a request, but 50 and 50 fill the rate better


async def test_rows_that_follow_invalid_ones_fill_their_requests_as_in_a_run(folder):
    write("rows.jsonl", "".join(row(number) + "nonsense\n" for number in range(500)))
    report = await report_of("rows.jsonl")
    assert (report.rows, report.instances, report.batches) == (1_000, 500, 5)


def test_standard_input_gzip_first_and_flags_of_the_list_work_as_in_a_run(folder, quick):
    write_rows("rows.jsonl", 300)
    Path("rows.gz").write_bytes(gzip.compress(Path("rows.jsonl").read_bytes()))
    assert "300 rows: 300 can be sent" in quick("check", "rows.gz").err
    assert "250 rows: 250 can be sent" in quick("check", "rows.gz", "--first", "250").err
    with Path("rows.jsonl").open() as stdin:
        ended = bulkwf("check", "-", *UNLIMITED, "--batch-size", "10", stdin=stdin)
    assert "30 requests; at least 0.0 s, bound by no limit" in ended.err
    Path("bare.jsonl").write_text('{"n":1}\n[1]\n7\n')
    assert quick("check", "bare.jsonl", "--row-shape", "params").code == 0
    assert quick("check", "bare.jsonl").code == 1


def test_an_empty_list_is_valid(folder, quick):
    Path("rows.jsonl").touch()
    ended = quick("check", "rows.jsonl")
    assert ended.code == 0
    assert "0 rows" in ended.err


def test_temporary_files_that_cannot_be_written_exit_with_4_and_the_folder_is_named(folder):
    ended = bulkwf("check", write_rows("rows.jsonl", 10_000), limits={resource.RLIMIT_FSIZE: 100})
    assert ended.code == 4
    assert "can't be written to temporary files: File too large. Make room in /" in ended.err
    assert "or name another folder with TMPDIR" in ended.err


async def test_temporary_files_are_smaller_than_the_list_and_deleted(folder, monkeypatch):
    found, temporary = [], folder / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(checking.tempfile, "tempdir", str(temporary))
    find = checking._Ids.find_repeated

    def measured_find(ids):
        found.append(sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file()))
        return find(ids)

    monkeypatch.setattr(checking._Ids, "find_repeated", measured_find)
    write("rows.jsonl", "".join(f'{{"instance_id":"order-{number}"}}\n' for number in range(250_000)))

    assert (await report_of("rows.jsonl")).good
    assert found[0] < 250_000 * len('{"instance_id":"order-100000"}') / 4
    assert not list(temporary.iterdir())


async def test_the_first_duplicates_of_the_list_are_the_examples(folder):
    write("rows.jsonl", "".join(row(number % 1_000) for number in range(3_000)))
    report = await report_of("rows.jsonl")
    assert report.duplicates == 2_000
    assert [place for place, _ in report.examples] == [f"rows.jsonl:{number}" for number in range(1_001, 1_021)]


@pytest.mark.parametrize(
    ("rows_of", "code", "lengths", "more_mb"),
    [
        (write_rows, 0, (20_000, 400_000), 30),  # the ids of one of many files, and those that wait to be written
        (write_copies, 1, (110_000, 300_000), 10),
    ],
    ids=["different ids", "one id"],
)
def test_memory_does_not_grow_with_the_length_of_the_list(folder, rows_of, code, lengths, more_mb):
    peaks = []
    for rows in lengths:
        ended = measured("check", rows_of("rows.jsonl", rows))
        assert ended.code == code
        peaks.append(ended.peak_mb)
    assert max(peaks) < 120
    assert peaks[1] < peaks[0] + more_mb
