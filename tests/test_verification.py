"""Whether what a checkpoint calls started is really there: any list whatever, in virtual time, over a real file."""

import asyncio
import contextlib
import random
import sqlite3
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from fakes import (
    EPOCH,
    HEADER,
    TARGET,
    UNLIMITED,
    Machine,
    ScriptedTransport,
    ServiceTransport,
    clock,
    fault,
    memory_folder,
    now,
    reply,
    reseal,
    run_virtual,
    service,
    wall,
    windows,
    write_run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bulkwf import api
from bulkwf.checkpoint import Checkpoint, inline, read_results, read_status
from bulkwf.emulator import Limits
from bulkwf.emulator.answers import Answer, refusal, success
from bulkwf.emulator.state import Tampering
from bulkwf.errors import CheckpointError, ServiceRefused, TemporaryStop
from bulkwf.limiter import WindowLimiter
from bulkwf.model import FaultKind
from bulkwf.options import Options, RateLimits, RetryPolicy
from bulkwf.verification import open_verification, opening, read_past
from bulkwf.verification.verify import LEAST_DEBT

FREE = Options(base_url=HEADER.base_url, rate=UNLIMITED)
NO_SUCH_CURSOR = refusal(400, 10002, "this cursor is none that was given out")
NO_LIST = refusal(400, 10002, "there is no list to be had")


@pytest.fixture
def folder():
    with memory_folder() as folder:
        yield Path(folder)


class OddTransport(ServiceTransport):
    """Lists and looks up as a test says.

    `listing`: given the query, and the page that the service would give; returns the answer. `looking`: the same for a
    look-up.
    """

    def __init__(self, held, *, listing=None, looking=None, **more):
        super().__init__(held, **more)
        self.listing = listing or (lambda query, give: give(query))
        self.looking = looking or (lambda instance_id, give: give(instance_id))

    def _page(self, query):
        return self.listing(query, super()._page)

    def _look_up(self, instance_id):
        return self.looking(instance_id, super()._look_up)


class World:
    """One run's checkpoint and one service, through as many verifications as it takes."""

    def __init__(self, folder, *, limits=None, options=FREE, **more):
        self.file = Path(folder) / "run.bulkwf"
        self.held = service(limits, epoch=EPOCH)
        self.transport = OddTransport(self.held, **more)
        self.options = options
        self.clock = clock
        self.recorded = 0
        self.bad = []

    async def has_run(self, rows, *, others=None, gone=(), failing=(), **more):
        """So many more rows; the service holds all that are called created or existed but those in *gone*."""
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
                self.file, account_id=TARGET.account, token=dict, options=options or self.options, sample=sample
            ) as opened:
                yield opened

    async def verify(self, *, cut_after=None, **more):
        """One session, to its end or cut off after so many turns of the loop; what it has come to."""
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
    """Cancel *work* after so many turns of the loop, if it is not done by then; that must end it."""
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
    """One run and one verification of it; returns the world and what it came to."""

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


# --- the cheaper way ----------------------------------------------------------------------------------------------


def test_a_list_is_read_a_hundred_instances_a_request(folder):
    world, told = verified(folder, 1_234)

    assert world.asked == (13, 0)
    assert {query["per_page"] for query in world.transport.queries} == {"100"}
    assert (told.instances, told.total, told.found, told.missing, told.statuses) == (1_234,) * 3 + (
        0,
        {"queued": 1_234},
    )
    assert (told.requests, told.complete, told.run_finished, told.exit_code) == (13, True, True, 0)
    assert told.elapsed_s == pytest.approx(now(), abs=0.1)


@pytest.mark.parametrize(("rows", "asked"), [(0, (0, 0)), (1, (0, 1)), (10, (0, 10)), (11, (1, 0))])
def test_a_few_instances_are_looked_up_at_once(folder, rows, asked):
    world, told = verified(folder, rows)

    assert world.asked == asked
    assert (told.found, told.complete, told.exit_code) == (rows, True, 0)


@pytest.mark.parametrize(("sample", "asked"), [(13, (0, 13)), (14, (13, 0)), (1_300, (13, 0))])
def test_a_sample_is_looked_up_where_the_list_would_take_more_requests(folder, sample, asked):
    world, told = verified(folder, 1_300, sample=sample)

    assert world.asked[0] <= asked[0]
    assert world.asked[1] == asked[1]
    assert (told.instances, told.total, told.found, told.exit_code) == (sample, 1_300, sample, 0)


def test_a_sample_finds_what_is_missing_of_it_and_nothing_else(folder):
    world, told = verified(folder, 400, gone=range(200), sample=100)

    assert told.found + told.missing == 100
    assert 20 < told.missing < 80
    assert world.missing < set(range(200))
    assert told.exit_code == 1


