"""Whole runs in virtual time, with the emulator's service and a real checkpoint file."""

import asyncio
import contextlib
import gc
import random
import sqlite3
from collections import Counter
from dataclasses import replace

import orjson
import pytest
from fakes import (
    HEADER,
    RUN_TARGET,
    TARGET,
    ServiceTransport,
    clock,
    fault,
    lines,
    now,
    reseal,
    run_virtual,
    service,
    wall,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bulkwf.attempt import FaultKind
from bulkwf.batching.batch_state import BatchState
from bulkwf.checkpoint import read_results, read_status
from bulkwf.emulator import Limits, Service
from bulkwf.emulator.answers import refusal
from bulkwf.errors import BulkwfError, CheckpointError, InputError, ServiceRefused, TemporaryStop
from bulkwf.events import RunEnded
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.options import BatchLimits, Options, RateLimits, RetryPolicy
from bulkwf.run import open_run
from bulkwf.submission.engine import AHEAD

FAST = RateLimits(instances_per_s=None, requests_per_5m=None)
TROUBLE = [
    {"method": "POST", "chance": 0.06, "status": 500, "when": "before"},
    {"method": "POST", "chance": 0.06, "status": 503, "when": "after"},
    {"method": "POST", "chance": 0.06, "reset": True, "partial": 3},
    {"method": "POST", "chance": 0.04, "truncate": 30},
    {"method": "POST", "chance": 0.03, "foreign": 1},
    {"method": "POST", "chance": 0.02, "status": 429, "retry_after": 4},
    {"method": "GET", "chance": 0.1, "close": True},
    {"chance": 0.2, "latency_s": [0.0, 3.0]},
]


class World:
    """One list, one checkpoint and one service, for any number of sessions."""

    def __init__(
        self,
        folder,
        rows,
        *,
        options=None,
        script=(),
        seed=0,
        limits=None,
        commit_s=0.004,
        **more,
    ):
        self.file = folder / "run.bulkwf"
        self.rows = rows
        self.options = options or Options(rate=FAST)
        self.held = service(limits, **more)
        self.transport = ServiceTransport(self.held, script=script, seed=seed, travel_s=(0.001, 0.015))
        self.commit_s = commit_s
        self.seed = seed
        self.emitted = []
        self.begun = []
        self.commits = 0
        self.running = False
        """A session is under way: it has been opened, and has not ended or been killed."""
        self.task = None
        """The task of the present session."""

    async def execute(self, function):
        self.commits += 1
        await asyncio.sleep(self.commit_s if self.running else 0)
        return function()

    async def session(self, *, rows=None, options=None, act=None, new=False, kill_after=None, observers=()):
        """Run one session; returns its `Summary`, or None if it was killed."""
        run_key = None if self.file.exists() else HEADER.run_key
        options, at = replace(options or self.options, run_key=run_key), clock(self.seed)
        opening = open_run(
            self.rows if rows is None else rows,
            target=RUN_TARGET,
            token=dict,
            checkpoint=self.file,
            new=new,
            options=options,
            emit=self._emit,
            observers=observers,
            transport=self.transport,
            limiter=WindowLimiter(options.rate, clock=at.now),
            clock=at,
            executor=self.execute,
        )
        async with opening as run:
            self._watch(run._engine._checkpoint)
            self.running = True
            running = self.task = asyncio.ensure_future(run.finish())
            acting = asyncio.ensure_future(act(run)) if act is not None else None
            done, _ = await asyncio.wait((running,), timeout=kill_after)
            self.running = bool(done)
            if acting is not None:
                acting.cancel()
            if done:
                return running.result()
            disk = {path: path.read_bytes() for path in self._files() if path.exists()}
            running.cancel()
            await asyncio.wait((running,))
        # A killed process leaves behind what was on the disk at that moment.
        for path in self._files():
            path.unlink(missing_ok=True)
        for path, content in disk.items():
            path.write_bytes(content)
        return None

    def _files(self):
        return self.file, self.file.with_name(self.file.name + "-wal")

    def _watch(self, checkpoint):
        """Note when each batch begins."""
        begin = checkpoint.begin

        def noted(state, when):
            self.begun.append((now(), state.batch))
            return begin(state, when)

        checkpoint.begin = noted

    async def _emit(self, results):
        self.emitted.extend(results)

    # --- what is true afterwards ---

    @property
    def ids(self):
        return self.held.ids(TARGET)

    def results(self, outcome=None):
        return list(read_results(self.file, outcome=outcome))

    def check(self, rows, *, bad=frozenset()):
        """Assert that each row has one result, in order, and that each created or existing row has one instance."""
        results = self.results()
        assert [result.row for result in results] == list(rows)
        started = [result.id for result in results if result.outcome in ("created", "existed")]
        assert len(set(started)) == len(started)
        assert set(started) == set(self.ids)
        assert self.held.created == len(self.ids)
        assert {result.row for result in results if result.outcome not in ("created", "existed")} == set(bad)
        with contextlib.closing(sqlite3.connect(self.file)) as db:
            listed = db.execute("SELECT row, id, outcome FROM result ORDER BY row").fetchall()
        assert listed == [(result.row, result.id, result.outcome) for result in results]


def run(folder, rows, **more):
    """Run one session to its end."""

    async def go():
        world = World(folder, rows, **more)
        return world, await world.session()

    return run_virtual(go())


def mappings(n, first=0):
    return [{"instance_id": f"id-{i}", "params": {"n": i}} for i in range(first, first + n)]


# --- a run --------------------------------------------------------------------------------------------------------


def test_every_row_is_created_and_emitted_once_durable(folder):
    world, summary = run(folder, mappings(1_234))

    world.check(range(1_234))
    assert (summary.created, summary.rows, summary.pending, summary.complete) == (1_234, 1_234, 0, True)
    assert sorted(result.row for result in world.emitted) == list(range(1_234))
    assert summary.attempts == len(world.transport.requests) == 13
    assert read_status(world.file).finished_at is not None


@pytest.mark.parametrize("kind", ["file", "gzip", "generator", "async generator"])
def test_every_kind_of_list_gives_the_same_run(folder, kind):
    import gzip  # noqa: PLC0415

    rows = mappings(1_050)

    async def drawn():
        for row in rows:
            await asyncio.sleep(0.001)
            yield row

    (folder / "rows.jsonl").write_bytes(lines(1_050))
    (folder / "rows.gz").write_bytes(gzip.compress(lines(1_050)))

    async def go():
        source = {"file": "rows.jsonl", "gzip": "rows.gz", "generator": (row for row in rows)}.get(kind)
        world = World(folder, drawn() if source is None else source)
        return world, await world.session()

    world, summary = run_virtual(go())

    world.check(range(1_050))
    assert summary.complete


def test_generated_ids_hold_run_key_row_and_checksum(folder):
    world, _ = run(folder, [{"params": {"n": i}} for i in range(3)])

    assert [one.rsplit("-", 1)[0] for one in world.ids] == ["key-0", "key-1", "key-2"]


@pytest.mark.parametrize("rows", [[], iter(())])
def test_an_empty_list_is_a_finished_run(folder, rows):
    world, summary = run(folder, rows)

    assert (summary.rows, summary.complete, world.transport.requests) == (0, True, [])
    assert read_status(world.file).finished_at is not None


def test_an_empty_file_is_a_finished_run(folder):
    (folder / "rows.jsonl").write_bytes(b"")

    assert run(folder, "rows.jsonl")[1].complete


def test_a_list_of_invalid_rows_is_settled_without_a_request(folder):
    (folder / "rows.jsonl").write_bytes(b"nonsense\n" * 2_500)
    world, summary = run(folder, "rows.jsonl")

    assert (summary.invalid, summary.complete, summary.exit_code) == (2_500, True, 1)
    assert world.transport.requests == []
    world.check(range(2_500), bad=range(2_500))
    assert len(world.emitted) == 2_500


def test_blank_lines_are_no_rows_but_have_row_numbers(folder):
    data = b"\n\n" + lines(2) + b"  \n" + lines(1, 2) + b"\n" * 1_500 + lines(1, 3)
    (folder / "rows.jsonl").write_bytes(data)
    world, summary = run(folder, "rows.jsonl")

    world.check([2, 3, 5, 1_506])
    assert (summary.rows, summary.created) == (4, 4)


def test_later_rows_take_the_places_of_invalid_rows(folder):
    """A batch has as many instances as it may have."""
    rows = [b"nonsense\n" if i % 3 == 0 else lines(1, i) for i in range(300)]
    (folder / "rows.jsonl").write_bytes(b"".join(rows))
    world, summary = run(folder, "rows.jsonl")

    assert [len(ids) for ids in world.transport.posts] == [100, 100]
    assert (summary.created, summary.invalid) == (200, 100)
    world.check(range(300), bad=range(0, 300, 3))


# --- limits and backpressure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_service_counts_no_overrun_and_the_rate_is_used(folder, seed):
    world, summary = run(
        folder, mappings(6_000), options=Options(), limits=Limits(), script=TROUBLE[:5] if seed else (), seed=seed
    )

    world.check(range(6_000))
    assert world.held.overruns == {}
    assert world.held.worst_window <= 100
    if not seed:
        assert summary.elapsed_s < 62


def test_the_limit_of_requests_holds_over_crashes_and_resumes(folder):
    """A process that is killed and restarted repeatedly overruns no window of the service."""

    async def go():
        world = World(folder, mappings(4_000), options=Options(), limits=Limits())
        kills = random.Random(7)
        while await world.session(kill_after=kills.uniform(0.1, 15.0)) is None:
            pass
        return world

    world = run_virtual(go())

    world.check(range(4_000))
    assert world.held.overruns == {}


def test_requests_that_a_killed_process_may_have_sent_count(folder):
    """It was killed before an answer came and restarted at once, so its requests are not stored as attempts."""

    async def go():
        world = World(folder, mappings(4_000), options=Options(), limits=Limits(), script=[{"latency_s": 60.0}])
        for _ in range(20):
            assert await world.session(kill_after=0.3) is None
        return world

    world = run_virtual(go())

    assert world.held.worst_window <= 100
    assert world.held.overruns == {}
    assert len(world.transport.posts) <= 6


def ahead(folder, *, options, limits=None, latency_s=0.0, at_s):
    """Number of batches begun and not sent, number of batches begun, and the transport, at *at_s* seconds."""

    async def go():
        script = [{"latency_s": latency_s}] if latency_s else ()
        world = World(folder, mappings(20_000), options=options, limits=limits, script=script)
        await world.session(kill_after=at_s)
        return len(world.begun) - len(world.transport.posts), len(world.begun), world.transport

    return run_virtual(go())


@pytest.mark.parametrize("other", ["own-1", "key-1-00000000"])
def test_stored_ids_that_the_rows_would_not_get_are_damage(folder, other):
    """Sent under another id, the row would be started a second time."""

    async def go():
        world = World(folder, [{"params": {"n": n}} for n in range(2)], script=[{"hang": True, "when": "after"}])
        assert await world.session(kill_after=1.0) is None
        with contextlib.closing(sqlite3.connect(world.file)) as db, db:
            ((ids,),) = db.execute("SELECT ids FROM batch").fetchall()
            db.execute("UPDATE batch SET ids = ?", (orjson.dumps([orjson.loads(ids)[0], other]).decode(),))
        reseal(world.file)
        sent = len(world.transport.requests)
        with pytest.raises(CheckpointError, match="damaged: the rows from row 0 on do not have the ids"):
            await world.session()
        assert len(world.transport.requests) == sent

    run_virtual(go())


def test_a_slow_service_leaves_few_batches_in_doubt(folder):
    options = Options(rate=RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=4))
    waiting, begun, transport = ahead(folder, options=options, latency_s=30.0, at_s=20.0)

    assert (waiting, begun, transport.most_on_wire) == (AHEAD, 4 + AHEAD, 4)


