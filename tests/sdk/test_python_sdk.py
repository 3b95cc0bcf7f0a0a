"""Cloudflare's SDK for Python, `cloudflare` 5.9.0: both its clients, against the emulator."""

import asyncio
import inspect
from datetime import UTC, datetime, timedelta
from uuid import UUID

import cloudflare
import pytest
from cloudflare.types.workflows import InstanceBulkResponse, InstanceGetResponse, InstanceListResponse
from command import ACCOUNT, TOKEN

from bulkwf.emulator import params_crc, read_log
from sdk import FAILING, INTRUDER, PARAMS, UNKNOWN_WORKFLOW, WORKFLOWS, WRONG_TOKEN, as_sent, emulated

pytestmark = pytest.mark.slow

MOST_PAGES = 50
"""Upper bound of the pages of a list, so that repeated pages end with a failure."""
HOUR = timedelta(hours=1)


async def value(answer):
    """The result of a call of either client."""
    return await answer if inspect.isawaitable(answer) else answer


async def pages(answer):
    """All pages of a list, as the SDK reads them."""
    found = [await value(answer)]
    while found[-1].has_next_page():
        assert len(found) < MOST_PAGES, "the list does not end"
        found.append(await value(found[-1].get_next_page()))
    return found


async def each(answer):
    """The items of a list, iterated as a user of the SDK does."""
    if hasattr(answer, "__aiter__"):
        async for item in answer:
            yield item
    else:
        for item in answer:
            yield item


async def items(answer):
    """All items of a list."""
    found = []
    async for item in each(answer):
        found.append(item)
        assert len(found) <= MOST_PAGES * 100, "the list does not end"
    return found


class User:
    """One workflow, through one client."""

    def __init__(self, client, workflow):
        self.client = client
        self.workflow = workflow
        self.instances = client.workflows.instances
        self.place = {"workflow_name": workflow, "account_id": ACCOUNT}

    def of(self, workflow):
        return User(self.client, workflow)

    def differing(self, **options):
        """The same client with other options; it shares the connections."""
        return User(self.client.with_options(**options), self.workflow)

    def ids(self, rows, start=0):
        return [f"{self.workflow}-{number}" for number in range(start, rows)]

    async def bulk(self, ids, **fields):
        return await items(self.instances.bulk(**self.place, body=[{"instance_id": id_, **fields} for id_ in ids]))

    async def create(self, *ids, **fields):
        return [one.id for one in await self.bulk(ids, **fields)]

    async def list(self, **query):
        return sorted(one.id for one in await items(self.instances.list(**self.place, **query)))

    async def get(self, id_, **query):
        return await value(self.instances.get(id_, **self.place, **query))

    async def details(self):
        return await value(self.client.workflows.get(**self.place))


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with emulated(tmp_path_factory.mktemp("sdk")) as service:
        yield service


@pytest.fixture(scope="module")
def unused():
    return iter(WORKFLOWS)


@pytest.fixture(params=[cloudflare.Cloudflare, cloudflare.AsyncCloudflare], ids=["sync", "async"])
async def user(request, service, unused):
    client = request.param(base_url=service.base_url, api_token=TOKEN, max_retries=0, timeout=20.0)
    yield User(client, next(unused))
    await value(client.close())


def codes(raised):
    return raised.value.status_code, [error.code for error in raised.value.errors]


# --- creating -----------------------------------------------------------------------------------------------------


async def test_a_full_batch_returns_typed_instances_in_order(user, service):
    ids = user.ids(100)
    created = await user.bulk(ids, params={"n": 1}, instance_retention={"success_retention": "2 days"})
    assert [one.id for one in created] == ids
    assert {type(one) for one in created} == {InstanceBulkResponse}
    assert {one.status for one in created} == {"queued"}
    [(workflow_id, version_id)] = {(one.workflow_id, one.version_id) for one in created}
    assert UUID(workflow_id) != UUID(version_id)
    assert [service.created[id_] for id_ in ids] == [1] * 100


async def test_a_batch_that_is_sent_again_returns_no_instances(user, service):
    ids = user.ids(100)
    assert await user.create(*ids) == ids
    assert await user.create(*ids) == []
    assert [service.created[id_] for id_ in ids] == [1] * 100


