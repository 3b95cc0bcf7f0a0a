"""Runs against a service: the outcomes of the rows, and the exit codes 0, 1, 3 and 75."""

import json
import os
import re
import signal
import socket
import threading
from collections import Counter
from pathlib import Path
from zlib import crc32

import pytest
from command import ACCOUNT, HERE, TOKEN, Running, bulkwf, closed_port, emulator, ids, outcomes, row, write_rows

from bulkwf import read_results

pytestmark = pytest.mark.slow


@pytest.fixture
def rows(folder):
    """A list of 250 rows."""
    return write_rows("rows.jsonl", 250)


def results(checkpoint, outcome):
    return list(read_results(checkpoint, outcome=outcome))


# --- exit code 0 --------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_run_whose_rows_are_all_created_exits_with_0_and_the_service_holds_each_once(rows):
    with emulator() as service:
        ended = bulkwf("run", rows, *service.flags())
        assert service.created == Counter(ids(250))
    assert ended.code == 0
    assert outcomes("rows.jsonl.bulkwf") == {"created": 250}
    assert [result.id for result in results("rows.jsonl.bulkwf", "created")] == [f"row-{n}" for n in range(250)]


def test_rows_that_existed_before_are_no_failure(rows):
    with emulator() as service:
        assert bulkwf("run", rows, *service.flags(), "-c", "first").code == 0
        ended = bulkwf("run", rows, *service.flags(), "-c", "second")
        assert service.created == Counter(ids(250))
    assert ended.code == 0
    assert "existed" in ended.err
    assert outcomes("second") == {"existed": 250}


def test_an_empty_list_exits_with_0_and_says_so(folder):
    Path("rows.jsonl").touch()
    Path("blank.jsonl").write_text("\n \n\n")
    for name in ("rows.jsonl", "blank.jsonl", "/dev/null"):
        ended = bulkwf("run", name, *HERE, "-c", f"{Path(name).name}.done")
        assert ended.code == 0
        assert "the list is empty" in ended.err


def test_a_finished_run_started_again_sends_nothing_and_says_so(rows):
    with emulator() as service:
        assert bulkwf("run", rows, *service.flags()).code == 0
        ended = bulkwf("run", rows, *service.flags(), "--json")
        assert "in 3 requests" in service.stop().err
    assert ended.code == 0
    assert "nothing new" in ended.err
    assert ended.summary.items() >= {"created": 250, "settled_now": 0, "attempts": 0}.items()


def test_rows_added_at_the_end_of_a_finished_list_are_submitted(rows):
    with emulator() as service:
        assert bulkwf("run", rows, *service.flags()).code == 0
        with Path(rows).open("a") as file:
            file.writelines(row(number) for number in range(250, 320))
        ended = bulkwf("run", rows, *service.flags(), "--json")
        assert service.created == Counter(ids(320))
    assert ended.code == 0
    assert ended.summary.items() >= {"created": 320, "settled_now": 70}.items()


def test_new_moves_a_finished_checkpoint_aside_and_starts_over(rows):
    with emulator() as service:
        assert bulkwf("run", rows, *service.flags()).code == 0
        ended = bulkwf("run", rows, *service.flags("other"), "--new")
    assert ended.code == 0
    assert outcomes("rows.jsonl.bulkwf") == {"created": 250}
    (aside,) = Path().glob("rows.jsonl.bulkwf.*")
    assert outcomes(aside) == {"created": 250}


def test_first_limits_the_rows_and_the_command_without_it_continues(rows):
    with emulator() as service:
        assert bulkwf("run", rows, *service.flags(), "--first", "120").code == 0
        assert service.created == Counter(ids(120))
        assert bulkwf("run", rows, *service.flags()).code == 0
        assert service.created == Counter(ids(250))


