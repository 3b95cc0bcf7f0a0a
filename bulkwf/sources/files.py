"""Files of JSON lines, plain or gzip, read in order as one list; `-` is standard input."""

import os
import re
import stat
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio

from bulkwf.errors import InputError
from bulkwf.sources.source import Chunk
from bulkwf.threads import in_daemon_thread

__all__ = ["FileFeed"]

CHUNK_BYTES = 1_048_576
BOM = b"\xef\xbb\xbf"
GZIP_MAGIC = b"\x1f\x8b"
PIECE_BYTES = 8_192
"""Number of packed bytes that zlib gets at a time. At the end of a gzip member, it copies those that are left."""
_NO_PADDING = re.compile(rb"[^\0]")


class FileFeed:
    """Reads files in order. Checks all their names first: a wrong one ends the run before it begins."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)
        self._sizes = [_size(path) for path in paths]
        self._next = 0
        self._file: _File | None = None
        self._done_bytes = 0
        self._ends_in_line = False

    @property
    def read_share(self) -> float | None:
        """See `Feed.read_share`."""
        total = 0
        for size in self._sizes:
            if size is None:
                return None
            total += size
        current = self._file.read_bytes if self._file is not None else 0
        return min(1.0, (self._done_bytes + current) / total) if total else 1.0

    async def read(self) -> Chunk | None:
        """See `Feed.read`."""
        while True:
            part = None
            if self._file is None:
                if self._next == len(self._paths):
                    return None
                part = await self._open_next()
            assert self._file is not None
            try:
                data = await self._file.read() if part is None else await self._begin(self._file)
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"{self._file.name}: {_why(error)} Mend it and run the same command again.") from None
            if data:
                self._ends_in_line = not data.endswith(b"\n")
                return Chunk(data, part)
            ended_in_line, self._ends_in_line = self._ends_in_line, False
            await self._close()
            if ended_in_line:
                return Chunk(b"\n")

    async def aclose(self) -> None:
        """See `Feed.aclose`."""
        if self._file is not None:
            await self._close()

    @staticmethod
    async def _begin(file: "_File") -> bytes:
        """The first bytes of a file without the byte order mark. A pipe may give the mark in pieces, or alone."""
        if isinstance(file, _Gzip):
            await file.prove()
        data = await file.read()
        while data and BOM.startswith(data) and (more := await file.read()):
            data += more
        return data.removeprefix(BOM)

    async def _open_next(self) -> str:
        path = self._paths[self._next]
        self._next += 1
        self._ends_in_line = False
        try:
            self._file = await _open(path)
        except OSError as error:
            raise InputError(
                f"{path}: the input can't be read: {error.strerror}. Check its name and permissions."
            ) from None
        return "stdin" if path == "-" else Path(path).name

    async def _close(self) -> None:
        assert self._file is not None
        self._done_bytes += self._file.read_bytes
        file, self._file = self._file, None
        await in_daemon_thread(file.close)


class _File(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def read_bytes(self) -> int: ...
    async def read(self) -> bytes: ...
    def close(self) -> None: ...


class _RegularFile:
    """A file that is read in the event loop if its data is in memory, otherwise in a thread, as a disk may block.

    A read in a thread may hang and outlive the run. The descriptor is closed only after that read has returned:
    otherwise the system could give its number to another file, and the read would use that file.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.read_bytes = 0
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._in_thread = False
        self._closed = False
        self._start = os.lseek(descriptor, 0, os.SEEK_CUR)  # standard input may have been read from already
        self._size = os.fstat(descriptor).st_size - self._start

    async def read(self) -> bytes:
        if self._is_cached():
            data = os.read(self._descriptor, CHUNK_BYTES)
        else:
            data = await in_daemon_thread(self._read_in_thread)
        self.read_bytes += len(data)
        if not data and self.read_bytes < self._size:
            raise EOFError(f"the file shrank from {self._size:,} to {self.read_bytes:,} bytes while it was read.")
        return data

    def _read_in_thread(self) -> bytes:
        with self._lock:
            if self._closed:
                return b""
            self._in_thread = True
        try:
            return os.read(self._descriptor, CHUNK_BYTES)
        finally:
            self._leave_thread()

    def _leave_thread(self) -> None:
        with self._lock:
            self._in_thread = False
            if self._closed:
                self._release()

    def _is_cached(self) -> bool:
        """Whether the next chunk is in memory, judged by its last byte. False if the system can't say (not Linux)."""
        # Not -1 for an empty file: at that offset, preadv would advance the file position.
        last = max(0, min(self.read_bytes + CHUNK_BYTES, self._size) - 1)
        try:
            return os.preadv(self._descriptor, [bytearray(1)], self._start + last, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):
            return False

    def rewind(self) -> None:
        os.lseek(self._descriptor, self._start, os.SEEK_SET)
        self.read_bytes = 0

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if not self._in_thread:
                self._release()

    def _release(self) -> None:
        if self._descriptor != 0:
            os.close(self._descriptor)