async def test_a_batch_with_existing_ids_returns_the_new_instances(user, service):
    taken = user.ids(100)[::3]
    await user.create(*taken)
    assert await user.create(*user.ids(100)) == [id_ for id_ in user.ids(100) if id_ not in taken]
    assert [service.created[id_] for id_ in user.ids(100)] == [1] * 100


async def test_an_instance_without_an_id_is_given_one(user):
    [created] = await items(user.instances.bulk(**user.place, body=[{"params": {}}]))
    assert (await user.get(created.id)).status == "queued"


async def test_params_arrive_unchanged(user, service):
    [id_] = await user.create(*user.ids(1), params=PARAMS)
    assert {one.crc for one in read_log(service.log) if one.id == id_} == {params_crc(as_sent(PARAMS))}


async def test_a_batch_with_a_bad_id_is_refused_as_a_whole(user):
    with pytest.raises(cloudflare.BadRequestError) as raised:
        await user.create("good", "größer")
    assert codes(raised) == (400, [10002])
    assert await user.list() == []


async def test_a_batch_that_is_too_large_is_refused(user):
    with pytest.raises(cloudflare.BadRequestError) as raised:
        await user.create(*user.ids(101))
    assert codes(raised) == (400, [10002])


async def test_a_single_instance_is_created_once(user, service):
    [id_] = user.ids(1)
    created = await value(user.instances.create(**user.place, instance_id=id_, params=PARAMS))
    assert (created.id, created.status) == (id_, "queued")
    assert UUID(created.workflow_id) != UUID(created.version_id)
    assert {one.crc for one in read_log(service.log) if one.id == id_} == {params_crc(as_sent(PARAMS))}
    with pytest.raises((cloudflare.BadRequestError, cloudflare.ConflictError)) as raised:
        await value(user.instances.create(**user.place, instance_id=id_))
    assert codes(raised)[1] == [10405]
    assert await user.create(id_) == []
    assert service.created[id_] == 1


# --- reading ------------------------------------------------------------------------------------------------------


async def test_iterating_a_list_reads_all_pages(user):
    for start in (0, 100, 200):
        await user.create(*user.ids(min(start + 100, 230), start))
    everything = sorted(user.ids(230))
    assert await user.list() == everything
    assert await user.list(per_page=100) == everything
    assert await user.list(per_page=23) == everything  # the last page is full


async def test_each_page_gives_its_number_and_the_total(user):
    await user.create(*user.ids(7))
    found = await pages(user.instances.list(**user.place, per_page=3))
    assert [len(page.result) for page in found] == [3, 3, 1, 0]  # the SDK reads until a page is empty
    assert [page.result_info.page for page in found] == [1, 2, 3, 4]
    assert [page.result_info.model_extra["count"] for page in found] == [3, 3, 1, 0]
    assert {page.result_info.per_page for page in found} == {3}
    assert {page.result_info.model_extra["total_count"] for page in found} == {7}


async def test_a_list_is_read_by_cursor(user):
    """The SDK pages by number: its users have to pass each cursor themselves."""
    await user.create(*user.ids(7))
    found, page = [], await value(user.instances.list(**user.place, per_page=3))
    while True:
        found += [one.id for one in page.result]
        cursor = page.result_info.model_extra.get("cursor")
        if cursor is None:
            break
        page = await value(user.instances.list(**user.place, per_page=3, cursor=cursor))
    assert sorted(found) == user.ids(7)


async def test_a_query_with_page_and_cursor_is_refused(user):
    with pytest.raises(cloudflare.BadRequestError):
        await user.list(page=2, cursor="1")


async def test_a_list_is_filtered_by_status(user):
    failing = [FAILING + id_ for id_ in user.ids(4)]
    await user.create(*user.ids(5), *failing)
    assert await user.list(status="queued", per_page=2) == user.ids(5)
    assert await user.list(status="errored", per_page=2) == failing
    assert await user.list(status="complete") == []


async def test_a_list_is_filtered_by_date(user):
    early, late = f"{user.workflow}-early", f"{user.workflow}-late"
    await user.create(early)
    await asyncio.sleep(0.02)
    moment = datetime.now(UTC)
    await asyncio.sleep(0.02)
    await user.create(late)

    def utc(time):
        return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    assert await user.list(date_end=utc(moment)) == [early]
    assert await user.list(date_start=utc(moment)) == [late]
    assert await user.list(date_start=utc(moment - HOUR), date_end=utc(moment + HOUR), per_page=1) == [early, late]
    assert await user.list(date_start=utc(moment + HOUR)) == []


