"""Bad input of every kind: only the documented errors, every row accounted for, and no message that does harm.

What must hold is in `fuzz.checks`; what a row is, in `fuzz.reading`, which shares nothing with bulkwf.
"""

import gc
import gzip
import json
import sqlite3
import tracemalloc
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from canary import assert_silent
from fakes import memory_folder, reseal
from fuzz.checks import (
    BATCH,
    assert_harmless,
    batches_of,
    check_answer,
    check_checkpoint,
    check_headers,
    check_list,
    counts,
)
from fuzz.inputs import (
    CHANCES,
    HEADERS,
    IDS,
    ROWS,
    SECRET,
    SHAPES,
    all_headers,
    answer_bodies,
    damaged,
    damaged_file,
    damages,
    likely_answer,
    real_answers,
    row_lines,
    write_checkpoint,
)
from fuzz.records import change, check_run, check_verification, stored_results, write_cut_run
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torture import TORTURE, scaled, tally

from bulkwf.attempt import Reply
from bulkwf.batching.ids import IdScheme
from bulkwf.batching.packer import Packer
from bulkwf.cli.flags import ServiceFlags, flag_layer
from bulkwf.emulator import FaultScriptError, parse_script
from bulkwf.emulator.faults import Facts, Rule, decide
from bulkwf.errors import ConfigError, InputError
from bulkwf.limits.pause import pause_s
from bulkwf.model import Slice
from bulkwf.options import Options, Target
from bulkwf.service.judge import judge
from bulkwf.service.responses import retry_after_s
from bulkwf.settings import Settings, parse_duration, parse_rate
from bulkwf.sources.files import GZIP_MAGIC
from bulkwf.transport.credentials import check_secret, file_credential

pytestmark = pytest.mark.slow


def examples(number):
    """*number* examples, the same each time, in `make test`; more, and different ones, in `make torture`."""
    return settings(
        max_examples=scaled(number, 40 * number), derandomize=not TORTURE, suppress_health_check=list(HealthCheck)
    )


tally(
    "fuzzed: {lists:,} lists of {rows:,} rows ({sent:,} sent, {refused:,} refused), {answers:,} answers "
    "({settled:,} rows settled, {created:,} as created), {headers:,} headers, {files:,} checkpoints "
    "({unreadable:,} refused), {records:,} changed records ({refused_records:,} refused)",
    counts=counts,
)


@pytest.fixture(scope="module")
def memory():
    with memory_folder() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def checkpoint(memory):
    """A checkpoint, undamaged."""
    path = memory / "good.bulkwf"
    write_checkpoint(path)
    return path


# --- rows ---------------------------------------------------------------------------------------------------------

ENDS = st.sampled_from([b"\n", b"\n", b"\r\n", b""])
LISTS = st.lists(st.builds(bytes.__add__, row_lines(), ENDS), max_size=12).map(b"".join)
PARTS = st.lists(LISTS | damages(LISTS) | st.binary(max_size=60), min_size=1, max_size=3)
CHUNKS = st.sampled_from([1, 2, 3, 7, 64, 1_000, 1 << 20])


