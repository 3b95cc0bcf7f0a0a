"""Verifications with any list that the service may give, in virtual time, over real files."""

import asyncio
import contextlib
import random
import sqlite3
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from fakes import (
    EPOCH,
    HEADER,
    RUN_TARGET,
    TARGET,
    UNLIMITED,
    Machine,
    ScriptedTransport,
    ServiceTransport,
    clock,
    fault,
    make_batch,
    memory_folder,
    now,
    reply,
    reseal,
    run_virtual,
    wall,
    windows,
    write_run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import created

from bulkwf.attempt import FaultKind
from bulkwf.batching.batch_state import BatchState
from bulkwf.checkpoint import Checkpoint, inline, read_results, read_status
from bulkwf.emulator import Limits, Service
from bulkwf.emulator.answers import Answer, refusal, success
from bulkwf.emulator.state import Tampering
from bulkwf.errors import CheckpointError, ServiceRefused, SystemRefused, TemporaryStop
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.options import Options, RateLimits, RetryPolicy
from bulkwf.parts import restore
from bulkwf.run import open_run
from bulkwf.verification import Scope, VerificationStore, open_verification, opening, read_past, store
from bulkwf.verification.scope import wanted
from bulkwf.verification.verify import CONFIRM_AFTER_S, LEAST_DEBT, list_pays

DAY_S = 86_400.0
FREE = Options(rate=UNLIMITED)
NO_SUCH_CURSOR = refusal(400, 10002, "this cursor is unknown")
NO_LIST = refusal(400, 10002, "there is no list")


@pytest.fixture
def folder():
    with memory_folder() as folder:
        yield Path(folder)


class OddService(Service):
    """Answers questions for the list and look-ups as a test says.

    `listing`: called with the query and a function that returns the page for a query; returns the answer. `looking`:
    the same for a look-up, with the id.
    """

    def __init__(self, limits=None, *, listing=None, looking=None):
        super().__init__(limits or Limits.none(), now, epoch=EPOCH)
        self.listing = listing or (lambda query, give: give(query))
        self.looking = looking or (lambda instance_id, give: give(instance_id))

    def list_instances(self, target, query):
        return self.listing(query, partial(super().list_instances, target))

    def get_instance(self, target, id_, *, simple=False):
        return self.looking(id_, partial(super().get_instance, target, simple=simple))


class World:
    """One run's checkpoint and one service, for several verifications."""

    def __init__(self, folder, *, limits=None, options=FREE, listing=None, looking=None, **more):
        self.file = Path(folder) / "run.bulkwf"
        self.held = OddService(limits, listing=listing, looking=looking)
        self.transport = ServiceTransport(self.held, **more)
        self.options = options
        self.clock = clock
        self.recorded = 0
        self.bad = []

    async def has_run(self, rows, *, others=None, gone=(), failing=(), **more):
        """Add *rows* rows to the run; the service holds all that are created or existed except those in *gone*."""
        await write_run(self.file, rows, others=others, **more)
        lost = {f"id-{number}" for number in gone}
        ids = [result.id for result in read_results(self.file) if result.outcome in ("created", "existed")]
        self.begin([one for one in ids if one not in lost], failing={f"id-{number}" for number in failing})

    def begin(self, ids, failing=()):
        """Instances begin at the service."""
        for first in range(0, len(ids), 100):
            items = self.held.read(orjson.dumps([{"instance_id": one} for one in ids[first : first + 100]])).items
            self.held.create(TARGET, items, Tampering(failing=frozenset(failing)))

    @contextlib.asynccontextmanager
    async def opened(self, *, sample=None, options=None, transport=None):
        """A verification as the command opens it, but for the time and the network."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opening, "system_clock", self.clock)
            patch.setattr(opening, "open_transport", lambda *_: transport or self.transport)
            async with open_verification(
                self.file,
                account_id=TARGET.account,
                base_url=HEADER.base_url,
                token=dict,
                options=options or self.options,
                sample=sample,
            ) as opened:
                yield opened

    async def verify(self, *, cut_after=None, **more):
        """One session, to its end or cut off after *cut_after* turns of the loop; returns its counts."""
        async with self.opened(**more) as opened:
            try:
                await (opened.run() if cut_after is None else cut(opened.run(), cut_after))
            finally:
                self.recorded = len(read_past(self.file, 0)[0])
            report = await opened.report()
        self.bad = list(report.problems())
        report.discard()
        return report.counts

    # --- what the service was asked ---

    @property
    def asked(self):
        """Requests: (for pages of the list, for single instances)."""
        return len(self.transport.queries), len(self.transport.gets)

    @property
    def written(self):
        """When requests were written."""
        return [request.written_at for request in self.transport.requests if request.written_at is not None]

    def worst_window(self, period_s=300.0):
        return windows([(at, 1) for at in sorted(self.written)], period_s)

    @property
    def missing(self):
        return {one.row for one in self.bad if one.outcome == "missing"}


async def cut(work, turns):
    """Cancel *work* after this number of turns of the loop, unless it is done; the cancellation must end it."""
    loop, left = asyncio.get_running_loop(), turns
    task = asyncio.ensure_future(work)

    def turn():
        nonlocal left
        left -= 1
        if left == 0:
            task.cancel()
        type(loop)._run_once(loop)

    loop._run_once = turn
    try:
        await asyncio.wait((task,))
    finally:
        del loop._run_once
    assert task.cancelled() or not task.cancelling(), "a cancellation was swallowed"
    return task.cancelled() or task.result()


def verified(folder, rows, *, gone=(), others=None, failing=(), sample=None, **more):
    """One run and one verification of it; returns the world and the counts."""

    async def go():
        world = World(folder, **more)
        await world.has_run(rows, gone=gone, others=others, failing=failing)
        return world, await world.verify(sample=sample)

    return run_virtual(go())


def refused(kind, folder, rows=30, **more):
    """The same, for a verification that ends with an error of this kind; returns the error instead."""

    async def go():
        world = World(folder, **more)
        await world.has_run(rows)
        with pytest.raises(kind) as raised:
            await world.verify()
        return world, raised.value

    return run_virtual(go())


def page(ids, cursor=None, status="queued"):
    """A page of a list."""
    listed = [{"id": one, "status": status, "created_on": "2025-10-09T08:53:20.000Z"} for one in ids]
    info = {"count": len(listed)} | ({} if cursor is None else {"cursor": cursor})
    return success(orjson.dumps(listed).decode(), orjson.dumps(info).decode())


def paged(ids, size=100):
    """A listing of *ids* in this order, whose cursors are positions in it."""
    ids = list(ids)

    def give(query, _):
        at = int(query.get("cursor", 0))
        return page(ids[at : at + size], str(at + size) if at + size < len(ids) else None)

    return give


def names(numbers):
    return [f"id-{number}" for number in numbers]


# --- list or look-ups -------------------------------------------------------------------------------------------------


def test_the_list_is_read_in_pages_of_100(folder):
    world, counts = verified(folder, 1_234)

    assert world.asked == (13, 0)
    assert {query["per_page"] for query in world.transport.queries} == {"100"}
    assert (counts.instances, counts.total, counts.found, counts.missing, counts.statuses) == (1_234,) * 3 + (
        0,
        {"queued": 1_234},
    )
    assert (counts.requests, counts.complete, counts.run_finished, counts.exit_code) == (13, True, True, 0)
    assert counts.elapsed_s == pytest.approx(now(), abs=0.1)


@pytest.mark.parametrize(("rows", "asked"), [(0, (0, 0)), (1, (0, 1)), (10, (0, 10)), (11, (1, 0))])
def test_up_to_ten_instances_are_looked_up_without_the_list(folder, rows, asked):
    world, counts = verified(folder, rows)

    assert world.asked == asked
    assert (counts.found, counts.complete, counts.exit_code) == (rows, True, 0)


@pytest.mark.parametrize(("sample", "asked"), [(13, (0, 13)), (14, (13, 0)), (1_300, (13, 0))])
def test_a_small_sample_is_looked_up_without_the_list(folder, sample, asked):
    world, counts = verified(folder, 1_300, sample=sample)

    assert world.asked[0] <= asked[0]
    assert world.asked[1] == asked[1]
    assert (counts.instances, counts.total, counts.found, counts.exit_code) == (sample, 1_300, sample, 0)


def test_only_missing_instances_of_the_sample_are_reported(folder):
    world, counts = verified(folder, 400, gone=range(200), sample=100)

    assert counts.found + counts.missing == 100
    assert 20 < counts.missing < 80
    assert world.missing < set(range(200))
    assert counts.exit_code == 1


def test_missing_and_errored_instances_are_reported_in_row_order(folder):
    world, counts = verified(folder, 300, gone=[7, 250], failing=[8, 299], others={250: "existed", 9: "rejected"})

    assert [(one.row, one.id, one.outcome, one.status) for one in world.bad] == [
        (7, "id-7", "missing", None),
        (8, "id-8", "errored", "errored"),
        (250, "id-250", "missing", None),
        (299, "id-299", "errored", "errored"),
    ]
    assert (counts.instances, counts.found, counts.missing, counts.exit_code) == (299, 297, 2, 1)
    assert counts.statuses == {"queued": 295, "errored": 2}
    assert world.asked == (3, 4)  # the whole list, and each of the two twice


def test_an_errored_instance_is_not_missing(folder):
    _, counts = verified(folder, 20, failing=range(20))

    assert (counts.statuses, counts.missing, counts.exit_code) == ({"errored": 20}, 0, 0)


def test_all_first_look_ups_precede_all_second_ones(folder):
    world, _ = verified(folder, 60, gone=range(0, 60, 2), listing=lambda query, give: NO_LIST)

    first, again = world.transport.gets[:60], world.transport.gets[60:]
    assert sorted(first) == sorted(names(range(60)))
    assert sorted(again) == sorted(names(range(0, 60, 2)))


def test_look_ups_in_flight_stay_within_the_concurrency(folder):
    rates = replace(UNLIMITED, concurrency=5)
    world, _ = verified(folder, 60, options=replace(FREE, rate=rates), listing=lambda query, give: NO_LIST)

    assert world.transport.most_on_wire == 5


def test_look_ups_are_concurrent(folder):
    verified(folder, 320, listing=lambda query, give: NO_LIST, travel_s=(0.5, 0.5))

    assert now() < 320 / 16 * 1.5 + 10


@pytest.mark.parametrize(
    ("debt", "unanswered", "pays"),
    [
        (0, 0, False), (0, 1, True), (10, 1, True), (11, 1, False), (11, 100, False), (10, 109, True),
        (11, 110, True), (12, 110, False), (200_000, 2_000_000, True), (200_001, 2_000_000, False),
    ],
)  # fmt: skip
def test_the_list_pays_up_to_a_debt_of_a_tenth_of_the_look_ups_left_or_ten(debt, unanswered, pays):
    assert list_pays(debt, unanswered) is pays


# --- the dates of the list --------------------------------------------------------------------------------------------


def dates(folder, **run):
    """Between which dates the list is asked for, two days after a run of a hundred rows that began at 10:53:20."""

    async def go():
        world = World(folder)
        await asyncio.sleep(7_200)
        await world.has_run(100, **run)
        await asyncio.sleep(2 * 86_400)
        await world.verify()
        query = world.transport.queries[0]
        return query.get("date_start"), query.get("date_end")

    return run_virtual(go())


def test_the_date_window_is_the_run_and_an_hour_on_either_side(folder):
    assert dates(folder) == ("2025-10-09T09:53:20Z", "2025-10-09T11:53:20Z")


def test_the_date_window_of_an_unfinished_run_has_no_end(folder):
    assert dates(folder, finished=False) == ("2025-10-09T09:53:20Z", None)


@pytest.mark.parametrize(
    ("existed", "in_doubt", "start"),
    [(1, False, "2025-10-09T09:53:20Z"), (2, False, None), (2, True, "2025-10-09T09:53:20Z")],
)
def test_the_date_window_has_no_start_if_over_1_percent_existed_before_the_run(folder, existed, in_doubt, start):
    others = dict.fromkeys(range(existed), "existed")
    assert dates(folder, others=others, in_doubt=in_doubt)[0] == start


def test_the_date_window_covers_all_days_of_a_run(folder):
    async def go():
        world = World(folder)
        for days in (0, 1, 1):
            await asyncio.sleep(days * 86_400)
            await world.has_run(50)
        await world.verify()
        return world.transport.queries[0]

    query = run_virtual(go())

    assert (query["date_start"], query["date_end"]) == ("2025-10-09T07:53:20Z", "2025-10-11T09:53:20Z")


def test_an_instance_outside_the_date_window_is_looked_up(folder):
    async def go():
        world = World(folder)
        world.begin(["id-50"])
        await asyncio.sleep(3 * 86_400 / 2)
        await world.has_run(200, others={50: "existed"})
        return world, await world.verify()

    world, counts = run_virtual(go())

    assert (world.asked, counts.found, counts.missing) == ((2, 1), 200, 0)


# --- odd lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["oldest first", "by name", "at random"])
def test_the_list_may_come_in_any_order(folder, order):
    ids = names(range(1_000))
    {"oldest first": list, "by name": list.sort, "at random": random.Random(4).shuffle}[order](ids)
    world, counts = verified(folder, 1_000, listing=paged(ids))

    assert (world.asked, counts.found, counts.missing) == ((10, 0), 1_000, 0)


def test_a_list_reordered_for_each_page_makes_nothing_missing(folder):
    chance = random.Random(5)

    def give(query, _):
        return paged(chance.sample(names(range(500)), 500))(query, _)

    world, counts = verified(folder, 500, gone=[3], listing=give)

    assert counts.found == 500  # the list has shown what a look-up would not have found
    assert world.asked[0] <= 25


def test_a_repeated_page_costs_one_request(folder):
    def give(query, _):
        at = int(query.get("cursor", 0))
        return page(names(range(at // 2 * 100, at // 2 * 100 + 100)), str(at + 1) if at < 19 else None)

    world, counts = verified(folder, 1_000, listing=give)

    assert (world.asked, counts.found) == ((19, 0), 1_000)


def test_a_cursor_to_its_own_page_is_given_up_at_the_bound_of_the_debt(folder):
    world, counts = verified(folder, 300, listing=lambda query, give: page(names(range(100)), "same"))

    assert (world.asked, counts.found, counts.missing) == ((22, 200), 300, 0)  # a tenth of the 200 look-ups, and one


@pytest.mark.parametrize("length", [2, 3, 7])
def test_cursors_in_a_circle_are_given_up_at_the_bound_of_the_debt(folder, length):
    def give(query, _):
        at = int(query.get("cursor", 0))
        return page(names(range(at * 10, at * 10 + 10)), str((at + 1) % length))

    world, counts = verified(folder, 200, listing=give)

    look_ups = 200 - length * 10
    assert world.asked == (length + look_ups // 10 + 1, look_ups)
    assert (counts.found, counts.missing) == (200, 0)


def losing_cursors(ids, *lost):
    """A listing that has lost the cursor of these requests, counted from 1."""
    number, whole = 0, paged(ids)

    def give(query, _):
        nonlocal number
        number += 1
        return NO_SUCH_CURSOR if number in lost else whole(query, _)

    return give


@pytest.mark.parametrize(("lost", "asked"), [((2,), 12), ((10,), 20), ((2, 4, 7), 17)])
def test_after_a_refused_cursor_the_list_continues_from_its_start(folder, lost, asked):
    world, counts = verified(folder, 1_000, gone=[1_001], listing=losing_cursors(names(range(1_000)), *lost))

    assert counts.found == 1_000
    assert world.asked[0] <= asked


def test_a_refused_cursor_near_the_end_costs_at_most_ten_requests(folder):
    world, counts = verified(folder, 905, listing=losing_cursors(names(range(905)), 10))

    assert counts.found == 905
    assert sum(world.asked) <= 20


def test_a_list_that_refuses_every_cursor_is_given_up(folder):
    def give(query, _):
        return NO_SUCH_CURSOR if "cursor" in query else paged(names(range(500)))(query, _)

    world, counts = verified(folder, 500, gone=[400], listing=give)

    assert world.asked == (1 + 400 // 10 + 1, 400 + 1)
    assert (counts.found, world.missing) == (499, {400})


def test_instances_after_an_early_end_of_the_list_are_looked_up(folder):
    world, counts = verified(folder, 1_000, gone=[10, 990], listing=paged(names(range(11, 500))))

    assert world.asked == (5, 511 + 2)
    assert (counts.found, world.missing) == (998, {10, 990})


@pytest.mark.parametrize("ids", [[], names(range(2_000, 2_050))], ids=["nothing", "others'"])
def test_a_list_without_any_instance_of_the_run_is_read_once(folder, ids):
    world, counts = verified(folder, 300, listing=paged(ids))

    assert (world.asked, counts.found, counts.missing) == ((1, 300), 300, 0)


def test_instances_that_the_list_skips_are_looked_up(folder):
    shown = [number for number in range(300) if number % 10]
    world, counts = verified(folder, 300, gone=[20, 21], listing=paged(names(shown)))

    assert (counts.found, world.missing) == (299, {20})  # the list has shown 21
    assert world.asked[1] == 30 + 1


@pytest.mark.parametrize(
    "answer",
    [NO_LIST, refusal(413, 10002, "too large"), success("[[]]"), success("{}"), success('[{"id":7}]')],
    ids=["400", "413", "no list", "an object", "no ids"],
)
def test_without_a_list_every_instance_is_looked_up(folder, answer):
    world, counts = verified(folder, 40, gone=[4], listing=lambda query, give: answer)

    assert world.asked == (1, 41)
    assert (counts.found, world.missing, counts.exit_code) == (39, {4}, 1)


def test_a_list_of_mostly_other_instances_is_given_up(folder):
    async def go():
        world = World(folder)
        await world.has_run(30)
        world.begin([f"other-{number}" for number in range(5_000)])
        return world, await world.verify()

    world, counts = run_virtual(go())

    assert world.asked == (LEAST_DEBT + 1, 30)
    assert (counts.found, counts.missing) == (30, 0)


def test_100_rows_beside_many_other_instances_read_eleven_pages(folder):
    """However many the others are: a list without end."""

    def give(query, _):
        at = int(query.get("cursor", 0))
        return page([f"other-{at}-{number}" for number in range(100)], str(at + 1))

    world, counts = verified(folder, 100, listing=give)

    assert (world.asked, counts.found, counts.missing) == ((LEAST_DEBT + 1, 100), 100, 0)


def test_a_list_that_finds_less_than_one_instance_per_page_is_given_up(folder):
    """Every other page shows one: that is never in vain for long, and still costs more than look-ups."""

    def give(query, _):
        at = int(query.get("cursor", 0))
        return page([f"id-{at // 2}" if at % 2 else "other"], str(at + 1))

    world, counts = verified(folder, 300, listing=give)

    pages, look_ups = world.asked
    assert pages + look_ups <= 300 + 30 + 1
    assert (pages, counts.found) == (55, 300)


def test_refused_pages_add_to_the_debt(folder):
    """Each reading shows one instance more and loses its cursor: two requests for what a look-up does with one."""
    readings = iter(range(1_000))

    def give(query, _):
        return NO_SUCH_CURSOR if "cursor" in query else page([f"id-{next(readings)}", "other"], "next")

    world, counts = verified(folder, 300, listing=give)

    assert counts.found == 300
    assert sum(world.asked) <= 300 + 30 + 2


def test_instances_created_meanwhile_make_nothing_missing(folder):
    """They shift what is counted from the list's beginning, so that pages repeat what others have shown."""
    newer = 0

    def give(query, _):
        nonlocal newer
        world.begin([f"newer-{newer + number}" for number in range(30)])
        newer += 30
        return paged(reversed(world.held.ids(TARGET)))(query, _)

    async def go():
        await world.has_run(1_000, gone=[500])
        return await world.verify()

    world = World(folder, listing=give)
    counts = run_virtual(go())

    assert (counts.found, world.missing) == (999, {500})
    assert world.asked[0] <= 16


def test_instances_deleted_meanwhile_make_no_other_missing(folder):
    def give(query, _):
        for one in world.held.ids(TARGET)[-40:]:
            if one.startswith("other"):
                world.held.delete_instance(TARGET, one)
        return paged(reversed(world.held.ids(TARGET)))(query, _)

    async def go():
        await world.has_run(1_000, gone=[500])
        world.begin([f"other-{number}" for number in range(300)])
        return await world.verify()

    world = World(folder, listing=give)
    counts = run_virtual(go())

    assert (counts.found, world.missing) == (999, {500})


def test_a_listed_instance_without_status_counts_as_status_unknown(folder):
    _, counts = verified(folder, 20, listing=lambda query, give: success('[{"id":"id-0"},{"id":"id-1","status":null}]'))

    assert counts.statuses == {"queued": 18, "unknown": 2}


def test_a_look_up_without_status_counts_as_status_unknown(folder):
    _, counts = verified(folder, 3, looking=lambda instance_id, give: success(f'{{"id":"{instance_id}"}}'))

    assert counts.statuses == {"unknown": 3}


# --- the second look-up -----------------------------------------------------------------------------------------------


def absent_at_first(*ids, times=1):
    """A service whose first look-ups of these ids do not find them."""
    asked = Counter()

    def look(instance_id, give):
        asked[instance_id] += 1
        return give("no-such" if instance_id in ids and asked[instance_id] <= times else instance_id)

    return look


def test_an_instance_absent_once_and_present_later_is_not_missing(folder):
    world, counts = verified(folder, 9, looking=absent_at_first("id-2", "id-7"))

    assert (counts.found, counts.missing, counts.exit_code, world.bad) == (9, 0, 0, [])
    assert world.asked == (0, 11)


@pytest.mark.parametrize("rows", [1, 9, 60])
def test_the_second_look_up_of_an_absent_instance_comes_seconds_after_all_first_ones(folder, rows):
    world, counts = verified(folder, rows, gone=range(rows), listing=lambda query, give: NO_LIST)

    at = {}
    for request in world.transport.requests:
        if request.method == "GET":
            at.setdefault(request.ids[0], []).append((request.at, request.ended_at))
    last_answer = max(ended for (_, ended), _ in at.values())
    assert len(at) == counts.missing == rows
    assert all(second - last_answer >= CONFIRM_AFTER_S for _, (second, _) in at.values())


def test_an_instance_absent_twice_is_missing(folder):
    world, counts = verified(folder, 9, looking=absent_at_first("id-2", times=2))

    assert (counts.found, world.missing, counts.exit_code) == (8, {2}, 1)


# --- a service that fails ---------------------------------------------------------------------------------------------

TROUBLE = [
    {"chance": 0.08, "status": 500},
    {"chance": 0.06, "status": 503, "html": True},
    {"chance": 0.06, "reset": True},
    {"chance": 0.05, "truncate": 30},
    {"chance": 0.03, "status": 200, "body": "<html>Welcome to the hotel's network</html>"},
    {"chance": 0.03, "status": 429, "retry_after": 4},
    {"chance": 0.2, "latency_s": [0.0, 3.0]},
]


@pytest.mark.parametrize("seed", range(4))
def test_faults_make_no_instance_missing_or_found(folder, seed):
    listing = paged(names(number for number in range(400) if number % 4 and number != 7))
    world, counts = verified(folder, 400, gone=[7, 200], script=TROUBLE, seed=seed, listing=listing)

    assert (counts.found, world.missing, counts.exit_code) == (398, {7, 200}, 1)
    assert counts.requests == len(world.transport.requests)


def test_nothing_is_sent_during_a_pause(folder):
    script = [{"request": 1, "status": 429, "retry_after": 50}, {"request": 20, "status": 429, "retry_after": 70}]
    world, counts = verified(folder, 60, listing=lambda query, give: NO_LIST, script=script)

    refusals = [request for request in world.transport.requests if request.reply.status == 429]
    assert len(refusals) == 2
    for refused, seconds in zip(refusals, (50, 70), strict=True):
        until = refused.ended_at + seconds - 1e-6
        assert not [one for one in world.transport.requests if refused.ended_at < one.at < until]
    assert (counts.found, counts.exit_code) == (60, 0)


def test_a_pause_binds_the_next_session(folder):
    async def go():
        world = World(folder, script=[{"request": 3, "status": 429, "retry_after": 600}])
        await world.has_run(9)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.verify(), 100)
        asked = len(world.transport.requests)
        await world.verify()
        return world.transport.requests[asked].at

    assert 600 <= run_virtual(go()) < 601


