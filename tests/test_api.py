"""The library: `submit_all`, `submit_stream` and `read_results`, against the emulator on a real socket."""

import asyncio
import contextlib
import json
import os
import secrets
import sqlite3
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
from fakes import TARGET, lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bulkwf
from bulkwf import (
    BatchLimits,
    BulkwfError,
    CheckpointError,
    ConfigError,
    InputError,
    Instance,
    Options,
    RateLimits,
    RetryPolicy,
    ServiceRefused,
    SystemRefused,
    TemporaryStop,
    read_results,
    submit_all,
    submit_stream,
)
from bulkwf.checkpoint import Checkpoint, read_status
from bulkwf.emulator import Limits, Service, emulate
from bulkwf.events import BatchBegun

TOKEN = "canary-51c0"
FAST = RateLimits(instances_per_s=None, requests_per_5m=None)


class Place:
    """A running emulator, and the arguments that make a run use it."""

    def __init__(self, emulator, folder):
        self.service = emulator.service
        self.base_url = emulator.base_url
        self.file = folder / "run.bulkwf"

    def options(self, **more):
        return Options(**{"rate": FAST, "retry": RetryPolicy(base_s=0.001), **more})

    def known(self, *, checkpoint=True, **options):
        arguments = {
            "workflow": "resize",
            "account_id": "acct",
            "base_url": self.base_url,
            "api_token": TOKEN,
            "options": self.options(**options),
        }
        return {**arguments, "checkpoint": self.file} if checkpoint else arguments

    @property
    def ids(self):
        return self.service.ids(TARGET)


@contextlib.asynccontextmanager
async def emulated(folder, *faults, **service):
    async with emulate(Service(Limits.none(), time.monotonic, **service), faults=faults) as emulator:
        yield Place(emulator, folder)


def mappings(n, first=0):
    return [{"instance_id": f"id-{i}", "params": {"n": i}} for i in range(first, first + n)]


def ids(n, first=0):
    return [f"id-{i}" for i in range(first, first + n)]


# --- what a list may be -------------------------------------------------------------------------------------------


async def drawn(rows):
    for row in rows:
        await asyncio.sleep(0)
        yield row


async def read(results, seen):
    async for result in results:
        seen.append(result)


