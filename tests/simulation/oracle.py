"""Checks what happened in a world against the promises."""

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf

from canary import assert_silent, assert_silent_files, report

from bulkwf.attempt import Fault, FaultKind, Reply
from bulkwf.checkpoint import read_results, read_status
from bulkwf.emulator import params_crc
from bulkwf.errors import ServiceRefused
from bulkwf.model import Result
from bulkwf.service.responses import retry_after_s
from simulation.network import Sent
from simulation.world import World

ALLOWED = {
    "own": {"created", "existed", "rejected"},
    "plain": {"created", "existed", "rejected"},
    "bad": {"invalid"},
    "poison": {"rejected"},
    "taken": {"existed"},
    "twin": {"created", "existed", "rejected", "invalid"},  # requests overtake each other: the later row may be first
}
"""Possible outcomes of each kind of row. A valid row is rejected only if the service keeps omitting it, or refuses at
random."""
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
    """The result of each row in a checkpoint: it must never change."""
    settled_in: dict[str, int] = field(default_factory=dict)
    """The session that settled an id."""

    def look(self, world: World) -> None:
        """Check the checkpoint after a session."""
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
        assert sorted(rows) == begun, "the rows in the checkpoint are not the first `status.rows` of the list"
        for result in results:
            found = (result.outcome, result.id)
            assert self.settled.setdefault(result.row, found) == found, f"row {result.row} has changed: {found}"
            if result.id is not None and result.outcome != "invalid":
                self.settled_in.setdefault(result.id, world.sessions[-1].number)
        assert self.settled.keys() == {result.row for result in results}, "a settled row was lost"
        for row, found in world.sessions[-1].emitted:
            assert self.settled.get(row) == found, f"row {row} was given to the caller before it was durable: {found}"
        self._check_truth(world, results)

    def judge(self, world: World) -> None:
        """Check everything once the run is complete."""
        assert world.service.created_twice == []
        last = world.sessions[-1]
        assert last.summary is not None
        assert last.summary.complete, f"the run is not complete: {last.error!r}"
        assert last.summary.pending == 0
        excused = _excused(world)
        for number, row in enumerate(world.plan.rows):
            found = self.settled.get(number)
            assert (found is None) == (row.kind == "blank"), f"row {number} ({row.kind}): {found}"
            if found is not None and found[1] not in excused:
                assert found[0] in ALLOWED[row.kind], f"row {number} ({row.kind}): {found}"
        self._check_instances(world)
        self._check_windows(world)
        self._check_requests(world)
        self._check_pauses(world)
        self._check_stops(world)

    def _check_truth(self, world: World, results: list[Result]) -> None:
        """Created and existed rows have an instance; that of a created row has the row's own params.

        An exception is an id of two rows that a late copy of an answer names: the copies in this world have no cf-ray.
        """
        excused = _excused(world)
        for result in results:
            row = world.plan.rows[result.row]
            if result.outcome == "created":
                copied = result.id in world.shared and any(one.stale and result.id in one.ids for one in world.sent)
                own = world.created[result.id or ""][0] == params_crc(row.params)
                assert own or copied, f"row {result.row} has other params"
            elif result.outcome == "existed" and result.id not in excused:
                assert result.id in world.created, f"row {result.row} is existed, and has no instance"
            elif result.outcome == "rejected":
                self._check_rejection(world, result, row.kind)

    def _check_rejection(self, world: World, result: Result, kind: str) -> None:
        """A row is rejected after an error for it alone, or after three absences while others were created.

        Before, a look-up over a connection of its own has found no instance.
        """
        about = [sent for sent in world.sent if sent.ids == (result.id,)]
        alone = [sent for sent in about if sent.method == "POST"]
        # Copies of errors on two connections in a row can't be distinguished from errors.
        copied = sum(sent.stale for sent in alone) >= 2
        refusals = [sent for sent in alone if _refuses(sent)]
        named = [sent for sent in world.sent if sent.ids[:1] == (result.id,) and _refuses_inside(sent)]
        runs = result.id in world.created and result.id not in world.shared
        assert not runs or (copied and world.plan.lag_s), f"row {result.row} is rejected, and has an instance"
        if result.id not in world.shared:
            last = about[-1]
            absent = last.fresh and isinstance(last.reply, Reply) and last.reply.status == 404
            assert absent, f"row {result.row} is rejected without a look-up"
        # The last of them was sent over a connection of its own, and no attempt followed, except for another row.
        followed = refusals[-1:] != alone[-1:] and result.id not in world.shared
        refused = any(sent.fresh for sent in refusals[0 if named else 1 :]) and not followed
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
            and isinstance(sent.reply, Reply)
            and sent.reply.status == 404
        ]
        counted: list[Sent] = []
        for sent in absences:
            if not counted or _others_created(world, counted[-1], sent):
                counted.append(sent)
        assert len(counted) >= 3, f"row {result.row} is rejected for {len(counted)} absences while others were created"

    def _check_instances(self, world: World) -> None:
        """There is one instance for each valid row, and no other."""
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
        """No window exceeds its limit, counted when each body was written."""
        rate = world.plan.options.rate
        posts = [(sent.written_at, len(sent.ids)) for sent in world.sent if sent.method == "POST"]
        _check_window(posts, 1.0, rate.instances_per_s, "instances")
        _check_window([(sent.written_at, 1) for sent in world.sent], 300.0, rate.requests_per_5m, "requests")

    def _check_requests(self, world: World) -> None:
        """What an answer names as created is not sent again; only what an answer left out is looked up."""
        acknowledged: dict[tuple[int, str], float] = {}
        left_out: set[tuple[int, str]] = set()
        for sent in sorted(world.sent, key=lambda sent: sent.at):
            for id_ in sent.ids:
                if sent.method == "GET":
                    assert (sent.session, id_) in left_out, f"{id_} is looked up without a reason"
                    continue
                if id_ in world.shared:
                    continue
                replied_at = acknowledged.get((sent.session, id_))
                assert replied_at is None or replied_at > sent.at, f"{id_} is sent again after an answer named it"
                settled_in = self.settled_in.get(id_)
                assert settled_in is None or sent.session <= settled_in, f"{id_} is sent again after it was settled"
            if sent.method == "POST" and sent.clean and sent.replied_at is not None:
                named = _named(sent)
                for id_ in sent.ids:
                    if id_ in named:
                        acknowledged.setdefault((sent.session, id_), sent.replied_at)
                    else:
                        left_out.add((sent.session, id_))
            elif sent.method == "POST":
                left_out.update((sent.session, id_) for id_ in sent.ids)

    def _check_pauses(self, world: World) -> None:
        """Nothing is sent in a pause that the service has asked for."""
        self._check_what_is_left(world)
        for session in world.sessions:
            own = [sent for sent in world.sent if sent.session == session.number]
            for sent in own:
                assert sent.at >= session.paused_until - TOLERANCE_S, "sent in a stored pause"
            for refused in own:
                if not isinstance(refused.reply, Reply) or refused.reply.status != 429 or refused.replied_at is None:
                    continue
                until = refused.replied_at + (retry_after_s(refused.reply) or 0.0)
                for sent in own:
                    assert not refused.replied_at + TOLERANCE_S < sent.at < until - TOLERANCE_S, "sent in a pause"
                assert not _sent_between(world, refused, until), "sent in an earlier session's pause"

    def _check_what_is_left(self, world: World) -> None:
        """Until the next answer, no more requests are sent than an answer says are left; none where it says 0.

        An answer that another one has overtaken may be the older of the two: then only a 0 counts.
        """
        answers = [(one, one.replied_at, _left(one)) for one in world.sent if one.replied_at is not None and _left(one)]
        first_after = list(accumulate((replied_at for _, replied_at, _ in reversed(answers)), min, initial=inf))[::-1]
        times = sorted(replied_at for _, replied_at, _ in answers)
        for answered, replied_at, quotas in answers:
            overtaken = bisect_left(times, replied_at) - bisect_right(times, answered.at) > 0
            next_at = first_after[bisect_left(answers, replied_at - TOLERANCE_S, key=lambda answer: answer[0].at)]
            for left, seconds in quotas:
                if left and overtaken:
                    continue
                until = replied_at + seconds if left == 0 else min(replied_at + seconds, next_at)
                sent = _sent_between(world, answered, until)
                assert sent <= left, f"{sent} sent though {left} were left for {seconds} s, at {replied_at}"

    def _check_stops(self, world: World) -> None:
        """A session for which the service has created something ends only after three probes over 30 s."""
        for session in world.sessions:
            if not isinstance(session.error, ServiceRefused):
                continue
            own = [sent for sent in world.sent if sent.session == session.number and sent.replied_at is not None]
            odd = sorted((sent.replied_at or 0.0) for sent in own if _is_odd(sent))
            handshakes = [sent.replied_at for sent in own if _is_handshake(sent)]
            created = [sent.replied_at for sent in own if sent.method == "POST" and sent.clean and _named(sent)]
            refused_at = min([*odd[:1], *handshakes], default=session.began_at)
            if not created or min(created) > refused_at:  # the first refusal may have ended it
                continue
            assert len(odd) > PROBES, f"session {session.number} was ended by {len(odd)} odd answers"
            assert odd[-1] - odd[0] >= PROBING_S - TOLERANCE_S, f"session {session.number} was ended too early"


