"""The log of a verification's requests: what it holds, which limits count it, and how it fails."""

import errno
import os
import stat

import pytest
from fakes import EPOCH

from bulkwf.checkpoint import Past
from bulkwf.checkpoint.attempts import LAST_WORDS
from bulkwf.clock import UNKNOWN_BOOT, Boot
from bulkwf.errors import CheckpointError
from bulkwf.limits.quota import Said
from bulkwf.verification.files import request_log_path, store_path
from bulkwf.verification.request_log import RequestLog, read_past, remove_unneeded


@pytest.fixture
def path(folder):
    return folder / "run.bulkwf"


def log_of(path, sample=None):
    return request_log_path(store_path(path, sample))


def start(path, now=EPOCH, boot=UNKNOWN_BOOT, sample=None):
    return RequestLog.open(log_of(path, sample), now, boot)


def test_every_request_is_read_back_with_its_time(path):
    sent = [EPOCH + at for at in (0.0, 0.2, 0.99, 1.0, 7.5, 7.5)]
    log = start(path)
    for at in sent:
        log.sent(at)

    assert read_past(path, EPOCH - 1) == Past([(at, 0) for at in sent], 0.0, [])  # also while it is written
    log.close()
    start(path, EPOCH + 60).close()
    assert read_past(path, EPOCH - 1).attempts == [(at, 0) for at in sent]


def test_opening_drops_requests_that_no_limit_counts_any_more(path):
    log = start(path)
    for at in (0.0, 100.0, 200.0):
        log.sent(EPOCH + at)
    log.close()

    start(path, EPOCH + 400.0).close()

    assert read_past(path, 0).attempts == [(EPOCH + 100.0, 0), (EPOCH + 200.0, 0)]


def test_requests_before_the_asked_time_are_left_out(path):
    log = start(path)
    for at in (0.9, 100.2, 100.9, 300.0):
        log.sent(EPOCH + at)

    assert read_past(path, EPOCH + 100.5).attempts == [(EPOCH + 100.9, 0), (EPOCH + 300.0, 0)]


def test_requests_of_samples_and_of_whole_verifications_count_together(path):
    """The service counts all requests of a token."""
    whole, sample = start(path), start(path, sample=5)
    whole.sent(EPOCH + 1)
    sample.sent(EPOCH)
    whole.pause(EPOCH + 600)
    sample.pause(EPOCH + 60)

    assert read_past(path, 0) == Past([(EPOCH, 0), (EPOCH + 1, 0)], EPOCH + 600, [])


def test_a_shorter_pause_does_not_shorten_a_longer_one(path):
    log = start(path)
    log.pause(EPOCH + 600)
    log.pause(EPOCH + 5)
    assert read_past(path, 0).pause_until == EPOCH + 600
    log.close()
    start(path).close()
    assert read_past(path, 0).pause_until == EPOCH + 600


def test_the_last_quotas_are_read_back(path):
    words = [Said(EPOCH + 3.5, EPOCH + 3, "r=3;t=60"), Said(EPOCH + 4, EPOCH + 1, "r=2;t=60")]
    log = start(path)
    for number in range(LAST_WORDS):
        log.said(Said(EPOCH + number / 100, EPOCH, "r=900;t=300"))
    for said in words:
        log.sent(said.sent_at)
        log.said(said)
    log.close()
    start(path, EPOCH + 310).close()

    past = read_past(path, EPOCH + 300)

    assert len(past.words) == LAST_WORDS
    assert past.words[-2:] == words
    assert past.attempts == [(EPOCH + 1, 0), (EPOCH + 3, 0)]  # as far back as the words go


