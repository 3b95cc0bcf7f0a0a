"""What must hold for every input, however bad. `counts`: the inputs checked."""

import asyncio
import contextlib
import json
import math
import re
import signal
import sqlite3
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import product
from unittest import mock
from zlib import crc32

from fakes import EPOCH, HEADER, lines, make_batch, run_virtual
from test_batcher import take_batches

from bulkwf.attempt import Reply, Verdict
from bulkwf.batching import packer as batching
from bulkwf.batching.batch_state import BatchState
from bulkwf.batching.body import compose
from bulkwf.batching.ids import IdScheme
from bulkwf.checkpoint import Begun, Checkpoint, inline, read_results, read_run_past, read_status
from bulkwf.checkpoint.reading import results
from bulkwf.checkpoint.records import begun_row
from bulkwf.errors import CheckpointError
from bulkwf.limits.limiter import WindowLimiter
from bulkwf.limits.pause import pause_s
from bulkwf.limits.quota import QuotaPacer, Said, quota_text
from bulkwf.options import BatchLimits, Options, RateLimits, RetryPolicy
from bulkwf.service.fast_path import FastJudge
from bulkwf.service.judge import judge, judge_lookup, judge_page
from bulkwf.service.responses import retry_after_s
from bulkwf.service.verdicts import HANDLING, Action
from bulkwf.sources import files, open_source
from bulkwf.sources import source as reader
from bulkwf.submission.retries import Wait, plan
from fuzz.inputs import IDS
from fuzz.reading import LEVELS, Pairs, lines_of, read_line, strictly

LONGEST_ROW = 1_200
"""Replaces `MAX_ROW_BYTES` and `MAX_PARAMS_BYTES`, which are a megabyte."""
LONGEST_MESSAGE = 450
"""Upper bound of a message: a cleaned text, and the sentence around it."""
LONGEST_USE_S = 2.0
"""Upper bound of the CPU time for one checkpoint, in seconds; an undamaged one takes some milliseconds."""
BATCH = make_batch(len(IDS), first_row=100, data=lines(len(IDS)))
counts: Counter[str] = Counter()


def assert_harmless(text, longest=LONGEST_MESSAGE):
    """Check a text for people: one line, not too long, without escape sequences or bidirectional controls."""
    assert len(text) <= longest, f"{len(text):,} characters"
    assert not [c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}], ascii(text)


def assert_pause(seconds):
    """Check that a pause is finite and not negative."""
    assert 0.0 <= seconds < math.inf


# --- rows ---------------------------------------------------------------------------------------------------------


def batches_of(paths, *, chunk=1 << 20, shape="instance", instances=100, size=1 << 20):
    """The batches that a run would make of a list."""
    options = Options(batch=BatchLimits(instances=instances, rows=max(instances, 40), bytes=size), row_shape=shape)

    async def take():
        source = open_source([str(path) for path in paths])
        try:
            return await take_batches(source, options, IdScheme("key"))
        finally:
            await source.aclose()

    with (
        mock.patch.multiple(batching, MAX_ROW_BYTES=LONGEST_ROW, MAX_PARAMS_BYTES=LONGEST_ROW),
        mock.patch.object(reader, "MAX_ROW_BYTES", LONGEST_ROW),
        mock.patch.object(files, "CHUNK_BYTES", chunk),
    ):
        return run_virtual(take())