def test_a_rehearsal_in_the_emulator_does_not_affect_the_real_run(rows):
    none = dict.fromkeys(("CLOUDFLARE_API_TOKEN", "CLOUDFLARE_ACCOUNT_ID"))
    assert bulkwf("run", rows, *HERE, env=none).code == 0  # and needs no account
    with emulator() as service:
        assert bulkwf("run", rows, *service.flags()).code == 0
        assert service.created == Counter(ids(250))
    assert outcomes("rows.jsonl.emulated.bulkwf") == outcomes("rows.jsonl.bulkwf") == {"created": 250}


def test_params_reach_the_service_byte_for_byte_and_ids_come_from_a_template(folder):
    params = ['{"n":1,"x":1.00}', '{ "n" : 2, "big": 123456789012345678901234567890 }', '{"n":3,"t":"\\u00e9é"}']
    Path("rows.jsonl").write_text("".join(f'{{"params":{one}}}\n' for one in params))
    Path("bare.jsonl").write_text("".join(f"{one}\n" for one in params))
    template = ("--id-template", "order-{n}")

    sums = Counter(f"{crc32(one.encode()):08x}" for one in params)
    for name, flags in (("rows.jsonl", ()), ("bare.jsonl", ("--row-shape", "params"))):
        with emulator() as service:
            assert bulkwf("run", name, *service.flags(), *template, *flags).code == 0
            assert service.created_params == sums
            assert service.created == {"order-1": 1, "order-2": 1, "order-3": 1}


# --- exit code 1 --------------------------------------------------------------------------------------------------


def test_rows_that_the_service_rejects_are_isolated_and_exit_with_1(rows):
    faults = [{"refuse_ids": "^row-(17|130|131)$"}]
    with emulator(faults=faults) as service:
        ended = bulkwf("run", rows, *service.flags())
        assert service.created == Counter(ids(250) - {"row-17", "row-130", "row-131"})
    assert ended.code == 1
    assert "rows.jsonl:18: " in ended.err
    rejected = bulkwf("results", "rows.jsonl.bulkwf", "--outcome", "rejected").lines
    assert [(one["row"], one["id"]) for one in rejected] == [(17, "row-17"), (130, "row-130"), (131, "row-131")]
    assert all(isinstance(one["code"], int) and "is refused" in one["message"] for one in rejected)


BAD_ROWS = {
    "nonsense": "not_json",
    '["instance_id","a"]': "",
    '{"instance_id":"a","param":{}}': "unknown_key",
    '{"instance_id":"a b"}': "bad_id",
    '{"instance_id":""}': "bad_id",
    '{"instance_id":"batch"}': "reserved_id",
    '{"instance_retention":{"success_retention":"soon"}}': "bad_retention",
    '{"params":NaN}': "",
    '{"params":' + "[" * 2_000 + "]" * 2_000 + "}": "",
    '{"params":"' + "x" * 1_048_577 + '"}': "params_too_large",
    '{"params":"\udcff"}': "not_utf8",
    '{"params":{"text":"cut \\ud83d","n":1}}': "lone_surrogate",
    '{"instance_id":7}': "",
}


def test_invalid_rows_are_not_sent_are_named_with_their_place_and_exit_with_1(folder):
    lines = [line for number, bad in enumerate(BAD_ROWS) for line in (row(number), bad + "\n")]
    Path("rows.jsonl").write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    with emulator() as service:
        ended = bulkwf("run", "rows.jsonl", *service.flags())
        assert service.created == Counter(ids(len(BAD_ROWS)))
    assert ended.code == 1
    invalid = results("rows.jsonl.bulkwf", "invalid")
    assert [one.row for one in invalid] == [2 * number + 1 for number in range(len(BAD_ROWS))]
    for one, code in zip(invalid, BAD_ROWS.values(), strict=True):
        assert one.message
        assert code in ("", one.code), one
    assert "rows.jsonl:2: " in ended.err


