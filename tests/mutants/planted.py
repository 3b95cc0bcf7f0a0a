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
        "            window.written(now, amount)\n        self._wake()\n",
        "            window.written(now, amount)\n            window.used(now, amount)\n        self._wake()\n",
    ),
    Mutant(
        "forget what was written",
        "limiter.py",
        "            window.lead_s = min(self._leads, default=0.0)\n            window.written(now, amount)\n",
        "            window.lead_s = min(self._leads, default=0.0)\n            window.give_back(amount)\n",
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
    Mutant("draw a run key of 32 bits", "api.py", "RUN_KEY_BYTES = 8\n", "RUN_KEY_BYTES = 4\n"),
    Mutant(
        "believe a record whatever its checksum",
        "checkpoint/records.py",
        "        if checksum(self[:14]) != self.settled_crc or checksum(begun) != self.begun_crc:\n",
        "        if checksum(begun) != self.begun_crc:\n",
    ),
    Mutant(
        "believe the record of the run",
        "checkpoint/records.py",
        "    if checksum(list(values.values())) != crc:\n",
        "    if False:\n",
    ),
    Mutant(
        "believe ids whatever their checksum",
        "checkpoint/records.py",
        "        if crc32(self.ids.encode()) != self.ids_crc:\n",
        "        if False:\n",
    ),
    Mutant(
        "believe ids that can be none",
        "checkpoint/records.py",
        "        if len(ids) != self.rows or (sent and not ids_are_good(sent)):\n",
        "        if len(ids) != self.rows:\n",
    ),
    Mutant(
        "believe any run key",
        "checkpoint/records.py",
        "    named = is_run_key(header.run_key) and is_target_name",
        "    named = is_target_name",
    ),
    Mutant(
        "resend other ids than the rows have",
        "engine.py",
        "            if not has_its_ids(ledger.batch, self._scheme, ledger.refused()):\n",
        "            if False:\n",
    ),
    Mutant("paste an id into a URL", "transport.py", "{quote(instance_id, safe='')}", "{instance_id}"),
    Mutant(
        "close under a commit",
        "checkpoint/writer.py",
        "            if not self._busy:\n                self._begin_closing()\n        await",
        "            self._reader.close()\n            self._close(intact=True)\n"
        "            self._closed.set_result(None)\n        await",
    ),
    Mutant(
        "let a cancellation cut off what must end",
        "uncancelled.py",
        "                cancellation = error\n                cancelled()\n",
        "                cancellation = error\n                break\n",
    ),
    Mutant(
        "close what a thread still reads",
        "uncancelled.py",
        "    running = asyncio.get_running_loop().run_in_executor(None, partial(function, *args))\n    try:\n"
        "        await until_done(running)\n",
        "    running = asyncio.get_running_loop().run_in_executor(None, partial(function, *args))\n    try:\n"
        "        await running\n",
    ),
    Mutant(
        "commit in a task that can be cancelled",
        "api.py",
        "    return partial(asyncio.get_running_loop().run_in_executor, pool)\n",
        "    async def execute(function):\n"
        "        return await asyncio.get_running_loop().run_in_executor(pool, function)\n\n    return execute\n",
    ),
)