KINDS = {
    "list": mappings,
    "tuple": lambda n: tuple(mappings(n)),
    "generator": lambda n: (row for row in mappings(n)),
    "async generator": lambda n: drawn(mappings(n)),
    "instances": lambda n: [Instance(instance_id=f"id-{i}", params={"n": i}) for i in range(n)],
    "path": lambda n: "rows.jsonl",
    "path object": lambda n: bulkwf.checkpoint.file.Path("rows.jsonl"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [True, False])
async def test_a_list_of_any_kind_is_submitted(folder, kind, stored):
    (folder / "rows.jsonl").write_bytes(lines(250))
    async with emulated(folder) as place:
        summary = await submit_all(KINDS[kind](250), **place.known(checkpoint=stored))

    assert (summary.created, summary.rows, summary.complete, summary.exit_code) == (250, 250, True, 0)
    assert sorted(place.ids) == sorted(ids(250))
    names = {one.name for one in folder.iterdir()}
    assert names == ({"rows.jsonl", "run.bulkwf"} if stored else {"rows.jsonl"})
    if stored:
        assert [result.id for result in read_results(place.file)] == ids(250)


async def test_a_run_key_has_64_random_bits(folder, monkeypatch):
    """Two runs with the same key take each other's rows for their own and do not start them."""
    asked = []

    def ask(size):
        asked.append(size)
        return os.urandom(size)

    monkeypatch.setattr(secrets, "token_bytes", ask)
    keys = set()
    async with emulated(folder) as place:
        for number in range(20):
            file = folder / f"{number}.bulkwf"
            await submit_all([{"params": 1}], **{**place.known(), "checkpoint": file})
            keys.add(read_status(file).header.run_key)
        assert len(place.ids) == 20
    assert min(asked) >= 8
    assert {len(key) for key in keys} == {2 * asked[0]}
    assert len(keys) == 20


async def test_a_run_cancelled_while_opening_releases_its_checkpoint(folder, monkeypatch):
    begun, go_on, real = threading.Event(), threading.Event(), Checkpoint.open

    def slow(*args, **more):
        begun.set()
        assert go_on.wait(10)
        return real(*args, **more)

    async with emulated(folder) as place:
        monkeypatch.setattr(Checkpoint, "open", slow)
        opening = asyncio.ensure_future(submit_all(mappings(5), **place.known()))
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(3):
            opening.cancel()
            await asyncio.sleep(0)
        assert not opening.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert [one.name for one in folder.iterdir()] == [place.file.name]
        with contextlib.closing(sqlite3.connect(place.file)) as db:
            assert db.execute("SELECT reason, ended_at - started_at FROM session").fetchall() == [(None, 0.0)]
        monkeypatch.undo()
        assert (await submit_all(mappings(5), **place.known())).created == 5


async def test_a_run_that_can_not_start_a_thread_is_refused(folder, monkeypatch):
    def none(*_):
        raise RuntimeError("can't start new thread")

    async with emulated(folder) as place:
        monkeypatch.setattr(ThreadPoolExecutor, "submit", none)
        with pytest.raises(SystemRefused, match="ulimit -u"):
            await submit_all(mappings(5), **place.known())


async def test_on_progress_is_called_as_rows_become_durable(folder):
    seen = []
    async with emulated(folder) as place:
        await submit_all(
            mappings(500),
            **place.known(),
            on_progress=lambda progress: seen.append((progress.counts.settled, progress.settled_now)),
        )

    assert seen == sorted(seen)
    assert seen[-1] == (500, 500)


async def test_invalid_rows_have_codes_and_make_the_exit_code_1(folder):
    rows = [{"nonsense": 1}, {"params": float("nan")}, {"instance_id": "batch"}, *mappings(1), {"instance_id": "id-0"}]
    async with emulated(folder) as place:
        summary = await submit_all(rows, **place.known())

    assert (summary.created, summary.invalid, summary.exit_code, summary.complete) == (1, 4, 1, True)
    codes = {result.row: result.code for result in read_results(place.file, outcome="invalid")}
    assert codes == {0: "unknown_key", 1: "not_json", 2: "reserved_id", 4: "duplicate_id"}


async def test_a_late_second_answer_never_settles_another_batch(folder):
    async with emulated(folder, {"every": 3, "twice": True}, existing="skip") as place:
        summary = await submit_all(mappings(600), **place.known(batch=BatchLimits(instances=50)))

    assert summary.created + summary.existed == 600
    assert sorted(place.ids) == sorted(ids(600))


# --- the stream ---------------------------------------------------------------------------------------------------


async def test_a_stream_gives_each_result_once_it_is_durable(folder):
    async with emulated(folder, {"chance": 0.2, "status": 500, "when": "after"}) as place:
        seen = []
        async with submit_stream([{"x": 1}, *mappings(450)], **place.known(batch=BatchLimits(instances=30))) as results:
            async for result in results:
                seen.append(result)
                if len(seen) % 50 == 0:
                    durable = {one.row for one in read_results(place.file)}
                    assert {one.row for one in seen} <= durable

    assert sorted(result.row for result in seen) == list(range(451))
    final = {one.row: one for one in read_results(place.file)}
    assert [replace(one, attempts=final[one.row].attempts) for one in seen] == [final[one.row] for one in seen]
    assert (results.summary.rows, results.summary.invalid, results.summary.complete) == (451, 1, True)


@pytest.mark.parametrize("after", [0, 1, 120])
async def test_leaving_a_stream_early_drains_the_run(folder, after):
    async with emulated(folder, existing="duplicate") as place:
        known = place.known(rate=RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=2))
        seen = []
        async with submit_stream(mappings(2_000), **known) as results:
            while len(seen) < after:
                seen.append(await anext(results))
        settled = list(read_results(place.file))
        assert not results.summary.complete
        assert results.summary.created == len(settled) == len(place.ids) < 2_000
        assert {one.row for one in seen} <= {one.row for one in settled}
        later = []
        async with submit_stream(mappings(2_000), **known) as results:
            async for result in results:
                later.append(result)  # noqa: PERF401

    assert place.service.created == 2_000
    assert {one.row for one in later}.isdisjoint({one.row for one in settled})
    assert len(later) + len(settled) == 2_000