def test_an_id_twice_in_one_batch_is_invalid_and_the_first_row_is_named(folder):
    Path("rows.jsonl").write_text(row(1) + row(2) + row(1))
    ended = bulkwf("run", "rows.jsonl", *HERE)
    assert ended.code == 1
    (twice,) = results("rows.jsonl.emulated.bulkwf", "invalid")
    assert (twice.row, twice.id, twice.code) == (2, "row-1", "duplicate_id")


def test_fail_on_existed_exits_with_1_where_rows_existed_before(rows):
    with emulator() as service:
        assert bulkwf("run", rows, *service.flags(), "-c", "first").code == 0
        ended = bulkwf("run", rows, *service.flags(), "-c", "second", "--fail-on-existed")
    assert ended.code == 1
    assert outcomes("second") == {"existed": 250}


def test_fail_on_existed_does_not_count_rows_that_this_run_may_have_created_itself(rows):
    faults = [{"method": "POST", "request": 2, "status": 500, "when": "after"}]
    with emulator(faults=faults) as service:
        ended = bulkwf("run", rows, *service.flags(), "--fail-on-existed", "--concurrency", "1", "--json")
        assert service.created == Counter(ids(250))
    assert ended.code == 0
    assert ended.summary.items() >= {"created": 150, "existed": 100, "existed_in_doubt": 100}.items()


# --- exit code 3 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 401}, "refuses the credential"),
        ({"status": 403}, "refuses the credential"),
        ({"status": 400, "code": 10000}, "refuses the credential"),
        ({"status": 405}, "refuses the run"),
        ({"status": 404, "code": 10200}, "Check the account id, the workflow's name"),
    ],
)
def test_a_service_that_refuses_the_run_exits_with_3_and_rejects_no_row(rows, fault, reason):
    with emulator(faults=[fault]) as service:
        ended = bulkwf("run", rows, *service.flags())
        assert not service.created
    assert ended.code == 3
    assert reason in ended.err
    assert not results("rows.jsonl.bulkwf", "rejected")
    assert results("rows.jsonl.bulkwf", "pending")


def test_a_workflow_that_does_not_exist_exits_with_3(rows):
    with emulator("--workflow", "resize") as service:
        ended = bulkwf("run", rows, *service.flags("resise"))
        assert bulkwf("run", rows, *service.flags("resize"), "-c", "right").code == 0
    assert ended.code == 3
    assert "the workflow's name" in ended.err
    assert set(outcomes("rows.jsonl.bulkwf")) == {"pending"}


def test_a_redirect_is_not_followed_but_exits_with_3(rows):
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        elsewhere.setblocking(False)
        location = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/client/v4"
        with emulator(faults=[{"status": 307, "headers": {"Location": location}}]) as service:
            ended = bulkwf("run", rows, *service.flags())
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    assert ended.code == 3
    assert not results("rows.jsonl.bulkwf", "rejected")


def test_a_token_that_is_revoked_between_two_sessions_rejects_no_row_and_a_new_one_finishes_the_list(folder):
    rows = write_rows("rows.jsonl", 2_000)
    with emulator(faults=[{"method": "POST", "request": 6, "revoke_token": True}]) as service:
        assert bulkwf("run", rows, *service.flags(), "--first", "500").code == 0
        ended = bulkwf("run", rows, *service.flags(), "--concurrency", "2")
        assert ended.code == 3
        assert "no row was rejected for this" in ended.err
        assert not results("rows.jsonl.bulkwf", "rejected")
        assert len(results("rows.jsonl.bulkwf", "created")) == 500
        again = bulkwf("run", rows, *service.flags(), env={"CLOUDFLARE_API_TOKEN": "another"})
        assert again.code == 0
        assert service.created == Counter(ids(2_000))
    assert outcomes("rows.jsonl.bulkwf") == {"created": 2_000}