def test_a_pause_of_the_run_binds_the_verification(folder):
    async def go():
        world = World(folder, script=[{"request": 2, "status": 429, "retry_after": 600}])
        async with a_real_run(world, 200, FREE) as running:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(running.finish(), 50)
        counts = await world.verify()
        return world, counts

    world, counts = run_virtual(go())

    assert (counts.found, counts.exit_code) == (100, 75)
    assert 600 <= world.transport.requests[2].at < 601


@pytest.mark.parametrize("set_s", [0.0, 3_600.0, -3_600.0])
def test_the_token_quota_binds_the_next_session_and_a_run(folder, set_s):
    """Another tool has left six requests of the token's: each session would send four at once."""

    async def go():
        options = replace(FREE, rate=replace(UNLIMITED, concurrency=4))
        world = World(folder, limits=replace(Limits.none(), requests_per_5m=6), options=options)
        await world.has_run(9)
        machine = Machine()
        world.clock = machine.clock
        for _ in range(4):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(world.verify(), 20)
            machine.set_s += set_s
        at = machine.clock()
        limiter = WindowLimiter(FREE.rate, clock=at.now)
        checkpoint = Checkpoint.open(world.file, HEADER, now=at.wall(), executor=inline, boot=at.boot())
        at = at.counted_by(checkpoint.boot)
        verified = partial(read_past, world.file, boot=checkpoint.boot)
        restore(limiter, "run", world.file, checkpoint.past, verified, FREE, at.wall())
        await checkpoint.aclose()
        held = limiter.capacity(0)
        return world, held, await world.verify()

    world, held, counts = run_virtual(go())

    assert (counts.found, counts.missing, held) == (9, 0, 0)
    assert world.held.admission.overruns["requests"] == 0