async def test_a_cancelled_stream_has_a_summary(folder):
    opened, begun, all_begun = [], [], asyncio.Event()

    def observe(event):
        if isinstance(event, BatchBegun):
            begun.append(event)
            if len(begun) == 3:
                all_begun.set()

    async def read_hanging(place):
        async with submit_stream(mappings(300), **place.known(), observers=[observe]) as results:
            opened.append(results)
            await anext(results)

    async with emulated(folder, {"hang": True}) as place:
        reading = asyncio.ensure_future(read_hanging(place))
        await asyncio.wait_for(all_begun.wait(), 30)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert (opened[0].summary.pending, opened[0].summary.complete) == (300, False)


async def test_a_stream_raises_its_error_after_all_results(folder):
    async with emulated(folder, {"from": 3, "status": 407}) as place:
        one_at_a_time = RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=1)
        seen = []
        async with submit_stream(mappings(900), **place.known(rate=one_at_a_time)) as results:
            with pytest.raises(ServiceRefused) as raised:
                await read(results, seen)

    assert sorted(one.row for one in seen) == list(range(200))
    assert raised.value.summary == results.summary
    assert (results.summary.created, results.summary.complete, raised.value.exit_code) == (200, False, 3)


async def test_an_error_of_the_caller_passes_through_the_stream(folder):
    async with emulated(folder) as place:
        with pytest.raises(KeyError, match="the caller's own"):  # noqa: PT012
            async with submit_stream(mappings(2_000), **place.known()) as results:
                async for _ in results:
                    raise KeyError("the caller's own")
        summary = await submit_all(mappings(2_000), **place.known())

    assert summary.complete
    assert len(place.ids) == 2_000


async def test_an_unread_stream_stops_the_run_but_not_the_caller(folder):
    async with emulated(folder) as place:
        async with submit_stream(mappings(20_000), **place.known()) as results:
            for _ in range(500):
                await asyncio.sleep(0)
            assert results.summary is None
        assert results.summary.created < 20_000


# --- the generator that gives the rows ----------------------------------------------------------------------------


class Generators:
    """Generators of rows that hold a resource open, such as a connection to a database.

    Attributes:
        opened: How many have begun.
        closed: How many have ended their cleanup.
    """

    def __init__(self, *, awaited):
        self.opened = self.closed = 0
        self.give = self._awaited if awaited else self._plain

    def _plain(self, n):
        self.opened += 1
        try:
            yield from mappings(n)
        finally:
            self.closed += 1

    async def _awaited(self, n):
        self.opened += 1
        try:
            for row in mappings(n):
                await asyncio.sleep(0)
                yield row
        finally:
            await asyncio.sleep(0)
            self.closed += 1


async def all_of(rows, known):
    return await submit_all(rows, **known)


async def a_few_of(rows, known):
    async with submit_stream(rows, **known) as results:
        await anext(results)


async def timed_out(rows, known):
    async with asyncio.timeout(0.2):
        await submit_all(rows, **known)


async def cancelled_at_once(rows, known):
    task = asyncio.ensure_future(submit_all(rows, **known))
    await asyncio.sleep(0)
    task.cancel()
    await task


SILENT = {"hang": True}
ENDS = {
    "complete": (all_of, {}, {}, None),
    "only the first rows": (all_of, {}, {"first": 10}, None),
    "a stream that is left early": (a_few_of, {}, {}, None),
    "refused": (all_of, {"status": 401}, {}, ServiceRefused),
    "given up": (all_of, {"status": 500}, {"retry": RetryPolicy(base_s=0.001, max_outage_s=0.0)}, TemporaryStop),
    "cancelled": (timed_out, SILENT, {}, TimeoutError),
    "cancelled at once": (cancelled_at_once, {}, {}, asyncio.CancelledError),
    "a checkpoint that can't be made": (all_of, {}, {}, CheckpointError),
}


