"""Explains an exception of a request: whether the service may have received the request, and what happened, in words.

The words name hosts and causes. They quote no message of an aiohttp exception, which can hold the proxy's URL with its
password, or data from the other side.
"""

import errno
import os
import re
import ssl
from urllib.parse import SplitResult, urlsplit
from urllib.request import proxy_bypass

import aiohttp

from bulkwf.attempt import FaultKind
from bulkwf.options import Options, Target

__all__ = ["MAX_HEADER_LINES", "MAX_HEADER_LINE_BYTES", "explain"]

MAX_HEADER_LINE_BYTES = 32_768
"""Maximum size of a header line and of the status line of an answer, in bytes."""
MAX_HEADER_LINES = 256
"""Maximum number of header lines of an answer. Together they are at most as large as the largest body."""

_PROXY_REFUSALS = frozenset({403, 407})
"""Statuses with which a proxy refuses every CONNECT: the address is forbidden, or a password is required."""
_UNKNOWN_AUTHORITY = frozenset({2, 18, 19, 20, 21, 27})
"""OpenSSL's error codes for a certificate that no trusted authority has signed."""
_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"})
"""OpenSSL's reasons for a handshake that failed because the other side does not use TLS."""
_TOO_LARGE = ("Got more than", "Too many headers")
"""Beginnings of aiohttp's messages for a header section that exceeds a limit."""
_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_ERRNO = re.compile(r"\[Errno (\d+)\]")


def explain(
    error: Exception, target: Target, options: Options, elapsed_s: float, *, began: bool
) -> tuple[FaultKind, str]:
    """The kind of fault of a request that raised *error*, and what happened, in words.

    Args:
        error: The exception.
        target: Where the request was to go.
        options: Time limit, proxy and certificate authorities of the request.
        elapsed_s: Seconds since the request was started.
        began: The first byte may have been sent.
    """
    service = _host_and_port(urlsplit(target.base_url))
    if began:
        return FaultKind.IN_DOUBT, _broken(error, service, options.timeout_s)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return FaultKind.FATAL, _bad_certificate(error, _other_side(error, options), options)
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return FaultKind.HANDSHAKE, _failed_handshake(error, _other_side(error, options))
    if isinstance(error, aiohttp.InvalidURL):
        which = "the base URL" if options.proxy is None else "the base URL or the proxy"
        return FaultKind.FATAL, f"{which} has a host that can't be used: it {error.description or 'is malformed'}"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        kind = FaultKind.FATAL if error.status in _PROXY_REFUSALS else FaultKind.NOT_SENT
        return kind, f"{_proxy(options)} answers CONNECT with HTTP {error.status}"
    hint = _unused_proxy(target, options)
    return FaultKind.NOT_SENT, _no_connection(error, service, options, elapsed_s) + hint


# --- before the first byte ----------------------------------------------------------------------------------------


def _no_connection(error: Exception, service: str, options: Options, elapsed_s: float) -> str:
    if isinstance(error, TimeoutError):
        way = service if options.proxy is None else f"{service} through {_proxy(options)}"
        return f"no connection to {way} within {elapsed_s:.1f} s"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        whose = "the name" if options.proxy is None else "the proxy's name"
        return f"{whose} {error.host} can't be resolved ({_lower(error.os_error.strerror or 'no reason is known')})"
    if not isinstance(error, aiohttp.ClientConnectorError):
        if options.proxy is None:
            return f"no connection to {service} ({type(error).__name__})"
        return _broken(error, _proxy(options), options.timeout_s)  # it has not answered CONNECT
    there, numbers = _other_side(error, options), _numbers(error.os_error)
    if numbers == [errno.ECONNREFUSED]:
        return f"connection refused by {there}"
    if numbers:
        return f"no connection to {there}: {', '.join(_lower(os.strerror(number)) for number in numbers)}"
    return f"{there} ended the connection while it was being made ({type(error.os_error).__name__})"