def test_what_is_missing_is_listed_with_what_failed(folder):
    world, told = verified(folder, 300, gone=[7, 250], failing=[8, 299], others={250: "existed", 9: "rejected"})

    assert [(one.row, one.id, one.outcome, one.status) for one in world.bad] == [
        (7, "id-7", "missing", None),
        (8, "id-8", "errored", "errored"),
        (250, "id-250", "missing", None),
        (299, "id-299", "errored", "errored"),
    ]
    assert (told.instances, told.found, told.missing, told.exit_code) == (299, 297, 2, 1)
    assert told.statuses == {"queued": 295, "errored": 2}
    assert world.asked == (3, 4)  # the whole list, and each of the two twice


def test_an_instance_that_failed_is_not_missing(folder):
    _, told = verified(folder, 20, failing=range(20))

    assert (told.statuses, told.missing, told.exit_code) == ({"errored": 20}, 0, 0)


def test_every_absent_instance_is_asked_for_once_before_any_is_asked_for_again(folder):
    world, _ = verified(folder, 60, gone=range(0, 60, 2), listing=lambda query, give: NO_LIST)

    first, again = world.transport.gets[:60], world.transport.gets[60:]
    assert sorted(first) == sorted(names(range(60)))
    assert sorted(again) == sorted(names(range(0, 60, 2)))


def test_no_more_look_ups_are_on_the_wire_than_are_allowed(folder):
    rates = replace(UNLIMITED, concurrency=5)
    world, _ = verified(folder, 60, options=replace(FREE, rate=rates), listing=lambda query, give: NO_LIST)

    assert world.transport.most_on_wire == 5


def test_look_ups_go_side_by_side(folder):
    verified(folder, 320, listing=lambda query, give: NO_LIST, travel_s=(0.5, 0.5))

    assert now() < 320 / 16 * 1.5 + 10


# --- the dates of the list ----------------------------------------------------------------------------------------


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


def test_the_list_is_asked_for_from_an_hour_before_the_run_to_an_hour_after_it(folder):
    assert dates(folder) == ("2025-10-09T09:53:20Z", "2025-10-09T11:53:20Z")


def test_the_list_of_an_unfinished_run_is_open_to_its_end(folder):
    assert dates(folder, finished=False) == ("2025-10-09T09:53:20Z", None)


@pytest.mark.parametrize(
    ("existed", "in_doubt", "start"),
    [(1, False, "2025-10-09T09:53:20Z"), (2, False, None), (2, True, "2025-10-09T09:53:20Z")],
)
def test_where_more_than_a_hundredth_was_there_before_the_run_the_list_is_open_to_its_start(
    folder, existed, in_doubt, start
):
    others = dict.fromkeys(range(existed), "existed")
    assert dates(folder, others=others, in_doubt=in_doubt)[0] == start


def test_the_list_of_a_run_of_several_days_is_asked_for_from_its_first_day_to_its_last(folder):
    async def go():
        world = World(folder)
        for days in (0, 1, 1):
            await asyncio.sleep(days * 86_400)
            await world.has_run(50)
        await world.verify()
        return world.transport.queries[0]

    query = run_virtual(go())

    assert (query["date_start"], query["date_end"]) == ("2025-10-09T07:53:20Z", "2025-10-11T09:53:20Z")


def test_instances_that_began_long_before_the_run_are_looked_up_and_found(folder):
    async def go():
        world = World(folder)
        world.begin(["id-50"])
        await asyncio.sleep(3 * 86_400 / 2)
        await world.has_run(200, others={50: "existed"})
        return world, await world.verify()

    world, told = run_virtual(go())

    assert (world.asked, told.found, told.missing) == ((2, 1), 200, 0)


# --- a list that is not as it should be ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["oldest first", "by name", "at random"])
def test_a_list_in_any_order_finds_all(folder, order):
    ids = names(range(1_000))
    {"oldest first": list, "by name": list.sort, "at random": random.Random(4).shuffle}[order](ids)
    world, told = verified(folder, 1_000, listing=paged(ids))

    assert (world.asked, told.found, told.missing) == ((10, 0), 1_000, 0)


def test_a_list_in_another_order_for_each_page_makes_nothing_missing(folder):
    chance = random.Random(5)

    def give(query, _):
        return paged(chance.sample(names(range(500)), 500))(query, _)

    world, told = verified(folder, 500, gone=[3], listing=give)

    assert told.found == 500  # the list has shown what a look-up would not have found
    assert world.asked[0] <= 25