@pytest.mark.parametrize("awaited", [False, True], ids=["generator", "async generator"])
@pytest.mark.parametrize("end", ENDS)
async def test_the_generator_is_closed_however_the_run_ends(folder, end, awaited):
    call, fault, options, error = ENDS[end]
    generators = Generators(awaited=awaited)
    rows = generators.give(2_000)
    async with emulated(folder, *([fault] if fault else [])) as place:
        known = place.known(**options)
        if error is CheckpointError:
            known["checkpoint"] = folder / "nowhere" / "run.bulkwf"
        with pytest.raises(error) if error else contextlib.nullcontext():
            await call(rows, known)
        assert generators.closed == generators.opened
        with pytest.raises(StopAsyncIteration if awaited else StopIteration):
            await anext(rows) if awaited else next(rows)


async def test_the_generator_of_an_iterable_object_is_closed_too(folder):
    generators = Generators(awaited=False)

    class Table:
        def __iter__(self):
            return generators.give(2_000)

    async with emulated(folder) as place:
        await submit_all(Table(), **place.known(first=10))

    assert (generators.opened, generators.closed) == (1, 1)


@pytest.mark.parametrize("awaited", [False, True])
async def test_an_iterator_that_is_no_generator_is_not_closed(folder, awaited):
    class Cursor:
        closed = False

        def __init__(self):
            self.rows = iter(mappings(2_000))

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.rows)

        def close(self):
            self.closed = True

    class AsyncCursor(Cursor):
        __iter__ = None

        def __aiter__(self):
            return self

        async def __anext__(self):
            return next(self)

        async def aclose(self):
            self.closed = True

    rows = AsyncCursor() if awaited else Cursor()
    async with emulated(folder) as place:
        await submit_all(rows, **place.known(first=10))

    assert not rows.closed


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_failing_cleanup_hides_neither_the_summary_nor_the_error(folder, awaited, caplog):
    async def later():
        try:
            for row in mappings(100_000):
                yield row
        finally:
            raise OSError("the pool is gone")

    def at_once():
        try:
            yield from mappings(100_000)
        finally:
            raise OSError("the pool is gone")

    rows = later if awaited else at_once
    async with emulated(folder) as place:
        assert (await submit_all(rows(), **place.known(first=10))).created == 10
    async with emulated(folder, {"status": 401}) as place:
        with pytest.raises(ServiceRefused):
            await submit_all(rows(), **(place.known() | {"checkpoint": None}))

    assert caplog.text.count("OSError('the pool is gone')") == 2


# --- cancelling ---------------------------------------------------------------------------------------------------


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.integers(0, 400), min_size=1, max_size=4), awaited=st.booleans())
def test_a_run_cancelled_at_any_await_resumes_and_leaves_nothing_open(tmp_path_factory, turns, awaited):
    async def run():
        generators = Generators(awaited=awaited)
        folder = tmp_path_factory.mktemp("run")
        async with emulated(folder, {"chance": 0.1, "status": 500, "when": "after"}) as place:
            known = place.known(batch=BatchLimits(instances=20))
            for number in turns:
                task = asyncio.ensure_future(submit_all(generators.give(300), **known))
                for _ in range(number):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert generators.closed == generators.opened
                assert {one.name for one in folder.iterdir()} <= {"run.bulkwf"}
            summary = await submit_all(mappings(300), **known)
            assert summary.complete
            assert summary.created + summary.existed == 300
            assert sorted(place.ids) == sorted(ids(300))
            assert [one.row for one in read_results(place.file)] == list(range(300))

    asyncio.run(run())