def test_a_token_file_rotated_twice_in_one_run_is_read_again_and_the_run_goes_on(folder):
    # The list comes through a pipe, so that each new token is in the file before the row that revokes the old one.
    revoking = [{"contains_id": f"row-{number}", "times": 1, "revoke_token": True} for number in (150, 250)]
    Path("token").write_text(TOKEN)
    none = {"CLOUDFLARE_API_TOKEN": None}
    reader, writer = os.pipe()
    with emulator(faults=revoking) as service, os.fdopen(writer, "w") as pipe, os.fdopen(reader) as stdin:
        arguments = ("run", "-", *service.flags(), "-c", "done", "--api-token-file", "token")
        with Running(*arguments, env=none, stdin=stdin) as run:
            for turn in range(3):
                pipe.writelines(row(number) for number in range(turn * 100, turn * 100 + 100))
                pipe.flush()
                service.has_created(turn * 100 + 100)
                Path("token").write_text(f"{TOKEN}-{turn}\n")
            pipe.close()
            ended = run.wait()
        assert service.created == Counter(ids(300))
    assert ended.code == 0
    assert outcomes("done") == {"created": 300}


def test_more_rejected_rows_than_allowed_exit_with_3_and_the_rest_stays_pending(folder):
    rows = write_rows("rows.jsonl", 2_000)
    with emulator(faults=[{"refuse_ids": "5$"}]) as service:
        ended = bulkwf("run", rows, *service.flags(), "--max-rejects", "20", "--concurrency", "1")
    assert ended.code == 3
    assert "rows are rejected, more than the 20 allowed" in ended.err
    found = outcomes("rows.jsonl.bulkwf")
    assert 21 <= found["rejected"] < 30  # those of a batch that was in flight count too
    assert found["pending"] > 0
    assert found["created"] > 0


def test_a_first_batch_refused_with_one_error_ends_the_run_and_rejects_no_row(folder):
    rows = write_rows("rows.jsonl", 90)
    with emulator(faults=[{"refuse_ids": "."}]) as service:
        ended = bulkwf("run", rows, *service.flags())
        assert not service.created
    assert ended.code == 3
    assert "refuses the first rows alike" in ended.err
    assert outcomes("rows.jsonl.bulkwf") == {"rejected": 3, "pending": 87}


# --- exit code 75 -------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_service_that_is_down_exits_with_75_and_the_printed_command_finishes_the_list(rows):
    with closed_port() as base_url:
        ended = bulkwf("run", rows, "-w", "resize", "--base-url", base_url, "--max-outage", "1s")
    assert ended.code == 75
    assert "connection refused by 127.0.0.1:" in ended.err
    due = re.search(r"would be made ([\d.,]+) s after the first failure, but the run waits at most 1 s", ended.err)
    assert due
    assert float(due[1]) > 1  # also where the first failure was 0.99 s ago, and the next attempt is due in 0.02 s
    assert set(outcomes("rows.jsonl.bulkwf")) == {"pending"}
    assert "--max-outage 1s" in ended.resume_command


def test_errors_of_the_service_are_retried_until_they_end(rows):
    faults = [{"to": 4, "status": 503}, {"from": 5, "to": 6, "reset": True}, {"request": 7, "truncate": 20}]
    with emulator(faults=faults) as service:
        ended = bulkwf("run", rows, *service.flags(), "--concurrency", "1")
        assert service.created == Counter(ids(250))
    assert ended.code == 0


def test_a_full_queue_ends_with_75_and_its_rows_stay_pending(rows):
    with emulator("--max-queued", "0") as service:
        ended = bulkwf("run", rows, *service.flags(), "--max-outage", "3s")
        assert not service.created
    assert ended.code == 75
    assert set(outcomes("rows.jsonl.bulkwf")) == {"pending"}
    assert re.search(r"\(id row-\d+\) out of its answers", ended.err)
    assert "--reject-omitted" not in ended.err  # the flag gives up one or two rows, not a list


