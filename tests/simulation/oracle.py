"""What happened in a world, held against the promises."""

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

from canary import assert_silent, assert_silent_files, report
from fakes import EPOCH

from bulkwf.attempt import Fault, FaultKind, Reply
from bulkwf.checkpoint import read_results, read_status
from bulkwf.errors import ServiceRefused, TemporaryStop
from bulkwf.model import Result
from bulkwf.service.judge import retry_after_s
from simulation.world import Crash, Sent, World, params_crc

ALLOWED = {
    "own": {"created", "existed", "rejected"},
    "plain": {"created", "existed", "rejected"},
    "bad": {"invalid"},
    "poison": {"rejected"},
    "taken": {"existed"},
    "twin": {"created", "existed", "invalid"},  # requests overtake each other: the later row may come first
}
"""What a row of each kind may come to. One that would be fine is rejected only where the service keeps omitting it."""
TOLERANCE_S = 1e-6
ABSENCE_GAP_S = 10.0
PROBING_S = 30.0
PROBES = 3
REFUSALS = frozenset({400, 409, 413, 422})
QUOTA = re.compile(r"r=(\d+);t=(\d+)")


@dataclass
class Oracle:
    """Watches a world between its sessions and at its end."""

    settled: dict[int, tuple[str, str | None]] = field(default_factory=dict)
    """What each row has come to, as told by a checkpoint: it may never change."""
    settled_in: dict[str, int] = field(default_factory=dict)
    """After which session an id was settled on the disk."""

    def look(self, world: World) -> None:
        """Between two sessions."""
        assert_silent_files(world.folder)
        if (error := world.sessions[-1].error) is not None:
            assert_silent(report(error), "an error with its locals")
        if not world.file.exists():
            return
        status = read_status(world.file)
        totals = status.counts
        assert totals.settled + totals.pending == totals.rows
        results = list(read_results(world.file))
        pending = list(read_results(world.file, outcome="pending"))
        assert Counter(result.outcome for result in results) == Counter(
            {name: getattr(totals, name) for name in ("created", "existed", "rejected", "invalid")}
        )
        assert len(pending) == totals.pending
        rows = [result.row for result in results] + [result.row for result in pending]
        assert len(set(rows)) == len(rows)
        begun = [number for number, row in enumerate(world.plan.rows) if row.kind != "blank" and number < status.rows]
        assert sorted(rows) == begun, "the checkpoint covers another part of the list than it says"
        for result in results:
            told = (result.outcome, result.id)
            assert self.settled.setdefault(result.row, told) == told, f"row {result.row} has changed: {told}"
            if result.id is not None and result.outcome != "invalid":
                self.settled_in.setdefault(result.id, world.sessions[-1].number)
        assert self.settled.keys() == {result.row for result in results}, "a settled row was lost"
        for row, told in world.sessions[-1].emitted:
            assert self.settled.get(row) == told, f"row {row} was handed to the caller before it was durable: {told}"
        self._check_truth(world, results)

    def judge(self, world: World) -> None:
        """At the end."""
        assert world.begun_twice == []
        last = world.sessions[-1]
        assert last.summary is not None
        assert last.summary.complete, f"the run did not come to its end: {last.error!r}"
        assert last.summary.pending == 0
        excused = _excused(world)
        for number, row in enumerate(world.plan.rows):
            told = self.settled.get(number)
            assert (told is None) == (row.kind == "blank"), f"row {number} ({row.kind}) has come to {told}"
            if told is not None and told[1] not in excused:
                assert told[0] in ALLOWED[row.kind], f"row {number} ({row.kind}) has come to {told}"
        self._check_instances(world)
        self._check_windows(world)
        self._check_requests(world)
        self._check_pauses(world)
        self._check_stops(world)

    def _check_truth(self, world: World, results: list[Result]) -> None:
        """What is called created or existed is there; what is created has the row's own params.

        Unless its id stands twice in the list, and the copy of an answer that names it was believed: the copies of this
        world bear no mark.
        """
        excused = _excused(world)
        for result in results:
            row = world.plan.rows[result.row]
            if result.outcome == "created":
                copied = result.id in world.shared and any(one.stale and result.id in one.ids for one in world.sent)
                own = world.created[result.id or ""][0] == params_crc(row.params)
                assert own or copied, f"row {result.row} has other params"
            elif result.outcome == "existed" and result.id not in excused:
                assert result.id in world.created, f"row {result.row} is called existed, and is not there"
            elif result.outcome == "rejected":
                self._check_rejection(world, result, row.kind)

    def _check_rejection(self, world: World, result: Result, kind: str) -> None:
        """A row is rejected for an error that names it alone, or for three absences while others were created."""
        alone = [sent for sent in world.sent if sent.method == "POST" and sent.ids == (result.id,)]
        # Copies of refusals on two connections in a row are more than can be told apart.
        copied = sum(sent.stale for sent in alone) >= 2
        runs = result.id in world.created and result.id not in world.shared
        assert not runs or copied, f"row {result.row} is rejected, and runs"
        refusals = [sent for sent in alone if isinstance(sent.told, Reply) and sent.told.status in REFUSALS]
        # The last of them was sent over a connection of its own, and no attempt followed.
        refused = len(refusals) >= 2 and refusals[-1] is alone[-1] and alone[-1].fresh
        if kind == "poison" or refused or copied:
            assert refused or copied, f"row {result.row} is rejected without having been refused alone"
            return
        session = self.settled_in.get(result.id or "", world.sessions[-1].number)
        absences = [
            sent
            for sent in world.sent
            if sent.session == session
            and sent.method == "GET"
            and sent.ids == (result.id,)
            and isinstance(sent.told, Reply)
            and sent.told.status == 404
        ]
        counted: list[Sent] = []
        for sent in absences:
            if not counted or _others_created(world, counted[-1], sent):
                counted.append(sent)
        assert len(counted) >= 3, f"row {result.row} is rejected for {len(counted)} absences while others were created"

    def _check_instances(self, world: World) -> None:
        """One instance for each valid row, and none besides."""
        excused = _excused(world)
        expected = {row.id for row in world.plan.rows if row.kind == "taken"}
        for number, (outcome, id_) in self.settled.items():
            row = world.plan.rows[number]
            if outcome in ("created", "existed") and id_ not in excused:
                expected.add(id_)
                if row.kind in ("own", "plain") and id_ not in world.shared:
                    assert world.created[id_ or ""][0] == params_crc(row.params), f"row {number} has other params"
        assert set(world.created) - excused == expected - excused

    def _check_windows(self, world: World) -> None:
        """No window was over, counted when each body had been written."""
        rate = world.plan.options.rate
        posts = [(sent.written_at, len(sent.ids)) for sent in world.sent if sent.method == "POST"]
        _check_window(posts, 1.0, rate.instances_per_s, "instances")
        _check_window([(sent.written_at, 1) for sent in world.sent], 300.0, rate.requests_per_5m, "requests")

    def _check_requests(self, world: World) -> None:
        """What was told to be created is never sent again, and only what was left out is asked for."""
        acknowledged: dict[tuple[int, str], float] = {}
        left_out: set[tuple[int, str]] = set()
        for sent in sorted(world.sent, key=lambda sent: sent.at):
            for id_ in sent.ids:
                if sent.method == "GET":
                    assert (sent.session, id_) in left_out, f"{id_} is asked for without a reason"
                    continue
                if id_ in world.shared:
                    continue
                told_at = acknowledged.get((sent.session, id_))
                assert told_at is None or told_at > sent.at, f"{id_} is sent again, and was acknowledged"
                settled_in = self.settled_in.get(id_)
                assert settled_in is None or sent.session <= settled_in, f"{id_} is sent again, and was settled"
            if sent.method == "POST" and sent.clean and sent.told_at is not None:
                named = _named(sent)
                for id_ in sent.ids:
                    if id_ in named:
                        acknowledged.setdefault((sent.session, id_), sent.told_at)
                    else:
                        left_out.add((sent.session, id_))
            elif sent.method == "POST":
                left_out.update((sent.session, id_) for id_ in sent.ids)

    def _check_pauses(self, world: World) -> None:
        """Nothing leaves before a pause that the service has ordered is over."""
        self._check_what_is_left(world)
        for session in world.sessions:
            own = [sent for sent in world.sent if sent.session == session.number]
            for sent in own:
                assert sent.at >= session.paused_until - TOLERANCE_S, "sent in a stored pause"
            for told in own:
                if not isinstance(told.told, Reply) or told.told.status != 429 or told.told_at is None:
                    continue
                until = told.told_at + (retry_after_s(told.told) or 0.0)
                for sent in own:
                    assert not told.told_at + TOLERANCE_S < sent.at < until - TOLERANCE_S, "sent in a pause"
                assert not _sent_between(world, told, until), "sent in an earlier session's pause"

    def _check_what_is_left(self, world: World) -> None:
        """Until a later answer tells, no more leaves than the service has said is left, and nothing where that is 0.

        An answer that another one has overtaken may be the older of the two: only its 0 counts.
        """
        words = [(one, one.told_at, _left(one)) for one in world.sent if one.told_at is not None and _left(one)]
        told_after = list(accumulate((told_at for _, told_at, _ in reversed(words)), min, initial=inf))[::-1]
        heard = sorted(told_at for _, told_at, _ in words)
        for told, told_at, quotas in words:
            overtaken = bisect_left(heard, told_at) - bisect_right(heard, told.at) > 0
            told_next = told_after[bisect_left(words, told_at - TOLERANCE_S, key=lambda word: word[0].at)]
            for left, seconds in quotas:
                if left and overtaken:
                    continue
                sent = _sent_between(world, told, told_at + seconds if left == 0 else min(told_at + seconds, told_next))
                assert sent <= left, f"{sent} sent though {left} were left for {seconds} s, at {told_at}"

    def _check_stops(self, world: World) -> None:
        """Once the service has created something for a session, no odd answer ends it before three probes over 30 s."""
        for session in world.sessions:
            if not isinstance(session.error, ServiceRefused):
                continue
            own = [sent for sent in world.sent if sent.session == session.number and sent.told_at is not None]
            odd = sorted((sent.told_at or 0.0) for sent in own if _is_odd(sent))
            handshakes = [sent.told_at for sent in own if _is_handshake(sent)]
            created = [sent.told_at for sent in own if sent.method == "POST" and sent.clean and _named(sent)]
            refused_at = min([*odd[:1], *handshakes], default=session.began_at)
            if not created or min(created) > refused_at:  # the first refusal may have ended it
                continue
            assert len(odd) > PROBES, f"session {session.number} was ended by {len(odd)} odd answers"
            assert odd[-1] - odd[0] >= PROBING_S - TOLERANCE_S, f"session {session.number} was ended too early"