def check_list(parts, paths, *, shape="instance", instances=100, size=1 << 20, chunk=1 << 20):
    """Each line of files with the contents *parts* is sent unchanged, or refused with a reason, or blank."""
    own = [line for part in parts for line in lines_of(part)]
    at = 0
    chunk = max(chunk, sum(map(len, parts)) // 200)  # a long list is not read byte by byte
    for batch in batches_of(paths, shape=shape, instances=instances, size=size, chunk=chunk):
        assert batch.first_row == at
        _check_rows(batch, own[at : at + batch.rows], shape)
        _check_bodies(batch, own[at : at + batch.rows], shape)
        assert len(batch.ids) <= instances
        assert not batch.ids or len(compose(batch, range(len(batch.ids)))) <= size
        at += batch.rows
    assert at == len(own)
    counts["lists"] += 1


def _check_rows(batch, own, shape):
    sent, refused = (
        dict(zip(batch.offsets, batch.ids, strict=True)),
        {r.row - batch.first_row: r for r in batch.refused},
    )
    assert len(sent) == len(batch.ids)
    assert len(refused) == len(batch.refused)
    seen = set()
    for offset, line in enumerate(own):
        read = read_line(line, shape, LONGEST_ROW)
        made = read.id or f"key-{batch.first_row + offset}-{crc32(line):08x}"
        first = read.kind == "good" and made not in seen
        code = refused[offset].code if offset in refused else None
        assert sent.get(offset) == (made if first else None), (line, code)
        assert (code is not None) == (read.kind != "blank" and not first), (line, code)
        assert (code == "duplicate_id") == (read.kind == "good" and not first)
        seen.add(made)
    for result in batch.refused:
        assert_harmless(result.message)
        assert_harmless(result.id or "")
    counts.update(rows=len(own), sent=len(sent), refused=len(refused))


def _check_bodies(batch, own, shape):
    """Every request has its rows byte for byte, each with its id, and another parser reads the same from it."""
    items = []
    for position, (offset, instance_id) in enumerate(zip(batch.offsets, batch.ids, strict=True)):
        item, line = compose(batch, [position])[1:-1], own[offset]
        row, named = strictly(line), b'{"instance_id":"%b"' % instance_id.encode()
        expected = row
        if shape == "params":
            assert item == named + b',"params":' + line + b"}"
            expected = Pairs([("instance_id", instance_id), ("params", row)])
        elif item != line:
            rest = line.lstrip()[1:]
            assert item == named + (b"," if row else b"") + rest
            expected = Pairs([("instance_id", instance_id), *row])
        assert strictly(item, LEVELS + 1) == expected
        assert dict(expected)["instance_id"] == instance_id
        items.append(item)
    assert compose(batch, range(len(items))) == b"[" + b",".join(items) + b"]"


# --- answers ------------------------------------------------------------------------------------------------------


def check_answer(part, reply):
    """Check the judgement of an answer to a batch, to a look-up, and to a request for the list."""
    outcome = judge(BATCH, part, reply)
    _check_memory(part, reply)
    _check_outcome(part, outcome)
    _check_grounds(part, reply, outcome)
    _check_account(part, outcome)
    lookup = judge_lookup(BATCH, part[0], reply)
    _check_outcome(part[:1], lookup)
    assert all(result.outcome == "existed" for _, result in lookup.others)
    assert not lookup.created
    assert lookup.unsettled or (_is_success(reply) and 200 <= reply.status < 300)
    answer, page = judge_page(reply)
    _check_outcome((), answer, settles=page is not None)
    if page is not None:
        assert _is_success(reply)
        assert [one.id for one in page.listed] == [one["id"] for one in _loads(reply)["result"]]
    counts.update(answers=1, created=len(outcome.created), settled=len(part) - len(outcome.unsettled))


def _check_memory(part, reply):
    """The fast path judges an answer, also with other ids or in another order, as `judge` does."""
    remembering = FastJudge()
    turned = replace(reply, body=re.sub(rb"id-(\d)", lambda found: b"id-%d" % (9 - int(found[1])), reply.body))
    others = replace(BATCH, ids=[re.sub(r"id-(\d)", lambda found: f"id-{9 - int(found[1])}", one) for one in BATCH.ids])
    for batch, answer in ((BATCH, reply), (BATCH, reply), (others, turned), (BATCH, turned), (others, reply)):
        assert remembering(batch, part, answer) == judge(batch, part, answer)


def _check_outcome(part, outcome, settles=None):
    """A judgement has each instance once; its message is harmless, and its pause finite."""
    others = [position for position, _ in outcome.others]
    assert sorted([*outcome.created, *others, *outcome.unsettled]) == list(part)
    assert (outcome.verdict is Verdict.DONE) == (not outcome.unsettled if settles is None else settles)
    assert_harmless(outcome.message)
    assert outcome.code is None or -(2**63) <= outcome.code < 2**63
    for position, result in outcome.others:
        assert (result.row, result.id) == (BATCH.first_row + BATCH.offsets[position], BATCH.ids[position])
        assert_harmless(result.message or "")
    if outcome.retry_after_s is not None:
        assert_pause(outcome.retry_after_s)
    for streak, proven in (
        product((1, 2, 2_000), (False, True)) if HANDLING[outcome.verdict].action is Action.BACK_OFF else ()
    ):
        step = plan(RetryPolicy(), outcome, streak, 1.0, proven=proven)
        if isinstance(step, Wait):
            assert_pause(step.seconds)
            assert step.seconds >= (outcome.retry_after_s or 0.0)
        else:
            assert_harmless(str(step.error))


def _check_grounds(part, reply, outcome):
    """An instance is settled only if the answer has its id or its index, or if it was sent alone."""
    settled = {outcome: set() for outcome in ("created", "existed", "rejected")}
    settled["created"].update(BATCH.ids[position] for position in outcome.created)
    for _, result in outcome.others:
        settled[result.outcome].add(result.id)
    if settled["created"]:
        assert 200 <= reply.status < 300
        assert _is_success(reply)
        result = _loads(reply)["result"]
        named = [one["id"] for one in (result if isinstance(result, list) else result["created"])]
        assert set(named) == settled["created"]
        assert len(named) == len(settled["created"])
    if settled["existed"]:
        assert b"10405" in reply.body
    if settled["rejected"] or (settled["existed"] and len(part) > 1):
        errors = _loads(reply)["result"]["errors"]
        named = {one["id"] for one in errors if one.get("id") is not None}
        named |= {BATCH.ids[part[int(one["index"])]] for one in errors if one.get("id") is None}
        assert settled["rejected"] | settled["existed"] <= named
        assert _is_success(reply)


def _check_account(part, outcome):
    """A checkpoint stores the judgement, and returns the same."""
    state = BatchState(BATCH)
    state.attempts = 1
    state.add(outcome)
    record = state.record()
    kept = list(results(None, begun(state)))
    assert sorted(kept, key=lambda one: one.row) == sorted(state.settled(outcome), key=lambda one: one.row)
    assert record.pending == BATCH.rows - len(part) + len(outcome.unsettled)


def begun(state):
    """A batch's record, read from the checkpoint."""
    return Begun(*begun_row(state, EPOCH))


def _loads(reply):
    return json.loads(reply.body.decode("utf-8", "replace"), parse_int=str)


def _is_success(reply):
    return _loads(reply)["success"] is True


# --- headers ------------------------------------------------------------------------------------------------------


def check_headers(headers, at=1_000.0):
    """Any headers give finite pauses, and these are not shortened."""
    ordered = retry_after_s(Reply(status=429, headers=headers, body=b"", received_at=EPOCH))
    if ordered is not None:
        assert_pause(ordered)
    limiter = WindowLimiter(RateLimits(), clock=lambda: at)
    for refusals in (1, 2, 2_000):
        pause = pause_s(refusals, ordered)
        assert_pause(pause)
        assert pause >= max(1.0, ordered or 0.0)
        assert pause_s(1, ordered) <= limiter.throttled(ordered) == limiter.paused_until - at
    pace = QuotaPacer(10 / 3)
    spent = pace.observe(Said(at, at, headers.get("ratelimit", "")))
    assert spent or pace.wait_s(at) == 0.0
    pace.sent(at)
    assert_pause(pace.wait_s(at))
    kept = QuotaPacer(10 / 3)
    kept.restore(at, [Said(at, at, quota_text(headers) or "")], [at])
    assert kept.wait_s(at) == pace.wait_s(at)
    limiter = WindowLimiter(RateLimits(), clock=lambda: at)
    limiter.observe(headers)
    limiter.hold(pause)
    assert limiter.capacity(1) == 0
    counts["headers"] += len(headers)


# --- checkpoints --------------------------------------------------------------------------------------------------


def check_checkpoint(path):
    """A checkpoint is read, or refused with a `CheckpointError` and not changed."""
    before = path.read_bytes()
    outcomes = (None, "created", "existed", "rejected", "invalid", "pending")
    refused = [
        _is_refused(lambda: read_status(path)),
        *(_is_refused(lambda outcome=outcome: list(read_results(path, outcome=outcome))) for outcome in outcomes),
        _is_refused(lambda: read_run_past(path, 0.0)),
    ]
    opened = []
    resumed = not _is_refused(lambda: asyncio.run(_resume(path, opened)))
    # A session that was opened is recorded even if it is refused; nothing else is.
    assert resumed or path.read_bytes() == before or (opened and _kept(_batches(before), _batches(path.read_bytes())))
    counts.update(files=1, unreadable=any(refused) or not resumed)


def _kept(before, after):
    """Whether no batch has changed. If damage makes two tables share a page, the session's row is in both."""
    if before == after or isinstance(before, str) or isinstance(after, str):
        return before == after
    return len(after) == len(before) + 1 and [row for row in after if row in before] == before


def _batches(data):
    """Everything that a checkpoint has about its rows, or why it can't be read."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(data[:18] + b"\1\1" + data[20:])  # a database in memory has no log
        try:
            return db.execute("SELECT * FROM batch").fetchall()
        except sqlite3.Error as error:
            return str(error)


async def _resume(path, opened):
    """What a run does with the checkpoint of an earlier session."""
    checkpoint = Checkpoint.open(path, HEADER, now=EPOCH, executor=inline)
    opened.append(checkpoint)
    try:
        _ = checkpoint.counts(), checkpoint.run_key, checkpoint.past(0.0)
        for begun in checkpoint.begun():
            if not begun.settled:
                checkpoint.batch_state(begun, b"\n" * begun.rows, "instance").record()
    finally:
        await checkpoint.aclose()


def _never_ends(*_):
    raise AssertionError("it never ends")


def _is_refused(use):
    signal.signal(signal.SIGVTALRM, _never_ends)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST_USE_S)
    try:
        use()
    except CheckpointError as error:
        assert_harmless(str(error), longest=100_000)
        return True
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return False
