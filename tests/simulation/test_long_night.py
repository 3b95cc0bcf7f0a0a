"""Two jobs on one account, a night through: in `make torture` 28 virtual hours and ten million rows, here less."""

from pathlib import Path

import pytest
from fakes import memory_folder, run_virtual
from torture import figures, scaled

from bulkwf.checkpoint import read_status
from bulkwf.options import REQUEST_PERIOD_S
from simulation.night import DOWN_S, OUTAGE_S, RATE, SILENCE_S, lulls, play_night, report, spans

pytestmark = pytest.mark.slow

ROWS = scaled(60_000, 5_000_000)
"""Of each job."""
RECOVERY_S = 60.0
"""A service that gets well is noticed no later: it is the longest wait between two attempts."""


def test_the_report_of_a_long_night_adds_up_to_the_second():
    with memory_folder() as folder:
        account, jobs = run_virtual(play_night(ROWS, Path(folder)))
        for job in jobs:
            figures.append(report(job))
            _check_rows(account, job)
            _check_time(account, job)
    assert account.admission.worst_window <= 2 * RATE
    assert set(account.admission.overruns) <= {"requests"}  # the silence that it ordered itself
    assert account.admission.overruns["requests"] <= len(jobs)


def _check_rows(account, job):
    """Each row has begun, and is told to have begun by the job: once, or in doubt and then found."""
    first, last = (session.summary for session in job.sessions)
    assert not first.complete
    assert (last.complete, last.exit_code) == (True, 0)
    assert account.begun[job.name] == b"\1" * ROWS
    assert (last.created + last.existed, last.existed) == (ROWS, last.existed_in_doubt)
    assert first.settled_now + last.settled_now == ROWS
    status = read_status(job.file)
    assert status.counts.pending == 0
    assert status.attempts == first.attempts + last.attempts


def _check_time(account, job):
    """Each second is one of a session or of the time between two, and each lull is one that the service knows."""
    first, last = job.sessions
    assert first.began_at == 0.0
    assert last.began_at - first.ended_at == pytest.approx(DOWN_S, abs=1)
    for session in job.sessions:
        assert session.summary.elapsed_s == pytest.approx(session.ended_at - session.began_at, abs=1)
    assert first.summary.paused_s + last.summary.paused_s == pytest.approx(SILENCE_S, abs=1)

    told = spans(job)
    known = lulls(account.answered_at[job.name])
    assert [(one.began_at, one.ended_at) for one in told] == [pytest.approx(span, abs=1) for span in known]
    held_s = sum(one.long_s for one in told if one.why == "held back")
    (stopped,) = (one for one in told if one.why == "stopped")
    (silent,) = (one for one in told if "throttled" in one.why)
    (ill,) = (one for one in told if "in_doubt" in one.why)
    assert sum(one.why != "held back" for one in told) == 3
    # Where the clock has gone back, requests of the last minutes count as sent just now: for their five minutes.
    recounted_s = REQUEST_PERIOD_S if last.skew_s < 0 else 0.0
    assert DOWN_S <= stopped.long_s + held_s < DOWN_S + recounted_s + 5
    assert silent.long_s == pytest.approx(SILENCE_S, abs=5)
    assert OUTAGE_S < ill.long_s < OUTAGE_S + RECOVERY_S
    assert (silent.began_at, ill.began_at) == pytest.approx((account.ordered[0], account.ill[0]), abs=5)
    sending_s = last.ended_at - sum(one.long_s for one in told)
    assert ROWS / RATE <= sending_s < 1.05 * ROWS / RATE
