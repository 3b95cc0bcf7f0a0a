"""Sources: a list of any kind gives the same rows however its bytes arrive, or the reason why it can't be read."""

import array
import asyncio
import contextlib
import datetime as dt
import fcntl
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
import termios
import threading
import types
import uuid
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, IntEnum
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkwf import Instance
from bulkwf.batching.lines import MAX_ROW_BYTES, fingerprint
from bulkwf.errors import InputError
from bulkwf.model import Slice
from bulkwf.sources import files, name_source, open_source
from bulkwf.sources import rows as rows_module
from bulkwf.sources import source as reader
from bulkwf.sources.rows import CHUNK_ROWS, encode_row
from bulkwf.sources.source import Chunk, Source
from bulkwf.uncancelled import uncancelled

EVERYTHING = 1 << 40


class Feed:
    """A feed of given chunks. An exception among them is raised; a future is awaited."""

    read_share = None

    def __init__(self, *chunks):
        self.chunks = list(chunks)
        self.closed = False

    async def read(self):
        if not self.chunks:
            return None
        chunk = self.chunks.pop(0)
        if isinstance(chunk, asyncio.Future):
            chunk = await chunk
        if isinstance(chunk, Exception):
            raise chunk
        return chunk if chunk is None or isinstance(chunk, Chunk) else Chunk(chunk)

    async def aclose(self):
        self.closed = True


async def take(source, rows, size, max_wait_s=None):
    """The next rows; None at the end of the list."""
    found = await source.peek(rows, size, max_wait_s)
    return source.take(found) if found.rows else None


async def drain(source, rows=100, size=EVERYTHING):
    """All slices of a source, which is then closed."""
    found = []
    try:
        while (piece := await take(source, rows, size)) is not None:
            found.append(piece)
    finally:
        await source.aclose()
    return found


def read(*args, rows=100, size=EVERYTHING, **how):
    async def go():
        return await drain(open_source(*args, **how), rows, size)

    return asyncio.run(go())


def lines_of(slices):
    return b"".join(piece.data for piece in slices).split(b"\n")[:-1]


def read_until_error(*args, **how):
    """The slices that were read before an input error, and its message."""

    async def go():
        source, found = open_source(*args, **how), []
        try:
            while (piece := await take(source, 7, EVERYTHING)) is not None:
                found.append(piece)
        except InputError as error:
            return found, str(error)
        finally:
            await source.aclose()
        pytest.fail("the list was read to its end")

    return asyncio.run(go())


class Region(NamedTuple):
    """Rows of an earlier session."""

    rows: int
    size: int
    digest: int

    @classmethod
    def of(cls, piece):
        return cls(piece.rows, *fingerprint(piece.data))


def numbered(count, start=0):
    return b"".join(b'{"params":%d}\n' % n for n in range(start, start + count))


# --- slices -------------------------------------------------------------------------------------------------------


@given(
    lines=st.lists(st.binary(max_size=8).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    cuts=st.lists(st.integers(0, 200), max_size=10),
    asked=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 40)), min_size=1),
)
def test_slices_are_contiguous_whole_rows_within_their_bounds(lines, cuts, asked):
    data = b"".join(line + b"\n" for line in lines)
    ends = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    chunks = [data[a:b] for a, b in pairwise(ends)]

    async def go():
        source, found, turn = Source(Feed(*chunks)), [], 0
        while True:
            rows, size = asked[turn % len(asked)]
            piece = await take(source, rows, size)
            if piece is None:
                return found
            found.append((piece, rows, size))
            turn += 1

    found = asyncio.run(go())
    assert b"".join(piece.data for piece, _, _ in found) == data
    at = 0
    for piece, rows, size in found:
        assert (piece.first_row, piece.data.count(b"\n"), piece.data[-1:]) == (at, piece.rows, b"\n")
        assert 1 <= piece.rows <= rows
        assert len(piece.data) <= size or piece.rows == 1
        at += piece.rows
    assert at == len(lines)


@given(
    lines=st.lists(st.sampled_from([b"{}", b"", b'{"params":1}', b"\xe2\x80\xa8", b" "]), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 100), max_size=10),
    shares=st.lists(st.integers(1, 9), min_size=1),
)
def test_rows_of_an_earlier_session_are_taken_again_or_skipped(lines, cuts, shares):
    data = b"".join(line + b"\n" for line in lines)
    ends = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    chunks = [data[a:b] for a, b in pairwise(ends)]

    async def go():
        first = Source(Feed(data))
        taken = []
        while (piece := await take(first, shares[len(taken) % len(shares)], EVERYTHING)) is not None:
            taken.append(piece)
        by_rows, by_bytes, mixed = (Source(Feed(*chunks)) for _ in range(3))
        for turn, piece in enumerate(taken):
            assert await by_rows.take_rows(piece.rows) == piece
            if turn % 2:
                assert await mixed.take_rows(piece.rows) == piece
            else:
                assert await mixed.skip([Region.of(piece)]) is None
        assert await by_bytes.skip(map(Region.of, taken)) is None
        further = Region(1, 2, 0)
        for source in (by_rows, by_bytes, mixed):
            assert source.row == len(lines)
            assert await take(source, 1, 1) is None
            assert (await source.take_rows(1)).rows == 0
            assert await source.skip([further]) == (further, True)

    asyncio.run(go())


async def test_a_shorter_list_gives_the_rows_that_are_left():
    source = Source(Feed(b"a\nb\n"))
    assert (await source.take_rows(5)).rows == 2
    source = Source(Feed(b"a\nb\n"))
    longer = Region(5, *fingerprint(b"a\nb\nc\nd\ne\n"))
    assert await source.skip([Region(1, *fingerprint(b"a\n")), longer]) == (longer, True)


@given(cuts=st.lists(st.integers(0, 60), max_size=5), at=st.integers(0, 59), shares=st.lists(st.integers(1, 4)))
def test_the_first_region_that_differs_is_returned(cuts, at, shares):
    """With any changed byte, and any ends of chunks."""
    lines = [b"row %d\n" % number for number in range(10)] * 2
    data, regions, first = b"".join(lines), [], 0
    for rows in [*shares, *[1] * 20]:
        region = b"".join(lines[first : first + rows])
        regions += [Region(min(rows, 20 - first), *fingerprint(region))] if region else []
        first += rows
    changed = data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :]
    ends = [0, *sorted(cuts), len(data)]
    within = [sum(one.size for one in regions[: number + 1]) for number in range(len(regions))]

    found = asyncio.run(Source(Feed(*(changed[a:b] for a, b in pairwise(ends)))).skip(regions))

    assert found == (regions[next(number for number, end in enumerate(within) if at < end)], False)