def _numbers(error: OSError) -> list[int]:
    """Error numbers of the attempts to connect, one attempt for each kind of address. No number is repeated."""
    if error.errno is not None:
        return [error.errno]
    return [int(number) for number in dict.fromkeys(_ERRNO.findall(str(error)))]


def _bad_certificate(error: aiohttp.ClientConnectorCertificateError, there: str, options: Options) -> str:
    found = error.certificate_error
    if not isinstance(found, ssl.SSLCertVerificationError):
        return f"the certificate of {there} is not valid ({type(found).__name__})"
    reason = found.verify_message.rstrip(".")
    if found.verify_code not in _UNKNOWN_AUTHORITY:
        return f"the certificate of {there} is not valid: {reason}"
    if options.ca_file is None:
        place, advice = "this system does not trust", ". To trust it, name a file with its certificate: --ca-file"
    else:
        place, advice = f"{options.ca_file} (--ca-file) does not hold", ""
    return f"the certificate of {there} is signed by an authority that {place} ({reason}){advice}"


def _failed_handshake(error: aiohttp.ClientConnectorSSLError, there: str) -> str:
    reason = getattr(error.os_error, "reason", None) or type(error.os_error).__name__
    if reason in _NOT_TLS:
        return f"{there} does not answer in TLS ({reason})"
    return f"the TLS handshake with {there} failed ({reason})"


# --- after the first byte -----------------------------------------------------------------------------------------


def _broken(error: Exception, there: str, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no complete answer from {there} within {timeout_s:g} s (--timeout)"
    if isinstance(error, aiohttp.ClientResponseError):
        if error.message.startswith(_TOO_LARGE):
            line, lines = f"a line of more than {MAX_HEADER_LINE_BYTES:,} bytes", f"more than {MAX_HEADER_LINES} lines"
            return f"the header section of the answer from {there} is too large: it has {line}, or {lines}"
        return f"what {there} answers is not HTTP"
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"the body of the answer from {there} is incomplete or malformed"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return f"{there} closed the connection before its answer was complete"
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, ConnectionError) or number in (errno.ECONNRESET, errno.EPIPE):
        return f"{there} reset the connection before its answer was complete"
    cause = error.__cause__ if isinstance(error.__cause__, ssl.SSLError) else error
    if isinstance(cause, ssl.SSLError):  # its errno is OpenSSL's
        reason = f"TLS, {cause.reason or type(cause).__name__}"
    elif number is not None:
        reason = _lower(os.strerror(number))
    else:
        reason = type(error).__name__
    return f"the connection to {there} broke before the answer was complete ({reason})"


# --- names --------------------------------------------------------------------------------------------------------


def _host_and_port(url: SplitResult) -> str:
    return _joined(url.hostname or "", url.port or (443 if url.scheme == "https" else 80))


def _joined(host: str, port: int | None) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _proxy(options: Options) -> str:
    """The proxy, without its password."""
    return f"the proxy {_host_and_port(urlsplit(options.proxy or ''))}"


def _other_side(error: aiohttp.ClientConnectorError, options: Options) -> str:
    """The other side of the connection that failed: the proxy, or the service."""
    there = _joined(error.host, error.port)
    proxy = f"the proxy {there}"
    return proxy if options.proxy is not None and proxy == _proxy(options) else there


def _unused_proxy(target: Target, options: Options) -> str:
    """A hint if the environment names a proxy for the service, but no option does; otherwise empty."""
    name = next((name for name in _PROXY_VARIABLES if os.environ.get(name)), None)
    if name is None or options.proxy is not None or target.loopback:
        return ""
    if proxy_bypass(urlsplit(target.base_url).hostname or ""):  # NO_PROXY names the service
        return ""
    return f"; {name} is set and not used: give --proxy or BULKWF_PROXY"


def _lower(text: str) -> str:
    """*text* with its first letter in lower case, for use inside a sentence."""
    return text[:1].lower() + text[1:]