def test_a_full_window_of_instances_leaves_few_batches_in_doubt(folder):
    waiting, _, transport = ahead(folder, options=Options(), at_s=5.5)

    assert waiting <= AHEAD
    assert len(transport.posts) == 6


def test_a_full_window_of_requests_leaves_few_batches_in_doubt(folder):
    options = Options(rate=RateLimits(instances_per_s=None, requests_per_5m=10))
    waiting, _begun, transport = ahead(folder, options=options, at_s=100.0)

    assert len(transport.posts) == 10
    assert waiting <= AHEAD


def test_a_pause_leaves_few_batches_in_doubt(folder):
    async def go():
        script = [{"request": 1, "status": 429, "retry_after": 600}]
        world = World(folder, mappings(20_000), script=script, options=Options())
        await world.session(kill_after=100)
        begun = len(world.begun)
        await world.session(kill_after=100)
        return begun, len(world.begun) - begun

    begun, begun_later = run_virtual(go())
    assert 1 <= begun <= 1 + AHEAD
    assert begun_later <= AHEAD


def test_batches_in_backoff_stop_the_reading_of_the_list(folder):
    """At most two batches for each place are open."""

    async def go():
        options = Options(rate=RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=3))
        world = World(folder, mappings(20_000), options=options, script=[{"status": 503}])
        await world.session(kill_after=600)
        return world

    assert len(run_virtual(go()).begun) == 6


