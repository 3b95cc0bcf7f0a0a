"""Where a batch ends: the number of requests of a list, which `check` and `run` agree on."""

import asyncio
import json
import re
from math import inf
from pathlib import Path
from unittest import mock

import pytest
from fakes import memory_folder, now, run_virtual
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_engine import World

from bulkwf.batching import packer as batching
from bulkwf.batching.batcher import ITEM_OVERHEAD_BYTES, Batcher, even_share, request_cost
from bulkwf.batching.body import compose
from bulkwf.batching.body_limit import BodyLimit
from bulkwf.batching.ids import IdScheme
from bulkwf.check import check_list
from bulkwf.errors import InputError
from bulkwf.options import BatchLimits, Options, RateLimits
from bulkwf.sources import open_source
from bulkwf.sources import source as reader
from bulkwf.sources.source import Chunk, Source

ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", re.ASCII)
KEYED = IdScheme("run")
UNLIMITED = RateLimits(instances_per_s=None, requests_per_5m=None)
LONGEST = 600
"""Replaces the megabyte of `MAX_ROW_BYTES` and `MAX_PARAMS_BYTES`."""


class Bytes:
    """A feed of given chunks. A number among them is a wait in seconds; an exception is raised."""

    read_share = None

    def __init__(self, *chunks):
        self.chunks = list(chunks)

    async def read(self):
        chunk = self.chunks.pop(0) if self.chunks else None
        if isinstance(chunk, float):
            await asyncio.sleep(chunk)
            return await self.read()
        if isinstance(chunk, Exception):
            raise chunk
        return chunk if chunk is None else Chunk(chunk)

    async def aclose(self):
        pass


def row(**members):
    return json.dumps(members, separators=(",", ":")).encode()


def chunked(data, cuts):
    ends = sorted({min(one, len(data)) for one in cuts} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False) if a < b]


def batcher_of(*chunks, options=None, linger_s=9.0, scheme=KEYED):
    return Batcher(Source(Bytes(*chunks)), scheme, options or Options(), linger_s=linger_s)


async def take_batches(source, options, scheme=KEYED, linger_s=9.0):
    """All batches of a source."""
    batcher = Batcher(source, scheme, options, linger_s=linger_s)
    batches = []
    while (batch := await batcher.next()) is not None:
        batches.append(batch)
    return batches


def batches_of(*chunks, **options):
    return asyncio.run(take_batches(Source(Bytes(*chunks)), Options(**options)))


def sizes(batches):
    return [(batch.rows, len(batch.ids)) for batch in batches]


# --- how many instances a request carries -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instances", "rate", "expected"),
    [
        (100, 100, 100),
        (100, 40, 40),
        (30, 100, 30),
        (100, None, 100),
        (1, 1, 1),
        (100, 300, 100),
        (100, 150, 75),
        (100, 101, 100),
    ],
)
def test_a_batch_has_the_size_that_fills_the_rate_window(instances, rate, expected):
    limits = RateLimits(instances_per_s=rate)

    batches = batches_of(b"{}\n" * 300, batch=BatchLimits(instances=instances), rate=limits)

    assert even_share(instances, limits) == expected
    assert {len(batch.ids) for batch in batches[:-1]} == {expected}