async def test_an_error_of_an_observer_is_logged_once_and_does_not_end_the_run(folder, caplog):
    def fail(_):
        raise ZeroDivisionError("the caller's own")

    seen = []
    async with emulated(folder) as place:
        summary = await submit_all(mappings(500), **place.known(), on_progress=fail, observers=[fail, seen.append])

    assert (summary.complete, summary.created) == (True, 500)
    assert [record.message for record in caplog.records if "observer" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 2  # one for each observer that fails
    kinds = Counter(type(event).__name__ for event in seen)
    assert (
        kinds.items()
        >= {"RunStarted": 1, "BatchBegun": 5, "AttemptFinished": 5, "BatchSettled": 5, "RunEnded": 1}.items()
    )
    assert seen[-1].summary == summary


async def test_a_failing_token_function_counts_as_no_other_token(folder, caplog):
    given = iter([TOKEN])

    def ask():
        try:
            return next(given)
        except StopIteration:
            raise RuntimeError(f"the vault that held {TOKEN} is down") from None

    async with emulated(folder, {"request": 1, "status": 401, "code": 10000}) as place:
        with pytest.raises(ServiceRefused, match="refuses the credential"):
            await submit_all(mappings(10), **(place.known() | {"api_token": ask}))

    assert "RuntimeError" in caplog.text
    assert TOKEN not in caplog.text


def test_a_hanging_token_function_does_not_delay_the_end_of_the_loop(folder):
    asked, goes_on = threading.Event(), threading.Event()
    given = iter([TOKEN])

    def ask():
        if token := next(given, None):
            return token
        asked.set()
        goes_on.wait(60)
        return TOKEN

    async def run():
        async with emulated(folder, {"status": 401, "code": 10000}) as place:
            running = asyncio.ensure_future(submit_all(mappings(10), **(place.known() | {"api_token": ask})))
            await asyncio.to_thread(asked.wait, 60)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    began = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began < 30
    goes_on.set()


@pytest.mark.parametrize("token", [None, b"bytes", 7])
async def test_a_token_function_that_returns_no_text_is_refused(folder, token):
    async with emulated(folder) as place:
        with pytest.raises(ConfigError, match="must be text"):
            await submit_all(mappings(10), **(place.known() | {"api_token": lambda: token}))

    assert place.service.requests == 0


async def test_a_token_in_an_error_message_is_not_stored(folder):
    token = "a-token-as-long-as-a-real-one-0123456789"
    said = {"method": "POST", "status": 400, "code": 10002, "message": f"what you sent: Bearer {token}"}
    async with emulated(folder, said) as place:
        summary = await submit_all(mappings(1), **(place.known() | {"api_token": token}))

    (result,) = read_results(place.file)
    assert summary.rejected == 1
    assert "what you sent: Bearer ***" in result.message
    assert token.encode() not in place.file.read_bytes()


async def test_a_timeout_around_the_call_ends_it(folder):
    async def submit(place):
        async with asyncio.timeout(None) as limit:

            def show(progress):
                if progress.counts.pending == 300:
                    limit.reschedule(asyncio.get_running_loop().time() + 0.1)

            await submit_all(mappings(300), **place.known(), on_progress=show)

    async with emulated(folder, {"hang": True}) as place:
        with pytest.raises(TimeoutError):
            await submit(place)
        assert len(list(read_results(place.file, outcome="pending"))) == 300


# --- errors -------------------------------------------------------------------------------------------------------


async def test_each_error_has_a_summary_and_an_exit_code(folder):
    def breaking():
        yield from mappings(600)
        raise OSError("gone")

    cases = [
        (ServiceRefused, 3, mappings(300), {"status": 401}, {}),
        (TemporaryStop, 75, mappings(300), {"status": 500}, {"retry": RetryPolicy(base_s=0.001, max_outage_s=0.0)}),
        (InputError, 4, breaking(), {"latency_s": 0.0, "repeat": False, "status": 200, "request": 9_999}, {}),
    ]
    for kind, code, rows, fault, options in cases:
        async with emulated(folder, fault) as place:
            place.file.unlink(missing_ok=True)
            with pytest.raises(kind) as raised:
                await submit_all(rows, **place.known(**options))
            summary = raised.value.summary
        assert raised.value.exit_code == code
        assert (summary.rows, summary.complete) == (summary.created + summary.pending, False)
        assert summary.created == len(list(read_results(place.file)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"workflow": "a/b"},
        {"workflow": ""},
        {"account_id": "../x"},
        {"account_id": None},
        {"api_token": None},
        {"api_token": " "},
        {"api_token": "two words"},
        {"api_token": lambda: "a\nb"},
        {"base_url": "http://api.example"},
        {"options": Options(id_template="{")},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_a_bad_argument_is_refused_before_anything_is_read_or_written(folder, wrong):
    def untouched():
        raise AssertionError("the list was read")
        yield

    known = {"workflow": "resize", "account_id": "acct", "api_token": TOKEN, "checkpoint": folder / "run.bulkwf"}
    with pytest.raises(ConfigError) as raised:
        await submit_all(untouched(), **{**known, **wrong})
    with pytest.raises(ConfigError):
        async with submit_stream(untouched(), **{**known, **wrong}):
            pass

    assert (raised.value.exit_code, raised.value.summary) == (2, None)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("rows", [{"instance_id": "a"}, b"rows.jsonl", 5, None])
async def test_rows_that_are_no_list_are_refused(folder, rows):
    async with emulated(folder) as place:
        with pytest.raises(ConfigError, match="rows must be a path, or an iterable of mappings"):
            await submit_all(rows, **place.known())

    assert not place.file.exists()


async def test_a_missing_list_is_refused_before_a_checkpoint_is_made(folder):
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        await submit_all("nowhere.jsonl", workflow="w", account_id="a", api_token=TOKEN, checkpoint="run.bulkwf")

    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: submit_all([], workflow="w", account_id="a", api_token="t"),
        lambda: submit_stream([], workflow="w", account_id="a", api_token="t").__aenter__(),
    ],
    ids=["all", "stream"],
)
def test_a_call_without_asyncio_is_refused(call):
    """Other event loops drive coroutines with `send`, and no asyncio loop is running."""
    coroutine = call()
    with pytest.raises(ConfigError, match="asyncio only"):
        coroutine.send(None)
    coroutine.close()