def test_the_last_row_that_stays_omitted_ends_with_75_and_is_named_with_its_place(rows):
    with emulator(faults=[{"method": "POST", "omit": "^row-249$"}]) as service:
        ended = bulkwf("run", rows, *service.flags(), "--max-outage", "3s", "--concurrency", "1")
    assert ended.code == 75
    assert "rows.jsonl:250 (id row-249)" in ended.err
    assert "--reject-omitted gives it up" in ended.err
    assert outcomes("rows.jsonl.bulkwf") == {"created": 249, "pending": 1}


def test_a_proxy_that_refuses_every_connection_exits_with_3_at_once_with_its_status(rows):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse():
            with listening.accept()[0] as client:
                client.recv(65_536)
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        place = f"127.0.0.1:{listening.getsockname()[1]}"
        env = {"CLOUDFLARE_API_TOKEN": TOKEN, "BULKWF_PROXY": f"http://me:proxy-password@{place}"}
        arguments = ("-w", "resize", "-a", ACCOUNT, "--base-url", "https://api.invalid/client/v4")
        ended = bulkwf("run", rows, *arguments, env=env)
    assert ended.code == 3
    assert f"the proxy {place} answers CONNECT with HTTP 407" in ended.err
    assert "proxy-password" not in ended.err


def test_a_queue_that_fills_during_the_run_loses_no_row(rows):
    with emulator("--max-queued", "130") as service:
        ended = bulkwf("run", rows, *service.flags(), "--max-outage", "3s", "--concurrency", "1")
        created = service.created
    assert ended.code == 75
    found = outcomes("rows.jsonl.bulkwf")
    assert found["existed"] == found["rejected"] == 0
    assert found["created"] == created.total() == 130


def test_a_pause_longer_than_the_longest_outage_ends_the_run_and_the_next_one(rows):
    with emulator(faults=[{"request": 1, "status": 429, "retry_after": 3_600}]) as service:
        arguments = ("run", rows, *service.flags(), "--max-outage", "10s", "--concurrency", "1")
        assert bulkwf(*arguments).code == 75
        again = bulkwf(*arguments)
        assert "in 1 request;" in service.stop().err
    assert again.code == 75
    assert re.search(r"ordered a pause of 3,(5\d\d|600) s more, but the run waits at most 10 s", again.err)


def test_a_short_pause_is_waited_for(rows):
    with emulator(faults=[{"request": 1, "status": 429, "retry_after": 1}]) as service:
        ended = bulkwf("run", rows, *service.flags(), "--json")
        assert service.created == Counter(ids(250))
    assert ended.code == 0
    assert ended.summary["paused_s"] > 0.9
    assert ended.summary["elapsed_s"] > 0.9


# --- under the limits ---------------------------------------------------------------------------------------------


def test_a_run_with_default_limits_is_never_throttled_by_the_emulators_limits(folder):
    rows = write_rows("rows.jsonl", 300)
    with emulator("--rate", "100/s", "--request-rate", "1200/5m", limited=True) as service:
        ended = bulkwf("run", rows, "-w", "resize", "--base-url", service.base_url, "--json")
        seen = service.stop().err
    assert ended.code == 0
    assert ended.summary["elapsed_s"] >= 2
    assert "the most attempted in any second: 100;" in seen
    assert "refused for a limit: 0" in seen


def test_status_and_results_can_be_read_during_the_run(folder):
    rows = write_rows("rows.jsonl", 300)
    with (
        emulator(faults=[{"method": "POST", "request": 3, "hang": True}]) as service,
        Running("run", rows, *service.flags(), "--concurrency", "1", "--drain-timeout", "0s") as run,
    ):
        service.has_created(200)
        while (status := bulkwf("status", "rows.jsonl.bulkwf", "--json").summary)["counts"]["created"] < 200:
            pass
        assert status["finished_at"] is None
        assert status["batches_in_doubt"] == 1
        assert json.loads(bulkwf("results", "rows.jsonl.bulkwf").out.splitlines()[-1])["id"] == "row-199"
        assert "not finished" in bulkwf("status", "rows.jsonl.bulkwf").out
        run.signal(signal.SIGTERM)
        assert run.wait().code == 143