@pytest.mark.parametrize(("passed_s", "set_s", "expired"), [(60.0, 4 * DAY_S, False), (4 * DAY_S, -4 * DAY_S, True)])
def test_retention_hint_follows_the_boot_clock_when_the_clock_is_set_after_the_run(folder, passed_s, set_s, expired):
    async def go():
        world, machine = World(folder), Machine()
        at, state = machine.clock(), BatchState(make_batch(1))
        checkpoint = Checkpoint.open(world.file, HEADER, now=at.wall(), executor=inline, boot=at.boot())
        await checkpoint.begin(state, at.wall())
        created(state)
        await checkpoint.settle(state, at.wall())
        await checkpoint.finish(at.wall())
        await checkpoint.aclose()
        await asyncio.sleep(passed_s)
        machine.set_s = set_s
        world.clock = machine.clock
        await world.verify()
        return world

    (missing,) = run_virtual(go()).bad

    assert ("it may have passed its retention" in missing.message) == expired


def test_a_stored_pause_over_max_outage_ends_the_verification_before_any_request(folder):
    async def go():
        world = World(folder)
        await world.has_run(9)
        async with world.opened() as opened:
            opened.store.requests.pause(wall() + 7_200)
        with pytest.raises(TemporaryStop, match="7,200 s more"):
            await world.verify()
        return world.asked

    assert run_virtual(go()) == (0, 0)


