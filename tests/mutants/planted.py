"""The bugs: the classical ways in which a bulk submitter breaks its promise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One bug: in `file`, `was` stands in place of `becomes` once, and exactly once."""

    name: str
    file: str
    was: str
    becomes: str


PLANTED = (
    Mutant(
        "count before commit",
        "engine.py",
        "        await self._checkpoint.settle(ledger, self._clock.wall())\n",
        "        self.progress.settled(outcome, 0, self._clock.now())\n"
        "        self.progress.totals.pending += len(outcome.created) + len(outcome.others)\n"
        "        await self._checkpoint.settle(ledger, self._clock.wall())\n",
    ),
    Mutant(
        "send before begin",
        "engine.py",
        "            if begun is not None:\n                await self._count(ledger.batch, begun)\n"
        "            if ledger.pending:\n                await self._courier.deliver(ledger, begun_at)\n",
        "            if ledger.pending:\n                await self._courier.deliver(ledger, begun_at)\n"
        "            if begun is not None:\n                await self._count(ledger.batch, begun)\n",
    ),
    Mutant(
        "trust a 200 with foreign ids",
        "outcome.py",
        "        position = position_of.pop(one.id, None)\n        if position is None:\n",
        "        position = position_of.pop(one.id, None)\n        if position is None:\n            continue\n"
        "        if position is None:\n",
    ),
    Mutant("reject on 403", "outcome.py", "    403: Verdict.UNAUTHORIZED,\n", "    403: Verdict.REFUSED,\n"),
    Mutant(
        "ignore Retry-After",
        "windows.py",
        "        return max(ordered_s, doubled)  #",
        "        return doubled  #",
    ),
    Mutant(
        "hold the slot in backoff",
        "delivery.py",
        "            if outcome.verdict is Verdict.NOT_SENT:\n                slot.unsent()\n"
        "        if outcome.verdict is Verdict.TOO_LARGE:\n",
        "            if outcome.verdict is Verdict.NOT_SENT:\n                slot.unsent()\n"
        "            if outcome.unsettled:\n                await self._back_off(3)\n"
        "        if outcome.verdict is Verdict.TOO_LARGE:\n",
    ),
    Mutant(
        "match by position",
        "outcome.py",
        "    if not envelope.refused and [one.id for one in answered] == _sent(batch, part) and _alike(answered):\n",
        "    if not envelope.refused and answered and len(answered) <= len(part) and _alike(answered):\n"
        "        part = part[: len(answered)]\n",
    ),
    Mutant(
        "re-serialise params",
        "payload.py",
        '        return b"[%b]" % batch.region[:-1].replace(b"\\n", b",")\n',
        '        whole = b"[%b]" % batch.region[:-1].replace(b"\\n", b",")\n'
        "        return msgspec.json.encode(msgspec.json.decode(whole))\n",
    ),
    Mutant(
        "drop the omitted id",
        "outcome.py",
        "    unsettled = tuple(sorted(position_of.values()))\n",
        "    unsettled = ()\n",
    ),
    Mutant(
        "count a place twice",
        "limiter.py",
        "            window.written(at, amount)\n        self._wake()\n",
        "            window.written(at, amount)\n            window.used(at, amount)\n        self._wake()\n",
    ),
    Mutant(
        "forget what was written",
        "limiter.py",
        "            window.written(at, amount)\n",
        "            window.give_back(amount)\n",
    ),
    Mutant(
        "swallow cancellation",
        "channel.py",
        "        found: Outcome = await retrying(attempts.next)\n",
        "        try:\n            found: Outcome = await retrying(attempts.next)\n"
        "        except BaseException as error:\n"
        "            if type(error).__name__ != 'CancelledError':\n                raise\n"
        "            found = await retrying(attempts.next)\n",
    ),
    Mutant(
        "skip the digest",
        "sources/reader.py",
        "            if digest != region.digest:\n",
        "            if False:\n",
    ),
    Mutant(
        "call an aborted run finished",
        "engine.py",
        "        complete = ended and not cut and self.error",
        "        complete = ended and self.error",
    ),
    Mutant(
        "reject after one refusal",
        "delivery.py",
        "        if position in self.refused:\n",
        "        if position not in self.refused:\n",
    ),
    Mutant(
        "believe a late copy",
        "transport.py",
        "        return known\n",
        "        return False\n",
    ),
    Mutant(
        "call a buffered body written",
        "transport.py",
        "        if transport is not None and self._clock is not None:\n",
        "        if False:\n",
    ),
    Mutant(
        "call a queued body written",
        "wire.py",
        "        if counts.acknowledged < end - UNACKNOWLEDGED_SEGMENTS * counts.segment:\n",
        "        if False:\n",
    ),
    Mutant(
        "count from the acknowledgement",
        "wire.py",
        "        return max(self._sent_at, now - counts.round_trip_us / 1e6)\n",
        "        return now\n",
    ),
    Mutant(
        "forget that it left earlier",
        "limiter.py",
        "        at = self._clock() if at is None else at\n",
        "        at = self._clock()\n",
    ),
    Mutant(
        "trust the first leads",
        "limiter.py",
        "min(self._leads) if len(self._leads) == LEADS else 0.0\n",
        "min(self._leads, default=0.0)\n",
    ),
)