def _sent_between(world: World, told: Sent, until: float) -> int:
    """How many have left after an answer, in later sessions too if there was the time to write the answer down."""
    assert told.told_at is not None
    known_s = world.sessions[told.session].ended_at - told.told_at
    durable = known_s > 3 * world.plan.commit_s + TOLERANCE_S
    first = bisect_right(world.sent, told.told_at + TOLERANCE_S, key=lambda sent: sent.at)
    last = bisect_left(world.sent, until - TOLERANCE_S, key=lambda sent: sent.at)
    own = (sent for sent in world.sent[first:last] if durable or sent.session == told.session)
    return sum(sent.written_at is not None for sent in own)


def _left(sent: Sent) -> list[tuple[int, float]]:
    """What the answer to a request has said is left: (requests, seconds) each."""
    if not isinstance(sent.told, Reply):
        return []
    return [(int(left), float(seconds)) for left, seconds in QUOTA.findall(sent.told.headers.get("ratelimit", ""))]


def _is_odd(sent: Sent) -> bool:
    """Whether an answer neither settles anything nor says that the service fails or is busy."""
    if not isinstance(sent.told, Reply) or sent.told.status == 429:
        return False
    if sent.told.status == 200 and b'"code":10001' in sent.told.body:
        return False
    return not sent.clean and (sent.told.status < 500 or sent.told.status in (501, 503))