def write_parts(memory, parts, *, packed=False):
    """Files with the contents *parts*."""
    paths = [memory / f"{number}.jsonl" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(gzip.compress(part, 1) if packed else part)
    return paths


@examples(400)
@given(
    parts=PARTS,
    packed=st.booleans(),
    chunk=CHUNKS,
    shape=st.sampled_from(["instance", "params"]),
    instances=st.integers(1, 12),
    size=st.sampled_from([3_500, 6_000, 1 << 20]),
)
@example(parts=[b"\xef\xbb\xbf{}"], packed=False, chunk=1, shape="instance", instances=1, size=1 << 20)
@example(parts=[b"{}", b"\xef\xbb\xbf{}"], packed=True, chunk=1, shape="instance", instances=9, size=1 << 20)
@example(parts=[b" " * 2_000 + b"\n{}"], packed=False, chunk=7, shape="params", instances=9, size=1 << 20)
def test_every_line_is_sent_unchanged_or_refused_with_a_reason(memory, parts, packed, **how):
    assume(packed or not any(part.startswith(GZIP_MAGIC) for part in parts))
    check_list(parts, write_parts(memory, parts, packed=packed), **how)


@examples(150)
@given(rows=LISTS.filter(bool), chance=CHANCES, chunk=CHUNKS)
def test_a_cut_gzip_file_is_an_input_error_and_a_damaged_one_may_be(memory, rows, chance, chunk):
    whole = gzip.compress(rows, mtime=0)
    (memory / "cut.gz").write_bytes(whole[: chance.randrange(len(GZIP_MAGIC), len(whole))])
    with pytest.raises(InputError) as caught:
        batches_of([memory / "cut.gz"], chunk=chunk)
    assert_harmless(str(caught.value))
    (memory / "damaged.gz").write_bytes(GZIP_MAGIC + damaged(whole[2:], chance))
    try:
        batches = batches_of([memory / "damaged.gz"], chunk=chunk)
    except InputError as error:
        assert_harmless(str(error))
    else:
        assert all(batch.region.count(b"\n") == batch.rows for batch in batches)


MEMBERS = st.sampled_from(
    [b'"instance_id":"-"', b'"instance_id":7', b'"instance_retention":{"a":1}', b'"location_hint":[]', b'"other":1']
)


def refused_alone(line, template=None):
    """The reasons for which a row is refused: one, or none."""
    packer = Packer(IdScheme("key", template), "instance")
    packer.add(Slice(0, 1, line + b"\n"))
    return packer.pack().refused


@examples(200)
@given(members=st.lists(MEMBERS, max_size=2), where=st.integers(0, 2), left=st.integers(1, 300))
def test_no_reason_contains_the_params(members, where, left):
    line = b"{" + b",".join([*members[:where], b'"params":' + SECRET, *members[where:]]) + b"}"
    for result in refused_alone(line[:left]):
        assert_silent(f"{result.id} {result.message}", result.code)
        assert_harmless(result.message)


@pytest.mark.parametrize("template", ["{to}", "order-{to}"])
def test_no_reason_contains_the_field_of_the_id_template(template):
    (result,) = refused_alone(b'{"params":{"to":' + json.dumps(json.loads(SECRET)["to"][0]).encode() + b"}}", template)

    assert result.code == "bad_id"
    assert_silent(f"{result.id} {result.message}", template)


# --- answers ------------------------------------------------------------------------------------------------------

STATUSES = [*[200] * 16, 201, 204, 302, 400, 401, 403, 404, 409, 413, 429, 500, 503, 525]
REPLIES = st.builds(Reply, status=st.sampled_from(STATUSES), headers=all_headers(), body=answer_bodies())
WHOLE = tuple(range(len(IDS)))
SENT = st.just(WHOLE) | st.sets(st.sampled_from(WHOLE), min_size=1).map(sorted).map(tuple)


@examples(1_500)
@given(part=SENT, reply=REPLIES)
def test_an_answer_settles_only_what_it_names_and_its_messages_are_harmless(part, reply):
    check_answer(part, reply)


@pytest.mark.parametrize("word", ["\x1b[2J", "\x9b31m", "a\nb", "\u202e", "x" * 100_000])
@pytest.mark.parametrize("key", ["status", "version_id", "workflow_id"])
def test_any_text_in_an_answer_about_an_instance_is_harmless(key, word):
    instances = [{"id": one, key: word} for one in IDS]
    others = [{"id": one, key: word + one} for one in IDS]
    for result in (instances, others):
        outcome = judge(
            BATCH, WHOLE, Reply(status=200, headers={}, body=json.dumps({"success": True, "result": result}).encode())
        )
        assert len(outcome.created) + len(outcome.others) == len(IDS)
        for one in (outcome.answer, *(result for _, result in outcome.others)):
            assert_harmless(getattr(one, key))


# --- headers ------------------------------------------------------------------------------------------------------


@examples(1_000)
@given(headers=all_headers())
@example({"retry-after": "Tue, 01 Sep 2026 11:00:00 GMT", "date": "Tue, 01 Sep 2026 12:00:00 GMT"})
def test_any_headers_give_a_finite_pause_and_no_error(headers):
    check_headers(headers)


@examples(300)
@given(st.integers(0, 40).flatmap(lambda digits: st.tuples(*[st.integers(0, 10**digits)] * 2)).map(sorted))
@example([30, 10**9])
def test_a_longer_retry_after_gives_no_shorter_pause(seconds):
    ordered = [retry_after_s(Reply(status=429, headers={"retry-after": str(one)}, body=b"")) for one in seconds]

    assert pause_s(1, ordered[0]) <= pause_s(1, ordered[1])


# --- checkpoints --------------------------------------------------------------------------------------------------


def place(memory, data):
    """A file with the content *data*, and no log of an earlier one beside it."""
    path = memory / "damaged.bulkwf"
    for leftover in memory.glob("damaged.bulkwf*"):
        leftover.unlink()
    path.write_bytes(data)
    return path


@examples(300)
@given(chance=CHANCES)
def test_a_damaged_checkpoint_is_read_or_refused_and_not_changed(memory, checkpoint, chance):
    check_checkpoint(place(memory, damaged_file(checkpoint.read_bytes(), chance)))


@examples(60)
@given(data=st.binary(min_size=1, max_size=200) | st.builds(bytes.__add__, st.just(b"SQLite format 3\0"), st.binary()))
def test_a_checkpoint_of_any_bytes_is_read_or_refused(memory, data):
    check_checkpoint(place(memory, data))


@examples(60)
@given(chance=CHANCES)
def test_a_checkpoint_beside_a_log_of_any_bytes_is_read_or_refused(memory, checkpoint, chance):
    path = place(memory, checkpoint.read_bytes())
    path.with_name(path.name + "-wal").write_bytes(damaged(checkpoint.read_bytes()[:100] * 50, chance))
    check_checkpoint(path)


COLUMNS = {
    "run": "created_at base_url run_key lane first_row source limits boot_id booted_at pause_until finished_at",
    "batch": "rows begun_at settled_at attempts retention_s created pending answer exceptions size digest ids",
    "attempt": "first_row started_at elapsed_s instances verdict kind bytes waited_s waited_for quota",
    "session": "started_at ended_at exit_code reason pid host log_lost",
}
CELLS = st.one_of(
    st.sampled_from([0, -1, 2**63 - 1, 1e300, 1e17, 2.5, float("inf"), b"", b"\xff\0", "", "\x1b[31m", "x", None]),
    st.sampled_from(["[]", "{}", "null", "7", '["a"]', '{"0":{}}', '{"0":7}', '{"0":{"outcome":7}}', "[[]]", "[null]"]),
    st.text(max_size=3),
    SHAPES.map(json.dumps),
)


@examples(250)
@given(cell=st.sampled_from([(t, c) for t, names in COLUMNS.items() for c in names.split()]), value=CELLS)
@example(("run", ""), None)
def test_a_checkpoint_with_a_changed_cell_is_read_or_refused(memory, checkpoint, cell, value):
    table, column = cell
    path = place(memory, checkpoint.read_bytes())
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "INSERT INTO attempt VALUES (1, 0, 1.0, 1.0, 1, 200, 'done', NULL, 'create', 9, 0.1, NULL, 'r=0;t=9', 0)"
        )
        change = f"UPDATE OR IGNORE {table} SET {column} = ?" if column else f"DELETE FROM {table} WHERE ? IS NULL"
        db.execute(change, (value,))
    if table in ("attempt", "session"):
        reseal(path)
    check_checkpoint(path)