@given(rows=st.integers(1, 2_000), rate=st.integers(1, 2_000), quota=st.one_of(st.none(), st.integers(1, 30_000)))
@example(rows=68, rate=100, quota=None)
def test_an_even_share_is_close_to_the_best_batch_size(rows, rate, quota):
    rates = RateLimits(instances_per_s=rate, requests_per_5m=quota)
    share = even_share(rows, rates)

    def used(size):
        return min(rate // size, inf if quota is None else quota / 300) * size

    assert 1 <= share <= min(rows, rate), "what fits a request's bytes goes on fitting"
    best = max(used(size) for size in range(1, min(rows, rate) + 1))
    assert used(share) >= 0.8 * best
    assert share == min(rows, rate) or used(share) > 1.05 * used(min(rows, rate)), "more requests are for more rows"


def test_an_even_share_of_68_at_100_a_second_is_50():
    assert even_share(68, RateLimits()) == 50


def test_a_batch_begun_at_a_higher_rate_is_sent_in_smaller_requests():
    batcher = batcher_of(options=Options(rate=RateLimits(instances_per_s=40)))

    assert batcher.next_part(range(100)) == range(40)
    assert batcher.next_part([3, 5, 8]) == [3, 5, 8]
    assert batcher.next_part([]) == []


def test_batches_are_smaller_while_bad_rows_are_frequent():
    batcher = batcher_of(b"{}\n" * 1_000)

    async def size():
        return len((await batcher.next()).ids)

    async def run():
        sizes = [await size()]
        for _ in range(4):
            batcher.bad_rows.found()
        sizes.append(await size())
        batcher.bad_rows.created(1_000)
        return [*sizes, await size()]

    whole, smaller, again = asyncio.run(run())

    assert (whole, again) == (100, 100)
    assert smaller < 20
    assert len(batcher.next_part(range(100))) == 100


@pytest.mark.parametrize(
    ("instances_per_s", "requests_per_5m", "cost"),
    [(100, 1_200, 25.0), (10, 1_200, 5.0), (100, None, 5.0), (None, 1_200, 1_000.0), (None, None, 1_000.0)],
)
def test_request_costs_as_many_instances_as_the_limits_allow_in_its_time(instances_per_s, requests_per_5m, cost):
    assert request_cost(RateLimits(instances_per_s=instances_per_s, requests_per_5m=requests_per_5m)) == cost


# --- bytes --------------------------------------------------------------------------------------------------------


@given(st.integers(1_024, 60_000), st.integers(1, 100))
def test_a_batch_always_has_room_for_a_row_of_half_its_bytes(size, instances):
    line = row(params="x" * (size // 2 - 20))
    assert len(line) < size // 2

    batches = batches_of(line + b"\n", batch=BatchLimits(bytes=size, instances=instances), rate=UNLIMITED)

    assert sizes(batches) == [(1, 1)]
    assert len(compose(batches[0], range(1))) <= size


def test_a_batch_that_fills_its_bytes_with_the_longest_ids_still_fits():
    size = (20_000 - 10 * ITEM_OVERHEAD_BYTES) // 10
    lines = [b'{"k":"%s"' % (b"%0100d" % n) for n in range(10)]
    lines = [line + b" " * (size - 2 - len(line)) + b"}\n" for line in lines]
    options = Options(batch=BatchLimits(bytes=20_000, instances=10, rows=10), row_shape="params")

    (batch,) = asyncio.run(take_batches(Source(Bytes(b"".join(lines))), options, IdScheme("r", "{k}")))

    assert len(batch.ids) == 10
    assert len(compose(batch, range(10))) <= 20_000


def test_a_large_row_that_does_not_fit_begins_the_next_batch():
    large = row(params="x" * 3_300)
    data = b"".join([b"\n", *[row(params="x" * 90) + b"\n"] * 3, large + b"\n", b"{}\n"])

    batches = batches_of(data, batch=BatchLimits(instances=4, rows=50, bytes=4_000))

    assert [batch.rows for batch in batches] == [4, 2]


def test_batches_bound_by_bytes_have_sizes_that_fill_the_rate_window():
    line = row(params="x" * 14_900) + b"\n"

    assert sizes(batches_of(line * 150)) == [(50, 50)] * 3
    assert sizes(batches_of(line * 150, rate=UNLIMITED)) == [(69, 69), (69, 69), (12, 12)]
    assert sizes(batches_of(line * 60)) == [(60, 60)]


def test_instances_already_in_a_batch_count_when_it_fills_the_window():
    line = row(params="x" * 14_900) + b"\n"

    batches = batches_of(b"{}\n" * 20 + b"bad\n" * 80 + line * 90)

    assert sizes(batches) == [(130, 50), (60, 60)]


def test_batches_are_smaller_after_the_service_refused_a_request_as_too_large():
    line = row(params="x" * 500) + b"\n"

    async def go():
        batcher = batcher_of(line * 300)
        first = await batcher.next()
        batcher.body_limit.too_large(60_000)
        second = await batcher.next()
        batcher.body_limit.too_large(60_000)  # begun before the limit was lowered
        third = await batcher.next()
        batcher.body_limit.too_large(14)
        return [len(batch.ids) for batch in (first, second, third, await batcher.next())], batcher

    found, batcher = asyncio.run(go())

    assert found == [100, 33, 33, 1]
    assert batcher.body_limit.size == 1_024


def test_the_body_limit_grows_again_later_after_each_refusal():
    limit, grown = BodyLimit(1_000_000), []
    for size in (1_000_000, 999_000, 500_000, 499_000):  # the 2nd and the 4th were begun before the limit was lowered
        limit.too_large(size)
    assert limit.size == 250_000

    for _ in range(4):
        passed = 0
        while limit.size < 1_000_000:
            limit.passed()
            passed += 1
        grown.append(passed)
        limit.too_large(1_000_000)

    assert grown == [16, 16, 32, 64]


# --- rows ---------------------------------------------------------------------------------------------------------


def test_later_rows_replace_blank_and_invalid_rows_in_a_batch():
    data = b"bad\n" + b"{}\n" * 3 + b"\n" + b"{}\n" * 9

    assert sizes(batches_of(data, batch=BatchLimits(instances=5, rows=50))) == [(7, 5), (5, 5), (2, 2)]
    assert sizes(batches_of(data, batch=BatchLimits(instances=5, rows=6))) == [(6, 4), (5, 5), (3, 3)]


GOOD = st.one_of(
    st.builds(lambda n: row(instance_id=f"id{n}", params=n), st.integers(0, 30)),
    st.builds(lambda n: row(params="x" * n), st.integers(0, 300)),
    st.sampled_from([b"{}", b" {} ", b'{"params":[]}\r', b'{"instance_id":"solo","location_hint":"x"}']),
)
BAD = st.sampled_from([b"nope", b"{", b"{}{}", b'{"x":1}', b'{"instance_id":"-"}', b"\xff", b"[1]", b'{"params":NaN}'])
BLANK = st.sampled_from([b"", b" ", b"\r", b"\t "])
LONG = st.integers(1, 3_000).map(lambda n: b'{"params":"' + b"x" * (LONGEST + n) + b'"}')
LINES = st.lists(
    st.one_of(
        st.tuples(st.just("good"), GOOD),
        st.tuples(st.just("bad"), BAD),
        st.tuples(st.just("blank"), BLANK),
        st.tuples(st.just("long"), LONG),
    ),
    max_size=60,
)


@settings(max_examples=400)
@given(
    lines=LINES,
    cuts=st.lists(st.integers(0, 20_000), max_size=12),
    size=st.sampled_from([1_024, 1_500, 4_000, 10**6]),
    instances=st.integers(1, 12),
    spare_rows=st.integers(0, 10),
    rate=st.sampled_from([None, 5, 100]),
)
def test_every_row_of_any_list_is_in_exactly_one_batch_within_the_bounds(
    lines, cuts, size, instances, spare_rows, rate
):
    limits = BatchLimits(instances=instances, rows=instances + spare_rows, bytes=size)
    options = Options(batch=limits, rate=RateLimits(instances_per_s=rate))
    data = b"".join(line + b"\n" for _, line in lines)
    with (
        mock.patch.multiple(batching, MAX_ROW_BYTES=LONGEST, MAX_PARAMS_BYTES=LONGEST),
        mock.patch.object(reader, "MAX_ROW_BYTES", LONGEST),
    ):
        batches = asyncio.run(take_batches(Source(Bytes(*chunked(data, cuts))), options))

    kinds = [kind for kind, _ in lines]
    assert sum(batch.rows for batch in batches) == len(lines)
    at = 0
    for batch in batches:
        assert (batch.first_row, batch.region.count(b"\n")) == (at, batch.rows)
        sent = [at + offset for offset in batch.offsets]
        refused = {result.row: result.code for result in batch.refused}
        blank = {n for n in range(at, at + batch.rows) if kinds[n] == "blank"}
        assert sorted([*sent, *refused, *blank]) == list(range(at, at + batch.rows)), "each row is in one place"
        assert all(kinds[n] == "good" for n in sent)
        assert all(kinds[n] != "good" or code == "duplicate_id" for n, code in refused.items())
        assert all(refused[n] == "row_too_long" for n in refused if kinds[n] == "long")
        assert len(set(batch.ids)) == len(batch.ids) == len(sent) <= instances
        assert all(map(ID.fullmatch, batch.ids))
        assert batch.rows <= limits.rows
        if batch.ids:
            body = compose(batch, range(len(batch.ids)))
            assert len(body) <= size
            assert [item["instance_id"] for item in json.loads(body)] == list(batch.ids)
        at += batch.rows


@given(lines=LINES, cuts=st.lists(st.integers(0, 20_000), max_size=12), instances=st.integers(1, 12))
def test_the_chunks_of_a_list_do_not_change_the_batches(lines, cuts, instances):
    assume(all(kind != "long" for kind, _ in lines))
    limits = BatchLimits(instances=instances)
    data = b"".join(line + b"\n" for _, line in lines)

    found = [batches_of(*chunked(data, where), batch=limits) for where in (cuts, [], cuts)]

    assert found[0] == found[1] == found[2]


# --- slow sources -------------------------------------------------------------------------------------------------


def taken_at(*chunks, linger_s=0.5, **options):
    """The batches of a feed, and the time of each."""

    async def go():
        batcher = batcher_of(*chunks, options=Options(**options), linger_s=linger_s)
        found = []
        while (batch := await batcher.next()) is not None:
            found.append((round(now(), 3), batch.rows))
        return found

    return run_virtual(go())


def test_a_batch_of_a_slow_source_ends_when_the_linger_after_its_first_row_is_over():
    slow = (3.0, b"{}\n", 0.2, b"{}\n", 0.2, b"{}\n", 0.2, b"{}\n", 9.0)

    assert taken_at(*slow) == [(3.5, 3), (4.1, 1)]
    assert taken_at(*slow, linger_s=0.0) == [(3.0, 1), (3.2, 1), (3.4, 1), (3.6, 1)]
    assert taken_at(*slow, linger_s=None) == [(12.6, 4)]


def test_a_batch_with_an_invalid_row_waits_only_for_the_linger():
    limits = BatchLimits(instances=2, rows=10)

    assert taken_at(b"bad\n{}\n", 60.0, b"{}\n", batch=limits) == [(0.5, 2), (60.0, 1)]


def test_rows_before_an_input_error_make_a_batch_before_the_error():
    async def go():
        batcher = batcher_of(b"{}\nbad\n", InputError("torn"), options=Options(batch=BatchLimits(instances=2)))
        batch = await batcher.next()
        for _ in range(2):
            with pytest.raises(InputError, match="torn"):
                await batcher.next()
        return batch

    assert sizes([asyncio.run(go())]) == [(2, 1)]


# --- check says what a run does -----------------------------------------------------------------------------------

OWN = st.integers(0, 40).map(lambda n: row(instance_id=f"order-{n}", params=n))
LISTED = st.lists(
    st.tuples(
        st.one_of(GOOD, OWN, BAD, BLANK, st.integers(1, 900).map(lambda n: row(params="x" * n))), st.integers(1, 9)
    ),
    max_size=40,
).map(lambda blocks: [line for line, times in blocks for _ in range(times)])
"""Blocks of equal lines: an id may occur in several rows, in one batch or in several."""


@settings(max_examples=100, deadline=None)
@given(
    lines=LISTED,
    instances=st.sampled_from([1, 2, 7, 30, 100]),
    spare_rows=st.sampled_from([0, 1, 10, 900]),
    size=st.sampled_from([1_024, 2_000, 10_000, 1_048_576]),
    rate=st.sampled_from([None, 3, 10, 100]),
    quota=st.sampled_from([None, 300, 1_000]),
)
@example(  # every second row is invalid
    lines=[b"bad", b"{}"] * 250, instances=100, spare_rows=900, size=1_048_576, rate=100, quota=1_000
)
def test_check_says_how_many_requests_and_instances_a_run_makes(lines, instances, spare_rows, size, rate, quota):
    options = Options(
        batch=BatchLimits(instances=instances, rows=instances + spare_rows, bytes=size),
        # Two rows may have one id. They are sent one after the other, and the second one needs no look-up.
        rate=RateLimits(instances_per_s=rate, requests_per_5m=quota, concurrency=1),
        confirm_existing=False,
    )

    async def go(folder):
        path = folder / "rows.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        source = open_source(str(path))
        report = await check_list(source, IdScheme("key"), options)
        await source.aclose()
        world = World(folder, str(path), options=options)
        return report, world.transport, await world.session()

    with memory_folder() as folder:
        report, transport, summary = run_virtual(go(Path(folder)))

    assert summary.complete
    assert len(transport.requests) == len(transport.posts) == report.batches
    assert sum(map(len, transport.posts)) == summary.created + summary.existed == report.instances
    assert (summary.rows, summary.rows - report.instances) == (report.rows, summary.invalid)