def test_a_look_up_that_was_not_sent_does_not_count_in_the_window(folder):
    refused_ones = {2, 3, 5, 8, 13}
    options = replace(FREE, rate=replace(UNLIMITED, requests_per_5m=12))
    world, counts = verified(
        folder,
        10,
        options=options,
        before=lambda number: fault(FaultKind.NOT_SENT) if number in refused_ones else None,
    )

    assert (counts.found, world.asked) == (10, (0, 15))
    assert now() < 100  # ten were sent, not fifteen


def test_a_page_that_was_not_sent_does_not_count_in_the_window(folder):
    options = replace(FREE, rate=replace(UNLIMITED, requests_per_5m=2))
    before = lambda number: fault(FaultKind.NOT_SENT) if number < 4 else None  # noqa: E731
    _, counts = verified(folder, 50, options=options, before=before)

    assert counts.found == 50
    assert now() < 100


@pytest.mark.parametrize("rows", [9, 90])
def test_after_an_outage_the_next_session_finishes(folder, rows):
    out = True

    async def go():
        world = World(folder, before=lambda number: fault() if out and number > 5 else None, listing=listing)
        await world.has_run(rows, gone=[3])
        with pytest.raises(TemporaryStop, match="--max-outage"):
            await world.verify()
        ended_at, asked = now(), Counter(world.transport.gets)
        out_no_more()
        counts = await world.verify()
        return world, counts, ended_at, asked

    def out_no_more():
        nonlocal out
        out = False

    listing = paged(names(range(5, 60)))
    world, counts, ended_at, _ = run_virtual(go())

    assert 1_500 < ended_at < 1_900
    assert (counts.found, world.missing) == (rows - 1, {3})