async def test_a_date_with_an_offset_is_refused(user):
    """The SDK encodes a datetime with a time zone, UTC included, with an offset; the service accepts none."""
    with pytest.raises(cloudflare.BadRequestError) as raised:
        await user.list(date_start=datetime.now(UTC))
    assert raised.value.request.url.params["date_start"].endswith("+00:00")
    assert codes(raised) == (400, [10002])


async def test_an_instance_is_looked_up(user):
    good, bad = await user.create(*user.ids(1), FAILING + user.workflow)
    instance = await user.get(good)
    assert isinstance(instance, InstanceGetResponse)
    assert (instance.status, instance.success, instance.error) == ("queued", None, None)
    assert (instance.start, instance.end, instance.step_count, instance.steps) == (None, None, 0, [])
    assert instance.trigger.source == "api"
    assert abs(datetime.now(UTC) - instance.queued) < HOUR
    failed = await user.get(bad, simple="true")
    assert (failed.status, failed.success, failed.step_count) == ("errored", False, 0)
    assert failed.error.message
    assert failed.start <= failed.end


async def test_a_missing_instance_is_not_found(user):
    with pytest.raises(cloudflare.NotFoundError) as raised:
        await user.get("nobody")
    assert codes(raised) == (404, [10400])


async def test_a_workflow_counts_its_instances(user):
    await user.create(*user.ids(5), *(FAILING + id_ for id_ in user.ids(2)))
    details = await user.details()
    assert details.name == user.workflow
    assert {status: number for status, number in details.instances.items() if number} == {"queued": 5, "errored": 2}


# --- authentication -----------------------------------------------------------------------------------------------


async def test_every_call_with_a_wrong_token_is_refused(user):
    stranger = user.differing(api_token=WRONG_TOKEN)
    for call in (stranger.create(INTRUDER), stranger.list(), stranger.get(INTRUDER), stranger.details()):
        with pytest.raises(cloudflare.AuthenticationError) as raised:
            await call
        assert codes(raised) == (401, [10000])
    assert await user.list() == []


async def test_an_unknown_workflow_is_not_found(user):
    lost = user.of(UNKNOWN_WORKFLOW)
    for call in (lost.create("a"), lost.list(), lost.get("a"), lost.details()):
        with pytest.raises(cloudflare.NotFoundError) as raised:
            await call
        assert codes(raised) == (404, [10200])


# --- the SDK's own models -----------------------------------------------------------------------------------------


@pytest.fixture
def strict(user):
    """A client that checks each answer against the SDK's models."""
    return user.differing(_extra_kwargs={"_strict_response_validation": True})


async def test_the_answer_to_a_batch_fits_its_model(strict):
    assert await strict.create(*strict.ids(2)) == strict.ids(2)


async def test_the_list_fits_its_model(strict):
    await strict.create(*strict.ids(2))
    listed = await items(strict.instances.list(**strict.place))
    assert {type(one) for one in listed} == {InstanceListResponse}
    assert all(abs(datetime.now(UTC) - one.created_on) < HOUR for one in listed)
    assert all(one.modified_on >= one.created_on for one in listed)


async def test_the_details_of_a_workflow_fit_their_model(strict):
    details = await strict.details()
    assert details.created_on <= details.modified_on


async def test_the_answer_to_a_single_creation_fits_its_model(strict):
    [id_] = strict.ids(1)
    assert (await value(strict.instances.create(**strict.place, instance_id=id_))).id == id_


async def test_an_instance_has_the_keys_of_its_model(user):
    """Except `params`, which the emulator does not store, and `output`, which the model does not allow to be null."""
    [id_] = await user.create(*user.ids(1))
    response = await value(user.instances.with_raw_response.get(id_, **user.place))
    instance = (await value(response.json()))["result"]
    fields = InstanceGetResponse.model_fields.items()
    demanded = {field.alias or name for name, field in fields if field.is_required()}
    assert demanded - instance.keys() <= {"params"}
    [listed] = await items(user.instances.list(**user.place))
    assert (await user.get(id_)).version_id == listed.version_id