class _Stream:
    """A pipe or a terminal. Waits in the event loop, so that a run can be stopped while no data comes."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.read_bytes = 0
        self._descriptor = descriptor

    async def read(self) -> bytes:
        while True:
            await anyio.wait_readable(self._descriptor)
            with suppress(BlockingIOError):
                data = os.read(self._descriptor, CHUNK_BYTES)
                break
        self.read_bytes += len(data)
        return data

    def close(self) -> None:
        if self._descriptor != 0:
            os.close(self._descriptor)


class _Gzip:
    """Unpacks another file, at most a chunk at a time. Concatenated gzip members are one file."""

    def __init__(self, file: _File, begun: bytes) -> None:
        self.name = file.name
        self._file = file
        self._packed = begun
        self._at = 0
        """Number of bytes of `_packed` that have been unpacked."""
        self._proving = False
        self._unpacker = zlib.decompressobj(wbits=31)

    @property
    def read_bytes(self) -> int:
        return 0 if self._proving else self._file.read_bytes

    async def prove(self) -> None:
        """Unpack the file to the checksum at its end before any row is used: damaged data can look like rows.

        A stream is not checked first, as it can't be read twice.
        """
        if isinstance(self._file, _RegularFile):
            self._proving = True
            while await self.read():
                pass
            self._proving = False
            self._file.rewind()
            self._packed, self._at, self._unpacker = b"", 0, zlib.decompressobj(wbits=31)

    async def read(self) -> bytes:
        while True:
            if data := await in_daemon_thread(self._unpack):
                return data
            self._packed, self._at = await self._file.read(), 0
            if not self._packed:
                if self._unpacker.eof:
                    return b""
                raise EOFError("the gzip file is cut off: its end is missing.")

    def _unpack(self) -> bytes:
        """The next chunk of unpacked bytes, over as many members as needed; empty once the packed bytes are used up."""
        pieces, room = [], CHUNK_BYTES
        while room:
            if self._unpacker.eof:
                begins = _NO_PADDING.search(self._packed, self._at)
                if begins is None:
                    break
                self._at = begins.start()
                self._unpacker = zlib.decompressobj(wbits=31)
            packed = self._packed[self._at : self._at + PIECE_BYTES]
            data = self._unpacker.decompress(packed, room)
            self._at += len(packed) - len(self._unpacker.unused_data or self._unpacker.unconsumed_tail)
            if not data and not packed:
                break
            pieces.append(data)
            room -= len(data)
        return b"".join(pieces)

    def close(self) -> None:
        self._file.close()


class _Begun:
    """A file whose first bytes were read already."""

    def __init__(self, file: _File, begun: bytes) -> None:
        self.name = file.name
        self._file = file
        self._begun = begun

    @property
    def read_bytes(self) -> int:
        return self._file.read_bytes

    async def read(self) -> bytes:
        if self._begun:
            begun, self._begun = self._begun, b""
            return begun
        return await self._file.read()

    def close(self) -> None:
        self._file.close()


async def _open(path: str) -> _File:
    name = "stdin" if path == "-" else path
    # Without O_NONBLOCK, opening a named pipe would wait for its writer where nothing can end the wait.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = 0 if path == "-" else await in_daemon_thread(partial(os.open, path, flags), undo=os.close)
    mode = os.fstat(descriptor).st_mode
    waited_for = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)  # /dev/null and disks are not
    file: _File = _Stream(name, descriptor) if waited_for else _RegularFile(name, descriptor)
    try:
        begun = await file.read()
        while len(begun) < len(GZIP_MAGIC) and (more := await file.read()):
            begun += more
    except BaseException:
        file.close()
        raise
    # Recognised by its first bytes, not by its name: no JSON line begins with them.
    return _Gzip(file, begun) if begun.startswith(GZIP_MAGIC) else _Begun(file, begun)


def _size(path: str) -> int | None:
    if path == "-":
        return None
    try:
        found = Path(path).stat()
        if stat.S_ISDIR(found.st_mode):
            raise InputError(f"{path}: the input is a folder; name files of JSON lines.")
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: the input can't be read: Permission denied. Check its name and permissions.")
    except OSError as error:
        raise InputError(
            f"{path}: the input can't be read: {error.strerror}. Check its name and permissions."
        ) from None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the input can't be read further: {error.strerror}."
    if isinstance(error, zlib.error):
        return "the gzip file is damaged."
    return str(error)
