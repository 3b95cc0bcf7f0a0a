"""The two services that are compared, and a client that shares no code with bulkwf's."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from command import ACCOUNT, PATIENCE_S, TOKEN
from real_engine.engine import WORKFLOWS, Engine

from bulkwf.emulator import Limits, Service, emulate, params_crc, read_log

WORKFLOW = WORKFLOWS[0]
_numbers = count(1)


def fresh(ids: int) -> list[str]:
    """*ids* new ids that no other test uses."""
    case = next(_numbers)
    return [f"case-{case}-{number}" for number in range(ids)]


@dataclass(frozen=True)
class Answer:
    """An answer. `body`: the decoded JSON, or the text where it is not JSON."""

    status: int
    headers: dict[str, str]
    body: Any

    def result(self, *also: str) -> Any:
        """The result of a success, whose envelope has the documented keys and those in *also*."""
        assert self.status == 200, self
        assert set(self.body) == {"success", "errors", "messages", "result", *also}
        assert (self.body["success"], self.body["errors"], self.body["messages"]) == (True, [], [])
        return self.body["result"]

    def refusal(self) -> tuple[int, int]:
        """Status and code of an error, in the documented envelope."""
        assert self.status >= 400, self
        assert set(self.body) == {"success", "errors", "messages", "result"}
        assert (self.body["success"], self.body["messages"], self.body["result"]) == (False, [], None)
        (error,) = self.body["errors"]
        assert set(error) == {"code", "message"}
        assert error["message"]
        return self.status, error["code"]


class Side:
    """One of the two services, as a caller sees it."""

    name: str

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def ask(
        self,
        method: str,
        path: str = "",
        body: Any = None,
        *,
        raw: bytes | None = None,
        workflow: str = WORKFLOW,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Send one request about a workflow. `raw`: the bytes of the body, instead of `body`, which is encoded."""
        url = urlsplit(f"{self.base_url}/accounts/{ACCOUNT}/workflows/{workflow}{path}")
        target = f"{url.path}?{url.query}" if url.query else url.path
        sent = raw if body is None else json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection(url.hostname, url.port, timeout=PATIENCE_S)) as connection:
            connection.request(
                method, target, sent, {"Authorization": f"Bearer {TOKEN}"} if headers is None else headers
            )
            response = connection.getresponse()
            text = response.read()
        try:
            decoded = json.loads(text)
        except ValueError:
            decoded = text.decode()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, decoded)

    def post(self, *items: Any, workflow: str = WORKFLOW) -> Answer:
        """Send a batch of these items."""
        return self.ask("POST", "/instances/batch", items, workflow=workflow)

    def create(self, *ids: str, workflow: str = WORKFLOW) -> list[str]:
        """Send a batch of instances with these ids and no params; return the ids that the answer names."""
        return names(self.post(*({"instance_id": id_} for id_ in ids), workflow=workflow))

    def has(self, id_: str) -> bool:
        """Whether there is an instance with this id."""
        return self.ask("GET", f"/instances/{id_}").status == 200

    def has_params(self, id_: str, text: str) -> bool:
        """Whether the params of the instance are the JSON *text*."""
        raise NotImplementedError

    def limited(self, **limits: Any) -> contextlib.AbstractContextManager["Side"]:
        """The same service with limits, where it has any."""
        raise NotImplementedError


def names(answer: Answer) -> list[str]:
    """The ids that the answer to a batch names."""
    return [instance["id"] for instance in answer.result()]


class EngineSide(Side):
    """Cloudflare's engine."""

    name = "engine"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.base_url)

    def has_params(self, id_: str, text: str) -> bool:
        found = self.ask("GET", f"/instances/{id_}").result()["params"]
        return _canonical(found) == _canonical(json.loads(text))

    def limited(self, **limits: Any) -> contextlib.AbstractContextManager[Side]:
        return contextlib.nullcontext(self)


def _canonical(value: Any) -> str:
    """Canonical JSON, because 1 == True in Python."""
    return json.dumps(value, sort_keys=True)


class EmulatorSide(Side):
    """The emulator, whose log has checksums of params."""

    name = "emulator"

    def __init__(self, base_url: str, folder: Path) -> None:
        super().__init__(base_url)
        self._folder = folder

    def has_params(self, id_: str, text: str) -> bool:
        crcs = [one.crc for one in read_log(self._folder / "log") if one.id == id_]
        return crcs == [params_crc(text.encode())]

    def limited(self, **limits: Any) -> contextlib.AbstractContextManager[Side]:
        folder = self._folder / str(next(_numbers))
        folder.mkdir()
        return emulator_side(folder, **limits)


@contextlib.contextmanager
def emulator_side(folder: Path, *, queued_s: float = 0.0, **limits: Any) -> Iterator[EmulatorSide]:
    """An emulator in its own thread; its log is in *folder*."""
    unlimited = {"instances_per_s": None, "account_instances_per_s": None, "requests_per_5m": None}
    service = Service(Limits(**unlimited | limits), time.time, workflows=WORKFLOWS, tokens=[TOKEN], queued_s=queued_s)
    started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stopped = asyncio.Event()
        async with emulate(service, log=folder / "log") as emulator:
            started.set_result((emulator.base_url, asyncio.get_running_loop(), stopped))
            await stopped.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    base_url, loop, stopped = started.result(PATIENCE_S)
    try:
        yield EmulatorSide(base_url, folder)
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