def test_a_slow_disk_stops_the_reading_of_the_list(folder):
    async def go():
        options = Options(rate=RateLimits(instances_per_s=None, requests_per_5m=None, concurrency=3))
        world = World(folder, mappings(20_000), options=options, commit_s=1e6)
        await world.session(kill_after=600)
        return world

    world = run_virtual(go())
    assert (len(world.begun), world.transport.posts) == (3 + AHEAD, [])


@pytest.mark.parametrize(
    ("rate", "batch", "commit_s", "rows"), [(100, 1, 0.03, 1_000), (5_000, 20, 0.02, 50_000), (300, 100, 0.2, 12_000)]
)
@pytest.mark.slow
def test_a_slow_disk_costs_little_of_the_rate(folder, rate, batch, commit_s, rows):
    """Enough batches begin ahead to last until the next commit."""
    rates = RateLimits(instances_per_s=rate, requests_per_5m=None)
    options = Options(rate=rates, batch=BatchLimits(instances=batch))
    limits = Limits(instances_per_s=rate, account_instances_per_s=None, requests_per_5m=None)
    world, summary = run(folder, mappings(rows), options=options, limits=limits, commit_s=commit_s)

    assert summary.created / summary.elapsed_s > 0.94 * rate
    assert world.held.overruns == {}


def test_settled_batches_are_freed(folder):
    async def rows():
        for number in range(500):
            yield {"instance_id": f"let-go-{number}"}
        await asyncio.sleep(60)
        gc.collect()
        held.extend(
            one for one in gc.get_objects() if isinstance(one, BatchState) and one.batch.ids[0].startswith("let-go")
        )

    held = []
    run_virtual(World(folder, rows()).session())

    assert held == []


def test_batches_share_commits(folder):
    """With sixteen requests at a time and a slow disk, there are far fewer commits than two for each batch."""
    world, _ = run(folder, mappings(10_000), commit_s=0.2)

    assert world.commits < 60


