"""Sends HTTP requests through aiohttp.

Rules:

1. The network never raises: whatever happens is returned as a `Reply` or a `Fault`. An exception's own `status` means
   nothing (a garbled status line looks like a 400); only an answer that was read to its end has a status.
2. No redirect is followed, no proxy or password of the environment is used, no cookie is kept, no body is decompressed.
   So rows and token go to the base URL only, and an answer is never larger than `MAX_BODY_BYTES`.
3. No exception of aiohttp leaves this package: their `repr` holds the token.
4. A request is sent once. By default, aiohttp repeats a failed GET itself, and no limit would count that.
5. An answer is used once. A late copy of it on an idle connection looks like the answer to the next request there. The
   copy is recognised by its mark (`cf-ray`), which differs between answers.
6. Until the first byte of a request is sent, nothing is in doubt, whatever exception is raised.
"""

import asyncio
import ssl
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import urlencode

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection

from bulkwf.attempt import Fault, FaultKind, Reply, Request, Slot
from bulkwf.errors import ConfigError
from bulkwf.options import Options, Target
from bulkwf.text import clean
from bulkwf.threads import in_daemon_thread
from bulkwf.transport.credentials import Credentials
from bulkwf.transport.faults import MAX_HEADER_LINE_BYTES, MAX_HEADER_LINES, explain
from bulkwf.transport.upload import Upload

__all__ = ["AiohttpTransport"]

MAX_BODY_BYTES = 8 * 1_048_576
CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 15.0
USER_AGENT = "bulkwf"
JSON_BODY = {"Content-Type": "application/json"}
MARKS = 1_024
"""Number of answers whose marks (`cf-ray`) are remembered."""
READ_HEADERS = ("cf-mitigated", "cf-ray", "date", "location", "ratelimit", "retry-after")
"""The headers of an answer that are read."""


class AiohttpTransport:
    """A `Transport` over aiohttp. Made inside the running loop, closed by `aclose`.

    Args:
        target: The service.
        credentials: Sent with each request.
        options: Time limit, proxy and certificate authorities.
        clock: Monotonic seconds.
        wall: Unix time in seconds.
    """

    def __init__(
        self,
        target: Target,
        credentials: Credentials,
        options: Options,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._target = target
        self._credentials = credentials
        self._options = options
        self._clock = clock
        self._wall = wall
        self._tls = _tls_context(options.ca_file)
        self._timeout = aiohttp.ClientTimeout(total=options.timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._pool = self._open_pool()
        self._fresh = self._open_pool(fresh=True)
        self._retired: list[_Pool] = []
        self._refreshing = asyncio.Lock()
        self._marks: OrderedDict[str, None] = OrderedDict()

    async def send(self, request: Request, slot: Slot) -> Reply | Fault:
        """See `Transport.send`."""
        if request.body is None:
            return await self._exchange(request, slot, None, slot.written)
        body = _Body(request.body, slot, self._clock)
        try:
            return await self._exchange(request, slot, body, body.answered)
        finally:
            body.stop()

    async def refresh_credential(self, credential: int) -> bool:
        """See `Transport.refresh_credential`."""
        async with self._refreshing:
            return await in_daemon_thread(lambda: self._credentials.refresh(credential))

    def drop_connections(self) -> None:
        """See `Transport.drop_connections`. Requests in flight on the old connections are completed."""
        self._retired = [pool for pool in self._retired if not pool.session.closed]
        self._retired.append(self._pool)
        self._pool.retire()
        self._pool = self._open_pool()

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        for pool in (*self._retired, self._pool, self._fresh):
            await pool.session.close()

    async def _exchange(
        self, request: Request, slot: Slot, body: "_Body | None", answer_began: Callable[[], None]
    ) -> Reply | Fault:
        started = self._clock()
        sending = _Sending(slot)
        _sending.set(sending)
        try:
            return await self._request(request, body, answer_began, started)
        except _LeaseLostError:
            kind, message = FaultKind.NOT_SENT, "the lease was lost before the first byte was sent"
        except _UselessAnswerError as error:
            kind, message = FaultKind.IN_DOUBT, str(error)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            elapsed_s = self._clock() - started
            kind, message = explain(error, self._target, self._options, elapsed_s, began=sending.began)
        return Fault(kind=kind, message=message, elapsed_s=self._clock() - started)

    async def _request(
        self, request: Request, body: "_Body | None", answer_began: Callable[[], None], started: float
    ) -> Reply:
        """Send a request and read its answer. Raises the exceptions of aiohttp, and those defined below."""
        number = self._credentials.number
        url = self._target.base_url + request.path + ("?" + urlencode(request.query) if request.query else "")
        headers = self._credentials.headers if body is None else JSON_BODY | self._credentials.headers
        with self._fresh if request.fresh else self._pool as session:
            async with session.request(
                request.method,
                url,
                data=body,
                headers=headers,
                allow_redirects=False,
                proxy=self._options.proxy,
                timeout=self._timeout,
            ) as response:
                answer_began()
                answer = await _read(response)
                status, received = response.status, self._headers(response)
                if self._is_copy(received):
                    self.drop_connections()  # the answer to this request may still arrive on that connection
                    raise _UselessAnswerError("the answer is a copy of an earlier one: it has the same cf-ray")
        return Reply(
            status=status,
            headers=received,
            body=self._credentials.hide(answer),
            elapsed_s=self._clock() - started,
            received_at=self._wall(),
            credential=number,
        )

    def _headers(self, response: aiohttp.ClientResponse) -> dict[str, str]:
        given = response.headers
        return {name: self._hidden(", ".join(given.getall(name))) for name in READ_HEADERS if name in given}

    def _hidden(self, value: str) -> str:
        return self._credentials.hide(value.encode(errors="surrogateescape")).decode(errors="surrogateescape")

    def _is_copy(self, headers: Mapping[str, str]) -> bool:
        ray = headers.get("cf-ray")
        if ray is None:
            return False
        known = ray in self._marks
        self._marks[ray] = None
        if len(self._marks) > MARKS:
            self._marks.popitem(last=False)
        return known

    def _open_pool(self, *, fresh: bool = False) -> "_Pool":
        """A pool of connections. If *fresh*, each request opens a connection of its own, which is closed after it."""
        connector = aiohttp.TCPConnector(
            limit=0,  # the limiter bounds the number of requests
            ssl=self._tls,
            ttl_dns_cache=60,
            force_close=fresh,
            keepalive_timeout=None if fresh else KEEPALIVE_S,
        )
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=self._timeout,
            max_line_size=MAX_HEADER_LINE_BYTES,
            max_field_size=MAX_HEADER_LINE_BYTES,
            max_headers=MAX_HEADER_LINES,
            request_class=_ClientRequest,
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT},
        )
        session._retry_connection = False  # noqa: SLF001 - rule 4; there is no public way
        return _Pool(session)


