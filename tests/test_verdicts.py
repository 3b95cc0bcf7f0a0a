"""What each verdict implies: the table is complete, and its flags agree with each other."""

import pytest

from bulkwf.attempt import Verdict
from bulkwf.service.verdicts import HANDLING, Action, table


def verdicts_where(attribute):
    return {verdict for verdict, handling in HANDLING.items() if getattr(handling, attribute)}


def test_every_verdict_has_a_row():
    assert set(HANDLING) == set(Verdict)


def test_only_an_attempt_that_may_have_created_instances_is_in_doubt():
    assert verdicts_where("in_doubt") == {Verdict.IN_DOUBT, Verdict.CONTRADICTION}


def test_accepted_verdict_is_neither_an_overload_nor_a_failed_look_up():
    assert not verdicts_where("accepted") & (verdicts_where("overload") | verdicts_where("lookup_failed"))


@pytest.mark.parametrize(
    "verdict", [v for v, h in HANDLING.items() if h.retries or h.proven_retries or h.remedy], ids=str
)
def test_only_a_verdict_that_backs_off_has_retries_and_a_remedy(verdict):
    assert HANDLING[verdict].action is Action.BACK_OFF


@pytest.mark.parametrize(
    "verdict", [v for v, h in HANDLING.items() if h.action is Action.BACK_OFF and h.retries < 1_000], ids=str
)
def test_verdict_that_can_end_the_run_has_a_remedy_of_its_own(verdict):
    remedy = HANDLING[verdict].remedy

    assert remedy.endswith(".")
    assert [handling.remedy for handling in HANDLING.values()].count(remedy) == 1


def test_documented_table_has_a_line_for_each_verdict():
    heading, rule, *lines = table()

    assert heading.count("|") == rule.count("|")
    assert [line.split("`")[1] for line in lines] == [verdict.value for verdict in HANDLING]
    assert all(line.count("|") == heading.count("|") for line in lines)
