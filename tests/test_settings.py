"""Settings: which layer wins, the origin of each value, and that errors name the origin."""

import re
from dataclasses import fields, is_dataclass
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.cli.flags import SETTINGS, ListFlags, RunFlags, ServiceFlags, flag_layer
from bulkwf.errors import ConfigError
from bulkwf.options import BatchLimits, Options, RateLimits, RetryPolicy, Target
from bulkwf.settings import (
    DEFAULT,
    NAMES,
    NOTATIONS,
    VARIABLES,
    Given,
    Settings,
    arguments,
    default_text,
    environment,
    parse_duration,
    parse_rate,
)

ACCOUNT = {"CLOUDFLARE_ACCOUNT_ID": "acct"}


# --- layers -------------------------------------------------------------------------------------------------------


def test_without_any_layer_the_options_are_the_defaults():
    assert Settings().options() == Options()
    assert Settings().origin("rate.instances_per_s") == DEFAULT
    assert Settings().get("rate.instances_per_s") is None


def test_no_flag_has_a_default_of_its_own():
    assert flag_layer(ListFlags(), RunFlags(), ServiceFlags()) == {}


def test_a_flag_wins_over_the_environment_and_that_over_a_file():
    variables = {"BULKWF_PROXY": "http://variable", "CLOUDFLARE_BASE_URL": "https://variable", **ACCOUNT}
    file = {
        "rate.concurrency": Given(3, "bulkwf.toml: rate.concurrency"),
        "base_url": Given("https://file", "bulkwf.toml: base_url"),
        "timeout_s": Given(5.0, "bulkwf.toml: timeout_s"),
    }
    flags = flag_layer(ServiceFlags(proxy="http://flag", concurrency=4), workflow="resize")
    settings = Settings(flags, environment(variables), file)

    options = settings.options()
    assert (options.proxy, options.rate.concurrency, options.timeout_s) == ("http://flag", 4, 5.0)
    assert options.rate == RateLimits(concurrency=4)
    assert settings.target() == Target(account_id="acct", workflow="resize", base_url="https://variable")
    assert [settings.origin(name) for name in ("proxy", "rate.concurrency", "base_url", "timeout_s", "run_key")] == [
        "--proxy",
        "--concurrency",
        "CLOUDFLARE_BASE_URL",
        "bulkwf.toml: timeout_s",
        DEFAULT,
    ]


def test_every_flag_reaches_its_field_of_options():
    layer = flag_layer(
        ListFlags(
            rate="7/s",
            request_rate="unlimited",
            batch_size=9,
            max_batch_bytes=2_048,
            row_shape="params",
            id_template="a-{b}",
            run_key="key",
            first=5,
        ),
        RunFlags(
            max_rejects=0,
            reject_omitted=True,
            drain_timeout="3s",
            in_doubt="resend",
            fail_on_existed=True,
            confirm_existing=False,
        ),
        ServiceFlags(concurrency=2, max_outage="2h", timeout="1.5m", proxy="http://proxy", ca_file="ca.pem"),
    )

    assert Settings(layer).options() == Options(
        batch=BatchLimits(instances=9, bytes=2_048),
        rate=RateLimits(instances_per_s=7, requests_per_5m=None, concurrency=2),
        retry=RetryPolicy(max_outage_s=7_200.0),
        row_shape="params",
        id_template="a-{b}",
        run_key="key",
        max_rejects=0,
        reject_omitted=True,
        confirm_existing=False,
        in_doubt="resend",
        fail_on_existed=True,
        first=5,
        timeout_s=90.0,
        drain_timeout_s=3.0,
        proxy="http://proxy",
        ca_file="ca.pem",
    )


def test_every_flag_variable_and_notation_belongs_to_a_setting():
    flags = {field.name for group in (ListFlags, RunFlags, ServiceFlags) for field in fields(group)}
    assert {SETTINGS.get(flag, flag) for flag in flags} <= NAMES
    assert {*SETTINGS.values(), *VARIABLES, *NOTATIONS} <= NAMES
    parts = {field.name for field in fields(Options) if is_dataclass(field.type)}
    assert parts == {"batch", "rate", "retry"}, "parts are found by their type"


def test_an_unknown_setting_is_a_bug():
    with pytest.raises(AssertionError, match=r"rate\.instances"):
        Settings({"rate.instances": Given(1, "--rate")})


def test_an_argument_that_is_none_is_not_given():
    assert arguments(workflow="resize", account_id=None) == {"workflow": Given("resize", "workflow")}


# --- the environment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {}),
        ({"CLOUDFLARE_ACCOUNT_ID": ""}, {}),
        ({"CLOUDFLARE_ACCOUNT_ID": " \n"}, {}),
        ({"CLOUDFLARE_ACCOUNT_ID": " acct\n"}, {"account_id": Given("acct", "CLOUDFLARE_ACCOUNT_ID")}),
        ({"CLOUDFLARE_BASE_URL": "b"}, {"base_url": Given("b", "CLOUDFLARE_BASE_URL")}),
        (
            {"CLOUDFLARE_API_BASE_URL": "a", "CLOUDFLARE_BASE_URL": "b"},
            {"base_url": Given("a", "CLOUDFLARE_API_BASE_URL")},
        ),
        ({"CLOUDFLARE_API_BASE_URL": "", "CLOUDFLARE_BASE_URL": "b"}, {"base_url": Given("b", "CLOUDFLARE_BASE_URL")}),
        ({"BULKWF_PROXY": "http://p\n"}, {"proxy": Given("http://p", "BULKWF_PROXY")}),
        ({"HTTPS_PROXY": "http://p", "PATH": "/bin"}, {}),
    ],
    ids=str,
)
def test_the_environment_is_read_without_surrounding_white_space(variables, expected):
    assert environment(variables) == expected