async def test_an_input_error_among_earlier_rows_is_not_a_shorter_list():
    for again in (lambda source: source.take_rows(5), lambda source: source.skip([Region(5, 99, 0)])):
        with pytest.raises(InputError, match="torn"):
            await again(Source(Feed(b"a\nb\nhalf", InputError("torn"))))


async def test_rows_can_be_taken_after_a_skipped_region():
    source = Source(Feed(numbered(3), numbered(3, 3)))

    await source.skip([Region(2, *fingerprint(numbered(2)))])
    piece = await take(source, 100, EVERYTHING)

    assert (piece.first_row, piece.rows, piece.data) == (2, 4, numbered(4, 2))


# --- a part of the list -------------------------------------------------------------------------------------------


@given(
    lines=st.lists(st.sampled_from([b"{}", b"", b'{"params":1}', b"x" * 40, b" "]), max_size=30),
    cuts=st.lists(st.integers(0, 200), max_size=10),
    first_row=st.integers(0, 33),
    stop=st.one_of(st.none(), st.integers(0, 33)),
    rows=st.integers(1, 9),
)
def test_a_source_with_a_first_row_keeps_the_rows_and_numbers_of_the_list(lines, cuts, first_row, stop, rows):
    data = b"".join(line + b"\n" for line in lines)
    ends = [0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]
    chunks = [Chunk(data[a:b], "list.jsonl" if a == 0 else None) for a, b in pairwise(ends)]

    with mock.patch.multiple(reader, MAX_ROW_BYTES=20, SEEK_ROWS=4):
        source = Source(Feed(*chunks), first_row=first_row, stop=stop)
        part = numbered_rows(asyncio.run(drain(source, rows)))
        whole = numbered_rows(asyncio.run(drain(Source(Feed(*chunks)))))

    wanted = range(first_row, len(lines) if stop is None else min(stop, len(lines)))
    assert part == {number: row for number, row in whole.items() if number in wanted}
    assert all(source.where(number) == f"list.jsonl:{number + 1}" for number in part)


def numbered_rows(slices):
    """The line of each row, and the code for which the source refused it, by row number."""
    found = {}
    for piece in slices:
        refused = {offset: code for offset, code, _ in piece.refused}
        for offset, line in enumerate(piece.data.split(b"\n")[:-1]):
            found[piece.first_row + offset] = (line, refused.get(offset))
    return found


@pytest.mark.parametrize("kind", ["files", "gzip", "iterable", "async iterable"])
@pytest.mark.parametrize("first_row", [0, 1, 499, 500, 1_199, 1_200, 2_399, 2_400, 9_999])
def test_a_list_of_any_kind_can_have_a_first_row(kind, first_row, tmp_path):
    own = [{"params": n} for n in range(2_400)]
    own[1_300] = {"params": {1, 2}}

    async def later():
        for one in own:
            yield one

    data = numbered(1_300) + b"\n" + numbered(1_099, 1_301)
    for name, part in (("a", data[:20_000]), ("b", data[20_000:])):
        (tmp_path / name).write_bytes(gzip.compress(part) if kind == "gzip" else part)
    paths = [tmp_path / "a", tmp_path / "b"]
    lists = {"iterable": lambda: iter(own), "async iterable": later}

    part, whole = (
        numbered_rows(read(lists.get(kind, lambda: paths)(), rows=77, first_row=row)) for row in (first_row, 0)
    )

    assert len(part) == max(0, len(whole) - first_row)
    assert part == {number: whole[number] for number in range(first_row, len(whole))}
    if "iterable" in kind:
        assert whole[1_300] == (b"", "not_json")


