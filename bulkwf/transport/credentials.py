"""The credential: its source, and how it is replaced when the service refuses it."""

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from bulkwf.errors import ConfigError

__all__ = [
    "Credentials",
    "Token",
    "TokenSource",
    "check_secret",
    "environment_credential",
    "file_credential",
    "token_credential",
    "token_source",
]

log = logging.getLogger("bulkwf")

SHORTEST_SECRET = 16
"""Minimum length of a redacted value, in characters. A shorter one could be ordinary text; no token is that short."""

LATEST_SECRETS = 8
"""Number of latest credentials that are redacted: answers to requests with an earlier credential may still arrive."""

Token = str | Callable[[], str]


class TokenSource(Protocol):
    """Returns the credential. Called once at the start, and again each time the service refuses the credential."""

    def __call__(self) -> Mapping[str, str]:
        """The headers that carry the credential.

        Raises:
            ConfigError: There is none, or it is malformed.
        """
        ...


class Credentials:
    """The credential in use.

    Args:
        source: Returns the credential. Called at once, and by `refresh`.

    Attributes:
        number: Number of the credential in use, counted from 0.
        headers: The headers that carry it.
        changed: Called with the new fingerprint when the credential changes, in the thread that calls `refresh`.
    """

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self.changed: Callable[[str], None] = lambda _: None
        self.number = 0
        self.headers: dict[str, str] = {}
        self._secrets: deque[bytes] = deque(maxlen=LATEST_SECRETS)
        self._use(dict(source()))

    def refresh(self, refused: int) -> bool:
        """Ask the source for a new credential; whether there is another one than number *refused*.

        The source is not asked if number *refused* was replaced already.
        """
        if refused != self.number:
            return True
        try:
            headers = dict(self._source())
        except Exception as error:  # noqa: BLE001 - the caller's own code; its message may hold the token
            log.warning(
                "the API token could not be read again (%s): the token that the service refused stays in use",
                type(error).__name__,
            )
            return False
        if headers == self.headers:
            return False
        self._use(headers)
        self.number += 1
        self.changed(self.fingerprint)
        return True

    @property
    def fingerprint(self) -> str:
        """A digest that identifies the credential and does not reveal it."""
        return hashlib.sha256(repr(sorted(self.headers.items())).encode()).hexdigest()

    def _use(self, headers: dict[str, str]) -> None:
        self.headers = headers
        secrets = (value.removeprefix("Bearer ").encode() for value in headers.values())
        self._secrets.extend(secret for secret in secrets if len(secret) >= SHORTEST_SECRET)

    def hide(self, text: bytes) -> bytes:
        """*text* with `***` in place of the latest credentials: an answer may quote its request."""
        for secret in self._secrets:
            text = text.replace(secret, b"***")
        return text

    def __repr__(self) -> str:
        return f"Credentials(number={self.number})"


def check_secret(name: str, value: object) -> str:
    """*value* without the white space around it, checked for use in a header. The error never quotes it.

    Raises:
        ConfigError: It is not a string, is empty, or holds a space, a control character or a non-ASCII character.
    """
    if isinstance(value, str) and (secret := value.strip()):
        if secret.isascii() and secret.isprintable() and " " not in secret:
            return secret
        flaw = "holds a space, a control character or a non-ASCII character. Its value is not shown here."
        del secret
    elif isinstance(value, str):
        flaw = "is empty. Put the API token there."
    else:
        flaw = f"must be text, or a function that returns it, not {type(value).__name__}."
    del value  # error trackers keep the locals of every frame
    raise ConfigError(f"{name} {flaw}")


def token_credential(token: Token | None) -> TokenSource:
    """The source of a token that a program passes; None means the credential in the environment."""
    if token is None:
        return environment_credential
    give = token if callable(token) else lambda: token
    return lambda: _bearer(check_secret("the API token", give()))


def _bearer(token: str) -> Mapping[str, str]:
    """The header that carries an API token."""
    return {"Authorization": f"Bearer {token}"}


def environment_credential() -> Mapping[str, str]:
    """The headers that carry the credential in the environment.

    Raises:
        ConfigError: There is none, or it is malformed.
    """
    if "CLOUDFLARE_API_TOKEN" in os.environ:
        return _bearer(check_secret("CLOUDFLARE_API_TOKEN", os.environ["CLOUDFLARE_API_TOKEN"]))
    if "CLOUDFLARE_EMAIL" in os.environ and "CLOUDFLARE_API_KEY" in os.environ:
        return {
            "X-Auth-Email": check_secret("CLOUDFLARE_EMAIL", os.environ["CLOUDFLARE_EMAIL"]),
            "X-Auth-Key": check_secret("CLOUDFLARE_API_KEY", os.environ["CLOUDFLARE_API_KEY"]),
        }
    raise ConfigError(
        "no credential is given. Set CLOUDFLARE_API_TOKEN (or CLOUDFLARE_EMAIL and CLOUDFLARE_API_KEY), or name a "
        "file that holds the token with --api-token-file."
    )


def file_credential(path: Path) -> TokenSource:
    """The source of a token in a file. The file is read at each call."""

    def read() -> Mapping[str, str]:
        try:
            return _bearer(check_secret(f"--api-token-file {path}", path.read_text("ascii")))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds a non-ASCII character"
            raise ConfigError(f"--api-token-file {path}: the token can't be read: {reason}.") from None

    return read


def token_source(file: Path | None) -> TokenSource:
    """The source of the command's credential: a file, or else the environment."""
    return environment_credential if file is None else file_credential(file)
