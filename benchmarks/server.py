"""A service that only answers, for measuring clients: `python benchmarks/server.py`.

It prints its base URL, and creates each instance that is sent. At its end (SIGTERM) it prints, as JSON, the number of
answers and how busy it was. At 1.0, the server was measured, not the client.
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
    """Counts of the answers."""

    requests = 0
    instances = 0
    first_at = 0.0
    last_at = 0.0
    cpu_before_s = 0.0
    cpu_s = 0.0

    def report(self) -> dict[str, float]:
        """The counts, the seconds from the first answer to the last, and the share of the core that was used."""
        wall_s = self.last_at - self.first_at
        busy = (self.cpu_s - self.cpu_before_s) / wall_s if wall_s else 0.0
        return {"requests": self.requests, "instances": self.instances, "wall_s": wall_s, "busy": busy}


class Connection(asyncio.Protocol):
    """One connection."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._data = bytearray()
        self._needed = 0
        self._body_at = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
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

    def _answer(self, request: bytes) -> None:
        served = self._served
        if not served.requests:
            served.first_at, served.cpu_before_s = time.monotonic(), time.process_time()
        ids = IDS.findall(request)
        served.requests += 1
        served.instances += len(ids)
        body = BEGIN + BETWEEN.join(ids) + END
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nCF-Ray: %016x-BEN\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % (served.requests, len(body)) + body)
        served.last_at, served.cpu_s = time.monotonic(), time.process_time()


async def serve() -> None:
    """Serve until a signal arrives."""
    loop, served, ended = asyncio.get_running_loop(), Served(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    gc.disable()  # nothing here makes reference cycles
    async with await loop.create_server(lambda: Connection(served), "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        print(f"http://127.0.0.1:{port}/client/v4", flush=True)
        await ended.wait()
    print(json.dumps(served.report()), flush=True)


if __name__ == "__main__":
    asyncio.run(serve())
