"""The bugs: the classical ways in which a bulk submitter breaks its promise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One bug: in `file`, `was` stands exactly once, and `becomes` takes its place.

    `by`: the harness that is known to catch it, which is tried first.
    """

    name: str
    file: str
    was: str
    becomes: str
    by: str = ""


PLANTED = (
    Mutant(
        "count before commit",
        "submission/journal.py",
        "        await self._committed(committing)\n",
        "        _ = committing\n",
    ),
    Mutant(
        "send before begin",
        "submission/engine.py",
        "            if begun is not None:\n                await self._count(state.batch, begun)\n"
        "            if state.pending:\n"
        "                await BatchDelivery(self._context, state, begun_at).deliver()\n",
        "            if state.pending:\n"
        "                await BatchDelivery(self._context, state, begun_at).deliver()\n"
        "            if begun is not None:\n                await self._count(state.batch, begun)\n",
    ),
    Mutant(
        "trust a 200 with foreign ids",
        "service/judge.py",
        "    contradiction = _contradiction(ids, envelope)\n",
        "    envelope.answered = [one for one in envelope.answered if one.id in ids]\n"
        "    contradiction = _contradiction(ids, envelope)\n",
        by="modules",
    ),
    Mutant(
        "open a run without counting what earlier sessions have sent",
        "run.py",
        '        restore(limiter, "run", file.path, file.past, verified, options, clock.wall())\n',
        "",
    ),
    Mutant(
        "reject on 403",
        "service/judge.py",
        "    403: Verdict.UNAUTHORIZED,\n",
        "    403: Verdict.BAD_REQUEST,\n",
        by="modules",
    ),
    Mutant(
        "ignore Retry-After",
        "limits/pause.py",
        "        return max(ordered_s, doubled)  #",
        "        return doubled  #",
        by="modules",
    ),
    Mutant(
        "hold the slot in backoff",
        "submission/client.py",
        "                slot.unsent()\n        pause_s = ",
        "                slot.unsent()\n            if judgement.unsettled:\n                await self.sleep(3.0)\n"
        "        pause_s = ",
    ),
    Mutant(
        "match by position",
        "service/judge.py",
        "    if not envelope.refused and [one.id for one in answered] == sent_ids(batch, part) and _alike(answered):\n",
        "    if not envelope.refused and answered and len(answered) <= len(part) and _alike(answered):\n"
        "        part = part[: len(answered)]\n",
        by="modules",
    ),
    Mutant(
        "re-serialise params",
        "batching/body.py",
        '        return b"[%b]" % batch.region[:-1].replace(b"\\n", b",")\n',
        '        whole = b"[%b]" % batch.region[:-1].replace(b"\\n", b",")\n'
        "        return msgspec.json.encode(msgspec.json.decode(whole))\n",
        by="modules",
    ),
    Mutant(
        "drop the omitted id",
        "service/judge.py",
        "    unsettled = tuple(sorted(position_of.values()))\n",
        "    unsettled = ()\n",
        by="modules",
    ),
    Mutant(
        "count a place twice",
        "limits/budget.py",
        "            window.written(at, amount)\n",
        "            window.written(at, amount)\n            window.used(at, amount)\n",
        by="engine",
    ),
    Mutant(
        "forget what was written",
        "limits/budget.py",
        "            window.written(at, amount)\n",
        "            window.give_back(amount)\n",
        by="modules",
    ),
    Mutant(
        "swallow cancellation",
        "submission/client.py",
        "        found: Judgement = await retrying(attempts.next)\n",
        "        try:\n            found: Judgement = await retrying(attempts.next)\n"
        "        except BaseException as error:\n"
        "            if type(error).__name__ != 'CancelledError':\n                raise\n"
        "            found = await retrying(attempts.next)\n",
        by="every await",
    ),
    Mutant(
        "skip the digest",
        "sources/source.py",
        "            if digest != region.digest:\n",
        "            if False:\n",
        by="ends",
    ),
    Mutant(
        "call an aborted run finished",
        "submission/engine.py",
        "        return ended and not cut and self.error",
        "        return ended and self.error",
    ),
    Mutant(
        "reject after one refusal",
        "submission/delivery.py",
        "            if await self._reject_if_again(refused[0]):\n",
        "            await self._requests.reject(refused[0], refusal)\n            if True:\n",
        by="engine",
    ),
    Mutant(
        "believe a late copy",
        "transport/http.py",
        "        return known\n",
        "        return False\n",
        by="modules",
    ),
    Mutant(
        "reject while nothing is created",
        "submission/delivery.py",
        "            if not (self._run.options.reject_omitted and self._is_last()):\n",
        "            if not self._is_last():\n",
        by="engine",
    ),
    Mutant(
        "count absences back to back", "submission/batch_requests.py", "ABSENCE_GAP_S = 10.0\n", "ABSENCE_GAP_S = 0.0\n"
    ),
    Mutant(
        "count absences from before the doubt",
        "submission/batch_requests.py",
        "            instance.absences, instance.absent_at = 0, -inf\n",
        "            pass\n",
        by="modules",
    ),
    Mutant(
        "reject by a look-up that comes too early",
        "submission/delivery.py",
        "            found = await self._requests.look_up_before_rejection(position)\n"
        "            if found.verdict is Verdict.ABSENT:\n"
        "                await self._requests.reject(position, replace",
        "            found = judgement\n            if found.verdict is Verdict.ABSENT:\n"
        "                await self._requests.reject(position, replace",
        by="modules",
    ),
    Mutant(
        "ask for one instance for ever",
        "submission/batch_requests.py",
        "            if not (handling.lookup_failed and tries.failed()):\n",
        "            if not (handling.lookup_failed and tries.failed() and False):\n",
        by="engine",
    ),
    Mutant(
        "end the run for one odd answer",
        "submission/retries.py",
        "    return Probe(error) if proven and handling.probed else Stop(error)\n",
        "    return Stop(error)\n",
        by="modules",
    ),
    Mutant(
        "throttle by the status alone",
        "service/judge.py",
        "    if reply.status == 429 or codes & RATE_ERRORS:\n",
        "    if reply.status == 429:\n",
        by="modules",
    ),
    Mutant(
        "take an alert for a wrong certificate",
        "transport/faults.py",
        "        return FaultKind.HANDSHAKE,",
        "        return FaultKind.FATAL,",
        by="modules",
    ),
    Mutant(
        "wait for a proxy that refuses",
        "transport/faults.py",
        "        kind = FaultKind.FATAL if error.status in _PROXY_REFUSALS else FaultKind.NOT_SENT\n",
        "        kind = FaultKind.NOT_SENT\n",
        by="modules",
    ),
    Mutant(
        "call a buffered body written",
        "transport/http.py",
        "        if transport is not None and self._slot.timed:  #",
        "        if False:  #",
        by="wire",
    ),
    Mutant(
        "call a queued body written",
        "transport/upload.py",
        "        if counts.acknowledged < end - UNACKNOWLEDGED_SEGMENTS * counts.segment:\n",
        "        if False:\n",
        by="wire",
    ),
    Mutant(
        "count from the acknowledgement",
        "transport/upload.py",
        "        return max(self._sent_at, now - counts.round_trip_us / 1e6)\n",
        "        return now\n",
        by="wire",
    ),
    Mutant(
        "forget that it left earlier",
        "limits/limiter.py",
        "        at = self._clock() if at is None else at\n",
        "        at = self._clock()\n",
        by="modules",
    ),
    Mutant(
        "begin anew without the log",
        "checkpoint/writer.py",
        "                refuse_torn(before, path)\n",
        "                before.close()\n                path.unlink()\n"
        "                prepare(path, header, now, boot, new=False)\n                before = connect_reader(path)\n",
        by="checkpoint",
    ),
    Mutant(
        "begin anew in an emptied file",
        "checkpoint/file.py",
        "        if log.exists() and is_new(path):\n",
        "        if log.exists() and not path.exists():\n",
        by="checkpoint",
    ),
    Mutant(
        "leave the session in the log",
        "checkpoint/sessions.py",
        '    if db.execute("PRAGMA wal_checkpoint(FULL)").fetchone()[0]:\n',
        "    if not db:\n",
        by="checkpoint",
    ),
    Mutant(
        "take lost rows for new ones",
        "submission/engine.py",
        "            wall = min(wall, self._checkpoint.lost_since)\n",
        "            wall = max(wall, self._checkpoint.lost_since)\n",
        by="travel",
    ),
    Mutant(
        "let readers fold the log",
        "checkpoint/file.py",
        '    if has_log(path):\n        uri += "?mode=ro"',
        '    if has_log(path):\n        uri += "?mode=rw"',
        by="checkpoint",
    ),
    Mutant(
        "write on without the log",
        "checkpoint/connection.py",
        "        if self._log_inode != inode(self._log):\n",
        "        if False:\n",
        by="checkpoint",
    ),
    Mutant(
        "open a file with two names",
        "checkpoint/place.py",
        "    if found.st_nlink > 1:\n",
        "    if found.st_nlink > 9:\n",
        by="checkpoint",
    ),
    Mutant(
        "open a file mounted by itself",
        "checkpoint/place.py",
        "    if is_mount_point(mounts, path):\n",
        '    if is_mount_point(mounts, path / "x"):\n',
        by="checkpoint",
    ),
    Mutant(
        "trust every file system",
        "checkpoint/place.py",
        '    return CLASSES.get(kind, "unknown") if kind else "local"\n',
        '    return "local"\n',
        by="checkpoint",
    ),
    Mutant(
        "upsert as new SQLites do",
        "verification/store.py",
        "INSERT OR IGNORE INTO instance (row, id, existed) VALUES (?, ?, ?)",
        "INSERT INTO instance (row, id, existed) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        by="checkpoint",
    ),
    Mutant(
        "call an absent instance missing at once",
        "verification/store.py",
        "CONFIRMED = 2\n",
        "CONFIRMED = 1\n",
        by="verification",
    ),
    Mutant(
        "confirm an absence at once",
        "verification/verify.py",
        "            await self._client.sleep(CONFIRM_AFTER_S)\n",
        "",
        by="verification",
    ),
    Mutant(
        "read the list whatever it finds",
        "verification/verify.py",
        "    return unanswered > 0 and debt <= max(LEAST_DEBT, unanswered // 10)\n",
        "    return unanswered > 0\n",
        by="verification",
    ),
    Mutant(
        "forget what a verification sends",
        "verification/journal.py",
        "        self._log.sent(self._wall())\n",
        "",
        by="verification",
    ),
    Mutant(
        "look up an id once for each of its rows",
        "verification/store.py",
        "earlier.row < one.row)",
        "earlier.row < 0)",
        by="verification",
    ),
    Mutant(
        "forget what is left",
        "submission/journal.py",
        "            quota=quota_text(reply.headers) if isinstance(reply, Reply) else None,\n",
        "            quota=None,\n",
        by="restarts",
    ),
    Mutant(
        "trust a clock that is set",
        "clock.py",
        "        return stored if self.id and self.id == stored.id else self\n",
        "        return self\n",
        by="restarts",
    ),
    Mutant(
        "no probe after a spent quota",
        "limits/budget.py",
        "        if token.pause.probing or token.pacer.expired(now):\n",
        "        if token.pause.probing:\n",
        by="restarts",
    ),
    Mutant(
        "wait for threads that hang",
        "cli/process.py",
        "                os._exit(code)\n",
        "                continue\n",
        by="signals",
    ),
    Mutant(
        "no forced exit",
        "cli/process.py",
        "        if receive is None or draining:\n",
        "        if False:\n",
        by="signals",
    ),
    Mutant(
        "ask for the token in the pool",
        "transport/http.py",
        "            return await in_daemon_thread(lambda: self._credentials.refresh(credential))\n",
        "            return await asyncio.to_thread(self._credentials.refresh, credential)\n",
        by="library",
    ),
    Mutant(
        "believe a short write",
        "cli/output.py",
        "                    left = left[os.write(self._descriptor, left) :]\n",
        "                    os.write(self._descriptor, left)\n                    left = left[:0]\n",
        by="output",
    ),
    Mutant(
        "write data by Python's stdout",
        "cli/output.py",
        '    sys.stdout = io.TextIOWrapper(io.BufferedWriter(_Whole(1)), "utf-8", errors="backslashreplace")\n',
        "    return\n",
        by="output",
    ),
    Mutant(
        "write messages in the event loop",
        "cli/messages.py",
        "            self._queue.append(data)\n            self._queued_bytes += len(data)\n",
        "            os.write(self._descriptor, data)\n",
        by="messages",
    ),
    Mutant(
        "wait for the reader of messages",
        "cli/messages.py",
        "queued.wait_written(FINISH_S)",
        "queued.wait_written(3_600)",
        by="messages",
    ),
    Mutant(
        "exit before the last message is written",
        "cli/process.py",
        "    if not messages.finish():\n        os._exit(code)\n",
        "    os._exit(code)\n",
        by="messages",
    ),
    Mutant(
        "drop the newest message",
        "cli/messages.py",
        'self._take().count(b"\\n")',
        'self._queue.pop().count(b"\\n")',
        by="messages",
    ),
    Mutant(
        "drop messages and say nothing",
        "cli/messages.py",
        "        if not dropped:\n",
        "        if True:\n",
        by="messages",
    ),
    Mutant(
        "let names control the terminal",
        "cli/messages.py",
        'f"{printable(line)}\\n"',
        'f"{line}\\n"',
        by="messages",
    ),
    Mutant(
        "call a missing thread a bug",
        "threads.py",
        """        if str(error) != "can't start new thread":\n""",
        "        if True:\n",
        by="messages",
    ),
    Mutant(
        "wait for the threads of the loop",
        "cli/process.py",
        "asyncio.Runner(loop_factory=_Loop)",
        "asyncio.Runner()",
        by="signals",
    ),
    Mutant(
        "leave a generator open",
        "sources/rows.py",
        "                self._rows.close()\n",
        "                pass\n",
        by="library",
    ),
    Mutant(
        "leave an async generator open",
        "sources/rows.py",
        "        if isinstance(self._rows, AsyncGenerator):\n",
        "        if False:\n",
        by="library",
    ),
    Mutant(
        "decode every error of an answer",
        "service/responses.py",
        "        if len(memoryview(errors)) > MAX_ERRORS_BYTES:\n",
        "        if False:\n",
        by="modules",
    ),
    Mutant("draw a run key of 32 bits", "run.py", "RUN_KEY_BYTES = 8\n", "RUN_KEY_BYTES = 4\n", by="library"),
    Mutant(
        "believe a record whatever its checksum",
        "checkpoint/records.py",
        "        if checksum(self[:14]) != self.settled_crc or checksum(begun) != self.begun_crc:\n",
        "        if checksum(begun) != self.begun_crc:\n",
        by="checkpoint",
    ),
    Mutant(
        "believe the record of the run",
        "checkpoint/records.py",
        "    if checksum(list(values.values())) != crc:\n",
        "    if False:\n",
        by="checkpoint",
    ),
    Mutant(
        "believe ids whatever their checksum",
        "checkpoint/records.py",
        "        if crc32(self.ids.encode()) != self.ids_crc:\n",
        "        if False:\n",
        by="checkpoint",
    ),
    Mutant(
        "believe ids that can be none",
        "checkpoint/records.py",
        "        if len(ids) != self.rows or (sent and not ids_are_good(sent)):\n",
        "        if len(ids) != self.rows:\n",
        by="checkpoint",
    ),
    Mutant(
        "believe any run key",
        "checkpoint/records.py",
        "    named = is_run_key(header.run_key) and is_target_name",
        "    named = is_target_name",
        by="checkpoint",
    ),
    Mutant(
        "resend other ids than the rows have",
        "submission/engine.py",
        "            if not has_its_ids(state.batch, self._scheme, state.refused()):\n",
        "            if False:\n",
        by="fuzz",
    ),
    Mutant(
        "paste an id into a URL",
        "service/requests.py",
        "{quote(instance_id, safe='')}",
        "{instance_id}",
        by="modules",
    ),
    Mutant(
        "close under a commit",
        "checkpoint/commits.py",
        "            if not self._busy:\n                self._begin_closing(self._closed)\n        await",
        "            self._connection.close(intact=True)\n            self._closed.set_result(None)\n        await",
        by="ends",
    ),
    Mutant(
        "let a cancellation cut off what must end",
        "uncancelled.py",
        "                cancellation = error\n                cancelled()\n",
        "                cancellation = error\n                break\n",
        by="ends",
    ),
    Mutant(
        "close what a thread still reads",
        "sources/files.py",
        "            self._closed = True\n            if not self._in_thread:\n",
        "            self._closed = True\n            if True:\n",
        by="ends",
    ),
    Mutant(
        "commit in a task that can be cancelled",
        "parts.py",
        "            return loop.run_in_executor(pool, function)\n",
        "            return asyncio.wait_for(loop.run_in_executor(pool, function), None)\n",
        by="ends",
    ),
    Mutant(
        "trust the first leads",
        "limits/limiter.py",
        "min(self._leads) if len(self._leads) == LEADS else 0.0)\n",
        "min(self._leads, default=0.0))\n",
        by="modules",
    ),
    Mutant(
        "share no window between runs",
        "parts.py",
        "        POOLS if clock.shared else Pools(),\n",
        "        Pools(),\n",
        by="budget",
    ),
    Mutant(
        "count no account",
        "limits/budget.py",
        "        pools = ((Bound.INSTANCES, self._lane), (Bound.ACCOUNT, self._account))\n",
        "        pools = ((Bound.INSTANCES, self._lane),)\n",
        by="budget",
    ),
    Mutant(
        "hold only the run that got the 429",
        "limits/budget.py",
        "            token.pause.hold(now + seconds)\n",
        "            self._pause.hold(now + seconds)\n",
        by="budget",
    ),
    Mutant(
        "let any request that fits go first",
        "limits/budget.py",
        "                wait = wait or self._turns.wait(now, waiter)\n",
        "",
        by="budget",
    ),
    Mutant(
        "forget what an ended run has sent",
        "limits/pools.py",
        "            if not pool.users and pool.clear(now):\n",
        "            if not pool.users:\n",
        by="budget",
    ),
    Mutant(
        "call a request that has begun unsent",
        "transport/http.py",
        "        sending.began = True\n",
        "",
        by="modules",
    ),
    Mutant(
        "believe an attempt whatever its checksum",
        "checkpoint/attempts.py",
        "            if checksum(values) != crc:\n",
        "            if False:\n",
        by="checkpoint",
    ),
    Mutant(
        "believe a session whatever its checksum",
        "checkpoint/sessions.py",
        "        if checksum((number, started_at, *others)) != crc:\n",
        "        if False:\n",
        by="checkpoint",
    ),
    Mutant(
        "believe the row that a refusal names",
        "submission/delivery.py",
        "            search.refused(refused, named_row(refusal.message, refused, batch.ids))\n",
        "            search.refused(refused, named_row(refusal.message, refused, batch.ids))\n"
        "            if search._named is not None:\n"
        "                await self._requests.reject(search._named, refusal)\n"
        "                search.found(search._named)\n",
        by="modules",
    ),
    Mutant(
        "repeat a refusal over a used connection",
        "submission/delivery.py",
        "        refusal = await self._settle((position,), fresh=True)\n",
        "        refusal = await self._settle((position,))\n",
        by="modules",
    ),
    Mutant(
        "reject the last suspect without sending it alone",
        "submission/delivery.py",
        "            await self._try(search, search.next_part())\n",
        "            if search.suspects == 1:\n"
        "                await self._requests.reject(search.rows[0], refusal)\n"
        "                search.found(search.rows[0])\n"
        "            else:\n"
        "                await self._try(search, search.next_part())\n",
        by="modules",
    ),
    Mutant(
        "forget the rest after a bad row",
        "batching/bad_rows.py",
        "        self._remove((row,))\n",
        "        self._remove((row, *self.rows[max(1, self.suspects) :]))\n",
        by="modules",
    ),
    Mutant(
        "call rows bad that were refused together",
        "batching/bad_rows.py",
        "        self.suspects = len(part)\n",
        "        self.suspects = 1\n",
        by="modules",
    ),
    Mutant(
        "reject an omitted row without a look-up",
        "submission/batch_requests.py",
        "        return position in self._state.in_doubt or position in self._notes\n",
        "        return position in self._state.in_doubt\n",
        by="modules",
    ),
    Mutant(
        "reject a row that is refused twice without a look-up",
        "submission/delivery.py",
        "        found = await self._requests.look_up_before_rejection(position)\n"
        "        if found.verdict is Verdict.ABSENT:\n"
        "            await self._requests.reject(position, refusal)\n",
        "        found = refusal\n        if found.verdict is refusal.verdict:\n"
        "            await self._requests.reject(position, refusal)\n",
        by="simulation",
    ),
    Mutant(
        "believe an index that an instance exists",
        "service/judge.py",
        "ALREADY_EXISTS and refused.id is not None:  # without its id it may be another request's\n"
        "            position = position_of.pop(refused.id)\n",
        "ALREADY_EXISTS:\n            position = position_of.pop(_refused_id(ids, refused))\n",
        by="modules",
    ),
    Mutant(
        "make requests smaller for one row that is too large",
        "submission/delivery.py",
        "        if self._too_large and not self._row_too_large:\n",
        "        if self._too_large:\n",
        by="modules",
    ),
    Mutant(
        "believe one answer that a row exists",
        "submission/delivery.py",
        "        refusal = await self._settle((position,), fresh=True)\n",
        "        refusal = await self._settle((position,))\n",
        by="modules",
    ),
    Mutant(
        "reject omitted ids with the refused ones beside them",
        "submission/delivery.py",
        "            if judgement.refused and asked > 1:  # the others are not refused with them\n",
        "            if False:\n",
        by="modules",
    ),
)
