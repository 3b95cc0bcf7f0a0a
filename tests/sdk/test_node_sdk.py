"""Cloudflare's SDK for TypeScript, `cloudflare` 7.3.0, from Node against the emulator."""

import json
import os
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from command import ACCOUNT, TOKEN
from node import installed

from bulkwf.emulator import params_crc, read_log
from sdk import FAILING, INTRUDER, PARAMS, UNKNOWN_WORKFLOW, WORKFLOWS, WRONG_TOKEN, as_sent, emulated

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TIMEOUT_S = 30.0
LISTED = {"id", "status", "created_on", "modified_on", "started_on", "ended_on", "version_id", "workflow_id"}
DESCRIBED = {"id", "name", "instances", "class_name", "script_name", "created_on", "modified_on", "triggered_on"}


class User:
    """One workflow, through the SDK. `run` makes all its calls in one process."""

    def __init__(self, service, workflow):
        self.base_url = service.base_url
        self.workflow = workflow
        self.calls = []

    def ids(self, rows, start=0):
        return [f"{self.workflow}-{number}" for number in range(start, rows)]

    def call(self, method, *args):
        self.calls.append({"method": f"workflows.{method}", "args": args})

    def bulk(self, *ids, **fields):
        body = [{"instance_id": id_, **fields} for id_ in ids]
        self.call("instances.bulk", self.workflow, {"account_id": ACCOUNT, "body": body})

    def create(self, id_, **fields):
        self.call("instances.create", self.workflow, {"account_id": ACCOUNT, "instance_id": id_, **fields})

    def list(self, **query):
        self.call("instances.list", self.workflow, {"account_id": ACCOUNT, **query})

    def get(self, id_, **query):
        self.call("instances.get", id_, {"account_id": ACCOUNT, "workflow_name": self.workflow, **query})

    def details(self):
        self.call("get", self.workflow, {"account_id": ACCOUNT})

    def run(self, token=TOKEN):
        """Make the calls; returns the result of each."""
        options = {"baseURL": self.base_url, "apiToken": token, "maxRetries": 0, "timeout": TIMEOUT_S * 500}
        done = subprocess.run(
            ["node", HERE / "client.mjs", installed(HERE / "package.json")],
            input=json.dumps({"options": options, "calls": self.calls}).encode(),
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        self.calls = []
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    installed(HERE / "package.json")
    with emulated(tmp_path_factory.mktemp("sdk")) as service:
        yield service


@pytest.fixture(scope="module")
def unused():
    return iter(WORKFLOWS)


@pytest.fixture
def user(service, unused):
    return User(service, next(unused))


def ids_of(outcome):
    return [one["id"] for one in outcome["answer"]["items"]]


# --- creating -----------------------------------------------------------------------------------------------------


def test_a_full_batch_returns_its_instances_in_order_and_a_second_time_none(user, service):
    ids = user.ids(100)
    user.bulk(*ids, params={"n": 1}, instance_retention={"success_retention": "2 days"})
    user.bulk(*ids, params={"n": 1})
    first, again = user.run()
    assert (ids_of(first), ids_of(again)) == (ids, [])
    assert {one["status"] for one in first["answer"]["items"]} == {"queued"}
    [(workflow_id, version_id)] = {(one["workflow_id"], one["version_id"]) for one in first["answer"]["items"]}
    assert UUID(workflow_id) != UUID(version_id)
    assert [service.created[id_] for id_ in ids] == [1] * 100


def test_a_batch_with_existing_ids_returns_the_new_instances(user, service):
    ids = user.ids(100)
    user.bulk(*ids[::3])
    user.bulk(*ids)
    first, second = user.run()
    assert ids_of(first) == ids[::3]
    assert ids_of(second) == [id_ for id_ in ids if id_ not in ids[::3]]
    assert [service.created[id_] for id_ in ids] == [1] * 100


def test_params_arrive_unchanged(user, service):
    [id_] = user.ids(1)
    user.bulk(id_, params=PARAMS)
    [outcome] = user.run()
    assert ids_of(outcome) == [id_]
    assert {one.crc for one in read_log(service.log) if one.id == id_} == {params_crc(as_sent(PARAMS))}


def test_a_batch_with_a_bad_id_is_refused_as_a_whole(user):
    user.bulk("good", "größer")
    user.list()
    refused, listed = user.run()
    assert refused == {"error": "BadRequestError", "status": 400, "codes": [10002]}
    assert ids_of(listed) == []


def test_a_single_instance_is_created_once(user, service):
    [id_] = user.ids(1)
    user.create(id_, params=PARAMS)
    user.create(id_)
    user.bulk(id_)
    created, refused, batch = user.run()
    assert (created["answer"]["id"], created["answer"]["status"]) == (id_, "queued")
    assert UUID(created["answer"]["workflow_id"]) != UUID(created["answer"]["version_id"])
    assert {one.crc for one in read_log(service.log) if one.id == id_} == {params_crc(as_sent(PARAMS))}
    assert refused["error"] in {"BadRequestError", "ConflictError"}
    assert refused["codes"] == [10405]
    assert ids_of(batch) == []
    assert service.created[id_] == 1


# --- reading ------------------------------------------------------------------------------------------------------


def test_iterating_a_list_reads_all_pages(user):
    for start in (0, 100, 200):
        user.bulk(*user.ids(min(start + 100, 230), start))
    user.list()
    user.list(per_page=100)
    user.list(per_page=23)  # the last page is full
    outcomes = user.run()[3:]
    assert [sorted(ids_of(one)) for one in outcomes] == [sorted(user.ids(230))] * 3


def test_each_page_gives_its_number_and_the_total(user):
    user.bulk(*user.ids(7))
    user.list(per_page=3)
    infos = user.run()[1]["answer"]["infos"]
    assert [info["page"] for info in infos] == [1, 2, 3, 4]
    assert [info["count"] for info in infos] == [3, 3, 1, 0]  # the SDK reads until a page is empty
    assert {(info["per_page"], info["total_count"]) for info in infos} == {(3, 7)}


def test_a_list_is_filtered_by_status(user):
    failing = [FAILING + id_ for id_ in user.ids(4)]
    user.bulk(*user.ids(5), *failing)
    user.list(status="queued", per_page=2)
    user.list(status="errored", per_page=2)
    user.list(status="complete")
    _, queued, errored, complete = user.run()
    assert (sorted(ids_of(queued)), sorted(ids_of(errored)), ids_of(complete)) == (user.ids(5), failing, [])


def test_a_list_is_filtered_by_date(user):
    early, late = f"{user.workflow}-early", f"{user.workflow}-late"
    user.bulk(early)
    user.run()
    time.sleep(0.02)
    moment = datetime.now(UTC)
    time.sleep(0.02)
    user.bulk(late)

    def utc(hours):
        return (moment + timedelta(hours=hours)).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    user.list(date_end=utc(0))
    user.list(date_start=utc(0))
    user.list(date_start=utc(-1), date_end=utc(1), per_page=1)
    user.list(date_start=utc(1))
    _, before, after, around, none = user.run()
    assert (ids_of(before), ids_of(after), ids_of(none)) == ([early], [late], [])
    assert sorted(ids_of(around)) == [early, late]


def test_an_instance_is_looked_up(user):
    [id_] = user.ids(1)
    failing = FAILING + id_
    user.bulk(id_, failing)
    user.get(id_)
    user.get(failing, simple="true")
    user.get("nobody")
    _, found, failed, missing = user.run()
    queued = found["answer"]
    assert (queued["status"], queued["success"], queued["error"], queued["end"]) == ("queued", None, None, None)
    assert (queued["step_count"], queued["steps"], queued["trigger"]) == (0, [], {"source": "api"})
    assert abs(datetime.now(UTC) - datetime.fromisoformat(queued["queued"])) < timedelta(hours=1)
    assert (failed["answer"]["status"], failed["answer"]["success"]) == ("errored", False)
    assert failed["answer"]["error"]["message"]
    assert missing == {"error": "NotFoundError", "status": 404, "codes": [10400]}


def test_a_workflow_counts_its_instances(user):
    user.bulk(*user.ids(5), *(FAILING + id_ for id_ in user.ids(2)))
    user.details()
    details = user.run()[1]["answer"]
    assert details["name"] == user.workflow
    assert {status: number for status, number in details["instances"].items() if number} == {"queued": 5, "errored": 2}


def test_answers_have_the_keys_of_the_sdks_types(user):
    """Except the params of an instance, which the emulator does not store."""
    user.bulk(*user.ids(1))
    user.list()
    user.get(*user.ids(1))
    user.details()
    _, listed, found, details = user.run()
    assert listed["answer"]["items"][0].keys() >= LISTED
    instance = {"queued", "start", "end", "status", "success", "error", "output", "step_count", "steps", "trigger"}
    assert found["answer"].keys() >= {*instance, "rollback", "versionId"}
    assert found["answer"]["versionId"] == listed["answer"]["items"][0]["version_id"]
    assert details["answer"].keys() >= DESCRIBED


# --- authentication -----------------------------------------------------------------------------------------------


def test_every_call_with_a_wrong_token_is_refused(user):
    user.bulk(INTRUDER)
    user.list()
    user.get(INTRUDER)
    user.details()
    assert user.run(token=WRONG_TOKEN) == [{"error": "AuthenticationError", "status": 401, "codes": [10000]}] * 4
    user.list()
    assert ids_of(user.run()[0]) == []


def test_an_unknown_workflow_is_not_found(user):
    user.workflow = UNKNOWN_WORKFLOW
    user.bulk("a")
    user.list()
    user.get("a")
    user.details()
    assert user.run() == [{"error": "NotFoundError", "status": 404, "codes": [10200]}] * 4