class _Sending:
    """A request that is being sent.

    Attributes:
        slot: Its slot.
        began: Its first byte may have been sent.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.began = False


_sending: ContextVar[_Sending] = ContextVar("bulkwf_sending")
"""The request that the running task sends. aiohttp has no parameter that would pass it to `_ClientRequest`."""


class _LeaseLostError(Exception):
    """The slot's lease was lost before the first byte."""


class _UselessAnswerError(Exception):
    """The service has answered, but its answer can't be used. The message says why."""


class _ClientRequest(aiohttp.ClientRequest):
    """A request that asks its slot for permission just before it sends its first byte on an open connection."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        sending = _sending.get()
        if not sending.slot.writing():
            raise _LeaseLostError
        sending.began = True
        return await super().send(conn)


class _Pool:
    """A session that closes itself once it is retired and its last request has ended."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self._in_use = 0
        self._retired = False
        self._closing: asyncio.Task[None] | None = None

    def __enter__(self) -> aiohttp.ClientSession:
        self._in_use += 1
        return self.session

    def __exit__(self, *_: object) -> None:
        self._in_use -= 1
        self._close_if_idle()

    def retire(self) -> None:
        self._retired = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._retired and not self._in_use and self._closing is None:
            self._closing = asyncio.ensure_future(self.session.close())


class _Body(aiohttp.BytesPayload):
    """A body that reports when it has left this machine. aiohttp's own trace hook is too early: it precedes the write.

    Args:
        value: Its bytes.
        slot: Its `written` is called.
        clock: Monotonic seconds.
    """

    def __init__(self, value: bytes, slot: Slot, clock: Callable[[], float]) -> None:
        # Not BytesPayload's own constructor, which warns of bodies over 1 MiB.
        super(aiohttp.BytesPayload, self).__init__(value, content_type="application/json")
        self._size = len(value)
        self._slot = slot
        self._clock = clock
        self._upload: Upload | None = None

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        transport, size = getattr(writer, "transport", None), writer.output_size
        if transport is not None and self._slot.timed:  # None: the connection is lost, and the write fails
            self._upload = Upload(transport, self._slot.written, self._clock)
        await super().write_with_length(writer, content_length)
        await writer.drain()
        if self._upload is not None:  # it uses timers of its own, because a wait here would delay the answer
            self._upload.follow(writer.output_size - size)

    def answered(self) -> None:
        """The answer has begun."""
        if self._upload is not None:
            self._upload.answered()

    def stop(self) -> None:
        """The request has ended: stop watching."""
        if self._upload is not None:
            self._upload.close()


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The answer's body. If it is compressed or too large, its connection is closed, and an error raised."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        response.close()
        raise _UselessAnswerError(f"the answer is compressed ({clean(encoding, 20)}), which was not asked for")
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            response.close()
            raise _UselessAnswerError(f"the answer is larger than {MAX_BODY_BYTES:,} bytes")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _tls_context(ca_file: str | Path | None) -> ssl.SSLContext | bool:
    """The context for the authorities in *ca_file*. None: True, for aiohttp's own, which has the system's authorities.

    A second context with the system's authorities would cost every command about 30 ms.
    """
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"CA file {ca_file}: no certificates could be read from it ({error}).") from None
