"""Logs the latest requests of verifications of a checkpoint, and the token's quotas that the answers reported.

Runs and verifications that start later count these requests against their own limits. The log is beside the store:
`<checkpoint>.verify-requests`, or `<checkpoint>.verify-sample-requests` for a sample. Each line is a JSON array. A line
is written in the event loop, before its request is sent, so it is written with one system call that does not wait for
the disk.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec

from bulkwf.checkpoint import Past
from bulkwf.checkpoint.attempts import LAST_WORDS
from bulkwf.checkpoint.file import make_private
from bulkwf.clock import UNKNOWN_BOOT, Boot
from bulkwf.limits.quota import Said
from bulkwf.options import REQUEST_PERIOD_S
from bulkwf.verification.files import explained, foreign_file, request_log_path, store_paths

__all__ = ["RequestLog", "read_past", "remove_unneeded"]


class _Header(msgspec.Struct, frozen=True, array_like=True, tag="bulkwf verification requests"):
    """The first line: the boot by which the times of all other lines are counted."""

    boot_id: str
    booted_at: float


class _Sent(msgspec.Struct, frozen=True, array_like=True, tag="sent"):
    """A request left at this Unix time."""

    at: float


class _Said(msgspec.Struct, frozen=True, array_like=True, tag="said"):
    """See `limits.quota.Said`."""

    heard_at: float
    sent_at: float
    quota: str


class _Pause(msgspec.Struct, frozen=True, array_like=True, tag="pause"):
    """Nothing may be sent before this Unix time."""

    until: float


_Line = _Header | _Sent | _Said | _Pause
_encode = msgspec.json.Encoder().encode
_header = msgspec.json.Decoder(_Header)
_line = msgspec.json.Decoder(_Sent | _Said | _Pause)


class RequestLog:
    """The one writer of a request log. Made by `open`.

    Attributes:
        boot: The boot by which this session must count its times.
    """

    def __init__(self, path: Path, descriptor: int, boot: Boot) -> None:
        self.boot = boot
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, now: float, boot: Boot) -> Self:
        """Open the log at *path*, and remove the requests that no limit counts any more.

        Args:
            path: The file; the caller holds the store's lock.
            now: Unix time.
            boot: This boot, by the same clock as *now*.

        Raises:
            CheckpointError: Another program has a file of that name, or the folder can't be written.
        """
        with explained(path):
            stored = _read(path)
            if stored is None and path.exists() and path.stat().st_size:
                raise foreign_file(path)
            stored_boot, past = stored or (UNKNOWN_BOOT, Past([], 0.0, []))
            now -= boot.shift_s(stored_boot)
            boot = boot.going_on(stored_boot)
            return cls(path, _rewrite(path, boot, _binding(past, now - REQUEST_PERIOD_S)), boot)

    def sent(self, now: float) -> None:
        """Store that a request is about to be sent; *now* in Unix time."""
        self._append(_Sent(now))

    def said(self, said: Said) -> None:
        """Store the quota of the token that an answer reports. Its times are Unix times."""
        self._append(_Said(*said))

    def pause(self, until: float) -> None:
        """Store that nothing may be sent before *until* (Unix time)."""
        self._append(_Pause(until))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _append(self, line: _Line) -> None:
        with explained(self._path):
            _write(self._descriptor, [line])


def read_past(checkpoint: Path, since: float, boot: Boot = UNKNOWN_BOOT) -> Past:
    """The requests that verifications of *checkpoint* sent from *since* on, the last pause, and the latest quotas.

    Args:
        checkpoint: The checkpoint's file.
        since: Unix time.
        boot: The boot by which *since* and the returned times are counted.
    """
    past = Past([], 0.0, [])
    for store in store_paths(checkpoint):
        with contextlib.suppress(OSError):
            if (stored := _read(request_log_path(store))) is not None:
                shift_s = boot.shift_s(stored[0])
                past = past.joined(_binding(stored[1], since - shift_s).shifted(shift_s))
    return past


def remove_unneeded(path: Path, now: float) -> None:
    """Delete the log at *path* if no request of the last five minutes and no pause is in it.

    Args:
        path: The file; the caller holds the store's lock.
        now: Unix time, by the same clock as the log.
    """
    stored = _read(path)
    if stored is not None:
        _, past = stored
        if past.pause_until <= now and all(at <= now - REQUEST_PERIOD_S for at, _ in past.attempts):
            path.unlink()


def _read(path: Path) -> tuple[Boot, Past] | None:
    """The boot and the content of a log; None if there is no log. Damaged and incomplete lines are skipped."""
    try:
        first, *lines = path.read_bytes().split(b"\n")
        header = _header.decode(first)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    sent: list[tuple[float, int]] = []
    words: list[Said] = []
    pause_until = 0.0
    for text in lines:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            match _line.decode(text):
                case _Sent(at):
                    sent.append((at, 0))
                case _Said(heard_at, sent_at, quota):
                    words.append(Said(heard_at, sent_at, quota))
                case pause:
                    pause_until = max(pause_until, pause.until)
    return Boot(header.boot_id, header.booted_at), Past(sorted(sent), pause_until, sorted(words)[-LAST_WORDS:])


def _binding(past: Past, since: float) -> Past:
    """*past* without the requests that were sent before *since* and before its first quota was reported."""
    since = min([since, *(said.heard_at for said in past.words)])
    return past._replace(attempts=[(at, instances) for at, instances in past.attempts if at >= since])


def _rewrite(path: Path, boot: Boot, past: Past) -> int:
    """Replace the log by one that holds *past*, all of it or nothing; returns a descriptor that appends to the log."""
    new = path.with_name(path.name + "-new")
    new.unlink(missing_ok=True)
    if path.exists():
        make_private(path)  # refuses a file that every user may write
    make_private(new)
    descriptor = os.open(new, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        lines: list[_Line] = [_Header(*boot)]
        lines += [_Sent(at) for at, _ in past.attempts]
        lines += [_Said(*said) for said in past.words]
        lines += [_Pause(past.pause_until)] if past.pause_until else []
        _write(descriptor, lines)
        new.rename(path)
    except BaseException:
        os.close(descriptor)
        new.unlink(missing_ok=True)
        raise
    return descriptor


def _write(descriptor: int, lines: Iterable[_Line]) -> None:
    text = b"".join(_encode(line) + b"\n" for line in lines)
    while text:
        text = text[os.write(descriptor, text) :]
