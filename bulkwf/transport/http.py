"""The way to the service: one aiohttp session, and every trap of HTTP on the way closed.

Rules:

1. The network never raises: whatever happens comes back as a `Reply` or a `Fault`. An exception's own `status` means
   nothing (a garbled status line looks like a 400); only an answer that was read to its end has a status.
2. No redirect is followed, no environment read, no cookie kept, no body unpacked: rows and token go where they were
   told to go, and an answer is never larger than `MAX_BODY_BYTES`.
3. No exception of aiohttp leaves this file: their `repr` holds the token.
4. A request goes out once. aiohttp would send a GET again by itself, which no limit would count.
5. An answer is believed once: a copy, late on an idle connection, looks like the answer to the next request there.
   The service marks each of its answers (`cf-ray`).
"""

import asyncio
import errno
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
from bulkwf.options import Options, Target, without_password
from bulkwf.threads import in_daemon_thread
from bulkwf.transport.credentials import Credentials
from bulkwf.transport.upload import Upload

__all__ = ["AiohttpTransport"]

MAX_BODY_BYTES = 8 * 1_048_576
CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 15.0
USER_AGENT = "bulkwf"
JSON_BODY = {"Content-Type": "application/json"}
RAYS = 1_024
"""So many answers' marks are remembered."""
READ_HEADERS = ("cf-mitigated", "cf-ray", "date", "location", "ratelimit", "retry-after")
"""What is read of an answer's headers; the others are nobody's business."""

_NOT_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientHttpProxyError,
    aiohttp.ConnectionTimeoutError,
)
_FATAL = (
    aiohttp.ClientConnectorCertificateError,
    aiohttp.ServerFingerprintMismatch,
    aiohttp.InvalidURL,
)
_PROXY_REFUSALS = frozenset({403, 407})
"""With these a proxy refuses every CONNECT alike: the address is forbidden, or a password is wanted."""


class AiohttpTransport:
    """A `Transport` over aiohttp. Made inside the running loop, closed by `aclose`.

    Args:
        target: Where to.
        credentials: Sent with each request.
        options: Time-outs, proxy, certificate authorities, connections.
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
        self._base_url = target.base_url
        self._credentials = credentials
        self._options = options
        self._limited = options.rate.instances_per_s is not None or options.rate.requests_per_5m is not None
        self._clock = clock
        self._wall = wall
        self._tls = _tls_context(options.ca_file)
        self._timeout = aiohttp.ClientTimeout(total=options.timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._pool = self._open_pool()
        self._fresh = self._open_pool(fresh=True)
        self._retired: list[_Pool] = []
        self._refreshing = asyncio.Lock()
        self._rays: OrderedDict[str, None] = OrderedDict()

    async def send(self, request: Request, slot: Slot) -> Reply | Fault:
        """See `Transport.send`."""
        if request.body is None:
            return await self._exchange(request, slot, None, slot.written)
        body = _Body(request.body, slot, self._clock if self._limited else None)
        try:
            return await self._exchange(request, slot, body, body.answered)
        finally:
            body.unwatch()

    async def refresh_credential(self, credential: int) -> bool:
        """See `Transport.refresh_credential`."""
        async with self._refreshing:
            return await in_daemon_thread(lambda: self._credentials.renew(credential))

    def drop_connections(self) -> None:
        """See `Transport.drop_connections`. Requests under way on the old connections are let through to their end."""
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
        number = self._credentials.number
        url = self._base_url + request.path + ("?" + urlencode(request.query) if request.query else "")
        headers = self._credentials.headers if body is None else JSON_BODY | self._credentials.headers
        _slot.set(slot)
        try:
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
                        self.drop_connections()  # the answer that it came before is still on its way there
                        text = "a copy of an earlier answer: it has the same cf-ray"
                        return Fault(kind=FaultKind.IN_DOUBT, message=text, elapsed_s=self._clock() - started)
        except _LeaveLostError:
            text = "the leave to send was lost before the first byte"
            return Fault(kind=FaultKind.NOT_SENT, message=text, elapsed_s=self._clock() - started)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return _fault(error, self._clock() - started, self._options.proxy)
        if answer is None:
            text = f"an answer that is compressed, or larger than {MAX_BODY_BYTES:,} bytes"
            return Fault(kind=FaultKind.IN_DOUBT, message=text, elapsed_s=self._clock() - started)
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
        known = ray in self._rays
        self._rays[ray] = None
        if len(self._rays) > RAYS:
            self._rays.popitem(last=False)
        return known

    def _open_pool(self, *, fresh: bool = False) -> "_Pool":
        """A pool of connections; with *fresh* each request opens one of its own, which is closed after it."""
        connector = aiohttp.TCPConnector(
            limit=0,  # the limiter's business
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
            request_class=_ClientRequest,
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT},
        )
        session._retry_connection = False  # noqa: SLF001 - rule 4; there is no public way
        return _Pool(session)


_slot: ContextVar[Slot] = ContextVar("bulkwf_slot")
"""The slot of the request that the running task sends: aiohttp hands nothing of ours on to `_ClientRequest`."""


class _LeaveLostError(Exception):
    """The slot's leave to send was lost before the first byte."""