async def test_a_second_run_on_one_checkpoint_is_refused(folder):
    async with emulated(folder, {"hang": True}) as place:
        first = asyncio.ensure_future(submit_all(mappings(300), **place.known()))
        while not place.service.requests:  # noqa: ASYNC110 (the emulator has no event for it)
            await asyncio.sleep(0.001)
        with pytest.raises(CheckpointError, match=f"pid {os.getpid()} "):
            await submit_all(mappings(300), **place.known())
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_two_runs_on_two_checkpoints_work_at_once(folder):
    async with emulated(folder) as place:
        summaries = await asyncio.gather(
            submit_all(mappings(500), **{**place.known(), "checkpoint": folder / "a.bulkwf"}),
            submit_all(mappings(500, 500), **{**place.known(), "checkpoint": folder / "b.bulkwf"}),
        )

    assert [summary.created for summary in summaries] == [500, 500]
    assert len(place.ids) == 1_000


async def test_the_checkpoint_of_another_workflow_is_refused(folder):
    async with emulated(folder) as place:
        await submit_all(mappings(3), **place.known())
        with pytest.raises(CheckpointError, match="its workflow is 'resize', this run's is 'other'"):
            await submit_all(mappings(3), **{**place.known(), "workflow": "other"})


# --- who we are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLOUDFLARE_API_BASE_URL", "CLOUDFLARE_BASE_URL"])
async def test_the_account_the_base_url_and_the_token_come_from_the_environment(folder, monkeypatch, name):
    monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", " acct ")
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", "the-token\n")
    async with emulated(folder, tokens=["the-token"], account="acct") as place:
        monkeypatch.setenv(name, place.base_url)
        summary = await submit_all(mappings(3), workflow="resize", options=place.options())

    assert summary.created == 3


