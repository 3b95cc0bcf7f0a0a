"""The emulator on a real socket: its routes, its log, and each fault as a client meets it."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import aiohttp
import pytest

from bulkwf.emulator import Limits, Service, Target, emulate, params_crc, read_log, serve

TARGET = Target("acct", "resize")
HEADERS = {"Authorization": "Bearer token"}
GONE = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)


class Client:
    """A client of the emulator."""

    def __init__(self, session, emulator):
        self.session = session
        self.emulator = emulator
        self.service = emulator.service
        self.url = f"{emulator.base_url}/accounts/acct/workflows/resize"

    async def get(self, path="", **params):
        async with self.session.get(self.url + path, params=params, headers=HEADERS) as response:
            return response.status, await response.json()

    async def post(self, *ids, headers=HEADERS, timeout_s=5.0):
        body = json.dumps([{"instance_id": id_, "params": {"id": id_}} for id_ in ids])
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self.session.post(
            f"{self.url}/instances/batch", data=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            response.text_read = await response.text()
            return response

    async def create(self, *ids):
        response = await self.post(*ids)
        assert response.status == 200
        return [instance["id"] for instance in json.loads(response.text_read)["result"]]

    def held(self):
        return self.service.ids(TARGET)


@asynccontextmanager
async def talk(*faults, service=None, **options):
    service = service or Service(Limits(), time.monotonic)
    async with emulate(service, faults=faults, **options) as emulator, aiohttp.ClientSession() as session:
        yield Client(session, emulator)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (the emulator has no event for this)
            await asyncio.sleep(0.001)


# ── Routes ──


async def test_a_batch_is_created_looked_up_listed_and_counted():
    async with talk() as client:
        assert client.emulator.base_url.startswith("http://127.0.0.1:")
        assert await client.create("a", "b") == ["a", "b"]
        assert await client.create("b", "c") == ["c"]

        status, found = await client.get("/instances/a", simple="true")
        assert (status, found["result"]["status"], "steps" in found["result"]) == (200, "queued", False)
        status, missing = await client.get("/instances/x")
        assert (status, missing["errors"][0]["code"]) == (404, 10400)
        _, page = await client.get("/instances", per_page=2)
        assert [i["id"] for i in page["result"]] == ["c", "b"]
        _, rest = await client.get("/instances", per_page=2, cursor=page["result_info"]["cursor"])
        assert [i["id"] for i in rest["result"]] == ["a"]
        _, counts = await client.get()
        assert counts["result"]["instances"]["queued"] == 3
        assert (await client.get("/instances", per_page="many"))[0] == 400
        assert client.service.gets == 6


async def test_a_single_instance_is_created_and_a_taken_id_is_refused(tmp_path):
    async with talk(log=tmp_path / "log") as client:

        async def create(body):
            async with client.session.post(client.url + "/instances", data=body, headers=HEADERS) as response:
                answer = await response.json()
                return response.status, answer["result"] or answer["errors"][0]["code"]

        status, created = await create('{"instance_id":"a","params":1}')
        assert (status, created["id"], created["status"]) == (200, "a", "queued")
        assert await create('{"instance_id":"a"}') == (400, 10405)
        assert (await create("{}"))[0] == 200
        for bad in ("", "[]", '{"instance_id":"b"},{"instance_id":"c"}', '{"instance_id":"a b"}'):
            assert await create(bad) == (400, 10002)
        assert len(client.held()) == 2
        first, _ = read_log(tmp_path / "log")
        assert first == ("a", params_crc(b"1"))


async def test_instances_are_deleted_one_by_one_and_together():
    async with talk() as client:
        await client.create("a", "b", "c")
        async with client.session.delete(client.url + "/instances/a", headers=HEADERS) as response:
            assert (response.status, (await response.json())["result"]) == (200, {"success": True})
        async with client.session.post(
            client.url + "/instances/batch/delete", json={"instances": ["c", "x"]}, headers=HEADERS
        ) as response:
            result = (await response.json())["result"]
        assert (result["deleted"], [(e["id"], e["code"]) for e in result["errors"]]) == ([{"id": "c"}], [("x", 10400)])

        assert client.held() == ["b"]
        assert await client.create("a", "b") == ["a"]
        assert client.service.gets == 0


@pytest.mark.parametrize("path", ["", "/accounts/acct", "/accounts/acct/workflows/resize/steps"])
async def test_an_unknown_path_has_no_route(path):
    async with talk() as client, client.session.get(client.emulator.base_url + path) as response:
        assert (response.status, (await response.json())["errors"][0]["code"]) == (404, 7003)


async def test_an_unknown_method_of_a_path_has_no_route():
    async with talk() as client:
        for method, path in (("PUT", "/instances/batch"), ("PATCH", "/instances"), ("DELETE", "/instances")):
            async with client.session.request(method, client.url + path, headers=HEADERS) as response:
                assert response.status == 404


async def test_the_limit_headers_are_on_every_answer_and_retry_after_only_on_a_429():
    async with talk(service=Service(Limits(instances_per_s=2), time.monotonic)) as client:
        first, second = await client.post("a", "b"), await client.post("c")

        assert (first.status, second.status) == (200, 429)
        assert first.headers["Ratelimit-Policy"] == '"default";q=1200;w=300'
        assert first.headers["Ratelimit"] == '"default";r=1199;t=300'
        assert second.headers["Ratelimit"] == '"default";r=1198;t=300'
        assert ("Retry-After" in first.headers, second.headers["Retry-After"]) == (False, "1")
        assert client.held() == ["a", "b"]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [({}, 401), ({"Authorization": "token"}, 400), ({"X-Auth-Email": "e@example.com", "X-Auth-Key": "k"}, 200)],
)
async def test_a_request_is_authenticated_by_its_headers(headers, expected):
    async with talk() as client:
        assert (await client.post("a", headers=headers)).status == expected


async def test_a_body_over_the_limit_is_not_read_completely():
    async with talk(service=Service(Limits(max_body_bytes=1000), time.monotonic)) as client:
        assert (await client.post(*(c * 100 for c in "abcde"))).status == 413
        assert await client.create("a") == ["a"]


# ── The log ──


async def test_the_log_has_each_instance_created_with_the_checksum_of_its_params(tmp_path):
    log = tmp_path / "created.log"
    async with talk({"request": 2, "close": True, "partial": 1}, log=log) as client:
        await client.create("a", "b")
        with pytest.raises(GONE):
            await client.post("c", "d")
        assert await client.create("a", "d") == ["d"]
        assert [created.id for created in read_log(log)] == ["a", "b", "c", "d"]

    assert next(read_log(log)).crc == params_crc(b'{"id": "a"}')


async def test_a_log_with_a_cut_line_is_read_and_continued(tmp_path):
    log = tmp_path / "created.log"
    async with talk(log=log) as client:
        await client.create("a")
        await client.create("b")
    log.write_bytes(log.read_bytes()[:-10])

    assert [created.id for created in read_log(log)] == ["a"]
    async with talk(log=log) as client:
        await client.create("c")
    assert [created.id for created in read_log(log)] == ["a", "c"]


# ── Faults, each as a client meets it ──


@pytest.mark.parametrize(
    ("how", "held"), [({}, []), ({"when": "after"}, ["a", "b", "c"]), ({"partial": 2}, ["a", "b"])]
)
@pytest.mark.parametrize("ending", [{"status": 500}, {"reset": True}, {"close": True}, {"raw": "\x00garbage\r\n\r\n"}])
async def test_an_ending_comes_before_or_after_the_execution_of_the_request(ending, how, held):
    async with talk({"request": 1} | ending | how) as client:
        if "status" in ending:
            assert (await client.post("a", "b", "c")).status == 500
        else:
            with pytest.raises(aiohttp.ClientError):
                await client.post("a", "b", "c")
        assert client.held() == held
        assert client.emulator.fired == [1]

        assert await client.create("a", "b", "c") == ["a", "b", "c"][len(held) :]


@pytest.mark.parametrize(
    ("answer", "headers"),
    [
        ({"status": 429, "retry_after": 7}, {"Retry-After": "7"}),
        ({"status": 503, "html": True}, {"Content-Type": "text/html; charset=UTF-8"}),
        ({"status": 301, "headers": {"Location": "http://127.0.0.1:9/"}}, {"Location": "http://127.0.0.1:9/"}),
        ({"status": 200, "code": 10001}, {"Content-Type": "application/json"}),
        ({"status": 200, "body": "<"}, {"Content-Type": "application/json"}),
    ],
)
async def test_an_answer_of_the_script_replaces_the_services_own_answer(answer, headers):
    async with talk(answer) as client:
        response = await client.post("a")

        assert response.status == answer["status"]
        assert headers.items() <= dict(response.headers).items()
        assert client.held() == []


async def test_retry_after_is_a_date_where_the_script_says_so():
    async with talk({"status": 429, "retry_after": "date+5"}) as client:
        assert (await client.post("a")).headers["Retry-After"].endswith(" GMT")


@pytest.mark.parametrize("cut", [0, 20])
async def test_an_answer_is_cut_after_the_bytes_that_the_script_says(cut):
    async with talk({"request": 1, "truncate": cut}) as client:
        with pytest.raises(GONE):
            await client.post("a")
        assert client.held() == ["a"]
        assert await client.create("b") == ["b"]


async def test_the_second_copy_of_an_answer_follows_on_the_same_connection():
    async with talk({"request": 1, "twice": True}) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(client.url.split(":")[2].split("/")[0]))
        body = b'[{"instance_id":"a"}]'
        path = client.url.split("/", 3)[3]
        head = f"POST /{path}/instances/batch HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answers = await reader.readuntil(b"}]}") + await reader.readuntil(b"}]}")
        writer.close()
        await writer.wait_closed()

    assert answers.count(b"HTTP/1.1 200 OK") == answers.count(b'"id":"a"') == 2


@pytest.mark.parametrize(("when", "held"), [("before", []), ("after", ["a"])])
async def test_a_hanging_request_gets_no_answer(when, held):
    async with talk({"hang": True, "when": when}) as client:
        with pytest.raises(TimeoutError):
            await client.post("a", timeout_s=0.05)
        assert client.held() == held


async def test_a_delayed_request_is_executed_after_the_client_has_given_up():
    async with talk({"request": 1, "latency_s": 0.05}) as client:
        with pytest.raises(TimeoutError):
            await client.post("a", timeout_s=0.01)
        assert client.held() == []
        await until(client.held)


async def test_a_delayed_answer_comes_after_the_execution():
    async with talk({"latency_s": [0.03, 0.06], "when": "after"}) as client:
        asked = asyncio.create_task(client.create("a"))
        await until(client.held)
        assert not asked.done()
        assert await asked == ["a"]


async def test_instances_are_left_out_of_the_answer_whether_created_or_not():
    async with talk({"request": 1, "omit": 1}, {"request": 2, "omit_created": "^[cd]$"}) as client:
        assert await client.create("a", "b") == ["b"]
        assert client.held() == ["b"]
        assert await client.create("c", "d", "e") == ["e"]
        assert client.held() == ["b", "c", "d", "e"]


async def test_the_answer_names_ids_twice_and_ids_that_were_not_sent():
    async with talk({"request": 1, "repeat": True}, {"request": 2, "foreign": ["x"]}) as client:
        assert await client.create("a") == ["a", "a"]
        assert await client.create("b") == ["b", "x"]
        assert client.held() == ["a", "b"]


async def test_a_batch_with_an_id_that_the_script_refuses_is_refused():
    async with talk({"refuse_ids": "bad"}) as client:
        response = await client.post("a", "bad-1", "b")

        assert (response.status, json.loads(response.text_read)["errors"][0]["code"]) == (400, 10002)
        assert await client.create("a", "b") == ["a", "b"]


async def test_a_revoked_token_is_refused_from_that_request_on():
    async with talk({"request": 2, "revoke_token": True}) as client:
        assert [(await client.post(id_)).status for id_ in "abc"] == [200, 401, 401]
        assert (await client.post("d", headers={"Authorization": "Bearer new"})).status == 200
        assert client.held() == ["a", "d"]


async def test_the_connection_is_closed_after_the_answer():
    async with talk({"request": 2, "disconnect": True}) as client:
        answers = [await client.post(id_) for id_ in "abc"]

    assert [answer.headers.get("Connection") for answer in answers] == [None, "close", None]
    assert client.held() == ["a", "b", "c"]


async def test_the_same_seed_gives_the_same_faults():
    async def statuses(seed):
        async with talk({"every": 10, "status": 500}, {"chance": 0.3, "status": 503}, seed=seed) as client:
            return [(await client.post(f"i{n}")).status for n in range(20)]

    first = await statuses(1)

    assert (first[9], first[19]) == (500, 500)
    assert 0 < first.count(503) < 18
    assert first == await statuses(1) != await statuses(2)


# ── Start and stop ──


async def test_a_stop_ends_hanging_and_delayed_requests():
    async with talk({"request": 1, "hang": True}, {"request": 2, "latency_s": 60}) as client:
        asked = [asyncio.create_task(client.post(id_, timeout_s=30)) for id_ in "ab"]
        await until(lambda: client.service.requests == 2)
        began = time.monotonic()
        client.emulator.stop()
        answers = await asyncio.gather(*asked, return_exceptions=True)

    assert time.monotonic() - began < 1
    assert all(isinstance(answer, GONE) for answer in answers)
    assert client.held() == []


async def test_a_client_that_disconnects_within_its_body_has_no_effect_on_others(caplog):
    async with talk() as client:
        port = int(client.url.split(":")[2].split("/")[0])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        path = client.url.split("/", 3)[3]
        writer.write(f"POST /{path}/instances/batch HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n[".encode())
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()
        assert await client.create("a") == ["a"]

    assert [record.getMessage() for record in caplog.records if record.name.startswith("aiohttp")] == []


async def test_the_service_outlives_its_socket():
    service = Service(Limits(), time.monotonic)
    async with talk(service=service) as client:
        await client.create("a")
    async with talk(service=service) as client:
        assert await client.create("a", "b") == ["b"]


async def test_serve_runs_until_it_is_cancelled(tmp_path):
    started = asyncio.get_running_loop().create_future()
    service = Service(Limits(), time.monotonic)
    task = asyncio.create_task(serve(service, started=started.set_result, log=tmp_path / "log"))

    url = await started
    async with aiohttp.ClientSession() as session, session.get(url, headers=HEADERS) as response:
        assert response.status == 404
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
