"""`bulkwf verify` against an emulator in another process: exit codes, outputs, interruptions."""

import contextlib
import csv
import io
import json
import os
import re
import resource
import select
import signal
import socket
import sqlite3
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from command import (
    ACCOUNT,
    HERE,
    TOKEN,
    Forker,
    Running,
    bulkwf,
    emulator,
    on_terminal,
    row,
    shell,
    until,
    write_rows,
)
from fakes import reseal

pytestmark = pytest.mark.slow

KEYS = ["row", "id", "outcome", "status", "message"]
COUNTS = {
    "instances", "total", "found", "missing", "unknown", "statuses", "run_finished", "complete",
    "requests", "elapsed_s", "exit_code",
}  # fmt: skip
BENT = [{"method": "POST", "lose": "^lost-", "fail": "^bad-"}]
"""The service names rows lost-… as created, and does not create them. Rows bad-… end with an error."""
NO_LIST = {"method": "GET", "to": 2, "from": 1, "status": 400, "code": 10002}
SLOWLY = {"method": "GET", "latency_s": 0.01}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Runs a command in a forked process, which is quick to start."""
    with Forker(tmp_path_factory.mktemp("outputs")) as forker:
        yield forker


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One service for all tests that need no faults. Each run has a workflow of its own."""
    with contextlib.chdir(tmp_path_factory.mktemp("service")), emulator(faults=BENT) as service:
        yield service


@pytest.fixture(scope="module")
def template(tmp_path_factory, service, quick):
    """The checkpoint of a finished run with rows that are lost and rows that fail."""
    with contextlib.chdir(tmp_path_factory.mktemp("template")):
        first = row(0) + row(0, "lost") + row(0, "bad") + "no row\n"
        Path("rows.jsonl").write_text(first + "".join(row(n) for n in range(1, 300)) + row(1, "lost"))
        submitted(service, quick, "mixed", code=1)
        return Path("done").read_bytes()


@pytest.fixture
def mixed(folder, service, template):
    """The arguments that verify that run."""
    Path("done").write_bytes(template)
    return ("verify", "done", "--base-url", service.base_url)


def submitted(service, quick, workflow, code=0, checkpoint="done"):
    """Submit `rows.jsonl`; returns the arguments that verify that run."""
    ended = quick("run", "rows.jsonl", *service.flags(workflow), "-c", checkpoint, "--concurrency", "1")
    assert ended.code == code
    return ("verify", checkpoint, "--base-url", service.base_url)