@pytest.fixture(scope="module", params=[True, False], ids=["in doubt", "settled"])
def cut(memory, request):
    """The checkpoint of an interrupted run, and the results of the run after it is resumed."""
    path = memory / f"cut-{request.param}.bulkwf"
    write_cut_run(path, in_doubt=request.param)
    whole = path.with_suffix(".whole")
    whole.write_bytes(path.read_bytes())
    assert not check_verification(path, "undamaged", made_up=False)
    assert not check_run(path, "undamaged", made_up=True, expected=[])
    expected = stored_results(path)
    assert {outcome for _, _, outcome in expected} == {"created", "invalid"}
    return path, whole, expected


@pytest.mark.parametrize("made_up", [False, True])
def test_a_changed_record_makes_no_run_send_another_id_params_or_path(cut, made_up):
    path, whole, expected = cut
    for seed in range(scaled(200, 5_000)):
        path.write_bytes(whole.read_bytes())
        what = f"seed {seed}: {change(path, Random(seed), made_up=made_up)}"
        changed = path.read_bytes()
        refused = check_verification(path, what, made_up=made_up)
        path.write_bytes(changed)
        refused |= check_run(path, what, made_up=made_up, expected=expected)
        counts.update(records=1, refused_records=refused)


# --- settings and credentials -------------------------------------------------------------------------------------