def _sent_between(world: World, answered: Sent, until: float) -> int:
    """How many requests were sent after an answer; in later sessions too if the answer could be committed."""
    assert answered.replied_at is not None
    known_s = world.sessions[answered.session].ended_at - answered.replied_at
    durable = known_s > 3 * world.plan.commit_s + TOLERANCE_S
    first = bisect_right(world.sent, answered.replied_at + TOLERANCE_S, key=lambda sent: sent.at)
    last = bisect_left(world.sent, until - TOLERANCE_S, key=lambda sent: sent.at)
    own = (sent for sent in world.sent[first:last] if durable or sent.session == answered.session)
    return sum(sent.written_at is not None for sent in own)


def _left(sent: Sent) -> list[tuple[int, float]]:
    """The quotas in the answer to a request: (requests left, seconds)."""
    if not isinstance(sent.reply, Reply):
        return []
    return [(int(left), float(seconds)) for left, seconds in QUOTA.findall(sent.reply.headers.get("ratelimit", ""))]


def _is_odd(sent: Sent) -> bool:
    """Whether an answer settles nothing and does not say that the service fails or throttles."""
    if not isinstance(sent.reply, Reply) or sent.reply.status == 429:
        return False
    if sent.reply.status == 200 and b'"code":10001' in sent.reply.body:
        return False
    return not sent.clean and (sent.reply.status < 500 or sent.reply.status in (501, 503))


