"""Options: the documented defaults, and bounds whose errors name the field."""

import dataclasses
import pickle
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkwf.errors import BulkwfError, CheckpointError, ConfigError, InputError, ServiceRefused, TemporaryStop
from bulkwf.options import BatchLimits, Options, RateLimits, RetryPolicy, Target

HEAD = string.ascii_letters + string.digits + "_"
TAIL = HEAD + "-"
NAN = float("nan")


def target(**changes):
    return Target(
        **{"base_url": "https://api.cloudflare.com/client/v4", "account_id": "acc", "workflow": "resize"} | changes
    )


# --- defaults -----------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_that_the_documentation_names():
    options = Options()

    assert Target(account_id="a", workflow="w").base_url == "https://api.cloudflare.com/client/v4"
    assert options.batch == BatchLimits(instances=100, rows=1_000, bytes=1_048_576, linger_s=0.5)
    assert options.rate == RateLimits(instances_per_s=100, requests_per_5m=1_000, concurrency=16)
    assert options.retry == RetryPolicy(base_s=0.5, max_wait_s=60.0, max_outage_s=1_800.0)
    assert (options.row_shape, options.in_doubt, options.confirm_existing) == ("instance", "stop", True)
    assert (options.id_template, options.run_key, options.max_rejects, options.first) == (None, None, None, None)
    assert (options.timeout_s, options.drain_timeout_s) == (60.0, 20.0)
    assert (options.proxy, options.ca_file, options.fail_on_existed) == (None, None, False)


@pytest.mark.parametrize("value", [Options(), BatchLimits(), RateLimits(), RetryPolicy(), target()])
def test_options_are_immutable(value):
    name = dataclasses.fields(value)[0].name

    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