@pytest.mark.parametrize("gone", [(), range(9)], ids=["there", "gone"])
def test_failures_between_successes_are_no_outage(folder, gone):
    options = replace(FREE, rate=replace(UNLIMITED, concurrency=1), retry=RetryPolicy(max_outage_s=60.0))
    script = [{"every": 3, "status": 503}]
    _, counts = verified(folder, 9, gone=gone, options=options, script=script, travel_s=(10.0, 10.0))

    assert now() > 250
    assert counts.found + counts.missing == 9


@pytest.mark.parametrize("status", [500, 501, 414])
def test_a_list_that_fails_half_way_is_given_up(folder, status):
    """A cursor deep in the list may be more than the service can bear: look-ups still work."""

    def listing(query, give):
        return refusal(status, 10001, "failing") if "cursor" in query else give(query)

    _world, counts = verified(folder, 1_000, gone={3, 700}, listing=listing)

    assert (counts.found, counts.missing, counts.exit_code) == (998, 2, 1)
    assert now() < 300


def test_a_list_that_always_fails_is_given_up(folder):
    world, counts = verified(folder, 40, gone=[4], listing=lambda query, give: refusal(500, 10001, "failing"))

    assert (counts.found, world.missing, counts.exit_code) == (39, {4}, 1)
    assert sum(world.asked) <= 41 + LEAST_DEBT + 8  # the last page's attempts and probes, and that of the workflow
    assert now() < 60


def test_a_list_that_failed_for_a_minute_is_read_on(folder):
    def listing(query, give):
        return refusal(503, 10001, "failing") if 0.5 < now() < 60 else give(query)

    world, counts = verified(folder, 5_000, listing=listing, travel_s=(0.05, 0.1))

    assert counts.exit_code == 0
    assert world.asked[1] < 4_000  # the rest came by the list


def test_a_workflow_that_does_not_exist_has_no_missing_instances(folder):
    """Whatever a look-up says in its absence: the list knows better."""

    def looking(instance_id, give):
        return refusal(404, 10501, "not found")

    def listing(query, give):
        return refusal(404, 10200, "no such workflow")

    refused(ServiceRefused, folder, 5, looking=looking, listing=listing)


def test_a_run_counts_the_requests_of_a_verification(folder):
    async def go():
        world = World(folder)
        await world.has_run(8)
        await world.verify()
        limits = RateLimits(instances_per_s=None, requests_per_5m=10)
        limiter = WindowLimiter(limits, clock=asyncio.get_running_loop().time)
        checkpoint = Checkpoint.open(world.file, HEADER, now=wall(), executor=inline)
        restore(limiter, "run", world.file, checkpoint.past, partial(read_past, world.file), FREE, wall())
        await checkpoint.aclose()
        return limiter.capacity(0)

    assert run_virtual(go()) == 2


def test_last_error_stands_until_a_request_succeeds(folder):
    async def go():
        seen = []
        world = World(
            folder,
            script=[{"from": 1, "to": 2, "status": 500, "message": "it went wrong"}],
            before=lambda number: seen.append(opened.last_error),
        )
        await world.has_run(360)
        async with world.opened() as opened:
            await opened.run()
        return seen

    assert run_virtual(go()) == ["", *["it went wrong"] * 2, "", "", ""]


# --- a service that refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, 500])
def test_a_refused_token_is_refreshed(folder, rows):
    world, counts = verified(folder, rows, script=[{"request": 2, "revoke_token": True}], tokens=("t0", "t1"))

    assert (counts.found, counts.exit_code) == (rows, 0)
    assert world.transport.credential == 1


@pytest.mark.parametrize("rows", [5, 50])
def test_a_token_refused_every_time_ends_the_verification(folder, rows):
    world, raised = refused(ServiceRefused, folder, rows, script=[{"request": 1, "revoke_token": True}])

    assert "credential" in str(raised)
    assert len(world.transport.requests) <= 16


@pytest.mark.parametrize("rows", [5, 50])
def test_a_missing_workflow_ends_the_verification_and_makes_nothing_missing(folder, rows):
    missing = refusal(404, 10200, "workflow.not_found")
    world, raised = refused(ServiceRefused, folder, rows, listing=lambda *_: missing, looking=lambda *_: missing)

    assert "workflow" in str(raised)
    assert len(world.transport.requests) <= 2 * 5

    async def go():
        async with world.opened() as again:
            ids = [one async for one in again.store.unanswered(0)]
            return again.store.resumed, again.store.missing, again.store.found, len(ids)

    assert run_virtual(go()) == (True, 0, 0, rows)


def test_a_refused_worker_stops_the_others(folder):
    world, _ = refused(
        ServiceRefused,
        folder,
        200,
        listing=lambda *_: NO_LIST,
        looking=lambda one, give: refusal(407, 10001, "no") if one == "id-3" else give(one),
        travel_s=(0.1, 0.5),
    )

    assert len(world.transport.gets) < 40