# --- errors name the origin ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (ListFlags(rate="0/s"), "--rate must be a number of at least 1, such as 100/s, or unlimited; it is '0/s'."),
        (ListFlags(request_rate="5/s"), "--request-rate must be a number of at least 1, such as 100/5m, or"),
        (ListFlags(batch_size=0), "--batch-size must be 1 to 100, not 0."),
        (ListFlags(max_batch_bytes=1), "--max-batch-bytes must be at least 1024, not 1."),
        (ListFlags(first=-1), "--first must be at least 0, not -1."),
        (ServiceFlags(concurrency=0), "--concurrency must be 1 to 1000, not 0."),
        (ServiceFlags(timeout="0s"), "--timeout must be more than 0 s, not 0.0."),
        (ServiceFlags(max_outage="soon"), "--max-outage must be a time like 90s, 30m or 2h, not 'soon'."),
        (ServiceFlags(proxy="ftp://p"), "--proxy must be like http://proxy.example:8080."),
        (ServiceFlags(proxy="http://me:hunter2@p"), "--proxy holds a user name or password"),
        (RunFlags(max_rejects=-1), "--max-rejects must be at least 0, not -1."),
    ],
    ids=str,
)
def test_an_error_about_a_flag_names_the_flag(flags, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as raised:
        Settings(flag_layer(flags)).options()

    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CLOUDFLARE_ACCOUNT_ID": "a/b"}, "CLOUDFLARE_ACCOUNT_ID must be 1 to 64 of the characters"),
        ({**ACCOUNT, "CLOUDFLARE_BASE_URL": "ftp://h"}, "CLOUDFLARE_BASE_URL 'ftp://h' would send the token"),
        ({**ACCOUNT, "CLOUDFLARE_API_BASE_URL": "https://u:hunter2@h"}, "CLOUDFLARE_API_BASE_URL holds a user name"),
        ({}, "no account id is given. Pass account_id (--account), or set CLOUDFLARE_ACCOUNT_ID."),
    ],
)
def test_an_error_about_a_variable_names_the_variable(variables, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as raised:
        Settings(arguments(workflow="resize"), environment(variables)).target()

    assert "hunter2" not in str(raised.value)


def test_an_error_about_the_proxy_of_the_environment_names_the_variable_and_not_the_value():
    with pytest.raises(ConfigError, match=r"^BULKWF_PROXY must be like") as raised:
        Settings(environment({"BULKWF_PROXY": "socks5://me:hunter2@p"})).options()

    assert "hunter2" not in str(raised.value)


def test_an_error_about_an_argument_names_the_argument():
    with pytest.raises(ConfigError, match=r"^base_url 'http://api\.example' would send"):
        Settings(arguments(workflow="w", account_id="a", base_url="http://api.example")).target()


# --- notations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("rate.instances_per_s", "100/s"),
        ("rate.requests_per_5m", "1000/5m"),
        ("retry.max_outage_s", "30m"),
        ("timeout_s", "1m"),
        ("drain_timeout_s", "20s"),
        ("batch.instances", "100"),
        ("row_shape", "instance"),
        ("confirm_existing", "True"),
    ],
)
def test_a_default_is_shown_as_people_write_it(setting, text):
    assert default_text(setting) == text


@given(
    st.one_of(st.none(), st.integers(1, 999_999_999)), st.sampled_from(["rate.instances_per_s", "rate.requests_per_5m"])
)
def test_a_rate_reads_back_as_it_is_shown(rate, setting):
    assert NOTATIONS[setting].parse("--rate", NOTATIONS[setting].text(rate)) == rate


@given(st.integers(0, 10**6).map(float) | st.integers(0, 10**4).map(lambda tenths: tenths / 10))
def test_a_duration_reads_back_as_it_is_shown(seconds):
    text = NOTATIONS["timeout_s"].text(seconds)
    assert parse_duration("--timeout", text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "rate"), [("100/s", 100), ("100", 100), ("unlimited", None)])
def test_a_rate_is_a_number_with_its_period_or_without(text, rate):
    assert parse_rate("--rate", text, "s") == rate


@pytest.mark.parametrize("text", ["", "0", "-1", "100/m", "1.5", "٣", "1/s\n", "inf", "9999999999"])
def test_a_rate_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--rate must be"):
        parse_rate("--rate", text, "s")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7_200), ("1d", 86_400), ("0s", 0)]
)
def test_a_duration_is_a_number_with_its_unit_or_of_seconds(text, seconds):
    assert parse_duration("--timeout", text) == seconds < inf


@pytest.mark.parametrize("text", ["", "-1s", "1w", "s", "1e3", "٣s", "1s\n", "inf", "nan"])
def test_a_duration_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match=r"^--timeout must be"):
        parse_duration("--timeout", text)