# --- trouble, and sessions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_every_row_is_created_once_whatever_goes_wrong(folder, seed):
    options = Options(rate=FAST, batch=BatchLimits(instances=20))
    world, summary = run(folder, mappings(600), script=TROUBLE, seed=seed, options=options)

    world.check(range(600))
    assert summary.created + summary.existed == 600
    assert summary.existed_in_doubt == sum(result.in_doubt for result in world.results())
    assert sorted(result.row for result in world.emitted) == list(range(600))


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), step=st.floats(0.05, 8.0))
def test_every_row_is_created_once_after_kills_at_any_time(tmp_path_factory, seed, step):
    async def go():
        folder = tmp_path_factory.mktemp("run")
        rows = b"".join(b"\n" if i % 50 == 7 else b"bad\n" if i % 90 == 8 else lines(1, i) for i in range(500))
        (folder / "rows.jsonl").write_bytes(rows)
        options = Options(rate=FAST, batch=BatchLimits(instances=25))
        world = World(folder, str(folder / "rows.jsonl"), script=TROUBLE, seed=seed, options=options)
        chance, sessions, summary = random.Random(seed), 0, None
        while summary is None:
            sessions += 1
            summary = await world.session(kill_after=None if sessions > 40 else chance.uniform(0, step) * sessions**0.5)
            if summary is None and world.file.exists():
                status = read_status(world.file)
                counts = status.counts
                assert counts.settled + counts.pending == counts.rows <= 500
                assert len(world.results()) == counts.settled
                assert len(world.results("pending")) == counts.pending
                assert {r.id for r in world.results("created")} <= set(world.ids)
        return world, summary

    world, summary = run_virtual(go())

    world.check([i for i in range(500) if i % 50 != 7], bad=[i for i in range(500) if i % 90 == 8 and i % 50 != 7])
    assert summary.complete
    assert summary.pending == 0
    assert Counter(result.outcome for result in world.results()) == Counter(
        created=summary.created, existed=summary.existed, invalid=summary.invalid
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_settled_row_is_sent_again_after_many_drains(folder, seed):
    """The service here creates an instance each time that an id is sent, so each row must be sent only once."""

    async def go():
        script = [{"latency_s": [0.0, 9.0]}]
        world = World(folder, mappings(9_000), existing="duplicate", script=script, seed=seed)
        chance, sessions = random.Random(seed), 0

        async def drain(engine):
            await asyncio.sleep(chance.uniform(0.0, 4.0))
            engine.drain()

        summary = None
        while summary is None or not summary.complete:
            sessions += 1
            summary = await world.session(act=drain)
        return world, sessions

    world, sessions = run_virtual(go())

    assert sessions > 3
    assert world.held.created == 9_000
    world.check(range(9_000))


@pytest.mark.parametrize("room", [198, 199, 190, 100])
def test_a_queue_full_near_the_end_of_the_list_rejects_no_row(folder, room):
    """The queue has room again after five minutes."""

    async def go():
        world = World(folder, mappings(200), limits=replace(Limits.none(), max_queued=room))

        async def make_room(engine):
            await asyncio.sleep(300.0)
            world.held.limits = Limits.none()

        return world, await world.session(act=make_room), now()

    world, summary, ended_at = run_virtual(go())

    assert (summary.created, summary.rejected, summary.complete) == (200, 0, True)
    assert ended_at < 900.0
    world.check(range(200))


@pytest.mark.parametrize("every_s", [5.0, 30.0])
def test_a_temporarily_full_queue_rejects_no_row_of_a_slow_source(folder, every_s):
    async def rows():
        for row in mappings(40):
            yield row
            await asyncio.sleep(every_s)

    async def go():
        world = World(folder, rows())

        async def fill(engine):
            await asyncio.sleep(50.0)
            world.held.limits = replace(Limits.none(), max_queued=0)
            await asyncio.sleep(600.0)
            world.held.limits = Limits.none()

        return world, await world.session(act=fill)

    world, summary = run_virtual(go())

    assert (summary.created, summary.rejected, summary.complete) == (40, 0, True)
    world.check(range(40))


def test_a_queue_that_stays_full_ends_the_run_with_rows_pending(folder):
    async def go():
        world = World(folder, mappings(200), limits=replace(Limits.none(), max_queued=199))
        with pytest.raises(TemporaryStop, match="--reject-omitted") as raised:
            await world.session()
        world.held.limits = Limits.none()
        return world, raised.value, await world.session()

    world, stop, summary = run_virtual(go())

    assert (stop.summary.created, stop.summary.pending, stop.summary.rejected) == (199, 1, 0)
    assert (summary.created, summary.rejected, summary.complete) == (200, 0, True)
    world.check(range(200))


def test_a_row_whose_look_ups_all_fail_stays_pending(folder):
    failing = {"id-7", "id-230"}

    class Failing(Service):
        def get_instance(self, target, id_, *, simple=False):
            return refusal(500, 10001, "no") if id_ in failing else super().get_instance(target, id_, simple=simple)

    async def go():
        world = World(folder, mappings(500))
        world.held = Failing(Limits.none(), now)
        world.transport = ServiceTransport(world.held)
        body = orjson.dumps([{"instance_id": one} for one in sorted(failing)])
        world.held.create(TARGET, world.held.read(body).items)
        with pytest.raises(TemporaryStop) as raised:
            await world.session()
        ended_at = now()
        failing.clear()
        return raised.value, ended_at, await world.session()

    stop, ended_at, summary = run_virtual(go())

    assert (stop.summary.created, stop.summary.pending) == (498, 2)
    assert "2 rows stay pending (" in str(stop)
    assert "id-7" in str(stop)
    assert ended_at < 120.0
    assert (summary.created, summary.existed, summary.complete) == (498, 2, True)


def test_a_finished_run_sends_nothing(folder):
    async def go():
        world = World(folder, mappings(250))
        await world.session()
        sent = len(world.transport.requests)
        return world, sent, await world.session()

    world, sent, summary = run_virtual(go())

    assert len(world.transport.requests) == sent
    assert (summary.created, summary.settled_now, summary.attempts, summary.complete) == (250, 0, 0, True)


def test_rows_added_to_a_finished_list_are_submitted(folder):
    async def go():
        world = World(folder, mappings(250))
        await world.session()
        return world, await world.session(rows=mappings(420))

    world, summary = run_virtual(go())

    world.check(range(420))
    assert (summary.created, summary.settled_now, summary.complete) == (420, 170, True)


def test_the_first_rows_can_be_submitted_before_the_rest(folder):
    async def go():
        world = World(folder, mappings(250))
        few = await world.session(options=Options(rate=FAST, first=30))
        fewer = await world.session(options=Options(rate=FAST, first=10))
        return world, few, fewer, await world.session()

    world, few, fewer, rest = run_virtual(go())

    assert (few.created, fewer.settled_now, rest.settled_now) == (30, 0, 220)
    world.check(range(250))


def differs(folder, second, *, kill_after, rows=None):
    """Resume a run with the list *second*: the error, the ids sent afterwards, and the world."""

    async def go():
        world = World(folder, rows or mappings(1_000), script=[{"latency_s": 1.0}], options=Options())
        assert await world.session(kill_after=kill_after) is None
        sent = len(world.transport.requests)
        with pytest.raises(InputError) as raised:
            await world.session(rows=second)
        later = {id_ for ids in world.transport.posts[sent:] for id_ in ids}
        return str(raised.value), later, world

    return run_virtual(go())


def changed(at, n=1_000):
    rows = mappings(n)
    rows[at] = {"instance_id": f"id-{at}", "params": {"n": "another"}}
    return rows


def test_a_list_with_changed_settled_rows_is_refused(folder):
    message, later, _ = differs(folder, changed(0), kill_after=5.5)

    assert "has changed" in message
    assert later == set()


def test_a_list_with_changed_rows_in_doubt_is_refused(folder):
    async def go():
        world = World(folder, mappings(300), script=[{"hang": True}])
        await world.session(kill_after=5)
        sent = len(world.transport.requests)
        with pytest.raises(InputError):
            await world.session(rows=changed(150, 300))
        return [ids for ids in world.transport.posts[sent:] if "id-150" in ids]

    assert run_virtual(go()) == []


def test_the_error_names_the_changed_file_and_its_lines(folder):
    (folder / "rows.jsonl").write_bytes(lines(1_000))
    (folder / "other.jsonl").write_bytes(lines(150) + lines(1, 999_999) + lines(849, 151))
    message, _, _ = differs(folder, "other.jsonl", kill_after=5.5, rows="rows.jsonl")

    assert "between other.jsonl:101 and other.jsonl:200" in message


def test_a_shortened_list_is_refused(folder):
    message, _, _ = differs(folder, mappings(150), kill_after=5.5)

    assert "the list ends before row 200" in message


def test_rejected_and_invalid_rows_may_change_between_sessions(folder):
    """Their lines are left out of the comparison of the list. Their results stay as they are."""

    def rows(bad, poison):
        return b"".join(bad if i == 4 else poison if i == 7 else lines(1, i) for i in range(250))

    (folder / "rows.jsonl").write_bytes(rows(b"nonsense\n", b'{"instance_id":"id-7","params":"poison"}\n'))
    (folder / "mended.jsonl").write_bytes(rows(lines(1, 4), lines(1, 7)))

    async def go():
        script = [{"refuse_ids": "^id-7$"}]
        world = World(folder, "rows.jsonl", script=script, options=Options(rate=FAST, first=150))
        await world.session()
        return world, await world.session(rows="mended.jsonl", options=Options(rate=FAST))

    world, summary = run_virtual(go())

    assert (summary.created, summary.invalid, summary.rejected, summary.complete) == (248, 1, 1, True)
    world.check(range(250), bad=[4, 7])


# --- stopping -----------------------------------------------------------------------------------------------------


def test_a_drain_keeps_the_answers_in_flight_and_sends_nothing_more(folder):
    async def go():
        world = World(folder, mappings(5_000), script=[{"latency_s": [1.0, 9.0]}])
        drained = []

        async def drain(engine):
            await asyncio.sleep(5.0)
            engine.drain()
            drained.append((now(), len(world.transport.requests)))

        summary = await world.session(act=drain)
        return world, summary, drained[0], now()

    world, summary, (drained_at, sent), ended_at = run_virtual(go())

    assert len(world.transport.requests) == sent
    assert ended_at - drained_at < 10
    assert not summary.complete
    assert summary.created == len(world.ids) > 0
    assert summary.pending <= 100 * AHEAD
    assert read_status(world.file).finished_at is None
    assert len(world.results()) == summary.created


def test_a_drain_ends_a_backoff_and_a_pause_at_once(folder):
    for script in ([{"status": 503}], [{"status": 429, "retry_after": 900}]):

        async def go(script=script):
            (folder / "run.bulkwf").unlink(missing_ok=True)
            world = World(folder, mappings(5_000), script=script)

            async def drain(engine):
                await asyncio.sleep(100.0)
                engine.drain()

            await world.session(act=drain)
            return now()

        assert run_virtual(go()) < 100.2


def test_hanging_requests_are_in_doubt_after_the_drain_deadline(folder):
    async def go():
        options = Options(rate=FAST, drain_timeout_s=7.0)
        world = World(folder, mappings(150), script=[{"request": 1, "hang": True, "when": "after"}], options=options)

        async def drain(engine):
            await asyncio.sleep(2.0)
            engine.drain()

        first = await world.session(act=drain)
        at = now()
        return world, first, at, await world.session()

    world, first, at, second = run_virtual(go())

    assert at == pytest.approx(9.0, abs=0.01)
    assert (first.complete, first.pending) == (False, 100)
    assert second.complete
    assert second.existed_in_doubt == 100
    world.check(range(150))


def test_an_abort_stops_at_once_and_loses_nothing(folder):
    async def go():
        world = World(folder, mappings(500), script=[{"latency_s": 30.0}])

        async def abort(engine):
            await asyncio.sleep(2.0)
            engine.drain()
            await asyncio.sleep(1.0)
            engine.abort()

        summary = await world.session(act=abort)
        at = now()
        assert await world.session() is not None
        return world, summary, at

    world, summary, at = run_virtual(go())

    assert at == pytest.approx(3.0, abs=0.01)
    assert (summary.created, summary.pending) == (0, 500)
    world.check(range(500))


def test_a_run_aborted_before_its_first_commit_is_not_finished(folder):
    """A short list has been read to its end by then, and the checkpoint holds no pending row."""

    async def go():
        world = World(folder, mappings(5), commit_s=1.0)

        async def abort(engine):
            await asyncio.sleep(0.5)
            engine.abort()

        first = await world.session(act=abort)
        status = read_status(world.file)
        assert (await world.session()).complete
        return world, first, status

    world, first, status = run_virtual(go())

    assert (first.complete, first.exit_code, status.finished_at) == (False, 75, None)
    world.check(range(5))


def test_the_first_reason_to_stop_is_raised(folder):
    async def go():
        world = World(folder, mappings(5_000), script=[{"from": 5, "status": 404, "code": 10200}])
        with pytest.raises(ServiceRefused) as raised:
            await world.session()
        return world, raised.value

    world, error = run_virtual(go())

    assert error.summary.pending + error.summary.created == error.summary.rows
    assert error.summary.created == len(world.results("created"))
    assert not error.summary.complete


def test_a_refusal_after_a_drain_is_not_raised(folder):
    async def go():
        world = World(folder, mappings(300), script=[{"status": 401, "latency_s": 2.0}])

        async def drain(engine):
            await asyncio.sleep(1.0)
            engine.drain()

        return world, await world.session(act=drain)

    world, summary = run_virtual(go())

    assert len(world.transport.requests) == 3
    assert (summary.complete, summary.pending) == (False, 300)


def test_a_run_that_an_outage_ended_is_finished_by_the_next(folder):
    async def go():
        options = Options(rate=FAST, retry=RetryPolicy(max_outage_s=300))
        script = [{"after_s": 2, "until_s": 4_000, "status": 502}, {"latency_s": 1.0}]
        world = World(folder, mappings(5_000), script=script, options=options)
        with pytest.raises(TemporaryStop) as raised:
            await world.session()
        stopped_at = now()
        await asyncio.sleep(4_000)
        return world, raised.value.summary, stopped_at, await world.session()

    world, first, stopped_at, second = run_virtual(go())

    assert 200 < stopped_at < 330
    assert first.created + first.pending == first.rows
    assert second.complete
    world.check(range(5_000))


def test_the_run_stops_when_too_many_rows_are_rejected(folder):
    async def go():
        world = World(folder, mappings(2_000), script=[{"refuse_ids": "[5-9]$"}])
        with pytest.raises(ServiceRefused) as raised:
            await world.session()
        return raised.value.summary

    summary = run_virtual(go())

    assert 101 <= summary.rejected <= 101 + 32
    assert summary.created + summary.rejected + summary.pending == summary.rows


def test_a_failing_source_ends_the_run_and_keeps_what_was_read(folder):
    def rows():
        yield from mappings(700)
        raise OSError("the disk is gone")

    async def go():
        world = World(folder, rows())
        with pytest.raises(InputError) as raised:
            await world.session()
        return world, raised.value

    world, error = run_virtual(go())

    assert "the disk is gone" in str(error)
    assert error.summary.created + error.summary.pending == error.summary.rows >= 500
    assert error.summary.created == len(world.ids)


def test_a_checkpoint_that_can_not_be_written_stops_all_sending(folder):
    async def go():
        world = World(folder, mappings(50_000), script=[{"latency_s": 0.5}])

        async def delete(engine):
            await asyncio.sleep(5.25)
            world.file.unlink()
            world.gone = (now(), len(world.transport.requests))

        with pytest.raises(BulkwfError) as raised:
            await world.session(act=delete)
        return world, raised.value

    world, error = run_virtual(go())

    assert error.exit_code == 4
    assert "deleted" in str(error)
    at, sent = world.gone
    assert all(request.at <= at + 0.6 for request in world.transport.requests[sent:])
    assert len(world.transport.requests) - sent <= 16
    assert error.summary.created == len(world.emitted)


# --- pauses -------------------------------------------------------------------------------------------------------


def test_a_stored_pause_is_kept_by_the_next_session(folder):
    async def go():
        world = World(folder, mappings(3_000), script=[{"request": 4, "status": 429, "retry_after": 900}])
        assert await world.session(kill_after=10) is None
        sent = len(world.transport.requests)
        summary = await world.session()
        return world, world.transport.requests[sent:], summary

    world, later, summary = run_virtual(go())

    assert later[0].at >= 900
    assert later[1].at >= later[0].ended_at  # one probe goes first
    assert summary.complete
    world.check(range(3_000))


def test_a_pause_is_never_shortened_by_a_later_order(folder):
    """Two requests on the wire are refused: one for 900 s, then one for 1 s."""

    async def go():
        script = [
            {"request": 1, "status": 429, "retry_after": 900, "latency_s": 1.0},
            {"request": 2, "status": 429, "retry_after": 1, "latency_s": 2.0},
        ]
        world = World(folder, mappings(200), script=script)
        assert await world.session(kill_after=10) is None
        until = read_status(world.file).pause_until - wall() + now()
        await world.session()
        return world, until

    world, until = run_virtual(go())

    assert until >= 900
    assert world.transport.requests[2].at >= 900


def test_a_stored_pause_over_max_outage_ends_the_session_unsent(folder):
    async def go():
        world = World(folder, mappings(300), script=[{"request": 1, "status": 429, "retry_after": 3_000}])
        for _ in range(2):
            with pytest.raises(TemporaryStop):
                await world.session()
        return world

    assert len(run_virtual(go()).transport.requests) <= 3


def test_a_stored_pause_of_more_than_a_day_is_ignored(folder, caplog):
    async def go():
        world = World(folder, mappings(300))
        await world.session(options=Options(rate=FAST, first=0))
        with contextlib.closing(sqlite3.connect(world.file)) as db:
            db.execute("UPDATE run SET pause_until = ?", (wall() + 90_000,))
            db.commit()
        reseal(world.file)
        await world.session()
        return now()

    assert run_virtual(go()) < 10
    assert "which is ignored" in caplog.text


def test_overlapping_pauses_are_counted_once(folder):
    _world, summary = run(folder, mappings(3_000), script=[{"from": 1, "to": 16, "status": 429, "retry_after": 50}])

    assert 50 <= summary.paused_s <= 52


# --- what never changes -------------------------------------------------------------------------------------------


def test_params_reach_the_service_byte_for_byte(folder):
    rows = [
        b'{"instance_id":"a","params":{"big":123456789012345678901234567890,"f":1.10}}\n',
        b'{"instance_id":"b","params":null}\n',
        b'{"instance_id":"c"}\n',
        b'{ "params" : [1,  2 ,3] , "instance_id":"d" }\n',
        '{"instance_id":"e","params":"\\u00e9 é"}\n'.encode(),
    ]
    (folder / "rows.jsonl").write_bytes(b"".join(rows))
    bodies = []

    async def go():
        world = World(folder, "rows.jsonl")
        send = world.transport.send

        async def noted(request, slot):
            bodies.append(request.body)
            return await send(request, slot)

        world.transport.send = noted
        await world.session()

    run_virtual(go())
    assert bodies == [b"[" + b",".join(row[:-1] for row in rows) + b"]"]


def test_requests_that_were_not_sent_leave_no_row_in_doubt(folder):
    async def go():
        world = World(folder, mappings(1_000))
        world.transport.before = lambda number: fault(FaultKind.NOT_SENT, "refused") if number % 3 else None
        return world, await world.session()

    world, summary = run_virtual(go())

    world.check(range(1_000))
    assert summary.created == 1_000


def test_each_request_is_stored_as_an_attempt(folder):
    world, _ = run(folder, mappings(1_000), script=TROUBLE, seed=3)

    with contextlib.closing(sqlite3.connect(world.file)) as db:
        noted = db.execute("SELECT instances, verdict FROM attempt").fetchall()
    assert len(noted) == len(world.transport.requests)
    assert sorted(n for n, _ in noted) == sorted(
        len(r.ids) if r.method == "POST" else 0 for r in world.transport.requests
    )
    assert orjson.loads(orjson.dumps(noted))  # plain values, every one


# --- sessions and the timeline ------------------------------------------------------------------------------------


def stored(folder, query):
    with contextlib.closing(sqlite3.connect(folder / "run.bulkwf")) as db:
        return db.execute(query).fetchall()


def timeline(folder):
    """(session, seconds by state) of each interval."""
    return [
        (session, orjson.loads(states)) for session, states in stored(folder, "SELECT session, states FROM timeline")
    ]


def test_the_states_of_each_session_add_up_to_its_length(folder):
    throttled = {"method": "POST", "request": 20, "status": 429, "retry_after": 30, "code": 971}
    failing = {"method": "POST", "after_s": 60, "until_s": 75, "status": 502}
    limits = RateLimits(instances_per_s=100, requests_per_5m=None)

    async def go():
        world = World(folder, mappings(6_000), script=[throttled, failing])
        await world.session(options=Options(rate=limits, first=5_500))
        await world.session(options=Options(rate=limits))

    run_virtual(go())

    lengths = dict(stored(folder, "SELECT id, ended_at - started_at FROM session"))
    spent = {session: Counter() for session in lengths}
    for session, states in timeline(folder):
        spent[session].update(states)
    assert len(spent) == 2
    for session, seconds in spent.items():
        assert seconds.total() == pytest.approx(lengths[session], rel=0.01)
    assert spent[1]["paused"] == pytest.approx(30.0, abs=0.5)
    assert spent[1]["outage"] >= 10.0
    assert spent[1]["instances"] >= 40.0
    assert sum(row[0] for row in stored(folder, "SELECT created FROM timeline")) == 6_000
    assert stored(folder, "SELECT sum(attempts), sum(errors) FROM timeline") == stored(
        folder, "SELECT count(*), sum(verdict NOT IN ('done', 'omitted', 'absent')) FROM attempt"
    )


def test_a_run_with_a_slow_list_waits_for_its_source(folder):
    async def slowly():
        for row in mappings(50):
            await asyncio.sleep(1.0)
            yield row

    run(folder, slowly())

    spent = sum((Counter(states) for _, states in timeline(folder)), Counter())
    assert spent["source"] >= 45.0


def test_each_session_stores_how_it_ended(folder):
    async def terminate(engine):
        await asyncio.sleep(0.05)
        engine.drain(signal=15)

    async def go():
        world = World(folder, mappings(10_000), script=[{"latency_s": 1.0}])
        await world.session(act=terminate)
        await world.session()

    run_virtual(go())

    assert stored(folder, "SELECT reason, exit_code FROM session") == [("drained", 128 + 15), ("finished", 0)]


def cancelled(folder, after_s, *, drained=False, **more):
    """A session that is cancelled after *after_s*: the world, its events, and its stored session."""

    async def go():
        world, events = World(folder, mappings(5_000), **more), []

        async def cancel(run):
            await asyncio.sleep(after_s)
            if drained:
                run.drain()
            world.task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await world.session(act=cancel, observers=[events.append])
        (session,) = stored(folder, "SELECT reason, exit_code, ended_at - started_at FROM session")
        return world, events, session

    return go()


def test_a_cancelled_run_has_its_last_event_and_a_reason(folder):
    world, events, session = run_virtual(cancelled(folder, 12.0, script=[{"latency_s": [1.0, 9.0]}]))

    assert session == ("cancelled", None, pytest.approx(12.0, abs=0.1))
    ended = events[-1]
    assert isinstance(ended, RunEnded)
    assert ended.reason == "cancelled"
    assert not ended.summary.complete
    assert 0 < ended.summary.created == len(world.emitted) <= len(world.ids)
    assert sum(sum(states.values()) for _, states in timeline(folder)) == pytest.approx(session[2], rel=0.01)


def test_a_run_cancelled_while_it_drains_has_drained(folder):
    _, events, session = run_virtual(cancelled(folder, 12.0, drained=True, script=[{"latency_s": [1.0, 9.0]}]))

    assert session[:2] == ("drained", 75)
    assert events[-1].reason == "drained"


def test_a_run_cancelled_during_its_last_commit_is_not_complete(folder):
    async def go():
        world, events = World(folder, mappings(5), commit_s=1.0), []

        async def cancel(_):
            await asyncio.sleep(2.5)
            world.task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await world.session(act=cancel, observers=[events.append])
        return events[-1], await world.session()

    ended, summary = run_virtual(go())

    assert (ended.reason, ended.summary.complete, ended.summary.created) == ("cancelled", False, 5)
    assert (summary.complete, summary.settled_now) == (True, 0)


def test_a_session_that_ends_before_its_run_has_a_reason(folder):
    async def go():
        world = World(folder, mappings(300), script=[{"request": 1, "status": 429, "retry_after": 3_000}])
        assert (
            await world.session(options=Options(rate=FAST, retry=RetryPolicy(max_outage_s=4_000)), kill_after=5) is None
        )
        with pytest.raises(TemporaryStop):
            await world.session()

    run_virtual(go())

    assert stored(folder, "SELECT reason, exit_code, ended_at - started_at FROM session")[-1] == (
        "TemporaryStop",
        75,
        0.0,
    )


def test_each_attempt_is_stored_with_what_it_sent_and_waited_for(folder):
    run(folder, mappings(300), options=Options(rate=RateLimits(instances_per_s=100, requests_per_5m=None)))

    kinds = stored(folder, "SELECT kind, instances, bytes > 3000, waited_for FROM attempt ORDER BY id")
    assert kinds == [("create", 100, 1, None), ("create", 100, 1, "instances"), ("create", 100, 1, "instances")]
    waited = [row[0] for row in stored(folder, "SELECT waited_s FROM attempt ORDER BY id")]
    assert waited[0] == 0.0
    assert all(0.5 < one < 2.1 for one in waited[1:])