def test_a_page_that_comes_twice_costs_one_request(folder):
    def give(query, _):
        at = int(query.get("cursor", 0))
        return page(names(range(at // 2 * 100, at // 2 * 100 + 100)), str(at + 1) if at < 19 else None)

    world, told = verified(folder, 1_000, listing=give)

    assert (world.asked, told.found) == ((19, 0), 1_000)


def test_a_cursor_that_leads_to_its_own_page_ends_the_reading(folder):
    world, told = verified(folder, 300, listing=lambda query, give: page(names(range(100)), "same"))

    assert (world.asked, told.found, told.missing) == ((22, 200), 300, 0)  # a tenth of the 200 look-ups, and one


@pytest.mark.parametrize("length", [2, 3, 7])
def test_cursors_that_lead_in_a_circle_are_followed_only_so_far(folder, length):
    def give(query, _):
        at = int(query.get("cursor", 0))
        return page(names(range(at * 10, at * 10 + 10)), str((at + 1) % length))

    world, told = verified(folder, 200, listing=give)

    look_ups = 200 - length * 10
    assert world.asked == (length + look_ups // 10 + 1, look_ups)
    assert (told.found, told.missing) == (200, 0)


def losing_cursors(ids, *lost):
    """A listing that has lost the cursor of these requests, counted from 1."""
    number, whole = 0, paged(ids)

    def give(query, _):
        nonlocal number
        number += 1
        return NO_SUCH_CURSOR if number in lost else whole(query, _)

    return give


@pytest.mark.parametrize(("lost", "asked"), [((2,), 12), ((10,), 20), ((2, 4, 7), 17)])
def test_a_list_that_loses_its_cursor_is_read_again_from_its_start(folder, lost, asked):
    world, told = verified(folder, 1_000, gone=[1_001], listing=losing_cursors(names(range(1_000)), *lost))

    assert told.found == 1_000
    assert world.asked[0] <= asked


def test_a_cursor_that_is_lost_when_little_is_left_leads_to_look_ups(folder):
    world, told = verified(folder, 905, listing=losing_cursors(names(range(905)), 10))

    assert told.found == 905
    assert sum(world.asked) <= 20


def test_cursors_that_are_always_lost_leave_the_rest_to_look_ups(folder):
    def give(query, _):
        return NO_SUCH_CURSOR if "cursor" in query else paged(names(range(500)))(query, _)

    world, told = verified(folder, 500, gone=[400], listing=give)

    assert world.asked == (1 + 400 // 10 + 1, 400 + 1)
    assert (told.found, world.missing) == (499, {400})


def test_a_list_that_ends_half_way_leaves_the_rest_to_look_ups(folder):
    world, told = verified(folder, 1_000, gone=[10, 990], listing=paged(names(range(11, 500))))

    assert world.asked == (5, 511 + 2)
    assert (told.found, world.missing) == (998, {10, 990})


@pytest.mark.parametrize("ids", [[], names(range(2_000, 2_050))], ids=["nothing", "others'"])
def test_a_list_that_shows_none_of_the_run_is_read_once(folder, ids):
    world, told = verified(folder, 300, listing=paged(ids))

    assert (world.asked, told.found, told.missing) == ((1, 300), 300, 0)


def test_instances_that_the_list_skips_are_looked_up(folder):
    shown = [number for number in range(300) if number % 10]
    world, told = verified(folder, 300, gone=[20, 21], listing=paged(names(shown)))

    assert (told.found, world.missing) == (299, {20})  # the list has shown 21
    assert world.asked[1] == 30 + 1


@pytest.mark.parametrize(
    "answer",
    [NO_LIST, refusal(413, 10002, "too large"), success("[[]]"), success("{}"), success('[{"id":7}]')],
    ids=["400", "413", "no list", "an object", "no ids"],
)
def test_without_a_list_every_instance_is_looked_up(folder, answer):
    world, told = verified(folder, 40, gone=[4], listing=lambda query, give: answer)

    assert world.asked == (1, 41)
    assert (told.found, world.missing, told.exit_code) == (39, {4}, 1)


def test_a_list_that_is_mostly_of_others_is_given_up(folder):
    async def go():
        world = World(folder)
        await world.has_run(30)
        world.begin([f"other-{number}" for number in range(5_000)])
        return world, await world.verify()

    world, told = run_virtual(go())

    assert world.asked == (LEAST_DEBT + 1, 30)
    assert (told.found, told.missing) == (30, 0)


def test_a_list_that_shows_less_than_one_a_page_is_given_up(folder):
    """Every other page shows one: that is never in vain for long, and still costs more than look-ups."""

    def give(query, _):
        at = int(query.get("cursor", 0))
        return page([f"id-{at // 2}" if at % 2 else "other"], str(at + 1))

    world, told = verified(folder, 300, listing=give)

    pages, look_ups = world.asked
    assert pages + look_ups <= 300 + 30 + 1
    assert (pages, told.found) == (55, 300)


def test_pages_that_are_refused_count_as_pages(folder):
    """Each reading shows one instance more and loses its cursor: two requests for what a look-up does with one."""
    readings = iter(range(1_000))

    def give(query, _):
        return NO_SUCH_CURSOR if "cursor" in query else page([f"id-{next(readings)}", "other"], "next")

    world, told = verified(folder, 300, listing=give)

    assert told.found == 300
    assert sum(world.asked) <= 300 + 30 + 2


def test_instances_that_begin_meanwhile_are_no_trouble(folder):
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
    told = run_virtual(go())

    assert (told.found, world.missing) == (999, {500})
    assert world.asked[0] <= 16


def test_instances_that_go_meanwhile_make_the_list_skip_others_which_are_not_missing(folder):
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
    told = run_virtual(go())

    assert (told.found, world.missing) == (999, {500})


def test_a_status_that_the_list_does_not_name_is_counted_as_unknown(folder):
    _, told = verified(folder, 20, listing=lambda query, give: success('[{"id":"id-0"},{"id":"id-1","status":null}]'))

    assert told.statuses == {"queued": 18, "unknown": 2}


def test_a_status_that_a_look_up_does_not_name_is_counted_as_unknown(folder):
    _, told = verified(folder, 3, looking=lambda instance_id, give: success("{}"))

    assert told.statuses == {"unknown": 3}


# --- once more before an instance is missing ----------------------------------------------------------------------


def absent_at_first(*ids, times=1):
    """A service whose look-ups do not find these ids for so many times."""
    asked = Counter()

    def look(instance_id, give):
        asked[instance_id] += 1
        return give("no-such" if instance_id in ids and asked[instance_id] <= times else instance_id)

    return look


def test_an_instance_that_is_absent_at_first_and_there_later_is_not_missing(folder):
    world, told = verified(folder, 9, looking=absent_at_first("id-2", "id-7"))

    assert (told.found, told.missing, told.exit_code, world.bad) == (9, 0, 0, [])
    assert world.asked == (0, 11)


def test_an_instance_that_is_absent_twice_is_missing(folder):
    world, told = verified(folder, 9, looking=absent_at_first("id-2", times=2))

    assert (told.found, world.missing, told.exit_code) == (8, {2}, 1)


# --- a service that is ill ----------------------------------------------------------------------------------------

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
def test_trouble_makes_nothing_missing_and_nothing_found(folder, seed):
    listing = paged(names(number for number in range(400) if number % 4 and number != 7))
    world, told = verified(folder, 400, gone=[7, 200], script=TROUBLE, seed=seed, listing=listing)

    assert (told.found, world.missing, told.exit_code) == (398, {7, 200}, 1)
    assert told.requests == len(world.transport.requests)


def test_nothing_is_asked_before_the_end_of_a_pause_that_the_service_orders(folder):
    script = [{"request": 1, "status": 429, "retry_after": 50}, {"request": 20, "status": 429, "retry_after": 70}]
    world, told = verified(folder, 60, listing=lambda query, give: NO_LIST, script=script)

    refusals = [request for request in world.transport.requests if request.reply.status == 429]
    assert len(refusals) == 2
    for refused, seconds in zip(refusals, (50, 70), strict=True):
        until = refused.ended_at + seconds - 1e-6
        assert not [one for one in world.transport.requests if refused.ended_at < one.at < until]
    assert (told.found, told.exit_code) == (60, 0)


def test_a_pause_outlives_the_session_that_was_ordered_it(folder):
    async def go():
        world = World(folder, script=[{"request": 3, "status": 429, "retry_after": 600}])
        await world.has_run(9)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.verify(), 100)
        asked = len(world.transport.requests)
        await world.verify()
        return world.transport.requests[asked].at

    assert 600 <= run_virtual(go()) < 601


def test_a_pause_that_the_run_was_ordered_holds_the_verification_too(folder):
    async def go():
        world = World(folder, script=[{"request": 2, "status": 429, "retry_after": 600}])
        async with a_real_run(world, 200, FREE) as running:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(running.finish(), 50)
        told = await world.verify()
        return world, told

    world, told = run_virtual(go())

    assert (told.found, told.exit_code) == (100, 75)
    assert 600 <= world.transport.requests[2].at < 601


@pytest.mark.parametrize("set_s", [0.0, 3_600.0, -3_600.0])
def test_what_the_service_has_left_outlives_the_session_and_holds_a_run_too(folder, set_s):
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
        api._take_over(limiter, checkpoint, FREE, at.wall())
        await checkpoint.aclose()
        held = limiter.vacancies(0)
        return world, held, await world.verify()

    world, held, told = run_virtual(go())

    assert (told.found, told.missing, held) == (9, 0, 0)
    assert world.held.admission.overruns["requests"] == 0


def test_a_stored_pause_that_is_too_long_to_wait_for_ends_it_before_anything_is_sent(folder):
    async def go():
        world = World(folder)
        await world.has_run(9)
        async with world.opened() as opened:
            opened.store.requests.pause(wall() + 7_200)
        with pytest.raises(TemporaryStop, match="7,200 s more"):
            await world.verify()
        return world.asked

    assert run_virtual(go()) == (0, 0)


def test_a_refused_connection_gives_its_place_in_the_window_back(folder):
    refused_ones = {2, 3, 5, 8, 13}
    options = replace(FREE, rate=replace(UNLIMITED, requests_per_5m=12))
    world, told = verified(
        folder,
        10,
        options=options,
        before=lambda number: fault(FaultKind.NOT_SENT) if number in refused_ones else None,
    )

    assert (told.found, world.asked) == (10, (0, 15))
    assert now() < 100  # ten were sent, not fifteen


def test_a_refused_connection_for_the_list_gives_its_place_back_too(folder):
    options = replace(FREE, rate=replace(UNLIMITED, requests_per_5m=2))
    before = lambda number: fault(FaultKind.NOT_SENT) if number < 4 else None  # noqa: E731
    _, told = verified(folder, 50, options=options, before=before)

    assert told.found == 50
    assert now() < 100


@pytest.mark.parametrize("rows", [9, 90])
def test_an_outage_ends_it_and_it_goes_on_afterwards(folder, rows):
    out = True

    async def go():
        world = World(folder, before=lambda number: fault() if out and number > 5 else None, listing=listing)
        await world.has_run(rows, gone=[3])
        with pytest.raises(TemporaryStop, match="--max-outage"):
            await world.verify()
        ended_at, asked = now(), Counter(world.transport.gets)
        out_no_more()
        told = await world.verify()
        return world, told, ended_at, asked

    def out_no_more():
        nonlocal out
        out = False

    listing = paged(names(range(5, 60)))
    world, told, ended_at, _ = run_virtual(go())

    assert 1_500 < ended_at < 1_900
    assert (told.found, world.missing) == (rows - 1, {3})


@pytest.mark.parametrize("gone", [(), range(9)], ids=["there", "gone"])
def test_failures_between_successes_are_no_outage_however_long_they_go_on(folder, gone):
    options = replace(FREE, rate=replace(UNLIMITED, concurrency=1), retry=RetryPolicy(max_outage_s=60.0))
    script = [{"every": 3, "status": 503}]
    _, told = verified(folder, 9, gone=gone, options=options, script=script, travel_s=(10.0, 10.0))

    assert now() > 250
    assert told.found + told.missing == 9


@pytest.mark.parametrize("status", [500, 501, 414])
def test_a_list_that_breaks_down_half_way_is_gone_round(folder, status):
    """A cursor deep in the list may be more than the service can bear: look-ups still work."""

    def listing(query, give):
        return refusal(status, 10001, "ill") if "cursor" in query else give(query)

    _world, told = verified(folder, 1_000, gone={3, 700}, listing=listing)

    assert (told.found, told.missing, told.exit_code) == (998, 2, 1)
    assert now() < 300


def test_a_list_that_was_down_for_a_while_is_read_again(folder):
    def listing(query, give):
        return refusal(503, 10001, "ill") if 0.5 < now() < 60 else give(query)

    world, told = verified(folder, 5_000, listing=listing, travel_s=(0.05, 0.1))

    assert told.exit_code == 0
    assert world.asked[1] < 4_000  # the rest came by the list


def test_a_workflow_that_does_not_exist_has_no_missing_instances(folder):
    """Whatever a look-up says in its absence: the list knows better."""

    def looking(instance_id, give):
        return refusal(404, 10501, "not found")

    def listing(query, give):
        return refusal(404, 10200, "no such workflow")

    refused(ServiceRefused, folder, 5, looking=looking, listing=listing)


def test_a_run_counts_what_a_verification_has_just_sent(folder):
    async def go():
        world = World(folder)
        await world.has_run(8)
        await world.verify()
        limits = RateLimits(instances_per_s=None, requests_per_5m=10)
        limiter = WindowLimiter(limits, clock=asyncio.get_running_loop().time)
        checkpoint = Checkpoint.open(world.file, HEADER, now=wall(), executor=inline)
        api._take_over(limiter, checkpoint, FREE, wall())
        await checkpoint.aclose()
        return limiter.vacancies(0)

    assert run_virtual(go()) == 2


def test_what_the_last_request_failed_for_is_told_until_one_succeeds(folder):
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


# --- a service that refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, 500])
def test_a_token_that_is_refused_is_asked_for_anew(folder, rows):
    world, told = verified(folder, rows, script=[{"request": 2, "revoke_token": True}], tokens=("t0", "t1"))

    assert (told.found, told.exit_code) == (rows, 0)
    assert world.transport.credential == 1


@pytest.mark.parametrize("rows", [5, 50])
def test_a_token_that_is_refused_for_good_ends_it(folder, rows):
    world, raised = refused(ServiceRefused, folder, rows, script=[{"request": 1, "revoke_token": True}])

    assert "credential" in str(raised)
    assert len(world.transport.requests) <= 16


@pytest.mark.parametrize("rows", [5, 50])
def test_a_workflow_that_is_not_there_ends_it_and_makes_nothing_missing(folder, rows):
    missing = refusal(404, 10200, "workflow.not_found")
    world, raised = refused(ServiceRefused, folder, rows, listing=lambda *_: missing, looking=lambda *_: missing)

    assert "workflow" in str(raised)
    assert len(world.transport.requests) <= 2 * 5

    async def go():
        async with world.opened() as again:
            ids = [one async for one in again.store.unanswered(0)]
            return again.store.resumed, again.store.missing, again.store.found, len(ids)

    assert run_virtual(go()) == (True, 0, 0, rows)


def test_one_worker_that_is_refused_stops_the_others(folder):
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
def test_an_instance_whose_look_ups_are_never_answered_is_unknown_and_holds_up_no_other(folder, status):
    world, told = verified(
        folder,
        200,
        listing=lambda *_: NO_LIST,
        looking=lambda one, give: refusal(status, 10001, "no") if one == "id-100" else give(one),
    )

    assert (told.found, told.missing, told.unknown, told.complete, told.exit_code) == (199, 0, 1, False, 75)
    assert [(one.row, one.id, one.outcome) for one in world.bad] == [(100, "id-100", "unknown")]


@pytest.mark.parametrize("status", [401, 405, 500])
@pytest.mark.parametrize(("rows", "sick"), [(8, "id-3"), (60, "id-59")])
def test_an_instance_that_is_never_answered_for_is_unknown_though_it_is_the_last_in_flight(folder, status, rows, sick):
    _, told = verified(
        folder,
        rows,
        listing=lambda *_: NO_LIST,
        looking=lambda one, give: refusal(status, 10001, "no") if one == sick else give(one),
    )

    assert (told.found, told.unknown, told.exit_code) == (rows - 1, 1, 75)


def test_the_only_instance_whose_look_up_is_never_answered_is_unknown_if_the_list_is_answered(folder):
    _, told = verified(folder, 1, looking=lambda one, give: refusal(500, 10001, "no"))

    assert (told.found, told.unknown, told.exit_code) == (0, 1, 75)


def test_an_unknown_instance_is_asked_for_again_by_the_next_verification(folder):
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


FAILED_BUT_TOLD = Answer(
    200, b'{"success":false,"errors":[{"code":10001,"message":"internal"}],"result":{"status":"complete"}}'
)


def test_a_look_up_that_is_called_failed_and_tells_the_status_all_the_same_finds_the_instance(folder):
    _, told = verified(folder, 5, looking=lambda *_: FAILED_BUT_TOLD)

    assert (told.found, told.statuses, told.exit_code) == (5, {"complete": 5}, 0)


def test_an_answer_that_no_service_gives_ends_it(folder):
    portal = ScriptedTransport(then=reply(200, b"<html>Welcome to the hotel's network</html>"))

    async def go():
        world = World(folder)
        await world.has_run(5)
        with pytest.raises(ServiceRefused, match="not the Workflows API"):
            await world.verify(transport=portal)

    run_virtual(go())
    assert portal.dropped > 0


# --- what it comes to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gone", "code"), [((), 75), ((3,), 1)])
def test_a_run_that_is_not_finished_is_verified_as_far_as_it_went(folder, gone, code):
    async def go():
        world = World(folder)
        await world.has_run(100, gone=gone, others=dict.fromkeys(range(50, 100), "pending"), finished=False)
        return await world.verify()

    told = run_virtual(go())

    assert (told.complete, told.run_finished, told.exit_code) == (True, False, code)
    assert (told.instances, told.found) == (50, 50 - len(gone))


def test_rows_that_the_run_adds_in_the_meantime_are_no_sample(folder):
    """The status is read before the rows, and a run that is under way does not wait."""

    async def go():
        world = World(folder)
        await world.has_run(100, finished=False)
        early = read_status(world.file)
        await world.has_run(50, finished=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opening, "read_status", lambda _: early)
            return await world.verify()

    told = run_virtual(go())

    assert (told.instances, told.found, told.exit_code) == (150, 150, 75)
    assert told.total == 150


def test_what_is_not_asked_for_yet_is_neither_found_nor_missing(folder):
    async def go():
        world = World(folder, listing=lambda *_: NO_LIST)
        await world.has_run(100)
        async with world.opened() as opened:
            await cut(opened.run(), 150)
            return (await opened.report()).counts, opened.answered

    told, answered = run_virtual(go())

    assert 0 < told.found == answered < 100
    assert (told.complete, told.missing, told.exit_code) == (False, 0, 75)


# --- where to -----------------------------------------------------------------------------------------------------


def no_token():
    raise AssertionError("nobody may ask for the token before it is known where it would go")


def test_the_ids_of_a_made_up_checkpoint_are_never_asked_for(folder):
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
        options = Options(base_url=base_url)
        async with open_verification(file, account_id=account_id, token=no_token, options=options, sample=None):
            raise AssertionError("it should not be open")

    with pytest.raises(ServiceRefused) as raised:
        run_virtual(go())
    assert not (folder / "run.bulkwf.verify").exists()
    return str(raised.value)


def test_a_checkpoint_of_another_endpoint_is_refused_naming_both(folder, monkeypatch):
    told = opened_elsewhere(folder, monkeypatch, base_url="https://api.example/client/v5")
    assert "endpoint is 'https://api.example/client/v4'" in told
    assert "asked is 'https://api.example/client/v5'" in told
    assert "--base-url" in told


def test_a_checkpoint_of_another_account_is_refused_naming_both(folder, monkeypatch):
    told = opened_elsewhere(folder, monkeypatch, account_id="other")
    assert "account is 'acct'" in told
    assert "asked is 'other'" in told
    assert "-a" in told


@pytest.mark.parametrize("environment", [None, "", "  ", "acct"])
def test_without_an_account_the_checkpoints_own_is_asked(folder, monkeypatch, environment):
    if environment is not None:
        monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", environment)
    seen = []
    monkeypatch.setattr(opening, "open_transport", lambda parts, target, *_: seen.append(target) or World(folder))

    async def go():
        file = folder / "run.bulkwf"
        await write_run(file, 5)
        options = Options(base_url=HEADER.base_url + "/")
        async with open_verification(file, account_id=None, token=no_token, options=options, sample=None):
            pass

    run_virtual(go())
    assert [(target.account_id, target.workflow, target.base_url) for target in seen] == [
        ("acct", "resize", HEADER.base_url)
    ]


# --- limits -------------------------------------------------------------------------------------------------------

TIGHT = replace(FREE, rate=RateLimits(instances_per_s=None, requests_per_5m=20))


@contextlib.asynccontextmanager
async def a_real_run(world, rows, options):
    """The run itself, over the same transport."""
    listed = ({"instance_id": f"id-{number}", "params": number} for number in range(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "system_clock", clock)
        async with api.open_run(
            listed,
            workflow=TARGET.workflow,
            account_id=TARGET.account,
            token=dict,
            checkpoint=world.file,
            options=options,
            transport=world.transport,
        ) as running:
            yield running


@pytest.mark.parametrize("listing", [None, lambda query, give: NO_LIST], ids=["list", "look-ups"])
def test_no_five_minutes_hold_more_requests_than_are_allowed(folder, listing):
    rows = 2_500 if listing is None else 55
    world, told = verified(folder, rows, options=TIGHT, listing=listing)

    assert told.found == rows
    assert world.worst_window() == 20
    assert now() < 301 * (len(world.written) // 20) + 10


def test_a_verification_says_what_its_next_request_waits_for(folder):
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
def test_a_request_counts_from_when_it_was_written_not_from_its_answer(folder, rows):
    options = replace(FREE, rate=RateLimits(instances_per_s=None, requests_per_5m=1))
    world, told = verified(folder, rows, options=options, travel_s=(20.0, 20.0))

    assert told.found == rows
    assert [later - at for at, later in pairwise(world.written)] == pytest.approx([320.0, 320.0], abs=0.1)


def test_the_requests_of_the_run_itself_count(folder):
    async def go():
        world = World(folder, options=TIGHT)
        async with a_real_run(world, 1_500, TIGHT) as running:
            await running.finish()
        return world, await world.verify()

    world, told = run_virtual(go())

    assert (told.found, told.exit_code) == (1_500, 0)
    assert (len(world.transport.posts), world.asked) == (15, (15, 0))
    assert world.worst_window() <= 20


def test_the_requests_of_earlier_sessions_count_for_no_less_than_five_minutes(folder):
    async def go():
        world = World(folder, options=TIGHT, listing=lambda *_: NO_LIST, travel_s=(0.001, 0.002))
        await asyncio.sleep(0.93)  # the second is nearly over
        await world.has_run(70)
        sessions = 0
        while True:
            sessions += 1
            with contextlib.suppress(TimeoutError):
                return world, sessions, await asyncio.wait_for(world.verify(), 97.0)

    world, sessions, told = run_virtual(go())

    assert sessions > 5
    assert told.found == 70
    assert len(world.transport.requests) == 71  # nothing twice: it was cut off while it waited
    assert world.worst_window() <= 20


def test_the_requests_that_were_on_the_wire_when_it_was_cut_off_count_too(folder):
    async def go():
        world = World(folder, options=TIGHT, listing=lambda *_: NO_LIST, travel_s=(5.0, 5.0))
        await world.has_run(40)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(world.verify(), 14.5)  # two for the list, and then sixteen on their way
        return world, await world.verify()

    world, told = run_virtual(go())

    assert told.found == 40
    assert world.worst_window() <= 20


def test_what_the_service_says_is_left_for_the_token_is_spread_over_the_time_it_is_for(folder):
    limits, options = replace(Limits.none(), requests_per_5m=20), replace(FREE, rate=RateLimits(requests_per_5m=1_000))
    world, told = verified(folder, 15, limits=limits, options=options, listing=lambda query, give: NO_LIST)

    assert told.found == 15
    assert world.worst_window(60.0) <= 5  # of seventeen that could go at once
    assert world.held.overruns.total() == 0


# --- cut off, and continued ---------------------------------------------------------------------------------------


def test_a_cursor_that_is_lost_between_two_sessions_does_not_lead_to_thousands_of_look_ups(folder):
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

    world, told = run_virtual(go())

    assert (told.found, told.missing) == (3_000, 0)
    assert sum(world.asked) <= 3 * 30 + 5


def test_what_an_earlier_session_found_is_not_asked_for_again(folder):
    async def go():
        world = World(folder, listing=lambda *_: NO_LIST, travel_s=(1.0, 1.0))
        await world.has_run(100, gone=[10, 90])
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(world.verify(), 9.5)
        return world, await world.verify()

    world, told = run_virtual(go())

    assert (told.found, world.missing) == (98, {10, 90})
    again = Counter(world.transport.gets)
    assert sum(again.values()) - 100 <= 2 + 3 * 16  # only what was on the wire
    assert len(world.transport.queries) == 1


CUT_ROWS, CUT_GONE = 30, {5, 17}


@pytest.fixture(scope="module")
def cut_everywhere(tmp_path_factory):
    """(turn, world, what it came to) of a verification that was cut off at this turn of the loop, and resumed."""
    template = tmp_path_factory.mktemp("template") / "run.bulkwf"
    run_virtual(write_run(template, CUT_ROWS))
    cases, turn, finished = [], 0, False
    while not finished:
        turn += 1
        folder = memory_folder()
        with folder:
            (Path(folder.name) / "run.bulkwf").write_bytes(template.read_bytes())
            world, told, finished = run_virtual(cut_and_resumed(Path(folder.name), turn))
        cases.append((turn, world, told))
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


def test_cut_off_at_any_await_and_resumed_it_comes_to_the_same(cut_everywhere):
    _, whole, told = cut_everywhere[-1]
    assert len(cut_everywhere) > 50  # or it was not cut off everywhere
    assert (told.found, told.missing) == (CUT_ROWS - 2, 2)
    for turn, world, result in cut_everywhere:
        assert (result.found, result.missing, result.statuses, result.complete, result.exit_code) == (
            told.found, told.missing, told.statuses, True, 1,
        ), turn  # fmt: skip
        assert world.missing == CUT_GONE, turn
        assert len(world.transport.requests) <= len(whole.transport.requests) + 3 + 1, turn


def test_cut_off_at_any_await_no_request_is_lost_from_the_count(cut_everywhere):
    for turn, world, _ in cut_everywhere:
        assert len(world.written) <= world.recorded <= len(world.transport.requests) + 3, turn


# --- any list whatever --------------------------------------------------------------------------------------------


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
        world, told = run_virtual(go(folder))
    again = len([one for one, times in Counter(world.transport.gets).items() if times > 1])
    return world, told, again


@settings(max_examples=40)
@given(whims())
def test_whatever_the_list_does_exactly_what_is_gone_is_missing(whim):
    world, told, _ = verify_whimsically(whim)

    assert world.missing == whim["gone"]
    assert (told.found, told.complete) == (whim["rows"] - len(whim["gone"]), True)
    assert max(Counter(world.transport.gets).values(), default=0) <= 2


@settings(max_examples=40)
@given(whims())
def test_whatever_the_list_does_it_costs_little_more_than_look_ups_would(whim):
    world, told, again = verify_whimsically(whim)

    assert sum(world.asked) <= whim["rows"] + again + LEAST_DEBT + 2
    assert told.requests == sum(world.asked)


# --- a checkpoint that can't be used ------------------------------------------------------------------------------


def test_what_can_not_be_kept_ends_it(folder):
    async def go():
        world = World(folder, listing=lambda *_: NO_LIST)
        await world.has_run(400)
        async with world.opened() as opened:
            size = opened.store._db.execute("PRAGMA page_count").fetchone()[0]
            opened.store._db.execute(f"PRAGMA max_page_count = {size}")
            with pytest.raises(CheckpointError, match="Make room"):
                await opened.run()

    run_virtual(go())