@pytest.mark.parametrize("status", [500, 501, 403])
def test_an_unanswered_instance_is_unknown_and_delays_no_other(folder, status):
    world, counts = verified(
        folder,
        200,
        listing=lambda *_: NO_LIST,
        looking=lambda one, give: refusal(status, 10001, "no") if one == "id-100" else give(one),
    )

    assert (counts.found, counts.missing, counts.unknown, counts.complete, counts.exit_code) == (199, 0, 1, False, 75)
    assert [(one.row, one.id, one.outcome) for one in world.bad] == [(100, "id-100", "unknown")]


@pytest.mark.parametrize("status", [401, 405, 500])
@pytest.mark.parametrize(("rows", "failing"), [(8, "id-3"), (60, "id-59")])
def test_an_unanswered_instance_is_unknown_even_as_the_last_in_flight(folder, status, rows, failing):
    _, counts = verified(
        folder,
        rows,
        listing=lambda *_: NO_LIST,
        looking=lambda one, give: refusal(status, 10001, "no") if one == failing else give(one),
    )

    assert (counts.found, counts.unknown, counts.exit_code) == (rows - 1, 1, 75)


def test_an_unanswered_only_instance_is_unknown_if_the_list_is_answered(folder):
    _, counts = verified(folder, 1, looking=lambda one, give: refusal(500, 10001, "no"))

    assert (counts.found, counts.unknown, counts.exit_code) == (0, 1, 75)


def test_the_next_verification_looks_up_unknown_instances_again(folder):
    async def go():
        failing = {"id-3"}
        world = World(
            folder,
            listing=lambda *_: NO_LIST,
            looking=lambda one, give: refusal(500, 10001, "no") if one in failing else give(one),
        )
        await world.has_run(20)
        first = await world.verify()
        failing.clear()
        asked = len(world.transport.gets)
        return first, await world.verify(), world.transport.gets[asked:]

    first, second, asked = run_virtual(go())

    assert (first.found, first.unknown) == (19, 1)
    assert (second.found, second.unknown, second.exit_code) == (20, 0, 0)
    assert asked == ["id-3"]


FAILED_BUT_COMPLETE = Answer(
    200, b'{"success":false,"errors":[{"code":10001,"message":"internal"}],"result":{"status":"complete"}}'
)


def test_a_failed_look_up_that_names_the_status_finds_the_instance(folder):
    _, counts = verified(folder, 5, looking=lambda *_: FAILED_BUT_COMPLETE)

    assert (counts.found, counts.statuses, counts.exit_code) == (5, {"complete": 5}, 0)


def test_an_answer_of_another_service_ends_the_verification(folder):
    portal = ScriptedTransport(then=reply(200, b"<html>Welcome to the hotel's network</html>"))

    async def go():
        world = World(folder)
        await world.has_run(5)
        with pytest.raises(ServiceRefused, match="not the Workflows API"):
            await world.verify(transport=portal)

    run_virtual(go())
    assert portal.dropped > 0


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gone", "code"), [((), 75), ((3,), 1)])
def test_an_unfinished_run_is_verified_as_far_as_it_went(folder, gone, code):
    async def go():
        world = World(folder)
        await world.has_run(100, gone=gone, others=dict.fromkeys(range(50, 100), "pending"), finished=False)
        return await world.verify()

    counts = run_virtual(go())

    assert (counts.complete, counts.run_finished, counts.exit_code) == (True, False, code)
    assert (counts.instances, counts.found) == (50, 50 - len(gone))


def test_rows_added_by_the_run_meanwhile_are_not_taken_for_a_sample(folder):
    """The status is read before the rows, and a run that is under way does not wait."""

    async def go():
        world = World(folder)
        await world.has_run(100, finished=False)
        early = read_status(world.file)
        await world.has_run(50, finished=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opening, "read_status", lambda _: early)
            return await world.verify()

    counts = run_virtual(go())

    assert (counts.instances, counts.found, counts.exit_code) == (150, 150, 75)
    assert counts.total == 150


def test_instances_not_looked_up_yet_are_neither_found_nor_missing(folder):
    async def go():
        world = World(folder, listing=lambda *_: NO_LIST)
        await world.has_run(100)
        async with world.opened() as opened:
            await cut(opened.run(), 150)
            return (await opened.report()).counts, opened.answered

    counts, answered = run_virtual(go())

    assert 0 < counts.found == answered < 100
    assert (counts.complete, counts.missing, counts.exit_code) == (False, 0, 75)


# --- endpoint and account ---------------------------------------------------------------------------------------------


def no_token():
    raise AssertionError("the token was read before its destination was checked")


def test_ids_of_a_forged_checkpoint_are_never_sent(folder):
    async def go():
        world = World(folder)
        await world.has_run(20)
        with contextlib.closing(sqlite3.connect(world.file)) as db, db:
            db.execute("""UPDATE batch SET ids = replace(ids, '"id-7"', '"../../user/tokens"')""")
        reseal(world.file)
        with pytest.raises(CheckpointError, match="the batch at row 0 has ids that no run writes"):
            await world.verify()
        assert world.asked == (0, 0)

    run_virtual(go())


def opened_elsewhere(folder, monkeypatch, base_url=HEADER.base_url, account_id=TARGET.account, header=HEADER):
    """Why a verification was refused that asks another place than the run did."""
    monkeypatch.setattr(opening, "open_transport", lambda *_: no_token())

    async def go():
        file = folder / "run.bulkwf"
        await write_run(file, 5, header=header)
        place = {"account_id": account_id, "base_url": base_url, "token": no_token}
        async with open_verification(file, **place, options=Options(), sample=None):
            raise AssertionError("it should not be open")

    with pytest.raises(ServiceRefused) as raised:
        run_virtual(go())
    assert not (folder / "run.bulkwf.verify").exists()
    return str(raised.value)


def test_a_checkpoint_of_another_endpoint_is_refused_naming_both(folder, monkeypatch):
    counts = opened_elsewhere(folder, monkeypatch, base_url="https://api.example/client/v5")
    assert "endpoint is 'https://api.example/client/v4'" in counts
    assert "asked is 'https://api.example/client/v5'" in counts
    assert "--base-url" in counts


def test_a_checkpoint_of_another_account_is_refused_naming_both(folder, monkeypatch):
    counts = opened_elsewhere(folder, monkeypatch, account_id="other")
    assert "account is 'acct'" in counts
    assert "asked is 'other'" in counts
    assert "-a" in counts


@pytest.mark.parametrize("environment", [None, "", "  ", "acct"])
def test_the_account_defaults_to_that_of_the_checkpoint(folder, monkeypatch, environment):
    if environment is not None:
        monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", environment)
    seen = []
    monkeypatch.setattr(opening, "open_transport", lambda parts, target, *_: seen.append(target) or World(folder))

    async def go():
        file = folder / "run.bulkwf"
        await write_run(file, 5)
        place = {"account_id": None, "base_url": HEADER.base_url + "/", "token": dict}
        async with open_verification(file, **place, options=Options(), sample=None):
            pass

    run_virtual(go())
    assert [(target.account_id, target.workflow, target.base_url) for target in seen] == [
        ("acct", "resize", HEADER.base_url)
    ]