def _is_handshake(sent: Sent) -> bool:
    return isinstance(sent.reply, Fault) and sent.reply.kind is FaultKind.HANDSHAKE


def trace(world: World) -> str:
    """Everything that happened, as text; the same for the same seed."""
    lines = [f"{one.at:.9f} {one.session} {one.method} {','.join(one.ids)} {one.reply}" for one in world.sent]
    lines += [f"{one.number} {one.began_at:.9f} {one.end} {one.summary} {one.error!r}" for one in world.sessions]
    return "\n".join(lines)


def _refuses(sent: Sent) -> bool:
    """Whether an answer refuses a request as a whole, or its first row."""
    return isinstance(sent.reply, Reply) and (sent.reply.status in REFUSALS or _refuses_inside(sent))


def _refuses_inside(sent: Sent) -> bool:
    """Whether a complete answer refuses the first row of its request."""
    return isinstance(sent.reply, Reply) and sent.reply.status == 200 and b'"index":0' in sent.reply.body


def _others_created(world: World, before: Sent, after: Sent) -> bool:
    """Whether others were created for the session between two look-ups at least `ABSENCE_GAP_S` apart."""
    assert before.replied_at is not None
    assert after.replied_at is not None
    if after.replied_at - before.replied_at < ABSENCE_GAP_S - TOLERANCE_S:
        return False
    # A created row counts from its commit, and a look-up may wait for its slot: so count from when the row was sent.
    since = max(
        sent.at for sent in world.sent if sent.method == "POST" and before.ids[0] in sent.ids and sent.at < before.at
    )
    return any(
        sent.session == after.session
        and sent.method == "POST"
        and sent.replied_at is not None
        and since <= sent.replied_at <= after.at
        and isinstance(sent.reply, Reply)
        and sent.reply.status == 200
        and _named(sent) - set(after.ids)
        for sent in world.sent
    )


def _named(sent: Sent) -> set[str]:
    assert isinstance(sent.reply, Reply)
    return {id_ for id_ in sent.ids if b'"%b"' % id_.encode() in sent.reply.body}


def _excused(world: World) -> set[str]:
    """Ids that the engine may take for existing though they are not; `docs/guarantees.md` says so.

    Two answers in a row left them out without creating them, together with others of the batch that were created: the
    one of these that is looked up decides for all.
    """
    excused: set[str] = set()
    omitted_before: dict[str, bool] = defaultdict(bool)
    existing = {row.id for row in world.plan.rows if row.kind == "taken"}
    for sent in world.sent:
        existing.update(sent.created)
        if sent.method != "POST" or not isinstance(sent.reply, Reply) or sent.reply.status != 200:
            continue
        lost = set(sent.withheld)
        if _refuses_inside(sent):  # a scripted answer, which names no id
            lost.update(id_ for id_ in sent.ids if id_ not in existing)
        # An id of two rows may be created for the other row between the answer and the look-up.
        mixed = set(sent.ids) - lost - _named(sent) or world.shared.intersection(sent.ids)
        for id_ in lost:
            if omitted_before[id_] and mixed:
                excused.add(id_)
            omitted_before[id_] = True
        for id_ in sent.created:
            omitted_before[id_] = False
    return excused


def _check_window(uses: list[tuple[float | None, int]], period_s: float, limit: int | None, what: str) -> None:
    """No half-open window of *period_s* seconds contains more than *limit*."""
    if limit is None:
        return
    held: list[tuple[float, int]] = []
    for at, amount in sorted((at, amount) for at, amount in uses if at is not None):
        held = [(then, n) for then, n in held if then > at - period_s + TOLERANCE_S]
        held.append((at, amount))
        total = sum(n for _, n in held)
        assert total <= limit, f"{total} {what} in {period_s} s, at {at}"