async def test_an_email_and_an_api_key_are_accepted(folder, monkeypatch):
    monkeypatch.setenv("CLOUDFLARE_EMAIL", "me@example.com")
    monkeypatch.setenv("CLOUDFLARE_API_KEY", "the-key")
    async with emulated(folder, tokens=["the-key"]) as place:
        known = {"workflow": "resize", "account_id": "acct", "base_url": place.base_url}
        summary = await submit_all(mappings(3), **known, options=place.options())

    assert summary.created == 3


async def test_arguments_win_over_the_environment(folder, monkeypatch):
    monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", "other")
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", "other")
    monkeypatch.setenv("CLOUDFLARE_API_BASE_URL", "http://127.0.0.1:9")
    async with emulated(folder, tokens=[TOKEN], account="acct") as place:
        assert (await submit_all(mappings(3), **place.known())).created == 3


async def test_the_token_function_is_called_again_after_a_refusal(folder):
    tokens = ["old", "new"]

    def give():
        return tokens.pop(0)

    async with emulated(folder, {"request": 2, "revoke_token": True}, tokens=["old", "new"]) as place:
        one_at_a_time = RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=1)
        summary = await submit_all(mappings(500), **{**place.known(rate=one_at_a_time), "api_token": give})

    assert (summary.created, tokens) == (500, [])


# --- resuming, and what the call leaves ---------------------------------------------------------------------------


async def test_the_same_call_again_sends_nothing(folder):
    async with emulated(folder) as place:
        first = await submit_all(mappings(300), **place.known())
        requests = place.service.requests
        second = await submit_all(mappings(300), **place.known())

    assert place.service.requests == requests
    assert (first.settled_now, second.settled_now, second.created, second.complete) == (300, 0, 300, True)


async def test_generated_ids_are_the_same_in_the_next_session(folder):
    """The checkpoint keeps the random run key of the first session, so the second one makes the same ids."""
    rows = [{"params": {"n": i}} for i in range(300)]
    async with emulated(folder, {"to": 1, "from": 1, "status": 500, "when": "after"}) as place:
        options = {"retry": RetryPolicy(base_s=0.001, max_outage_s=0.0)}
        with pytest.raises(TemporaryStop):
            await submit_all(rows, **place.known(**options))
        summary = await submit_all(rows, **place.known())

    assert summary.complete
    assert place.service.created == len(place.ids) == 300


async def test_existing_rows_make_the_exit_code_1_with_fail_on_existed(folder):
    async with emulated(folder) as place:
        await submit_all(mappings(30), **place.known(checkpoint=False))
        plain = await submit_all(mappings(30), **place.known(checkpoint=False))
        asked = await submit_all(mappings(30), **place.known(checkpoint=False, fail_on_existed=True))

    assert (plain.existed, plain.exit_code) == (30, 0)
    assert (asked.existed, asked.exit_code) == (30, 1)


async def test_new_starts_over_and_keeps_the_old_file(folder):
    async with emulated(folder) as place:
        await submit_all(mappings(30), **place.known())
        summary = await submit_all(mappings(60), **place.known(), new=True)

    assert (summary.existed, summary.created) == (30, 30)
    assert len(list(folder.glob("run.bulkwf.*"))) == 1


async def test_nothing_is_left_running_or_open(folder):
    async with emulated(folder) as place:
        before = asyncio.all_tasks()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            await submit_all(mappings(300), **place.known())
            async with submit_stream(mappings(300, 300), **place.known(checkpoint=False)):
                pass
        server_tasks = {task for task in asyncio.all_tasks() - before if "RequestHandler" in repr(task)}

    assert asyncio.all_tasks() - before - server_tasks == set()


def test_each_error_has_the_documented_exit_code():
    errors = [ConfigError, ServiceRefused, InputError, CheckpointError, SystemRefused, TemporaryStop]
    assert [error.exit_code for error in errors] == [2, 3, 4, 4, 4, 75]
    assert all(issubclass(error, BulkwfError) for error in errors)


async def test_a_summary_can_be_written_as_json(folder):
    async with emulated(folder) as place:
        summary = await submit_all(mappings(3), **place.known())

    assert json.loads(json.dumps(asdict(summary)))["created"] == 3
