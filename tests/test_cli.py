"""The command line: usage errors, credentials, which output gets what, and outputs that fail."""

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from command import HERE, TOKEN, Forker, bulkwf, emulator, outcomes, shell, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def rows(folder):
    """A list of 250 rows."""
    return write_rows("rows.jsonl", 250)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Runs a command in a forked process, which is quick to start."""
    with Forker(tmp_path_factory.mktemp("outputs")) as forker:
        yield forker


# --- exit code 2: usage and configuration -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["fly"], "fly"),
        (["run", "rows.jsonl", "-w", "resize", "--fast"], "--fast"),
        (["run", "rows.jsonl"], "--workflow"),
        (["run", "-w", "resize"], "no input is named"),
        (["check"], "no input is named"),
        (["run", "rows.jsonl", "-w", "re/size"], "--workflow must be"),
        (["run", "rows.jsonl", "-w", "r" * 65], "--workflow must be"),
        (["run", "rows.jsonl", "-w", "resize", "-a", "../zones"], "--account must be"),
        (["run", "rows.jsonl", "-w", "resize", "--rate", "0/s"], "--rate must be"),
        (["run", "rows.jsonl", "-w", "resize", "--rate", "100/m"], "--rate must be"),
        (["run", "rows.jsonl", "-w", "resize", "--request-rate", "1000/s"], "--request-rate must be"),
        (["run", "rows.jsonl", "-w", "resize", "--max-outage", "soon"], "--max-outage must be"),
        (["run", "rows.jsonl", "-w", "resize", "--timeout", "0s"], "timeout must be"),
        (["run", "rows.jsonl", "-w", "resize", "--drain-timeout", "-1s"], "--drain-timeout"),
        (["run", "rows.jsonl", "-w", "resize", "--batch-size", "101"], "--batch-size must be 1 to 100"),
        (["run", "rows.jsonl", "-w", "resize", "--batch-size", "many"], "--batch-size"),
        (["run", "rows.jsonl", "-w", "resize", "--max-batch-bytes", "10"], "--max-batch-bytes must be"),
        (["run", "rows.jsonl", "-w", "resize", "--concurrency", "0"], "concurrency must be"),
        (["run", "rows.jsonl", "-w", "resize", "--max-rejects", "-1"], "max-rejects must be"),
        (["run", "rows.jsonl", "-w", "resize", "--row-shape", "csv"], "--row-shape"),
        (["run", "rows.jsonl", "-w", "resize", "--in-doubt", "perhaps"], "--in-doubt"),
        (["run", "rows.jsonl", "-w", "resize", "--id-template", "row"], "id template"),
        (["run", "rows.jsonl", "-w", "resize", "--id-template", "{n"], "id template"),
        (["run", "rows.jsonl", "-w", "resize", "--run-key", "a b"], "--run-key must be"),
        (["run", "-", "-w", "resize"], "-c FILE"),
        (["run", "rows.jsonl", "rows.jsonl", "-w", "resize"], "-c FILE"),
        (["run", "-", "-", "-w", "resize", "-c", "x"], "only once"),
        (["results", "x", "--outcome", "lost"], "--outcome"),
        (["results", "x", "--format", "xml"], "--format"),
        (["emulate", "--port", "65536"], "port must be 0-65535"),
        (["emulate", "--port", "0", "--faults", "rows.jsonl"], "rows.jsonl"),
    ],
)
def test_a_malformed_command_exits_with_2_names_what_is_wrong_and_touches_nothing(rows, arguments, reason, quick):
    ended = quick(*arguments)
    assert ended.code == 2
    assert reason in ended.err
    assert ended.err.startswith("bulkwf: ")
    assert ended.out == ""
    assert [file.name for file in Path().iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/client/v4", "unencrypted"),
        ("http://127.0.0.1.example.com", "unencrypted"),
        ("ftp://127.0.0.1", "unencrypted"),
        ("https://user:pass@example.com", "user name"),
        ("https://", "--base-url must be"),
        ("", "--base-url must be"),
        ("https://[::1", "can't be read"),
        ("https://127.0.0.1:99999", "can't be read"),
    ],
)
def test_an_unsafe_or_malformed_base_url_is_refused(rows, url, reason, quick):
    ended = quick("run", rows, "-w", "resize", "--base-url", url)
    assert ended.code == 2
    assert reason in ended.err


@pytest.mark.parametrize("name", ["CLOUDFLARE_API_BASE_URL", "CLOUDFLARE_BASE_URL"])
def test_a_base_url_from_the_environment_follows_the_same_rule(rows, name, quick):
    ended = quick(
        "run", rows, "-w", "resize", env={"CLOUDFLARE_API_BASE_URL": None, name: "http://example.com/client/v4"}
    )
    assert ended.code == 2
    assert "http://example.com" in ended.err


def test_a_flag_takes_precedence_over_the_base_url_of_the_environment(rows, quick):
    ended = quick("run", rows, "-w", "resize", "--base-url", "ftp://flag", env={"CLOUDFLARE_BASE_URL": "ftp://env"})
    assert "ftp://flag" in ended.err


def test_a_secret_in_the_value_of_a_flag_is_not_repeated(rows, quick):
    ended = quick("run", rows, "-w", "resize", f"--api-token={TOKEN}")  # `bulkwf` asserts that it is not printed
    assert ended.code == 2
    assert "unknown option --api-token;" in ended.err


def test_a_ca_file_that_holds_no_certificates_exits_with_2(rows, quick):
    ended = quick("run", rows, "-w", "resize", "--ca-file", rows)
    assert ended.code == 2
    assert "CA file rows.jsonl" in ended.err


# --- credentials --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CLOUDFLARE_API_TOKEN": None}, "no credential is given"),
        ({"CLOUDFLARE_API_TOKEN": None, "CLOUDFLARE_EMAIL": "a@example.com"}, "no credential is given"),
        ({"CLOUDFLARE_API_TOKEN": ""}, "CLOUDFLARE_API_TOKEN is empty"),
        ({"CLOUDFLARE_API_TOKEN": " \n"}, "CLOUDFLARE_API_TOKEN is empty"),
        ({"CLOUDFLARE_API_TOKEN": f"{TOKEN} {TOKEN}"}, "CLOUDFLARE_API_TOKEN holds a space"),
        ({"CLOUDFLARE_API_TOKEN": f"{TOKEN}\n{TOKEN}"}, "CLOUDFLARE_API_TOKEN holds a space, a control"),
        ({"CLOUDFLARE_API_TOKEN": f"{TOKEN}é"}, "CLOUDFLARE_API_TOKEN holds"),
        (
            {"CLOUDFLARE_API_TOKEN": None, "CLOUDFLARE_EMAIL": "a@example.com", "CLOUDFLARE_API_KEY": f"{TOKEN}\r"},
            "",
        ),
        ({"CLOUDFLARE_ACCOUNT_ID": None}, "CLOUDFLARE_ACCOUNT_ID"),
    ],
)
def test_a_missing_or_malformed_credential_exits_with_2_and_is_never_quoted(rows, env, reason, quick):
    ended = quick("run", rows, "-w", "resize", "--max-outage", "0s", env=env)
    # White space around a key is accepted: that run ends only at the port where nobody listens.
    assert ended.code == (2 if reason else 75)
    assert reason in ended.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"", "is empty"), (b"\n", "is empty"), (b"\xff\xfe", "non-ASCII"), (b"a b", "a space")],
)
def test_a_token_file_that_holds_no_token_exits_with_2(rows, content, reason, quick):
    if content is not None:
        Path("token").write_bytes(content)
    ended = quick("run", rows, "-w", "resize", "--api-token-file", "token")
    assert ended.code == 2
    assert "--api-token-file token" in ended.err
    assert reason in ended.err


def test_a_run_with_email_and_key_or_with_a_token_file_needs_no_token_in_the_environment(rows):
    Path("token").write_text(TOKEN + "\n")
    none = {"CLOUDFLARE_API_TOKEN": None}
    with emulator() as service:
        by_file = bulkwf("run", rows, *service.flags("a"), "-c", "a", "--api-token-file", "token", env=none)
        key = {"CLOUDFLARE_EMAIL": "a@example.com", "CLOUDFLARE_API_KEY": TOKEN}
        by_key = bulkwf("run", rows, *service.flags("b"), "-c", "b", env=none | key)
    assert (by_file.code, by_key.code) == (0, 0)
    assert outcomes("a") == outcomes("b") == {"created": 250}


# --- stdout carries data, stderr the rest -------------------------------------------------------------------------


def test_a_run_prints_its_summary_on_stderr_and_nothing_on_stdout(rows):
    ended = bulkwf("run", rows, *HERE)
    assert ended.code == 0
    assert ended.out == ""
    assert re.search(r"created +250\n", ended.err)
    assert "rows.jsonl.emulated.bulkwf" in ended.err


def test_a_run_with_json_prints_its_summary_as_one_object_on_stdout(rows):
    ended = bulkwf("run", rows, *HERE, "--json")
    assert ended.summary.items() >= {"created": 250, "pending": 0, "complete": True, "exit_code": 0}.items()
    assert ended.summary["checkpoint"] == "rows.jsonl.emulated.bulkwf"
    assert ended.out.count("\n") == 1


def test_a_quiet_run_that_succeeds_prints_nothing(rows):
    for flag in ("--quiet", "-q"):
        ended = bulkwf("run", rows, *HERE, flag)
        assert (ended.code, ended.out, ended.err) == (0, "", "")


def test_a_summary_can_name_a_checkpoint_whose_name_is_not_utf_8(rows):
    ended = bulkwf("run", rows, *HERE, "--json", "-c", os.fsdecode(b"d\xf6ne"))
    assert ended.code == 0
    assert ended.summary["checkpoint"] == "d\ufffdne"


def test_a_quiet_run_that_fails_prints_the_reason(rows, quick):
    ended = quick("run", "none.jsonl", *HERE, "--quiet")
    assert ended.code == 4
    why = "bulkwf: none.jsonl: the input can't be read: No such file or directory. Check its name and permissions.\n"
    assert ended.err == why


def test_check_prints_its_report_on_stderr(rows, quick):
    ended = quick("check", rows)
    assert ended.out == ""
    assert "250 rows" in ended.err


def test_help_and_version_are_on_stdout(quick):
    assert quick("--version").out.strip() == version("bulkwf")
    for arguments in (["--help"], ["run", "--help"], ["check", "--help"], ["status", "--help"], ["emulate", "--help"]):
        ended = quick(*arguments)
        assert ended.code == 0
        assert "Usage: bulkwf" in ended.out
        assert ended.err == ""


def test_the_help_of_run_explains_every_flag(quick):
    ended = quick("run", "--help", env={"COLUMNS": "200"})
    flags = set(re.findall(r"--[a-z0-9-]+", ended.out))
    expected = """--workflow --account --checkpoint --base-url --rate --request-rate --concurrency --batch-size
        --max-batch-bytes --row-shape --id-template --run-key --max-rejects --max-outage --timeout --drain-timeout
        --in-doubt --fail-on-existed --no-confirm-existing --new --first --api-token-file --proxy --ca-file --quiet
        --json --emulate"""
    assert flags >= set(expected.split())
    assert not {"--api-token", "--token"} & flags


# --- outputs that fail --------------------------------------------------------------------------------------------


def test_a_reader_that_stops_early_ends_results_without_an_error(folder, quick):
    rows = write_rows("rows.jsonl", 20_000)
    assert quick("run", rows, *HERE, "-c", "done", "-q").code == 0
    ended = shell("set -o pipefail; bulkwf results done | head -1")
    assert (ended.code, ended.err) == (0, "")
    assert len(ended.lines) == 1


@pytest.mark.parametrize(
    "arguments",
    [("results", "done"), ("results", "done", "--format", "csv"), ("status", "done"), ("status", "done", "--json")],
)
def test_a_reader_that_stops_before_the_first_byte_is_no_error(rows, arguments, quick):
    assert quick("run", rows, *HERE, "-c", "done", "-q").code == 0
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = bulkwf(*arguments, stdout=writer)
    finally:
        os.close(writer)
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("arguments", ["results done", "results done --format csv", "status done", "run --help"])
def test_a_full_disk_under_stdout_is_reported_and_exits_with_4(rows, arguments, quick):
    assert quick("run", rows, *HERE, "-c", "done", "-q").code == 0
    ended = shell(f"bulkwf {arguments} > /dev/full")
    assert ended.code == 4
    assert "No space left on device" in ended.err


def test_a_summary_that_nobody_reads_does_not_change_the_runs_exit_code(folder):
    Path("rows.jsonl").write_text("{}\nnonsense\n")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = bulkwf("run", "rows.jsonl", *HERE, "--json", stdout=writer)
    finally:
        os.close(writer)
    assert ended.code == 1
    assert outcomes("rows.jsonl.emulated.bulkwf") == {"created": 1, "invalid": 1}


def test_a_summary_that_cannot_be_written_is_reported(rows):
    ended = shell("bulkwf run rows.jsonl -w resize --emulate --rate unlimited --json > /dev/full")
    assert ended.code == 4
    assert "the summary can't be written: No space left on device" in ended.err
    assert outcomes("rows.jsonl.emulated.bulkwf") == {"created": 250}


@pytest.mark.parametrize("closed", ["2>/dev/full", "2>&-", ">&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_outputs_that_are_closed_or_full_do_not_end_a_run(rows, closed):
    ended = shell(f"bulkwf run rows.jsonl -w resize --emulate --rate unlimited -c done {closed}")
    assert ended.code == 0
    assert ended.out == ""  # messages for a closed stderr have not gone to stdout
    assert outcomes("done") == {"created": 250}


def test_errors_keep_their_exit_code_where_nobody_can_read_them(folder):
    assert shell("bulkwf run none.jsonl -w resize --emulate 2>/dev/full").code == 4
    assert shell("bulkwf run none.jsonl -w resize --emulate 2>&-").code == 4
    assert shell("bulkwf fly 2>/dev/full").code == 2


def test_a_closed_stdin_is_not_an_empty_list(folder):
    ended = shell("bulkwf run - -w resize --emulate -c done <&-")
    assert ended.code == 4
    assert "the input can't be read" in ended.err


def test_an_empty_account_is_malformed_not_missing(rows, quick):
    ended = quick("run", rows, "-w", "resize", "-a", "", env={"CLOUDFLARE_ACCOUNT_ID": "acct"})
    assert ended.code == 2
    assert "--account must be" in ended.err