# --- limits -----------------------------------------------------------------------------------------------------------

TIGHT = replace(FREE, rate=RateLimits(instances_per_s=None, requests_per_5m=20))


@contextlib.asynccontextmanager
async def a_real_run(world, rows, options):
    """The run itself, over the same transport."""
    listed = ({"instance_id": f"id-{number}", "params": number} for number in range(rows))
    async with open_run(
        listed,
        target=RUN_TARGET,
        token=dict,
        checkpoint=world.file,
        options=options,
        transport=world.transport,
        clock=clock(),
    ) as running:
        yield running


@pytest.mark.parametrize("listing", [None, lambda query, give: NO_LIST], ids=["list", "look-ups"])
def test_no_five_minutes_hold_more_requests_than_the_limit(folder, listing):
    rows = 2_500 if listing is None else 55
    world, counts = verified(folder, rows, options=TIGHT, listing=listing)

    assert counts.found == rows
    assert world.worst_window() == 20
    assert now() < 301 * (len(world.written) // 20) + 10


def test_bound_by_names_the_limit_that_holds_the_next_request(folder):
    async def go():
        world = World(folder, options=TIGHT, listing=lambda *_: NO_LIST)
        await world.has_run(30)
        async with world.opened() as opened:
            running, seen = asyncio.ensure_future(opened.run()), [opened.bound_by]
            while not running.done():
                await asyncio.sleep(10.0)
                seen.append(opened.bound_by)
            return seen

    seen = run_virtual(go())

    assert seen[0] == ""
    assert set(seen) == {"", "20 requests/5 min"}


@pytest.mark.parametrize("rows", [3, 300], ids=["look-ups", "list"])
def test_a_request_counts_from_its_writing_not_from_its_answer(folder, rows):
    options = replace(FREE, rate=RateLimits(instances_per_s=None, requests_per_5m=1))
    world, counts = verified(folder, rows, options=options, travel_s=(20.0, 20.0))

    assert counts.found == rows
    assert [later - at for at, later in pairwise(world.written)] == pytest.approx([320.0, 320.0], abs=0.1)


def test_the_requests_of_the_run_count(folder):
    async def go():
        world = World(folder, options=TIGHT)
        async with a_real_run(world, 1_500, TIGHT) as running:
            await running.finish()
        return world, await world.verify()

    world, counts = run_virtual(go())

    assert (counts.found, counts.exit_code) == (1_500, 0)
    assert (len(world.transport.posts), world.asked) == (15, (15, 0))
    assert world.worst_window() <= 20


def test_requests_of_earlier_sessions_count_for_five_minutes(folder):
    async def go():
        world = World(folder, options=TIGHT, listing=lambda *_: NO_LIST, travel_s=(0.001, 0.002))
        await asyncio.sleep(0.93)  # the second is nearly over
        await world.has_run(70)
        sessions = 0
        while True:
            sessions += 1
            with contextlib.suppress(TimeoutError):
                return world, sessions, await asyncio.wait_for(world.verify(), 97.0)

    world, sessions, counts = run_virtual(go())

    assert sessions > 5
    assert counts.found == 70
    assert len(world.transport.requests) == 71  # nothing twice: it was cut off while it waited
    assert world.worst_window() <= 20


def test_requests_in_flight_at_an_interruption_count(folder):
    async def go():
        world = World(folder, options=TIGHT, listing=lambda *_: NO_LIST, travel_s=(5.0, 5.0))
        await world.has_run(40)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(world.verify(), 14.5)  # two for the list, and then sixteen on their way
        return world, await world.verify()

    world, counts = run_virtual(go())

    assert counts.found == 40
    assert world.worst_window() <= 20


def test_the_token_quota_is_spread_over_its_period(folder):
    limits, options = replace(Limits.none(), requests_per_5m=20), replace(FREE, rate=RateLimits(requests_per_5m=1_000))
    world, counts = verified(folder, 15, limits=limits, options=options, listing=lambda query, give: NO_LIST)

    assert counts.found == 15
    assert world.worst_window(60.0) <= 5  # of seventeen that could go at once
    assert world.held.overruns.total() == 0


# --- interrupted and continued ----------------------------------------------------------------------------------------


def test_a_cursor_that_expires_between_sessions_does_not_cause_thousands_of_look_ups(folder):
    given = set()

    def give(query, whole):
        if "cursor" in query and query["cursor"] not in given:
            return NO_SUCH_CURSOR
        answer = paged(names(range(3_000)))(query, whole)
        given.add(orjson.loads(answer.body)["result_info"].get("cursor"))
        return answer

    async def go():
        world = World(folder, listing=give, travel_s=(1.0, 1.0))
        await world.has_run(3_000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.verify(), 60)  # of the 90 s that the list takes
        given.clear()
        return world, await world.verify()

    world, counts = run_virtual(go())

    assert (counts.found, counts.missing) == (3_000, 0)
    assert sum(world.asked) <= 3 * 30 + 5


def test_instances_found_by_an_earlier_session_are_not_looked_up_again(folder):
    async def go():
        world = World(folder, listing=lambda *_: NO_LIST, travel_s=(1.0, 1.0))
        await world.has_run(100, gone=[10, 90])
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(world.verify(), 9.5)
        return world, await world.verify()

    world, counts = run_virtual(go())

    assert (counts.found, world.missing) == (98, {10, 90})
    again = Counter(world.transport.gets)
    assert sum(again.values()) - 100 <= 2 + 3 * 16  # only what was on the wire
    assert len(world.transport.queries) == 1


CUT_ROWS, CUT_GONE = 30, {5, 17}


CUT_EVERYWHERE = pytest.mark.xdist_group("cut everywhere")
"""Its tests run in one process: the fixture is dear."""


@pytest.fixture(scope="module")
def cut_everywhere(tmp_path_factory):
    """(turn, world, counts) of a verification that was cut off at this turn of the loop, and resumed."""
    template = tmp_path_factory.mktemp("template") / "run.bulkwf"
    run_virtual(write_run(template, CUT_ROWS))
    cases, turn, finished = [], 0, False
    while not finished:
        turn += 1
        folder = memory_folder()
        with folder:
            (Path(folder.name) / "run.bulkwf").write_bytes(template.read_bytes())
            world, counts, finished = run_virtual(cut_and_resumed(Path(folder.name), turn))
        cases.append((turn, world, counts))
    return cases


async def cut_and_resumed(folder, turn):
    script = [{"request": 3, "status": 500}, {"request": 6, "status": 429, "retry_after": 5}]
    shown = [number for number in range(CUT_ROWS) if number % 14 and number not in CUT_GONE]
    options = replace(FREE, rate=replace(UNLIMITED, concurrency=3))
    world = World(folder, script=script, options=options, listing=paged(names(shown), 15))
    world.begin([f"id-{number}" for number in range(CUT_ROWS) if number not in CUT_GONE])
    first = await world.verify(cut_after=turn)
    if first.complete:
        return world, first, True
    world.uncut = len(world.transport.requests)
    return world, await world.verify(), False


@CUT_EVERYWHERE
@pytest.mark.slow
def test_interrupted_at_any_await_and_resumed_the_result_is_the_same(cut_everywhere):
    _, whole, counts = cut_everywhere[-1]
    assert len(cut_everywhere) > 50  # or it was not cut off everywhere
    assert (counts.found, counts.missing) == (CUT_ROWS - 2, 2)
    for turn, world, result in cut_everywhere:
        assert (result.found, result.missing, result.statuses, result.complete, result.exit_code) == (
            counts.found, counts.missing, counts.statuses, True, 1,
        ), turn  # fmt: skip
        assert world.missing == CUT_GONE, turn
        assert len(world.transport.requests) <= len(whole.transport.requests) + 3 + 1, turn


@CUT_EVERYWHERE
@pytest.mark.slow
def test_interrupted_at_any_await_every_request_is_logged(cut_everywhere):
    for turn, world, _ in cut_everywhere:
        assert len(world.written) <= world.recorded <= len(world.transport.requests) + 3, turn


# --- any list ---------------------------------------------------------------------------------------------------------


@st.composite
def whims(draw):
    """How a list behaves, and what is gone."""
    rows = draw(st.integers(11, 45))
    rare = st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])
    return {
        "rows": rows,
        "gone": draw(st.sets(st.integers(0, rows - 1), max_size=6)),
        "others": draw(st.sampled_from([0, 0, 5, 60])),
        "size": draw(st.sampled_from([1, 2, 5, 20, 100])),
        "order": draw(st.sampled_from(["fixed", "of the reading", "of the page"])),
        "drops": draw(rare),
        "repeats": draw(rare),
        "loses": draw(rare),
        "jumps": draw(rare),
        "ends": draw(rare),
        "endless": draw(st.booleans()),
        "late": draw(rare),
        "seed": draw(st.integers(0, 2**32)),
    }