TEXTS = st.text(max_size=30) | st.text("0123456789/.smhd5{}[]:@-_ ", max_size=12)
URLS = damages([b"https://api.example/client/v4", b"http://[::1]:8787", b"http://user:word@proxy.example:8080"])
URLS = URLS.map(lambda data: data.decode("utf-8", "surrogateescape")) | TEXTS
USES = {
    "base URL": lambda text: Target(base_url=text, account_id="a", workflow="w"),
    "proxy": lambda text: Settings(flag_layer(ServiceFlags(proxy=text))).options(),
    "proxy of the environment": lambda text: Options(proxy=text),
    "rate": lambda text: parse_rate("--rate", text, "s"),
    "time": lambda text: parse_duration("--timeout", text),
    "template": lambda text: IdScheme("key", text),
    "token": lambda text: check_secret("the token", text),
}


@pytest.mark.parametrize("name", USES)
def test_a_setting_is_accepted_or_is_a_config_error(name):
    @examples(200)
    @given(text=URLS)
    @example(text="http://[")
    def check(text):
        try:
            USES[name](text)
        except ConfigError as error:
            assert_harmless(str(error), longest=10_000)  # it quotes the value

    check()


@examples(100)
@given(data=st.binary(max_size=20))
def test_a_file_of_any_bytes_is_a_token_or_a_config_error(memory, data):
    (memory / "token").write_bytes(data)
    try:
        headers = file_credential(memory / "token")()
    except ConfigError as error:
        assert_harmless(str(error))
    else:
        assert headers == {"Authorization": f"Bearer {data.decode().strip()}"}


RULES = st.lists(st.dictionaries(st.sampled_from([*Rule.__struct_encode_fields__, "other"]), SHAPES, max_size=4))


@examples(200)
@given(script=RULES.map(json.dumps) | SHAPES.map(json.dumps) | st.binary(max_size=20))
def test_a_fault_script_is_accepted_or_is_a_fault_script_error(script):
    try:
        rules = parse_script(script)
    except FaultScriptError:
        return
    for number in (1, 2):
        decide(rules, Facts("POST", number, number, 1.0, 1.0, IDS), [0] * len(rules), lambda: 0.5)


SEED = 20260401

# --- memory -------------------------------------------------------------------------------------------------------


def soaked_list(chance, memory):
    rows = [damaged(chance.choice(ROWS), chance) if chance.randrange(2) else chance.choice(ROWS) for _ in range(8)]
    parts = [b"\n".join(rows[:4]), b"\n".join(rows[4:])]
    check_list(parts, write_parts(memory, parts, packed=True), chunk=chance.choice([7, 64, 1_000]))


def soaked_answer(chance, memory):
    body = likely_answer(chance) if chance.randrange(2) else damaged(chance.choice(real_answers()), chance)
    check_answer(WHOLE[: chance.choice([1, 3, 6, 6, 6])], Reply(status=chance.choice(STATUSES), headers={}, body=body))


def soaked_headers(chance, memory):
    odd = {name: damaged(chance.choice(good), chance).decode("utf-8", "replace") for name, good in HEADERS.items()}
    check_headers(odd)


def soaked_checkpoint(chance, memory):
    check_checkpoint(place(memory, damaged_file((memory / "good.bulkwf").read_bytes(), chance)))


@pytest.mark.parametrize(
    ("soak", "number"),
    [
        (soaked_list, scaled(240, 12_000)),
        (soaked_answer, scaled(3_000, 120_000)),
        (soaked_headers, scaled(3_000, 120_000)),
        (soaked_checkpoint, scaled(60, 2_400)),
    ],
)
@pytest.mark.usefixtures("checkpoint")
def test_memory_does_not_grow_with_the_number_of_bad_inputs(memory, soak, number):
    chance = Random(SEED)
    held = []
    tracemalloc.start()
    try:
        for _ in range(4):  # the first round fills caches, and a later one may import a module
            for _ in range(number // 4):
                soak(chance, memory)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    growths = [later - earlier for earlier, later in pairwise(held)]
    assert min(growths) < 5_000, f"seed {SEED}: bytes held after each round: {held}"