# --- bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "good", "bad"),
    [
        (BatchLimits, "instances", (1, 100), (0, -1, 101)),
        (BatchLimits, "rows", (100, 5_000), (99, 0)),
        (BatchLimits, "bytes", (1_024, 10**8), (1_023, 0)),
        (BatchLimits, "linger_s", (0, 0.0, 60), (-0.1, NAN)),
        (RateLimits, "instances_per_s", (None, 1, 300), (0, -5)),
        (RateLimits, "requests_per_5m", (None, 1, 1_200), (0, -5)),
        (RateLimits, "concurrency", (1, 1_000), (0, 1_001)),
        (RetryPolicy, "base_s", (0.001, 60.0), (0, -1, NAN, 61.0)),
        (RetryPolicy, "max_wait_s", (0.5, 3_600.0), (0.4, NAN)),
        (RetryPolicy, "max_outage_s", (0, 1e9), (-1, NAN)),
        (Options, "row_shape", ("instance", "params"), ("rows", "")),
        (Options, "in_doubt", ("stop", "resend"), ("ask", "")),
        (Options, "max_rejects", (None, 0, 10**9), (-1,)),
        (Options, "first", (None, 0, 10**9), (-1,)),
        (Options, "timeout_s", (0.1, 600), (0, -1, NAN)),
        (Options, "drain_timeout_s", (0, 600), (-1, NAN)),
        (Options, "run_key", (None, "a", "_x-1", "k" * 64), ("", "-a", "k" * 65, "a b", "a\n", "ä", "٣", "a/b", "a.b")),
    ],
)
def test_a_value_is_taken_within_its_bounds_and_refused_beyond_them(kind, name, good, bad):
    for value in good:
        assert getattr(kind(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            kind(**{name: value})
        if name != "base_s" or value != 61.0:  # the error of that one names max_wait_s
            assert str(caught.value).startswith(f"{name} must be ")
            assert repr(value) in str(caught.value), "the message says what was given"


@pytest.mark.parametrize(
    "proxy", ["http://proxy:3128", "https://proxy", "http://user:hunter2@proxy:3128", "http://[::1]:1"]
)
def test_a_proxy_is_an_http_address(proxy):
    assert Options(proxy=proxy).proxy == proxy


@pytest.mark.parametrize(
    "proxy",
    [
        "",
        "proxy:3128",
        "user:hunter2@proxy:3128",
        "socks5://user:hunter2@proxy",
        "http://",
        "http://user:hunter2@[proxy",
        "http://user:hunter2@proxy:99999",
        "http://user:hunter2@proxy:x",
        "http://user:hunter2@proxy:0",
        "http://user:hunter2@proxy\n",
        "http://user:hunter2@pro xy",
    ],
)
def test_a_proxy_of_another_kind_is_refused_without_repeating_its_credential(proxy):
    with pytest.raises(ConfigError, match="proxy must be like") as caught:
        Options(proxy=proxy)

    assert "hunter2" not in str(caught.value)


def test_the_repr_of_options_hides_the_password_of_the_proxy():
    assert "hunter2" not in repr(Options(proxy="http://user:hunter2@proxy:3128"))


def test_a_setting_error_can_be_pickled():
    """Process pools pickle the exceptions of their workers."""
    with pytest.raises(ConfigError) as caught:
        RateLimits(concurrency=0)

    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.setting) == (str(caught.value), "concurrency")


# --- the target ---------------------------------------------------------------------------------------------------


def test_the_repr_of_options_shows_all_settings_but_the_password():
    text = repr(Options(proxy="http://me:a-secret@proxy.example:8080", run_key="night"))
    assert "proxy='proxy.example:8080'" in text
    assert "me" not in re.findall(r"proxy='[^']*'", text)[0].replace("example", "")
    assert "a-secret" not in text
    named = re.findall(r"(?:^|[(, ])(\w+)=", re.sub(r"\w+\([^()]*\)", "", text.removeprefix("Options(")))
    assert set(named) == {one.name for one in dataclasses.fields(Options)}
    assert "run_key='night'" in text
    assert "proxy=None" in repr(Options())


def test_the_instances_path_names_account_and_workflow():
    assert target().instances_path == "/accounts/acc/workflows/resize/instances"


def test_slashes_at_the_end_of_the_base_url_are_dropped():
    assert target(base_url="https://h/v4//").base_url == "https://h/v4"


@pytest.mark.parametrize("name", ["workflow", "account_id"])
@pytest.mark.parametrize(
    "value",
    ["", "-a", "a/b", "..", ".", "a b", "a?b", "a#b", "a%2fb", "a\n", "\na", "ä", "٣", "a" * 65, "a\0", "a.b", "a\\b"],
)
def test_a_name_that_could_change_the_path_is_refused(name, value):
    with pytest.raises(ConfigError, match="1 to 64 of the characters"):
        target(**{name: value})


@given(name=st.builds(str.__add__, st.sampled_from(HEAD), st.text(TAIL, max_size=63)), part=st.sampled_from(["a", "w"]))
def test_an_allowed_name_becomes_one_segment_of_the_path(name, part):
    made = target(workflow=name) if part == "w" else target(account_id=name)

    segments = made.instances_path.split("/")
    assert segments == ["", "accounts", made.account_id, "workflows", made.workflow, "instances"]
    assert name in segments


@given(st.text())
def test_only_names_of_allowed_characters_pass_the_check(text):
    allowed = 1 <= len(text) <= 64 and text[0] in HEAD and all(c in TAIL for c in text)

    try:
        target(workflow=text)
    except ConfigError:
        assert not allowed
    else:
        assert allowed


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("https://api.cloudflare.com/client/v4", False),
        ("https://gateway.example:8443/x", False),
        ("https://localhost", True),
        ("http://localhost:8787/client/v4", True),
        ("http://LOCALHOST:8787", True),
        ("http://127.0.0.1:1", True),
        ("http://[::1]:8787", True),
    ],
)
def test_a_base_url_is_https_or_on_this_machine(url, loopback):
    assert target(base_url=url).loopback is loopback


@pytest.mark.parametrize(
    "url",
    [
        "http://api.cloudflare.com",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://127.0.0.2",
        "http://localhost\t.example.com",
        "http://[::2]",
        "ftp://localhost",
        "file:///etc/passwd",
        "api.cloudflare.com",
        "//api.cloudflare.com",
        "https://",
        "",
        "https://h/v4?x=1",
        "https://h/v4#x",
        "https://h:99999",
        "https://h:x",
        "https://[::1",
        "https://h/v4\n",
        "https://h/\tv4",
        "http://local\thost",
        "https://h/a b",
        " https://h",
    ],
)
def test_a_base_url_that_is_unsafe_or_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="base_url"):
        target(base_url=url)


@pytest.mark.parametrize("url", ["https://user:hunter2@h", "https://user@h", "https://:hunter2@h"])
def test_a_base_url_with_a_credential_is_refused_without_repeating_the_credential(url):
    with pytest.raises(ConfigError, match="user name or password") as caught:
        target(base_url=url)

    assert "hunter2" not in str(caught.value)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (ServiceRefused, 3), (InputError, 4), (CheckpointError, 4), (TemporaryStop, 75)],
)
def test_each_error_class_has_the_exit_code_of_who_must_act(error, code):
    raised = error("why")

    assert isinstance(raised, BulkwfError)
    assert (raised.exit_code, raised.summary, str(raised)) == (code, None, "why")
