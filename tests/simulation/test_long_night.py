"""Two jobs on one account for a night: 28 virtual hours and ten million rows in `make torture`, else fewer."""

from pathlib import Path

import pytest
from fakes import memory_folder, run_virtual
from torture import figures, scaled

from bulkwf.checkpoint import read_status
from bulkwf.options import REQUEST_PERIOD_S
from simulation.night import DOWN_S, OUTAGE_S, PAUSE_S, RATE, gaps, play_night, report, spans

pytestmark = pytest.mark.slow

ROWS = scaled(60_000, 5_000_000)
"""Rows of each job."""
RECOVERY_S = 60.0
"""Longest wait between two attempts: how late the end of an outage is noticed."""


def test_the_times_in_the_report_of_a_long_night_add_up():
    with memory_folder() as folder:
        account, jobs = run_virtual(play_night(ROWS, Path(folder)))
        for job in jobs:
            figures.append(report(job))
            _check_rows(account, job)
            _check_time(account, job)
    assert account.admission.worst_window <= 2 * RATE
    assert set(account.admission.overruns) <= {"requests"}  # only in the pause that it asked for
    assert account.admission.overruns["requests"] <= len(jobs)


def _check_rows(account, job):
    """Each row has an instance, and the job reports it: created, or in doubt and then found."""
    first, last = (session.summary for session in job.sessions)
    assert not first.complete
    assert (last.complete, last.exit_code) == (True, 0)
    assert account.created[job.name] == b"\1" * ROWS
    assert (last.created + last.existed, last.existed) == (ROWS, last.existed_in_doubt)
    assert first.settled_now + last.settled_now == ROWS
    status = read_status(job.file)
    assert status.counts.pending == 0
    assert status.attempts == first.attempts + last.attempts


def _check_time(account, job):
    """Each second belongs to a session or to the time between two, and each gap is one that the service knows."""
    first, last = job.sessions
    assert first.began_at == 0.0
    assert last.began_at - first.ended_at == pytest.approx(DOWN_S, abs=1)
    for session in job.sessions:
        assert session.summary.elapsed_s == pytest.approx(session.ended_at - session.began_at, abs=1)
    assert first.summary.paused_s + last.summary.paused_s == pytest.approx(PAUSE_S, abs=1)

    found = spans(job)
    expected = gaps(account.answered_at[job.name])
    assert [(one.began_at, one.ended_at) for one in found] == [pytest.approx(span, abs=1) for span in expected]
    held_s = sum(one.long_s for one in found if one.why == "held back")
    (stopped,) = (one for one in found if one.why == "stopped")
    (paused,) = (one for one in found if "throttled" in one.why)
    (failing,) = (one for one in found if "in_doubt" in one.why)
    assert sum(one.why != "held back" for one in found) == 3
    # After the clock was set back, requests of the last minutes count as sent just now, for five minutes.
    recounted_s = REQUEST_PERIOD_S if last.skew_s < 0 else 0.0
    assert DOWN_S <= stopped.long_s + held_s < DOWN_S + recounted_s + 5
    assert paused.long_s == pytest.approx(PAUSE_S, abs=5)
    assert OUTAGE_S < failing.long_s < OUTAGE_S + RECOVERY_S
    assert (paused.began_at, failing.began_at) == pytest.approx((account.pausing[0], account.failing[0]), abs=5)
    sending_s = last.ended_at - sum(one.long_s for one in found)
    assert ROWS / RATE <= sending_s < 1.05 * ROWS / RATE
