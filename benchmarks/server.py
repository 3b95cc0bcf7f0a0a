"""A service that does nothing but answer, for measuring clients: `python benchmarks/server.py`.

It prints its base URL, creates whatever it is asked to create, and says at its end (SIGTERM), in JSON, what it has
answered and how busy it was: at 1.0 it would be the server that was measured, not the client.
"""

import asyncio
import gc
import json
import re
import signal
import time

HEAD_ENDS = b"\r\n\r\n"
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
IDS = re.compile(rb'"instance_id": *"([^"]*)"')
BEGIN = b'{"success":true,"errors":[],"messages":[],"result":[{"id":"'
BETWEEN = (
    b'","status":"queued","version_id":"6e8c6d4e-1b3a-4c8e-9f6a-2d5b7c1e0a44",'
    b'"workflow_id":"0b7f3c52-8d1e-4a6b-b3c9-5e2f7a9d4c18"},{"id":"'
)
END = BETWEEN[: -len(b',{"id":"')] + b"]}"


class Served:
    """What has been answered."""

    requests = 0
    instances = 0
    first_at = 0.0
    last_at = 0.0
    cpu_before_s = 0.0
    cpu_s = 0.0

    def told(self) -> dict[str, float]:
        """For whoever measures."""
        wall_s = self.last_at - self.first_at
        busy = (self.cpu_s - self.cpu_before_s) / wall_s if wall_s else 0.0
        return {"requests": self.requests, "instances": self.instances, "wall_s": wall_s, "busy": busy}


class Conversation(asyncio.Protocol):
    """One connection."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._data = bytearray()
        self._needed = 0
        self._body_at = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Someone has connected."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each request that is whole."""
        self._data += data
        while True:
            if not self._needed:
                end = self._data.find(HEAD_ENDS)
                if end < 0:
                    return
                head = self._data[:end]
                length = LENGTH.search(head)
                self._body_at = end + len(HEAD_ENDS)
                self._needed = self._body_at + (int(length[1]) if length else 0)
                if b"100-continue" in head:
                    self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if len(self._data) < self._needed:
                return
            body = bytes(self._data[self._body_at : self._needed])
            del self._data[: self._needed]
            self._needed = 0
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        served = self._served
        if not served.requests:
            served.first_at, served.cpu_before_s = time.monotonic(), time.process_time()
        ids = IDS.findall(body)
        served.requests += 1
        served.instances += len(ids)
        said = BEGIN + BETWEEN.join(ids) + END
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nCF-Ray: %016x-BEN\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % (served.requests, len(said)) + said)
        served.last_at, served.cpu_s = time.monotonic(), time.process_time()


async def serve() -> None:
    """Serve until a signal comes."""
    loop, served, ended = asyncio.get_running_loop(), Served(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    gc.disable()  # nothing here goes round
    async with await loop.create_server(lambda: Conversation(served), "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        print(f"http://127.0.0.1:{port}/client/v4", flush=True)
        await ended.wait()
    print(json.dumps(served.told()), flush=True)


if __name__ == "__main__":
    asyncio.run(serve())