def test_the_place_of_a_row_does_not_depend_on_the_first_row(tmp_path):
    for name, rows in (("a.jsonl", 3), ("b.jsonl", 4), ("c.jsonl", 2)):
        (tmp_path / name).write_bytes(numbered(rows))

    async def go():
        source = open_source([tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"], first_row=5)
        await drain(source)
        return [source.where(row) for row in range(5, 9)]

    assert asyncio.run(go()) == ["b.jsonl:3", "b.jsonl:4", "c.jsonl:1", "c.jsonl:2"]


async def test_earlier_rows_are_compared_from_the_first_row_and_beyond_the_stop():
    lines = numbered(10).splitlines(keepends=True)
    regions = [Region(len(part), *fingerprint(b"".join(part))) for part in (lines[4:6], lines[6:9])]
    chunks = [numbered(3), numbered(4, 3), numbered(3, 7)]

    source = Source(Feed(*chunks), first_row=4, stop=5)
    assert await source.skip(regions) is None
    assert (source.row, (await source.peek(9, EVERYTHING)).rows) == (9, 0)

    source = Source(Feed(*chunks), first_row=4)
    assert await source.take_rows(2) == Slice(4, 2, b"".join(lines[4:6]))
    assert await source.skip(regions[1:]) is None
    assert await take(source, 9, EVERYTHING) == Slice(9, 1, lines[9])

    assert await Source(Feed(*chunks), first_row=3).skip(regions) == (regions[0], False)
    assert await Source(Feed(*chunks), first_row=11).skip(regions) == (regions[0], True)


async def test_an_input_error_before_the_first_row_is_not_a_shorter_list():
    for again in (lambda source: take(source, 5, EVERYTHING), lambda source: source.take_rows(5)):
        with pytest.raises(InputError, match="torn"):
            await again(Source(Feed(b"a\nb\nhalf", InputError("torn")), first_row=9))


async def test_no_row_is_given_from_the_stop_on():
    source = Source(Feed(numbered(5), numbered(5, 5)), stop=7)

    found = [await take(source, 3, EVERYTHING) for _ in range(4)]

    assert [piece and (piece.first_row, piece.rows) for piece in found] == [(0, 3), (3, 3), (6, 1), None]


@pytest.mark.parametrize(("stop", "rows"), [(0, 0), (1, 1), (600, 600), (601, 601), (9_999, 1_200)])
def test_a_list_of_any_kind_ends_before_its_stop(stop, rows, tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_bytes(numbered(1_200))

    assert lines_of(read(path, stop=stop)) == numbered(rows).split(b"\n")[:-1]
    assert len(lines_of(read(({"params": n} for n in range(1_200)), stop=stop))) == rows


# --- peeking ------------------------------------------------------------------------------------------------------


async def test_joining_rows_may_be_none_after_the_wait_or_at_the_end():
    waiting = asyncio.get_running_loop().create_future()
    source = Source(Feed(b"a\n", waiting))
    await take(source, 1, EVERYTHING)

    assert (await source.peek(5, EVERYTHING, 0.0, joining=True)).rows == 0
    waiting.set_result(None)
    assert (await source.peek(5, EVERYTHING, 0.0, joining=True)).rows == 0
    assert await take(source, 5, EVERYTHING) is None


async def test_a_peek_takes_nothing_and_can_be_repeated_with_narrower_bounds():
    source = Source(Feed(b"a\n" + b"x" * 50 + b"\nb\n"))

    assert (await source.peek(9, EVERYTHING))[:3] == (55, 3, "data")
    assert (await source.peek(9, 53))[:3] == (53, 2, "bytes")
    assert (await source.peek(1, 53))[:3] == (2, 1, "rows")
    assert source.take(await source.peek(2, EVERYTHING)) == Slice(0, 2, b"a\n" + b"x" * 50 + b"\n")
    assert (await take(source, 9, EVERYTHING)).data == b"b\n"


async def test_joining_rows_raise_no_input_error():
    source = Source(Feed(b"a\n", InputError("torn")))
    await take(source, 1, EVERYTHING)

    assert (await source.peek(5, EVERYTHING, joining=True)).rows == 0
    with pytest.raises(InputError, match="torn"):
        await source.peek(5, EVERYTHING)


# --- slow sources -------------------------------------------------------------------------------------------------


async def test_buffered_rows_wait_for_others_at_most_the_given_time_and_none_is_lost():
    loop = asyncio.get_running_loop()
    waiting = [loop.create_future() for _ in range(2)]
    source = Source(Feed(b"a\nb\n", *waiting))

    assert (await take(source, 100, EVERYTHING, 0.0)).data == b"a\nb\n"
    waiting[0].set_result(b"c\n")
    waiting[1].set_result(b"d\n")
    assert (await take(source, 1, EVERYTHING, 0.0)).data == b"c\n"
    assert (await take(source, 1, EVERYTHING, 0.0)).data == b"d\n"
    assert await take(source, 1, EVERYTHING, 0.0) is None


async def test_without_a_buffered_row_the_wait_has_no_limit():
    waiting = asyncio.get_running_loop().create_future()
    source = Source(Feed(b"half a ", waiting))
    taking = asyncio.ensure_future(take(source, 5, EVERYTHING, 0.0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not taking.done()

    waiting.set_result(b"row\n")

    assert (await taking).data == b"half a row\n"


async def test_without_a_limit_of_the_wait_a_slice_waits_until_it_is_full():
    waiting = asyncio.get_running_loop().create_future()
    source = Source(Feed(b"a\n", waiting))
    taking = asyncio.ensure_future(take(source, 2, EVERYTHING))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not taking.done()

    waiting.set_result(b"b\n")

    assert (await taking).rows == 2


class Clock:
    """The clock of the loop, moved by the test. The timers of the loop follow it."""

    def __init__(self, monkeypatch):
        self.now = asyncio.get_running_loop().time()
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)

    async def pass_on(self, seconds):
        self.now += seconds
        for _ in range(20):
            await asyncio.sleep(0)


async def test_rows_that_arrive_one_by_one_do_not_extend_the_wait(monkeypatch):
    waiting = [asyncio.get_running_loop().create_future() for _ in range(9)]
    source = Source(Feed(b"0\n", *waiting))
    clock = Clock(monkeypatch)
    taking = asyncio.ensure_future(take(source, 100, EVERYTHING, 0.5))
    await clock.pass_on(0)
    for turn in range(2):
        await clock.pass_on(0.2)
        waiting[turn].set_result(b"%d\n" % (turn + 1))
        await clock.pass_on(0)
        assert not taking.done()

    await clock.pass_on(0.11)

    assert taking.done()
    assert (await taking).data == b"0\n1\n2\n"


async def test_a_cancelled_wait_for_rows_loses_none():
    waiting = asyncio.get_running_loop().create_future()
    source = Source(Feed(b"a\n", waiting))
    taking = asyncio.ensure_future(take(source, 5, EVERYTHING))
    await asyncio.sleep(0)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking

    waiting.set_result(b"b\n")

    assert (await take(source, 5, EVERYTHING)).data == b"a\nb\n"


async def test_closing_a_source_ends_its_read_and_closes_the_feed():
    waiting = asyncio.get_running_loop().create_future()
    feed = Feed(b"a\n", waiting)
    source = Source(feed)
    await take(source, 1, EVERYTHING)
    await asyncio.sleep(0)

    closing = asyncio.ensure_future(source.aclose())
    await asyncio.wait((closing,), timeout=10)

    assert closing.done()
    assert waiting.cancelled()
    assert feed.closed


async def test_a_cancelled_close_still_closes_the_feed():
    class Stubborn(Feed):
        async def read(self):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.Event().wait()

    feed = Stubborn()
    source = Source(feed)
    assert (await source.peek(1, EVERYTHING, 0.0, joining=True)).rows == 0
    closing = asyncio.ensure_future(source.aclose())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not closing.done()
    closing.cancel()

    with pytest.raises(asyncio.CancelledError):
        await closing
    assert feed.closed


async def test_rows_read_before_an_error_are_returned_before_the_error():
    source = Source(Feed(b"a\nb\nhalf", InputError("torn")))

    assert (await take(source, 1, EVERYTHING)).data == b"a\n"
    assert (await take(source, 9, EVERYTHING)).data == b"b\n"
    for _ in range(2):
        with pytest.raises(InputError, match="torn"):
            await take(source, 9, EVERYTHING)
    await source.aclose()


# --- where a row is -----------------------------------------------------------------------------------------------


def test_a_place_is_the_file_and_the_line_counted_from_1_in_each(tmp_path):
    for name, data in (("a.jsonl", b"1\n\n3"), ("empty.jsonl", b""), ("b.jsonl", b"1\n2\n")):
        (tmp_path / name).write_bytes(data)

    async def go():
        source = open_source([tmp_path / "a.jsonl", tmp_path / "empty.jsonl", tmp_path / "b.jsonl"])
        while await take(source, 1, EVERYTHING) is not None:
            pass
        await source.aclose()
        return [source.where(row) for row in range(5)]

    assert asyncio.run(go()) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "b.jsonl:2"]


async def test_rows_of_a_program_have_only_their_number():
    source = open_source([{"params": 1}])
    await take(source, 1, EVERYTHING)

    assert source.where(0) == "row 0"
    await source.aclose()


def test_a_list_is_called_by_the_names_of_its_files():
    assert name_source("x/a.jsonl") == "x/a.jsonl"
    assert name_source(Path("a.jsonl")) == "a.jsonl"
    assert name_source(["a.jsonl", "-"]) == "a.jsonl, standard input"
    assert name_source([{"params": 1}]) == name_source([]) == "rows of a program"


# --- overlong lines -----------------------------------------------------------------------------------------------


async def test_an_overlong_line_is_refused_without_being_held_in_memory():
    piece, times = b"x" * 100_000, 80
    feed = Feed(b"{}\n", b'{"params":"', *[piece] * times, b'"}\n{}\n')
    source = Source(feed)
    found, most = [], 0
    append = source._append

    def watched(chunk):
        nonlocal most
        append(chunk)
        most = max(most, len(source._data))

    source._append = watched
    while (one := await take(source, 100, EVERYTHING, 0.0)) is not None:
        found.append(one)

    assert lines_of(found) == [b"{}", b"", b"{}"]
    (refusal,) = [(piece.first_row + offset, code, text) for piece in found for offset, code, text in piece.refused]
    assert refusal[:2] == (1, "row_too_long")
    assert f"{8_000_013:,}" in refusal[2]
    assert most <= MAX_ROW_BYTES + len(piece)


@pytest.mark.parametrize("end", [[], [b"\n"], [b"\n{}\n"], [b"x", b"\n{}"]])
def test_an_overlong_line_at_the_end_of_a_file_is_refused_too(end, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 3_500_000 + b"".join(end))

    found = read(path)

    assert lines_of(found) == [b"{}", b"", *[b"{}"] * (b"{}" in b"".join(end))]
    assert [piece.first_row + offset for piece in found for offset, _, _ in piece.refused] == [1]


async def test_two_overlong_lines_are_each_refused_with_their_row():
    long = b"y" * (MAX_ROW_BYTES + 1)
    source = Source(Feed(b"{}\n" + long, b"yyy\n\n{}\n" + long, b"\n{}\n"))

    found = await drain(source)

    assert lines_of(found) == [b"{}", b"", b"", b"{}", b"", b"{}"]
    assert [piece.first_row + offset for piece in found for offset, _, _ in piece.refused] == [1, 4]


async def test_a_line_of_exactly_the_limit_is_kept_whole():
    line = b"z" * MAX_ROW_BYTES
    found = await drain(Source(Feed(line[:700_000], line[700_000:], b"\n{}\n")))

    assert lines_of(found) == [line, b"{}"]
    assert not any(piece.refused for piece in found)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ([b"a\nb\n"], [b"a", b"b"]),
        ([b"a\nb"], [b"a", b"b"]),
        ([b"a", b"b"], [b"a", b"b"]),
        ([b"a\n", b"b\n"], [b"a", b"b"]),
        ([b"", b"a", b"", b"b", b""], [b"a", b"b"]),
        ([b""], []),
        ([b"\n"], [b""]),
        ([b"\n\na\n\n"], [b"", b"", b"a", b""]),
        ([b"a\r\nb\r\n"], [b"a\r", b"b\r"]),
        ([b"a\rb\n"], [b"a\rb"]),
        (["a\u2028b\u2029c\x85d\x0be\x0cf\n".encode()], ["a\u2028b\u2029c\x85d\x0be\x0cf".encode()]),
        ([b"\xef\xbb\xbfa\n", b"\xef\xbb\xbfb\n"], [b"a", b"b"]),
        ([b"a\n\xef\xbb\xbfb\n"], [b"a", b"\xef\xbb\xbfb"]),
        ([b"\xef\xbb\xbf"], []),
        ([b"\xef\xbb\xbf", b"a"], [b"a"]),
        ([b"\xef\xbb"], [b"\xef\xbb"]),
        ([b"\x1f"], [b"\x1f"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_files_are_one_list_split_only_at_newlines(contents, expected, packed, tmp_path):
    paths = []
    for number, content in enumerate(contents):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_bytes(gzip.compress(content) if packed else content)

    assert lines_of(read(paths)) == expected


def test_a_path_may_be_text_a_path_or_several_of_either(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n")

    assert lines_of(read(path)) == lines_of(read(str(path))) == [b"{}"]
    assert lines_of(read((str(path), path))) == [b"{}", b"{}"]


@pytest.mark.parametrize("bytes_at_once", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_do_not_depend_on_where_the_reads_end(bytes_at_once, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", bytes_at_once)
    path = tmp_path / "a.jsonl"
    data = b"\xef\xbb\xbf" + numbered(12) + b"\n\nlast"
    path.write_bytes(gzip.compress(data) if packed else data)

    assert lines_of(read([path, path])) == [*data[3:].split(b"\n")] * 2


def test_a_large_file_is_read_in_chunks_to_its_last_byte(tmp_path):
    path = tmp_path / "large.jsonl"
    data = numbered(200_000)
    path.write_bytes(data)

    slices = read(path, rows=1_000)

    assert b"".join(piece.data for piece in slices) == data
    assert sum(piece.rows for piece in slices) == 200_000


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/also.jsonl"])
def test_a_missing_file_ends_the_run_before_it_begins_and_is_named(name, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_bytes(b"{}\n")

    with pytest.raises(InputError, match="No such file") as caught:
        open_source([good, tmp_path / name])
    assert name in str(caught.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        open_source(tmp_path)


def test_a_file_without_read_permission_is_refused_before_the_run_begins():
    """As another user, because root may read everything; in another process, because that can't be undone."""
    program = """if True:
        import os, sys
        from bulkwf.errors import InputError
        from bulkwf.sources import open_source
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        for path in sys.argv[1:]:
            try:
                open_source(path)
            except InputError as error:
                print(error)
    """
    with tempfile.TemporaryDirectory() as name:
        folder, locked = Path(name), Path(name) / "locked"
        folder.chmod(0o755)
        locked.mkdir()
        for path in (folder / "open", folder / "secret", locked / "any"):
            path.write_bytes(b"{}\n")
        (folder / "open").chmod(0o444)
        (folder / "secret").chmod(0o000)
        locked.chmod(0o000)
        paths = [str(folder / "open"), str(folder / "secret"), str(locked / "any")]
        found = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
        locked.chmod(0o700)

    assert found.stdout.splitlines() == [
        f"{path}: the input can't be read: Permission denied. Check its name and permissions." for path in paths[1:]
    ]


def test_a_file_deleted_during_the_run_is_an_input_error(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for path in (first, second):
        path.write_bytes(b"{}\n")

    async def go():
        source = open_source([first, second])
        second.unlink()
        try:
            return await take(source, 1, EVERYTHING), await take(source, 1, EVERYTHING)
        finally:
            await source.aclose()

    with pytest.raises(InputError, match=r"second\.jsonl: the input can't be read: No such file"):
        asyncio.run(go())


def test_a_file_that_shrinks_while_it_is_read_is_an_input_error(tmp_path):
    path = tmp_path / "shrinking.jsonl"
    path.write_bytes(numbered(300_000))

    async def go():
        source = open_source(path)
        try:
            await take(source, 1, EVERYTHING)
            os.truncate(path, 1_500_000)
            while await take(source, 1_000, EVERYTHING) is not None:
                pass
        finally:
            await source.aclose()

    with pytest.raises(InputError, match="shrank"):
        asyncio.run(go())


def test_a_file_that_grows_while_it_is_read_is_read_to_its_new_end(tmp_path):
    path = tmp_path / "growing.jsonl"
    path.write_bytes(numbered(150_000))

    async def go():
        source = open_source(path)
        await take(source, 1, EVERYTHING)
        with path.open("ab") as more:
            more.write(b"the last\n")
        return await drain(source, rows=1_000)

    assert lines_of(asyncio.run(go()))[-1] == b"the last"


def test_a_file_that_grows_from_empty_loses_no_byte(tmp_path):
    path = tmp_path / "growing.jsonl"
    path.touch()
    file = files._RegularFile(str(path), os.open(path, os.O_RDONLY))
    path.write_bytes(b"the first\n")

    assert asyncio.run(file.read()) == b"the first\n"
    file.close()


def test_files_are_closed_at_their_end_or_with_the_source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(numbered(300_000))

    def is_open():
        return any(one.is_symlink() and one.readlink() == path for one in Path("/proc/self/fd").iterdir())

    async def go():
        source = open_source(path)
        await take(source, 1, EVERYTHING)
        assert is_open()
        await source.aclose()
        assert not is_open()
        source = open_source(path)
        while await take(source, 1_000, EVERYTHING) is not None:
            pass
        assert not is_open()
        await source.aclose()

    asyncio.run(go())


def test_empty_input_is_an_empty_list():
    assert read("/dev/null") == []


# --- gzip ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(numbered(5)) + gzip.compress(numbered(5, 5)),
        gzip.compress(numbered(5) + b'{"params"') + gzip.compress(b":5}\n" + numbered(4, 6)),
        gzip.compress(b"") + gzip.compress(numbered(10)) + gzip.compress(b""),
        gzip.compress(numbered(10)) + b"\0" * 5_000,
        gzip.compress(numbered(5)) + b"\0" * 512 + gzip.compress(numbered(5, 5)),
    ],
    ids=["two members", "a row over two members", "empty members", "padding", "padding between members"],
)
@pytest.mark.parametrize("bytes_at_once", [1, 5, 1_048_576])
def test_the_members_of_a_gzip_file_are_one_list(packed, bytes_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", bytes_at_once)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed)

    assert lines_of(read(path)) == numbered(10).split(b"\n")[:-1]


@pytest.mark.parametrize("between", [b"", b"\0"], ids=["", "padded"])
def test_many_small_members_are_unpacked_in_few_calls(between, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(b'{"params":%d}\n' % n, 1) + between for n in range(20_000)))
    unpack, calls = files._Gzip._unpack, []
    monkeypatch.setattr(files._Gzip, "_unpack", lambda file: calls.append(file) or unpack(file))

    assert lines_of(read(path)) == numbered(20_000).split(b"\n")[:-1]
    assert len(calls) < 20  # one or two per megabyte, in each of two passes


def test_gzip_is_recognised_by_its_first_bytes_not_by_its_name(tmp_path):
    plain, packed = tmp_path / "plain.gz", tmp_path / "packed.jsonl"
    plain.write_bytes(b"1\n")
    packed.write_bytes(gzip.compress(b"2\n"))

    assert lines_of(read([plain, packed])) == [b"1", b"2"]


PACKED = gzip.compress(numbered(2_000), mtime=0)


@pytest.fixture
def piped(tmp_path):
    """Write bytes into a named pipe; returns its path."""
    with ThreadPoolExecutor(1) as writer:

        def write(data):
            path = tmp_path / "pipe"
            os.mkfifo(path)
            writer.submit(path.write_bytes, data)
            return path

        yield write


@pytest.mark.parametrize("kept", [2, 9, 11, len(PACKED) // 2, len(PACKED) - 9, len(PACKED) - 8, len(PACKED) - 1])
def test_a_gzip_file_that_is_cut_off_gives_the_reason_and_no_row(kept, tmp_path):
    path = tmp_path / "cut.gz"
    path.write_bytes(PACKED[:kept])

    found, reason = read_until_error(path)

    assert not found
    assert reason == f"{path}: the gzip file is cut off: its end is missing. Mend it and run the same command again."


@pytest.mark.parametrize("kept", [2, 11, len(PACKED) // 2, len(PACKED) - 1])
def test_a_gzip_file_from_a_pipe_that_is_cut_off_gives_its_whole_rows_and_then_the_reason(kept, piped):
    found, reason = read_until_error(piped(PACKED[:kept]))

    lines = lines_of(found)
    assert lines == numbered(len(lines)).split(b"\n")[:-1]
    assert "cut off" in reason


@pytest.mark.parametrize(
    "packed",
    [
        PACKED[: len(PACKED) // 2] + b"\xff" * 40 + PACKED[len(PACKED) // 2 + 40 :],
        PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:],
        PACKED[:-1] + b"\x01",
        PACKED[:2] + b"\x09" + PACKED[3:],
        PACKED + b"trailing garbage",
        PACKED + b"\0\0garbage",
    ],
    ids=["middle", "checksum", "length", "method", "garbage", "garbage after padding"],
)
def test_a_gzip_file_that_is_damaged_gives_the_reason_and_no_row(packed, tmp_path, piped):
    path = tmp_path / "bad.gz"
    path.write_bytes(packed)

    found, reason = read_until_error(path)
    believed, too_late = read_until_error(piped(packed))

    assert not found
    assert reason == f"{path}: the gzip file is damaged. Mend it and run the same command again."
    assert len(lines_of(believed)) <= 2_000
    assert too_late.endswith(": the gzip file is damaged. Mend it and run the same command again.")


def test_a_gzip_file_is_unpacked_no_faster_than_it_is_taken(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"\n" * 50_000_000))

    async def go():
        source = open_source(path)
        await take(source, 1, EVERYTHING)
        held = len(source._data)
        await source.aclose()
        return held

    assert asyncio.run(go()) <= files.CHUNK_BYTES


def test_a_single_wrong_bit_in_a_gzip_file_is_always_an_error(tmp_path):
    path = tmp_path / "bit.gz"
    whole = gzip.compress(numbered(40), mtime=0)
    rows = numbered(40).split(b"\n")[:-1]
    for byte in range(2, len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 0x10]) + whole[byte + 1 :])
        try:
            lines = lines_of(read(path))
        except InputError:
            continue
        assert byte < 10, "only the header's time, flags of no effect and system may be wrong without a word"
        assert lines == rows


# --- pipes --------------------------------------------------------------------------------------------------------


def written_to_a_pipe(tmp_path, *pieces, take=100):
    """The rows from a pipe. Each of the *pieces* is written after the one before it was read."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    keeper = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    async def go():
        source = open_source(path)
        taking = asyncio.ensure_future(drain(source, take))
        for piece in pieces:
            os.write(keeper, piece)
            await until_it_is_read(keeper)
        assert source.read_share is None
        os.close(keeper)
        return await taking, source

    return asyncio.run(go())


def unread(descriptor):
    size = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, size)
    return size[0]


async def until_it_is_read(descriptor):
    async with asyncio.timeout(10):
        while unread(descriptor):  # noqa: ASYNC110 - no event says when a pipe was read
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"a\nb\n"],
        [b"a", b"\n", b"b"],
        [b"\xef\xbb\xbf", b"a\nb\n"],
        [b"\xef", b"\xbb", b"\xbf", b"a\nb\n"],
        [b"\xef\xbb", b"\xbfa\nb"],
    ],
)
def test_a_pipe_is_read_as_it_is_written(pieces, tmp_path):
    found, source = written_to_a_pipe(tmp_path, *pieces)

    assert lines_of(found) == [b"a", b"b"]
    assert source.where(1) == "pipe:2"


def test_a_gzip_stream_may_arrive_in_pieces_of_any_size(tmp_path):
    packed = gzip.compress(b"\xef\xbb\xbfa\nb\n")

    found, _ = written_to_a_pipe(tmp_path, packed[:1], packed[1:3], packed[3:20], packed[20:])

    assert lines_of(found) == [b"a", b"b"]


def test_a_read_of_a_silent_pipe_can_be_cancelled(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    keeper = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    async def go():
        source = open_source(path)
        os.write(keeper, b"a\nb")
        taking = asyncio.ensure_future(take(source, 9, EVERYTHING))
        await until_it_is_read(keeper)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        await source.aclose()

    asyncio.run(go())
    os.close(keeper)


def test_standard_input_is_a_list_whose_places_name_stdin(tmp_path):
    program = """if True:
        import asyncio
        from bulkwf.sources import open_source

        async def go():
            source = open_source("-")
            found = await source.peek(9, 1 << 40)
            source.take(found)
            print(found.rows, source.where(1), source.read_share, (await source.peek(9, 9)).rows)
            await source.aclose()

        asyncio.run(go())
    """
    path = tmp_path / "list.jsonl"
    path.write_bytes(b"{}\n{}")
    with path.open("rb") as file:
        for standard_input in ({"input": b"{}\n{}"}, {"stdin": file}):
            found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, **standard_input)

            assert found.stdout == b"2 stdin:2 None 0\n"


# --- how much has been read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_the_read_share_grows_to_1(packed, tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        data = os.urandom(1_000_000).hex().encode() + b"\n" + numbered(100_000)
        path.write_bytes(gzip.compress(data, 1) if packed else data)

    async def go():
        source, shares = open_source(paths), []
        while await take(source, 1_000, 1 << 16) is not None:
            shares.append(source.read_share)
        shares.append(source.read_share)
        await source.aclose()
        return shares

    shares = asyncio.run(go())
    assert 0 <= shares[0] < 0.9
    assert all(0 <= share <= 1 for share in shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) > 3
    assert all(later > share - 0.2 for share, later in pairwise(shares))  # the share of buffered rows is estimated


async def test_the_read_share_is_known_only_for_rows_with_a_length():
    async def slow():
        yield {}

    known, unknown, awaited = open_source([{}] * 2_000), open_source(iter([{}])), open_source(slow())

    await take(known, 1_000, EVERYTHING)

    assert 0.4 < known.read_share < 0.8
    assert (unknown.read_share, awaited.read_share) == (None, None)
    await drain(known)
    assert known.read_share == 1.0
    for source in (unknown, awaited):
        await drain(source)


def test_the_read_share_of_an_empty_list_is_1(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.touch()

    assert open_source(path).read_share == 1.0
    assert open_source([]).read_share == 0.0 or read([]) == []


# --- rows of a program --------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"
    NONE = None
    NOWHERE = math.nan


class Level(IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({}, "{}"),
        ({"params": None}, '{"params":null}'),
        ({"params": {"a": 1, "b": [True, None, 1.5, "x"]}}, '{"params":{"a":1,"b":[true,null,1.5,"x"]}}'),
        ({"params": 2**64}, '{"params":18446744073709551616}'),
        ({"params": -(10**40)}, '{"params":-1' + "0" * 40 + "}"),
        ({"params": [10**30, 0.1, None, "é\u2028"]}, '{"params":[1' + "0" * 30 + ',0.1,null,"é\u2028"]}'),
        ({"params": "null"}, '{"params":"null"}'),
        ({"params": dt.date(2026, 9, 1)}, '{"params":"2026-09-01"}'),
        ({"params": [dt.date(2026, 9, 1), None]}, '{"params":["2026-09-01",null]}'),
        (
            {"params": dt.datetime(2026, 9, 1, 12, tzinfo=dt.UTC)},
            '{"params":"2026-09-01T12:00:00+00:00"}',
        ),
        ({"params": uuid.UUID(int=5)}, '{"params":"00000000-0000-0000-0000-000000000005"}'),
        ({"params": [uuid.UUID(int=5), None]}, '{"params":["00000000-0000-0000-0000-000000000005",null]}'),
        ({"params": (1, 2)}, '{"params":[1,2]}'),
        ({"params": Colour.RED}, '{"params":"red"}'),
        ({"params": [Colour.RED, 2**70]}, '{"params":["red",1180591620717411303424]}'),
        ({"params": Colour.NONE}, '{"params":null}'),
        ({"params": Level.HIGH}, '{"params":3}'),
        (types.MappingProxyType({"params": {"a": 1}}), '{"params":{"a":1}}'),
        ({"params": types.MappingProxyType({"a": None})}, '{"params":{"a":null}}'),
        (Instance(), "{}"),
        (Instance(params=None), '{"params":null}'),
        (Instance(instance_id="a", params=[1]), '{"instance_id":"a","params":[1]}'),
        (
            Instance(instance_id="a", instance_retention={"success_retention": 5}, location_hint="weur"),
            '{"instance_id":"a","instance_retention":{"success_retention":5},"location_hint":"weur"}',
        ),
    ],
)
def test_a_row_of_a_program_is_encoded_with_its_values_unchanged(row, line):
    assert encode_row(row).decode() == line


CIRCULAR = {}
CIRCULAR["self"] = CIRCULAR


@pytest.mark.parametrize(
    "params",
    [
        math.nan,
        math.inf,
        -math.inf,
        [1, {"a": math.nan}],
        {"a": None, "b": math.inf},
        [2**70, math.nan],
        {1, 2},
        b"bytes",
        object(),
        {1: "a"},
        {None: "a"},
        {True: "a"},
        {"a": [None, {2: "b"}]},
        types.MappingProxyType({1: None}),
        "\ud800",
        {"\udfff": None},
        Colour.NOWHERE,
        CIRCULAR,
        1j,
        Instance(params=1),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:20]!a}",
)
def test_a_value_without_a_json_form_is_refused_not_replaced(params):
    with pytest.raises((TypeError, ValueError, RecursionError)):
        encode_row({"params": params})
    with pytest.raises((TypeError, ValueError, RecursionError)):
        encode_row(Instance(params=params))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(JSON)
def test_each_json_value_is_decoded_to_itself(params):
    def exactly(value):
        return json.dumps(value, ensure_ascii=True)

    line = encode_row({"params": params})

    assert b"\n" not in line
    assert exactly(json.loads(line)) == exactly({"params": params})


@given(st.lists(st.integers(0, 1 << 70) | st.floats() | st.none() | st.sets(st.none()), max_size=5))
def test_no_line_holds_a_value_that_json_does_not_have(params):
    bad = any(isinstance(value, set) or (isinstance(value, float) and not math.isfinite(value)) for value in params)

    try:
        line = encode_row({"params": params})
    except (TypeError, ValueError):
        assert bad
    else:
        assert not bad
        assert json.loads(line) == {"params": params}


def test_a_row_that_cannot_be_encoded_is_refused_alone_and_keeps_its_number():
    rows = [{"params": 1}, {"params": math.nan}, "text", {"params": {1}}, 7, None, {"params": 2}]

    (piece,) = read(rows)

    assert piece.data == b'{"params":1}\n\n\n\n\n\n{"params":2}\n'
    assert [(offset, code) for offset, code, _ in piece.refused] == [(n, "not_json") for n in range(1, 6)]
    assert "a mapping or an Instance, not str" in piece.refused[1][2]
    assert all(message.isprintable() for _, _, message in piece.refused)


LONE_SURROGATES = {
    "in params": {"params": {"text": "cut \ud83d", "n": 1}},
    "beside a null": {"params": {"text": "\ud83d", "none": None}},
    "in a key": {"params": {"\ud83d": 1}},
    "in the id": {"instance_id": "\ud83d"},
    "in an Instance": Instance(params="\ud83d"),
}


@pytest.mark.parametrize("name", LONE_SURROGATES)
def test_a_mapping_with_a_lone_surrogate_is_refused_with_that_reason(name):
    (piece,) = read([{"params": 1}, LONE_SURROGATES[name], {"params": "\U0001f600"}])

    assert piece.data == '{"params":1}\n\n{"params":"\U0001f600"}\n'.encode()
    ((offset, code, message),) = piece.refused
    assert (offset, code) == (1, "lone_surrogate")
    assert message.startswith(r"\ud83d in a text of the row is a lone surrogate")


def test_refused_rows_keep_their_numbers_in_any_slicing():
    bad = {0, 3, 4, 9, 500, 501, 999, 1_000}
    slices = read([{"params": {n}} if n in bad else {"params": n} for n in range(1_200)], rows=7)

    assert {piece.first_row + offset for piece in slices for offset, _, _ in piece.refused} == bad
    assert all(0 <= offset < piece.rows for piece in slices for offset, _, _ in piece.refused)


@pytest.mark.parametrize("count", [0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 3 * CHUNK_ROWS])
def test_an_iterable_of_any_length_is_a_list(count):
    async def slowly():
        for n in range(count):
            if n % 3 == 0:
                await asyncio.sleep(0)
            yield {"params": n}

    rows = [{"params": n} for n in range(count)]
    expected = numbered(count).split(b"\n")[:-1]

    assert lines_of(read(rows)) == expected
    assert lines_of(read(iter(rows))) == expected
    assert lines_of(read(row for row in rows)) == expected
    assert lines_of(read(slowly())) == expected


@pytest.mark.parametrize("good", [0, 1, 30, CHUNK_ROWS, CHUNK_ROWS + 30])
@pytest.mark.parametrize("awaited", [False, True])
def test_an_iterable_that_raises_gives_all_earlier_rows_and_then_the_error(good, awaited):
    def rows():
        yield from ({"params": n} for n in range(good))
        raise LookupError("no more of the table")

    async def awaited_rows():
        for row in rows():
            yield row

    found, reason = read_until_error(awaited_rows() if awaited else rows())

    assert lines_of(found) == numbered(good).split(b"\n")[:-1]
    assert reason == f"the rows can't be read past row {good}: LookupError('no more of the table')"


async def test_the_cause_of_an_error_in_the_callers_code_is_kept():
    async def awaited_rows():
        yield {}
        raise LookupError

    def rows():
        yield {}
        raise LookupError

    for broken in (awaited_rows(), rows()):
        source = open_source(broken)
        await take(source, 1, EVERYTHING)
        with pytest.raises(InputError) as caught:
            await take(source, 1, EVERYTHING)
        assert isinstance(caught.value.__cause__, LookupError)
        await source.aclose()


async def test_a_cancellation_inside_the_callers_code_is_not_the_end_of_the_list():
    async def rows():
        yield {}
        lookup = asyncio.ensure_future(asyncio.sleep(3_600))
        lookup.cancel()
        await lookup
        yield {}

    source = open_source(rows())
    await take(source, 1, EVERYTHING)

    with pytest.raises(InputError, match="past row 1: CancelledError"):
        await take(source, 1, EVERYTHING)
    await source.aclose()


async def test_a_slow_async_list_gives_its_rows_when_the_wait_ends():
    more = asyncio.Event()

    async def rows():
        yield {"params": 0}
        yield {"params": 1}
        await more.wait()
        yield {"params": 2}

    source = open_source(rows())

    assert (await take(source, 100, EVERYTHING, 0.0)).data == numbered(2)
    more.set()
    assert (await take(source, 100, EVERYTHING)).data == numbered(1, 2)
    assert await take(source, 100, EVERYTHING) is None
    await source.aclose()


async def test_an_async_list_is_drawn_only_a_little_ahead():
    drawn = 0

    async def rows():
        nonlocal drawn
        while drawn < 100_000:
            drawn += 1
            yield {}

    source = open_source(rows())
    await take(source, 1, EVERYTHING)
    for _ in range(50):
        await asyncio.sleep(0)

    assert drawn <= 4 * CHUNK_ROWS
    await source.aclose()


async def test_an_iterable_is_drawn_only_a_little_ahead():
    drawn = 0

    def rows():
        nonlocal drawn
        while drawn < 100_000:
            drawn += 1
            yield {}

    source = open_source(rows())
    await take(source, 1, EVERYTHING)
    for _ in range(50):
        await asyncio.sleep(0)

    assert drawn <= 3 * CHUNK_ROWS
    await source.aclose()


async def test_closing_an_async_list_that_waits_ends_its_wait():
    ended = asyncio.Event()

    async def rows():
        yield {}
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    source = open_source(rows())
    await take(source, 1, EVERYTHING)
    closing = asyncio.ensure_future(source.aclose())
    await asyncio.wait((closing,), timeout=10)

    assert closing.done()
    assert ended.is_set()


async def test_an_async_generator_that_ignores_a_cancellation_is_closed():
    log = []

    async def rows():
        try:
            yield {}
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            log.append("goes on")
            yield {}
            yield {}
        finally:
            log.append("closed")

    source = open_source(rows())
    await take(source, 1, EVERYTHING)
    async with asyncio.timeout(10):
        await source.aclose()

    assert log == ["goes on", "closed"]


@pytest.mark.parametrize("waits_in", ["the rows", "the cleanup"])
async def test_the_cleanup_of_an_async_generator_is_limited_in_time(waits_in, monkeypatch, caplog):
    monkeypatch.setattr(rows_module, "CLEANUP_S", 0.05)
    cut = asyncio.Event()

    async def rows():
        try:
            yield {}
            if waits_in == "the rows":
                await asyncio.Event().wait()
            while True:
                yield {}
        finally:
            try:
                await asyncio.Event().wait()
            finally:
                cut.set()

    source = open_source(rows())
    await take(source, 1, EVERYTHING)
    async with asyncio.timeout(10):
        await source.aclose()
        await cut.wait()

    assert "took over 0 s and was cut off" in caplog.text


@pytest.mark.parametrize("step", ["open", "read"])
async def test_a_file_is_closed_after_the_thread_that_reads_it_has_ended(tmp_path, monkeypatch, step):
    """The run may end before the thread. Until then the descriptor must not get to another file."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" * 10)
    real, begun, go_on, used = getattr(os, step), threading.Event(), threading.Event(), []

    def slow(*args):
        if step == "read":
            used.append(args[0])
        begun.set()
        assert go_on.wait(10)
        found = real(*args)
        if step == "open":
            used.append(found)
        return found

    monkeypatch.setattr(files._RegularFile, "_is_cached", lambda self: False)
    source = open_source(path)
    taking = asyncio.ensure_future(take(source, 1, EVERYTHING))
    monkeypatch.setattr(files.os, step, slow)
    await asyncio.to_thread(begun.wait, 10)
    monkeypatch.setattr(files.os, step, real)
    taking.cancel()
    await uncancelled(source.aclose)
    for descriptor in used:
        os.fstat(descriptor)  # still open
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "bulkwf-call":
            await asyncio.to_thread(thread.join, 10)

    assert len(used) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(used[0])


@pytest.mark.parametrize("kind", ["iterable", "async iterable"])
async def test_only_a_few_large_rows_of_a_program_are_in_memory(kind):
    drawn = 0

    def rows():
        nonlocal drawn
        for _ in range(200):
            drawn += 1
            yield {"params": "x" * 300_000}

    async def later():
        for row in rows():
            yield row

    source = open_source(rows() if kind == "iterable" else later())
    try:
        for _ in range(3):
            await take(source, 1, 400_000)
        await asyncio.sleep(0)
        assert drawn <= 20
    finally:
        await source.aclose()