@pytest.mark.parametrize("set_s", [3_600, -3_600, 200_000])
def test_setting_the_clock_within_a_boot_changes_nothing(path, set_s):
    boot, later = Boot("a", EPOCH - 1_000), Boot("a", EPOCH - 1_000 + set_s)
    log = start(path, boot=boot)
    log.sent(EPOCH)
    log.pause(EPOCH + 60)
    log.said(Said(EPOCH + 1, EPOCH, "r=3;t=60"))
    log.close()

    log = start(path, EPOCH + 5 + set_s, later)

    assert log.boot == boot
    assert read_past(path, EPOCH - 1, log.boot) == Past([(EPOCH, 0)], EPOCH + 60, [Said(EPOCH + 1, EPOCH, "r=3;t=60")])
    past = read_past(path, EPOCH - 1 + set_s, later)
    assert past.attempts == [(EPOCH + set_s, 0)]
    assert past.pause_until == EPOCH + set_s + 60


def test_a_new_boot_counts_its_own_times(path):
    log = start(path, boot=Boot("a", EPOCH - 1_000))
    log.sent(EPOCH)
    log.close()

    log = start(path, EPOCH + 5, Boot("b", EPOCH - 10))

    assert log.boot == Boot("b", EPOCH - 10)
    assert read_past(path, 0, log.boot).attempts == [(EPOCH, 0)]


def test_a_damaged_or_half_written_line_is_left_out(path):
    log = start(path)
    log.sent(EPOCH)
    log.close()
    with log_of(path).open("ab") as file:
        file.write(b'["sent"]\n\xff\n["said",1,2,3]\n["sent",1760000001.0]\n["sent",17600')

    assert read_past(path, 0).attempts == [(EPOCH, 0), (EPOCH + 1, 0)]
    log = start(path)
    log.sent(EPOCH + 2)
    assert read_past(path, 0).attempts == [(EPOCH, 0), (EPOCH + 1, 0), (EPOCH + 2, 0)]


@pytest.mark.parametrize("text", [b"my own notes\n", b"\0" * 5_000])
def test_a_file_of_another_program_is_refused_and_not_changed(path, text):
    log_of(path).write_bytes(text)

    with pytest.raises(CheckpointError, match="another file has it"):
        start(path)

    assert log_of(path).read_bytes() == text
    assert read_past(path, 0) == Past([], 0.0, [])


def test_an_empty_file_is_replaced(path):
    log_of(path).touch()
    start(path).sent(EPOCH)
    assert read_past(path, 0).attempts == [(EPOCH, 0)]


def test_the_log_is_private(path):
    start(path).close()
    start(path).close()
    assert stat.S_IMODE(log_of(path).stat().st_mode) == 0o600
    log_of(path).chmod(0o666)
    with pytest.raises(CheckpointError, match="chmod 600"):
        start(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_ends_the_verification_with_what_to_do(path, monkeypatch, code):
    log = start(path)

    def full(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match="Make room on the disk and run the same command again"):
            log.sent(EPOCH)


def test_a_failed_start_keeps_the_log_as_it_was(path, monkeypatch):
    log = start(path)
    log.sent(EPOCH)
    log.close()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointError):
            start(path)

    assert read_past(path, 0).attempts == [(EPOCH, 0)]
    assert [file.name for file in path.parent.iterdir()] == [log_of(path).name]


@pytest.mark.parametrize(("now", "needed"), [(EPOCH + 299, True), (EPOCH + 301, False)])
def test_a_log_is_removed_once_no_request_binds_the_next(path, now, needed):
    log = start(path)
    log.sent(EPOCH)
    log.said(Said(EPOCH, EPOCH, "r=3;t=60"))
    log.close()
    remove_unneeded(log_of(path), now)
    assert log_of(path).exists() is needed


def test_a_log_that_is_gone_need_not_be_removed(path):
    remove_unneeded(log_of(path), EPOCH)
    assert list(path.parent.iterdir()) == []


def test_a_log_is_not_removed_during_a_pause(path):
    log = start(path)
    log.pause(EPOCH + 900)
    log.close()
    remove_unneeded(log_of(path), EPOCH + 899)
    assert log_of(path).exists()
    remove_unneeded(log_of(path), EPOCH + 900)
    assert not log_of(path).exists()