def _is_handshake(sent: Sent) -> bool:
    return isinstance(sent.told, Fault) and sent.told.kind is FaultKind.HANDSHAKE


def trace(world: World) -> str:
    """All that happened, as text: the same seed gives the same."""
    lines = [f"{one.at:.9f} {one.session} {one.method} {','.join(one.ids)} {one.told}" for one in world.sent]
    lines += [f"{one.number} {one.began_at:.9f} {one.end} {one.summary} {one.error!r}" for one in world.sessions]
    return "\n".join(lines)


def _others_created(world: World, before: Sent, after: Sent) -> bool:
    """Whether the session heard, between two look-ups at least `ABSENCE_GAP_S` apart, of instances created."""
    assert before.told_at is not None
    assert after.told_at is not None
    if after.told_at - before.told_at < ABSENCE_GAP_S - TOLERANCE_S:
        return False
    # What is created counts from its commit, and a look-up may wait long for its slot: so from when the row was sent.
    since = max(
        sent.at for sent in world.sent if sent.method == "POST" and before.ids[0] in sent.ids and sent.at < before.at
    )
    return any(
        sent.session == after.session
        and sent.method == "POST"
        and sent.told_at is not None
        and since <= sent.told_at <= after.at
        and isinstance(sent.told, Reply)
        and sent.told.status == 200
        and _named(sent) - set(after.ids)
        for sent in world.sent
    )


def _named(sent: Sent) -> set[str]:
    assert isinstance(sent.told, Reply)
    return {id_ for id_ in sent.ids if b'"%b"' % id_.encode() in sent.told.body}


def _excused(world: World) -> set[str]:
    """The one lie that the README owns up to.

    Ids that were left out of two answers in a row without having begun, together with others of the same batch that
    had: one of those, asked for, speaks for all.
    """
    excused: set[str] = set()
    omitted_before: dict[str, bool] = defaultdict(bool)
    for sent in world.sent:
        if sent.method != "POST" or not isinstance(sent.told, Reply) or sent.told.status != 200:
            continue
        lost = set(sent.withheld)
        # An id that stands in another row too may begin with that one, between the answer and the look-up.
        mixed = set(sent.ids) - lost - _named(sent) or world.shared.intersection(sent.ids)
        for id_ in lost:
            if omitted_before[id_] and mixed:
                excused.add(id_)
            omitted_before[id_] = True
        for id_ in sent.created:
            omitted_before[id_] = False
    return excused


def _check_window(uses: list[tuple[float | None, int]], period_s: float, limit: int | None, what: str) -> None:
    """No half-open window of *period_s* holds more than *limit*."""
    if limit is None:
        return
    held: list[tuple[float, int]] = []
    for at, amount in sorted((at, amount) for at, amount in uses if at is not None):
        held = [(then, n) for then, n in held if then > at - period_s + TOLERANCE_S]
        held.append((at, amount))
        total = sum(n for _, n in held)
        assert total <= limit, f"{total} {what} in {period_s} s, at {at}"


__all__ = ["EPOCH", "Crash", "Oracle", "TemporaryStop", "trace"]