class _ClientRequest(aiohttp.ClientRequest):
    """A request that asks its slot just before its first byte, when the connection is there."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        if not _slot.get().writing():
            raise _LeaveLostError
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
    """A body that says when it has left: aiohttp's own trace hook fires before the write.

    Args:
        value: Its bytes.
        slot: Learns when the body has left this machine.
        clock: Monotonic seconds. None if no rate is limited: then `written` is called when asyncio has the body.
    """

    def __init__(self, value: bytes, slot: Slot, clock: Callable[[], float] | None) -> None:
        # Past BytesPayload's own constructor, which warns of bodies over 1 MiB.
        super(aiohttp.BytesPayload, self).__init__(value, content_type="application/json")
        self._size = len(value)
        self._slot = slot
        self._clock = clock
        self._upload: Upload | None = None

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        transport, size = getattr(writer, "transport", None), writer.output_size
        if transport is not None and self._clock is not None:
            self._upload = Upload(transport, self._slot.written, self._clock)
        await super().write_with_length(writer, content_length)
        await writer.drain()
        if self._upload is not None:  # which looks from timers of its own: what is waited for here delays the answer
            self._upload.follow(writer.output_size - size)
        else:
            self._slot.written()

    def answered(self) -> None:
        """The answer has begun."""
        if self._upload is not None:
            self._upload.answered()

    def unwatch(self) -> None:
        """The request has ended."""
        if self._upload is not None:
            self._upload.close()


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """The answer's body; None if it is compressed after all, or too large. Then its connection is closed."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    chunks, size = [], 0
    if encoding in ("", "identity"):
        async for chunk in response.content.iter_any():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                break
            chunks.append(chunk)
        else:
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    response.close()
    return None


def _fault(error: Exception, elapsed_s: float, proxy: str | None) -> Fault:
    """What is known of a request that raised. Only an error of connecting proves that nothing was sent."""
    cause = getattr(error, "os_error", error)
    what = type(error).__name__
    number = getattr(cause, "errno", None)
    if isinstance(cause, ssl.SSLError):  # its errno is OpenSSL's
        what = cause.reason or what
    elif isinstance(number, int) and number in errno.errorcode:
        what = f"{what} {errno.errorcode[number]}"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        what = f"the proxy {without_password(proxy or '')} answers CONNECT with HTTP {error.status}"
        kind = FaultKind.FATAL if error.status in _PROXY_REFUSALS else FaultKind.NOT_SENT
        message = f"no connection to the service: {what}"
    elif isinstance(error, _FATAL):
        certificate = getattr(error, "certificate_error", None)
        reason = getattr(certificate, "verify_message", "") or what
        kind, message = FaultKind.FATAL, f"no secure connection to the service: {reason}"
    elif isinstance(error, aiohttp.ClientConnectorSSLError):
        kind, message = FaultKind.HANDSHAKE, f"no secure connection to the service: {what}"
    elif isinstance(error, _NOT_SENT):
        kind, message = FaultKind.NOT_SENT, f"no connection to the service: {what}"
    elif isinstance(error, TimeoutError):
        kind, message = FaultKind.IN_DOUBT, "no answer in time"
    else:
        kind, message = FaultKind.IN_DOUBT, f"the connection broke before the answer was complete: {what}"
    return Fault(kind=kind, message=message, elapsed_s=elapsed_s)


def _tls_context(ca_file: str | Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"CA file {ca_file}: no certificates could be read from it ({error}).") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
