"""What is stored of a list, and how a change of its files is explained."""

import json
import os
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.sources.identity import explain_change, identify


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b"{}\n")
        os.utime(name, (1_790_000_000, 1_790_000_000))
    return tmp_path


def test_a_file_is_identified_by_name_size_and_mtime(files):
    assert orjson.loads(identify(["a.jsonl"])) == {
        "format": "jsonl",
        "rules": 1,
        "parts": [{"name": "a.jsonl", "size": 3, "mtime": 1_790_000_000.0}],
    }


@pytest.mark.parametrize("path", ["-", "no-such-file", "/dev/null"])
def test_a_list_that_is_no_file_is_identified_by_its_name(files, path):
    assert orjson.loads(identify([path]))["parts"] == [{"name": path}]


def test_rows_of_a_program_have_no_parts():
    assert orjson.loads(identify(None)) == {"format": "rows", "rules": 1, "parts": []}


def test_unchanged_files_give_no_explanation(files):
    assert explain_change(identify(["a.jsonl"]), identify(["a.jsonl"])) == ""
    assert explain_change(identify(None), identify(None)) == ""
    assert explain_change(identify(["-"]), identify(["-"])) == ""


def test_a_changed_file_is_explained_by_its_sizes_and_times(files):
    before = identify(["a.jsonl", "b.jsonl"])
    (files / "b.jsonl").write_bytes(b"{}\n" * 500)
    os.utime("b.jsonl", (1_790_000_060, 1_790_000_060))

    assert explain_change(before, identify(["a.jsonl", "b.jsonl"])) == (
        "b.jsonl had 3 bytes, last changed 2026-09-21 14:13:20; it has 1,500 bytes now, last changed "
        "2026-09-21 14:14:20."
    )


def test_other_files_are_explained_by_their_names(files):
    assert (
        explain_change(identify(["a.jsonl"]), identify(["b.jsonl"])) == "The run began with a.jsonl; this is b.jsonl."
    )
    assert explain_change(identify(None), identify(["a.jsonl"])) == (
        "The run began with rows of a program; this is a.jsonl."
    )


@given(st.text() | st.dictionaries(st.text(), st.integers()).map(json.dumps))
def test_any_stored_text_is_accepted_without_an_error(stored):
    assert explain_change(stored, identify(None)) == ""