def whimsical(whim, held, chance):
    """The list of such a service. It never shows what is not there."""
    ids = [f"other-{number}" for number in range(whim["others"])] + held
    chance.shuffle(ids)

    def give(query, _):
        if "cursor" not in query and whim["order"] == "of the reading":
            chance.shuffle(ids)
        if "cursor" in query and chance.random() < whim["loses"]:
            return chance.choice([NO_SUCH_CURSOR, success("{}")])
        order = chance.sample(ids, len(ids)) if whim["order"] == "of the page" else ids
        at = int(query.get("cursor", 0))
        shown = [one for one in order[at : at + whim["size"]] if chance.random() >= whim["drops"]]
        if chance.random() < whim["repeats"]:
            shown += chance.sample(ids, min(len(ids), whim["size"]))
        following = at + whim["size"]
        if chance.random() < whim["jumps"]:
            following = chance.randrange(len(ids) + 1)
        over = following >= len(ids) and not whim["endless"]
        return page(shown, None if over or chance.random() < whim["ends"] else str(following))

    return give


def verify_whimsically(whim):
    chance = random.Random(whim["seed"])
    rows, gone = whim["rows"], whim["gone"]
    held = [f"id-{number}" for number in range(rows) if number not in gone]
    late = [one for one in held if chance.random() < whim["late"]]

    async def go(folder):
        listing, looking = whimsical(whim, held, chance), absent_at_first(*late)
        world = World(folder, listing=listing, looking=looking, seed=whim["seed"])
        await world.has_run(rows, gone=gone)
        return world, await world.verify()

    with memory_folder() as folder:
        world, counts = run_virtual(go(folder))
    again = len([one for one, times in Counter(world.transport.gets).items() if times > 1])
    return world, counts, again


@settings(max_examples=40)
@given(whims())
def test_with_any_list_exactly_the_deleted_instances_are_missing(whim):
    world, counts, _ = verify_whimsically(whim)

    assert world.missing == whim["gone"]
    assert (counts.found, counts.complete) == (whim["rows"] - len(whim["gone"]), True)
    assert max(Counter(world.transport.gets).values(), default=0) <= 2


@settings(max_examples=40)
@given(whims())
def test_any_list_costs_at_most_the_debt_more_than_look_ups(whim):
    world, counts, again = verify_whimsically(whim)

    assert sum(world.asked) <= whim["rows"] + again + LEAST_DEBT + 2
    assert counts.requests == sum(world.asked)


# --- the store's thread -------------------------------------------------------------------------------------------


async def test_the_loop_goes_on_while_the_store_is_opened_and_a_cancellation_closes_it(folder, monkeypatch):
    file = folder / "run.bulkwf"
    await write_run(file, 20, at=EPOCH)
    building, go_on = threading.Event(), threading.Event()

    def slowly(*args):
        building.set()
        assert go_on.wait(30)
        yield from wanted(*args)

    monkeypatch.setattr(store, "wanted", slowly)
    place = {"account_id": None, "base_url": HEADER.base_url, "token": dict}

    async def open_and_close():
        async with open_verification(file, **place, options=Options(), sample=None):
            raise AssertionError("it was cancelled")

    task = asyncio.ensure_future(open_and_close())
    await asyncio.get_running_loop().run_in_executor(None, building.wait, 30)  # the loop runs meanwhile
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()  # the thread has the files
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert sorted(one.name for one in folder.iterdir()) == [
        "run.bulkwf", "run.bulkwf.verify", "run.bulkwf.verify-requests",
    ]  # fmt: skip


async def test_without_a_thread_for_the_store_the_reason_is_named(folder, monkeypatch):
    def none(*_):
        raise RuntimeError("can't start new thread")

    file = folder / "run.bulkwf"
    await write_run(file, 20, at=EPOCH)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", none)
    place = {"account_id": None, "base_url": HEADER.base_url, "token": dict}
    with pytest.raises(SystemRefused):
        async with open_verification(file, **place, options=Options(), sample=None):
            raise AssertionError("it should not be open")


async def test_a_store_that_is_closed_twice_is_closed_once(folder):
    file = folder / "run.bulkwf"
    await write_run(file, 20, at=EPOCH)
    for _ in range(2):  # the lock is free
        opened = VerificationStore.open(Scope(file, read_status(file), None), EPOCH, random.random, inline)
        await opened.aclose()
        await opened.aclose()


# --- a checkpoint that can't be used ----------------------------------------------------------------------------------


def test_a_full_disk_ends_the_verification(folder):
    async def go():
        world = World(folder, listing=lambda *_: NO_LIST)
        await world.has_run(400)
        async with world.opened() as opened:
            size = opened.store._db.execute("PRAGMA page_count").fetchone()[0]
            opened.store._db.execute(f"PRAGMA max_page_count = {size}")
            with pytest.raises(CheckpointError, match="Make room"):
                await opened.run()

    run_virtual(go())