def delete(service, workflow, *ids):
    """Delete these instances from the service."""
    for one in ids:
        url = f"{service.base_url}/accounts/{ACCOUNT}/workflows/{workflow}/instances/{one}"
        request = urllib.request.Request(url, method="DELETE", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200


def found_so_far(checkpoint="done"):
    """The number of instances that a verification under way has found."""
    path = Path(f"{checkpoint}.verify")
    if not path.exists():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(status) FROM instance").fetchone()[0]
    except sqlite3.OperationalError:  # the file is being created
        return 0


def requests_seen(service):
    """Stop the service; returns its number of requests."""
    found = re.search(r" in ([\d,]+) requests?;", service.stop().err)
    return int(found[1].replace(",", ""))


def nothing_left(name="done"):
    """Whether the only file beside a checkpoint is the log of the last five minutes' requests."""
    logs = (f"{name}.verify-requests", f"{name}.verify-sample-requests")
    return all(one.name in logs for one in Path().glob(f"{name}?*"))


# --- from a run to a report -------------------------------------------------------------------------------------------


def test_all_instances_present_exits_with_0(folder, service, quick):
    write_rows("rows.jsonl", 350)
    ended = quick(*submitted(service, quick, folder.name))
    assert (ended.code, ended.out) == (0, "")
    assert "350 instances\n         350  queued\n           0  missing\n4 requests in " in ended.err
    assert nothing_left()


def test_missing_and_errored_instances_are_printed_and_exit_with_1(mixed, quick):
    ended = quick(*mixed)
    assert ended.code == 1
    assert all(list(line) == KEYS for line in ended.lines)
    assert [(line["row"], line["id"], line["outcome"], line["status"]) for line in ended.lines] == [
        (1, "lost-0", "missing", None),
        (2, "bad-0", "errored", "errored"),
        (303, "lost-1", "missing", None),
    ]
    assert "303 instances\n         300  queued\n           1  errored\n           2  missing\n" in ended.err
    assert nothing_left()


def test_csv_output_holds_the_same_problems(mixed, quick):
    ended = quick(*mixed, "--format", "csv")
    assert ended.code == 1
    lines = quick(*mixed).lines
    records = list(csv.DictReader(io.StringIO(ended.out, newline="")))
    assert records == [{name: "" if value is None else str(value) for name, value in line.items()} for line in lines]


def test_json_output_is_one_object_with_the_counts_and_the_problems(mixed, quick):
    ended = quick(*mixed, "--json")
    assert ended.code == 1
    assert ended.out.count("\n") == 1
    assert set(ended.summary) == COUNTS | {"problems"}
    counts = {"instances": 303, "total": 303, "found": 301, "missing": 2, "statuses": {"queued": 300, "errored": 1}}
    state = {"run_finished": True, "complete": True, "exit_code": 1, "requests": 4 + 4}
    assert ended.summary.items() >= (counts | state).items()


def test_a_sample_larger_than_any_run_is_the_whole_run(mixed, quick):
    assert quick(*mixed, "--sample", "9" * 30, "--json").summary["instances"] == 303


def test_errored_instances_alone_exit_with_0(folder, service, quick):
    write_rows("rows.jsonl", 3, "bad")
    ended = quick(*submitted(service, quick, folder.name))
    assert ended.code == 0
    assert [line["outcome"] for line in ended.lines] == ["errored"] * 3


def test_a_deleted_instance_is_missing_until_it_is_created_again(folder, service, quick):
    write_rows("rows.jsonl", 50)
    arguments = submitted(service, quick, folder.name)
    delete(service, folder.name, "row-7", "row-11")
    ended = quick(*arguments)
    assert ended.code == 1
    assert [line["id"] for line in ended.lines] == ["row-7", "row-11"]
    assert all("calls it created" in line["message"] for line in ended.lines)
    Path("rows.jsonl").write_text(row(7) + row(11))
    submitted(service, quick, folder.name, checkpoint="again")
    assert quick(*arguments).code == 0


def test_a_sample_looks_up_the_given_number_of_instances(folder, service, quick):
    write_rows("rows.jsonl", 400)
    arguments = submitted(service, quick, folder.name)
    ended = quick(*arguments, "--sample", "7", "--json")
    counts = ended.summary
    assert (counts["instances"], counts["total"], counts["found"], counts["requests"]) == (7, 400, 7, 7)
    assert "7 instances, drawn at random from 400" in ended.err
    assert quick(*arguments, "--sample", "99999", "--json").summary["instances"] == 400


def test_quiet_prints_only_the_data(mixed, quick):
    ended = quick(*mixed, "-q")
    assert (ended.code, ended.err) == (1, "")
    assert len(ended.lines) == 3


def test_an_empty_run_has_nothing_to_verify(folder, service, quick):
    Path("rows.jsonl").touch()
    ended = quick(*submitted(service, quick, folder.name), "--format", "csv")
    assert (ended.code, ended.out.splitlines()) == (0, [",".join(KEYS)])
    assert "0 instances" in ended.err


def test_a_terminal_shows_a_bar_that_disappears_at_the_end(mixed):
    shown = on_terminal(*mixed)
    assert shown.code == 1
    assert "\x1b[?25l" in shown.screen  # the cursor is hidden ...
    assert "\x1b[?25h" in shown.screen  # ... and comes back
    assert "of 303 instances asked for" in shown.screen
    last = shown.screen.rpartition("\x1b[2K")[2]
    assert "asked for" not in last
    assert "2  missing" in last
    assert [json.loads(line)["row"] for line in shown.out.splitlines()] == [1, 2, 303]


# --- stdout that can't be written -------------------------------------------------------------------------------------


def test_a_closed_stdout_does_not_change_exit_code_1(mixed):
    """With `| head`, the exit code still says that instances are missing."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as nobody:
        assert bulkwf(*mixed, stdout=nobody).code == 1


def test_problems_that_could_not_be_written_are_printed_by_the_next_command(mixed, quick):
    with Path("/dev/full").open("wb") as full:
        ended = bulkwf(*mixed, stdout=full)
    assert ended.code not in (0, 1)
    again = quick(*mixed, "--json", "-q")
    assert (again.code, again.summary["missing"], again.summary["requests"]) == (1, 2, 0)
    assert again.err == ""


# --- the wrong place --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening():
    """The base URL of a server that must get no request."""
    with socket.create_server(("127.0.0.1", 0)) as ear:
        yield f"http://127.0.0.1:{ear.getsockname()[1]}/client/v4"
        assert not select.select([ear], [], [], 0)[0], "somebody has called"


def test_an_endpoint_other_than_that_of_the_run_is_refused(mixed, quick):
    with listening() as elsewhere:
        for arguments, env in ((("--base-url", elsewhere), {}), ((), {"CLOUDFLARE_API_BASE_URL": elsewhere})):
            ended = quick("verify", "done", *arguments, env=env)
            assert (ended.code, ended.out) == (3, "")
            assert f"endpoint is '{mixed[-1]}', and the one to be asked is '{elsewhere}'" in ended.err
            assert "Nothing was sent" in ended.err
    assert nothing_left()


def test_a_forged_checkpoint_cannot_send_the_token_elsewhere(mixed, quick):
    with listening() as elsewhere:
        with contextlib.closing(sqlite3.connect("done")) as db:
            db.execute("UPDATE run SET base_url = ?", (elsewhere,))
            db.commit()
        assert quick(*mixed).code == 4  # it does not match its checksum
        reseal(Path("done"))
        ended = quick(*mixed)
        assert ended.code == 3
        assert elsewhere in ended.err


def test_an_account_other_than_that_of_the_run_is_refused(mixed, quick):
    for arguments, env in ((("-a", "other"), {}), ((), {"CLOUDFLARE_ACCOUNT_ID": "other"})):
        ended = quick(*mixed, *arguments, env=env)
        assert (ended.code, ended.out) == (3, "")
        assert "account is 'acct', and the one to be asked is 'other'" in ended.err
    assert quick(*mixed, env={"CLOUDFLARE_ACCOUNT_ID": None}).code == 1
    assert quick(*mixed, "-a", ACCOUNT, env={"CLOUDFLARE_ACCOUNT_ID": "other"}).code == 1


def test_a_verification_of_a_rehearsal_is_refused(folder, quick):
    rows = write_rows("rows.jsonl", 20)
    assert quick("run", rows, *HERE).code == 0
    with listening() as elsewhere:
        ended = quick("verify", "rows.jsonl.emulated.bulkwf", "--base-url", elsewhere)
    assert (ended.code, ended.out) == (3, "")
    assert "emulator" in ended.err
    assert "say so with --base-url" not in ended.err  # a rehearsal has no address


# --- a service that refuses or fails ----------------------------------------------------------------------------------


def test_a_token_that_is_refused_exits_with_3_and_is_not_shown(folder, quick):
    echo = {"method": "GET", "status": 401, "code": 10000, "message": f"Bearer {TOKEN} is no token"}
    with emulator(faults=[echo]) as service:
        for rows in (5, 50):  # few are looked up, many are listed
            write_rows("rows.jsonl", rows)
            ended = quick(*submitted(service, quick, f"all-{rows}", checkpoint=f"done-{rows}"))
            assert (ended.code, ended.out) == (3, "")
            assert "refuses the credential: Bearer *** is no token" in ended.err
            assert "Fix this, then resume with:" in ended.err
            for kept in (f"done-{rows}.verify", f"done-{rows}.verify-requests"):
                assert TOKEN.encode() not in Path(kept).read_bytes()


def test_a_long_outage_exits_with_75_and_the_printed_command_finishes(folder, quick):
    write_rows("rows.jsonl", 150)
    with emulator(faults=[{"method": "GET", "status": 503, "times": 2}]) as service:
        arguments = submitted(service, quick, "resize")
        ended = quick(*arguments, "--max-outage", "0s", "--json")
        assert (ended.code, ended.summary["exit_code"], ended.summary["complete"]) == (75, 75, False)
        assert "--max-outage" in ended.err
        assert "not asked for yet" in ended.err
        assert shell(ended.resume_command).code == 75
        assert quick(*arguments).code == 0
    assert nothing_left()


def test_the_settled_rows_of_an_unfinished_run_are_verified(folder, quick):
    write_rows("rows.jsonl", 250)
    with emulator(faults=[{"method": "POST", "from": 2, "status": 407}]) as service:
        arguments = submitted(service, quick, "resize", code=3)
        ended = quick(*arguments)
        assert (ended.code, ended.out) == (75, "")
        assert "100 instances" in ended.err
        assert "the run is not finished" in ended.err
        delete(service, "resize", "row-3")
        ended = quick(*arguments)
        assert (ended.code, [line["id"] for line in ended.lines]) == (1, ["row-3"])


def test_a_run_can_be_verified_while_it_is_under_way(folder, quick):
    rows = write_rows("rows.jsonl", 1_000)
    with (
        emulator(faults=[{"method": "POST", "latency_s": 0.05, "when": "after"}]) as service,
        Running("run", rows, *service.flags(), "--concurrency", "1", "-c", "done") as run,
    ):
        service.has_created(300)
        arguments = ("verify", "done", "--base-url", service.base_url)
        early = quick(*arguments, "--json")
        assert early.code == 75
        assert early.out.count("\n") == 1
        counts = early.summary
        assert (counts["complete"], counts["run_finished"], counts["missing"]) == (True, False, 0)
        assert 200 <= counts["found"] == counts["instances"] <= 1_000
        assert run.wait().code == 0
        assert quick(*arguments, "--json").summary.items() >= {"found": 1_000, "exit_code": 0}.items()


# --- interrupted ------------------------------------------------------------------------------------------------------


def test_after_a_signal_the_printed_command_continues_the_verification(folder, quick):
    rows = write_rows("the rows' list.jsonl", 240)
    with emulator(faults=[NO_LIST, SLOWLY]) as service:
        assert quick("run", rows, *service.flags()).code == 0
        arguments = ("verify", f"{rows}.bulkwf", "--base-url", service.base_url, "--concurrency", "4", "--json")
        with Running(*arguments) as verifying:
            until(lambda: found_so_far(f"{rows}.bulkwf") > 40, "some instances found")
            verifying.signal(signal.SIGTERM)
            ended = verifying.wait(30)
        assert (ended.code, ended.summary["exit_code"]) == (143, 143)
        assert (ended.summary["complete"], ended.summary["missing"]) == (False, 0)
        assert 40 < ended.summary["found"] == found_so_far(f"{rows}.bulkwf") < 240
        assert "bulkwf: SIGTERM: what was found so far is kept" in ended.err
        assert "not asked for yet" in ended.err
        again = shell(ended.resume_command)
        assert (again.code, again.summary["found"]) == (0, 240)
        assert "continuing the verification started 20" in again.err
        # Only instances whose requests were on the wire were asked for twice.
        assert ended.summary["found"] + again.summary["requests"] == 240
        assert requests_seen(service) <= 3 + 2 + 240 + 4
    assert nothing_left("the rows' list.jsonl.bulkwf")


def test_after_kills_the_same_command_finishes(folder, quick):
    write_rows("rows.jsonl", 240)
    with emulator(faults=[NO_LIST, SLOWLY]) as service:
        arguments = (*submitted(service, quick, "resize"), "--concurrency", "4")
        for some in (30, 90):
            with Running(*arguments) as verifying:
                until(lambda some=some: found_so_far() > some, "some instances found")
                verifying.signal(signal.SIGKILL)
                verifying.process.wait()
        ended = quick(*arguments, "--json")
        assert (ended.code, ended.summary["found"], ended.summary["missing"]) == (0, 240, 0)
        assert requests_seen(service) <= 3 + 2 + 240 + 2 * 4
    assert nothing_left()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "env", "what"),
    [
        (("--sample", "0"), {}, "--sample"),
        (("--sample", "-3"), {}, "--sample"),
        (("--sample", "some"), {}, "--sample"),
        (("--format", "xml"), {}, "--format"),
        (("--request-rate", "0/5m"), {}, "--request-rate"),
        (("--concurrency", "0"), {}, "concurrency"),
        (("--emulate",), {}, "--emulate"),
        (("--base-url", "http://api.example"), {}, "unencrypted"),
        (("-a", "no/account"), {}, "--account must be"),
        (("-a", ""), {}, "--account must be"),
        ((), {"CLOUDFLARE_ACCOUNT_ID": "no/account"}, "CLOUDFLARE_ACCOUNT_ID must be"),
        ((), {"CLOUDFLARE_API_TOKEN": None}, "CLOUDFLARE_API_TOKEN"),
    ],
)
def test_a_mistake_in_the_command_exits_with_2_before_anything_is_sent(mixed, quick, arguments, env, what):
    command = mixed[:2] if "--base-url" in arguments else mixed
    ended = quick(*command, *arguments, env=env)
    assert (ended.code, ended.out) == (2, "")
    assert what in ended.err
    assert nothing_left()


def test_a_command_without_a_checkpoint_exits_with_2(folder, quick):
    assert quick("verify").code == 2


def test_a_file_that_is_not_a_checkpoint_exits_with_4(folder, quick):
    write_rows("rows.jsonl", 3)
    Path("empty").touch()
    for name in ("none", "rows.jsonl", "empty", "."):
        ended = quick("verify", name)
        assert (ended.code, ended.out) == (4, "")
        assert name in ended.err
    assert not list(Path().glob("*.verify*"))


def test_a_full_disk_exits_with_4_and_with_more_space_it_finishes(mixed, quick):
    ended = bulkwf(*mixed, limits={resource.RLIMIT_FSIZE: 20_000})
    assert (ended.code, ended.out) == (4, "")
    assert "Make room on the disk" in ended.err
    assert quick(*mixed).code == 1


def test_an_id_in_two_rows_is_missing_in_both(folder, service, quick):
    lists = "".join(row(n) for n in range(100)) + row(5)
    Path("rows.jsonl").write_text(lists)
    arguments = submitted(service, quick, folder.name)
    delete(service, folder.name, "row-5")
    ended = quick(*arguments)
    assert [(line["row"], line["id"]) for line in ended.lines] == [(5, "row-5"), (100, "row-5")]
    assert Counter("calls it existed" in line["message"] for line in ended.lines) == {True: 1, False: 1}
