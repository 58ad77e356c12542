"""Images at URLs, by the package fsspec (extra `fsspec`).

`fastqcow.open` opens a URL by `open_url`. A file of an asynchronous file system (HTTP, S3, GCS, Azure, ...) becomes a RemoteFile:
it is asked for many ranges at once, and fetches them at the same time. Files of all others (archives, local copies, SFTP, ...) are
read by their own methods, one piece at a time.

HTTP is spoken here, over fsspec's session: its own `cat_file` takes whatever comes, and however much, where a server ignores that a
range was asked for. Failed requests are not made again, but by those file systems that do so themselves.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from fastqcow.errors import UnsupportedError
from fastqcow.locks import ForkSafeLock, for_file

if TYPE_CHECKING:
    from fastqcow._types import Writable

__all__ = ["RemoteFile", "StreamFile", "open_file", "open_url"]

BLOCK = 128 << 10
PIECE = 4 * BLOCK  # by one request
REQUESTS = 16  # of one file at the same time
CACHE_BLOCKS = 128  # of each file: 16 MiB
AHEAD_BLOCKS_MAX = 32
STREAMS = 8  # that are told from each other
FEW_RANGES = 4  # more are fetched as they are: they lie all over the file, and blocks would be many times as much
POLL_SECONDS = 0.05

Range: TypeAlias = tuple[int, int]  # host offset, bytes
_T = TypeVar("_T")


@dataclass(slots=True)
class _Block:
    """Part of a piece that is being fetched, or was: its bytes are there when the piece is done. It does not hold the others."""

    piece: Future[None]
    data: bytes = b""


class _Stream(NamedTuple):
    """Reads that continue one another, in blocks: where the last one ended, how much is fetched ahead of it, and up to where."""

    end: int
    window: int
    fetched: int


def open_url(url: str, **storage_options: Any) -> RemoteFile | StreamFile | io.FileIO:
    """Open a file by its URL, for `fastqcow.open` where the file system needs options. It is to be closed as any file is.

    Args:
        url: what fsspec knows, also a chain (`simplecache::https://host/disk.qcow2`).
        storage_options: of the file system, as for `fsspec.open`.

    Raises:
        UnsupportedError: a package is missing, or there is no such protocol.
        OSError: the file cannot be opened, or its server does not send ranges.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url, **storage_options)
    except (ImportError, ValueError) as e:
        raise UnsupportedError(str(e), path=url) from e
    except Exception as e:
        raise _os_error(e, url) from e
    return open_file(fs, path, url)


def open_file(fs: Any, path: str, url: str | None = None) -> RemoteFile | StreamFile | io.FileIO:
    """Open a file of an fsspec file system, for `fastqcow.open`. It is to be closed as any file is.

    Args:
        url: what to call it; by default what the file system says.

    Raises:
        OSError: as for `open_url`.
    """
    url = str(fs.unstrip_protocol(path)) if url is None else url
    if _is_async(fs):
        return RemoteFile(fs, path, url)
    try:
        file = fs.open(path, "rb", block_size=BLOCK)
    except Exception as e:
        raise _os_error(e, url) from e
    plain = getattr(file, "f", file)  # of fsspec's wrapper around a local file
    if type(plain) is not io.BufferedReader or type(plain.raw) is not io.FileIO:
        return StreamFile(fs, path, url, file)
    with file:
        return io.FileIO(os.dup(plain.fileno()))


def _is_async(fs: Any) -> bool:
    """Some file systems only pass on to another one."""
    inner = getattr(fs, "fs", None)
    return isinstance(fs, AsyncFileSystem) and not fs.asynchronous and (inner is None or _is_async(inner))


def _os_error(e: Exception, url: str, host_off: int | None = None) -> OSError:
    """What a file system raised as an OSError that names the URL and the place. (Python makes its kind from the number.)"""
    # fsspec's HTTP says of every URL that it cannot ask for that it is not there; then the cause says why. Others mean it.
    is_http = isinstance(e.__cause__, OSError) or type(e.__cause__).__module__.startswith("aiohttp")
    cause = e.__cause__ if isinstance(e, FileNotFoundError) and e.__cause__ and is_http else e
    status = getattr(cause, "status", None)
    if isinstance(cause, FileNotFoundError) or status == 404:
        number, said = errno.ENOENT, os.strerror(errno.ENOENT)
    elif status is not None:
        number = errno.EACCES if status in (401, 403) else errno.EIO
        said = f"the server answers {status} {getattr(cause, 'message', '')}".rstrip()
    else:
        unsaid = errno.EACCES if isinstance(cause, PermissionError) else errno.EIO
        number = (cause.errno if isinstance(cause, OSError) else None) or unsaid
        said = (cause.strerror if isinstance(cause, OSError) else None) or f"{type(cause).__name__} {cause}".rstrip()
    return OSError(number, f"{said} (host offset {host_off:#x})" if host_off else said, url)  # at 0, the file is being opened


class _UrlFile(io.RawIOBase):
    """What files at URLs have in common: a name, a length, a position, and their pickle.

    Attributes:
        url: what it is called in errors.
    """

    _size: int

    def __init__(self, fs: Any, path: str, url: str) -> None:
        super().__init__()
        self.url = url
        self._fs, self._path = fs, path
        self._position = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._fs, self._path, self.url)

    @property
    def name(self) -> str:
        return self.url

    @property
    def size(self) -> int:
        """Bytes of the file, as it was opened."""
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"the position would be {base + offset}; it cannot be negative")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Writable, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


class RemoteFile(_UrlFile):
    """A file of an asynchronous file system of fsspec. Made by `open_url` or `open_file`, and read by `fastqcow.open`.

    `read_ranges` may be called by many threads at once, and does not move the position, which `read` and `seek` share. It fetches
    blocks of 128 KiB, up to four by one request, and keeps the last 16 MiB of them. Behind reads that continue one another it
    fetches what comes next while these are being worked on, up to 4 MiB. Who asks for many ranges at once gets just these.

    It pickles as its file system does, with the options that this was given. After a fork it goes on with a file system of its own.
    """

    def __init__(self, fs: Any, path: str, url: str) -> None:
        super().__init__(fs, path, url)
        self._pid = os.getpid()
        self._is_http = type(fs).__module__ == "fsspec.implementations.http"
        self._lock = ForkSafeLock()
        self._gate = asyncio.Semaphore(REQUESTS)
        self._blocks: OrderedDict[int, _Block] = OrderedDict()  # the one that was used last is at the end
        self._streams: list[_Stream] = []  # here, too
        self._size = self._open_http() if self._is_http else self._ask_size()

    def _open_http(self) -> int:
        """The first block tells how long the file is. Not so HEAD, which servers may answer by other rules than GET."""
        fs = self._fs
        asked = asyncio.run_coroutine_threadsafe(self._get_by_http(fs, 0, BLOCK), fs.loop)
        self._wait([asked], _never)
        size, data = asked.result()
        got: Future[None] = Future()
        got.set_result(None)
        self._blocks[0] = _Block(got, data)
        return size

    def _ask_size(self) -> int:
        try:
            found = self._fs.info(self._path)
        except Exception as e:
            raise _os_error(e, self.url) from e
        if found.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.url)
        if not isinstance(found.get("size"), int):
            raise OSError(errno.ESPIPE, "the server does not say how long the file is", self.url)
        return int(found["size"])

    def __repr__(self) -> str:
        return f"<fastqcow.RemoteFile {self.url!r} size={self._size}>"

    def read(self, size: int | None = -1, /) -> bytes:
        nbytes = self._size if size is None or size < 0 else size
        (data,) = self.read_ranges([(self._position, nbytes)], _never)
        self._position += len(data)
        return data

    def read_ranges(self, ranges: Sequence[Range], stopped: Callable[[], bool]) -> list[bytes]:
        """The bytes of each (host offset, number of bytes), short only at the end of the file.

        Args:
            stopped: asked some 20 times a second; if it says so, what is still being fetched is dropped, and an OSError raised.

        Raises:
            OSError: the server failed, or sent something else than it was asked for.
        """
        wanted = [(at, max(min(nbytes, self._size - at), 0)) for at, nbytes in ranges]
        if len(wanted) > FEW_RANGES:
            return self._read_exactly(wanted, stopped)
        while True:
            with self._lock.lock:
                blocks = self._want(i for each in wanted for i in _blocks_of(*each))
                for each in wanted:
                    self._look_ahead(_blocks_of(*each))
            try:
                self._wait([block.piece for block in blocks.values()], stopped)
                return [_from_blocks(blocks, at, nbytes) for at, nbytes in wanted]
            except CancelledError:
                continue  # by another thread that waited for the same block

    def _read_exactly(self, wanted: list[Range], stopped: Callable[[], bool]) -> list[bytes]:
        pieces = [[self._start(self._get, *piece) for piece in _pieces(*each)] for each in wanted]
        self._wait([piece for each in pieces for piece in each], stopped)
        return [b"".join(piece.result() for piece in each) for each in pieces]

    # Blocks; these are called with the lock

    def _want(self, indices: Iterable[int]) -> dict[int, _Block]:
        """These blocks, fetched, being fetched, or from now on."""
        self._filesystem()
        wanted = set(indices)
        found = {i: self._blocks[i] for i in wanted & self._blocks.keys() if not _has_failed(self._blocks[i].piece)}
        for i in found:
            self._blocks.move_to_end(i)
        missing = sorted(wanted - found.keys())
        while missing:
            first = missing[0]
            count = next((n for n in range(1, PIECE // BLOCK) if missing[n : n + 1] != [first + n]), PIECE // BLOCK)
            blocks: dict[int, _Block] = {}
            piece = self._start(self._fill, blocks, first * BLOCK, min(count * BLOCK, self._size - first * BLOCK))
            blocks |= {i: _Block(piece) for i in missing[:count]}
            found |= blocks
            self._blocks |= blocks
            del missing[:count]
        while len(self._blocks) > CACHE_BLOCKS:
            self._blocks.popitem(last=False)
        return found

    async def _fill(self, blocks: dict[int, _Block], at: int, nbytes: int) -> None:
        """Fetch a piece, and give each of its blocks bytes of its own. Blocks of what failed are dropped: its exception may hold on
        to what has come. (All of the blocks are there when the lock is free.)"""
        try:
            data = await self._get(at, nbytes)
        except BaseException:
            with self._lock.lock:
                for i, block in blocks.items():
                    if self._blocks.get(i) is block:
                        del self._blocks[i]
            raise
        with self._lock.lock:
            for n, block in enumerate(blocks.values()):
                block.data = bytes(data[n * BLOCK : (n + 1) * BLOCK])

    def _look_ahead(self, read: range) -> None:
        """A read has come by: if it continues another one, fetch what is likely to be read next."""
        if not read:
            return
        stream = next((each for each in self._streams if each.end - 1 <= read.start <= each.end + 1), None)
        if stream is None:
            self._streams = [*self._streams[1 - STREAMS :], _Stream(read.stop, 0, read.stop)]
        elif read.stop > stream.end:
            self._streams.remove(stream)
            window = min(max(2 * stream.window, len(read)), AHEAD_BLOCKS_MAX)
            fetched = max(stream.fetched, read.stop)
            if fetched - read.stop <= window // 2:
                until = min(read.stop + window, -(-self._size // BLOCK))
                self._want(range(fetched, until))
                fetched = max(fetched, until)
            self._streams.append(_Stream(read.stop, window, fetched))

    # Requests

    def _filesystem(self) -> Any:
        if self._pid != os.getpid():
            self._fs = type(self._fs)(*self._fs.storage_args, **self._fs.storage_options)
            self._gate, self._pid = asyncio.Semaphore(REQUESTS), os.getpid()
            self._blocks.clear()  # some of them are on their way to the parent
        return self._fs

    def _start(self, request: Callable[..., Coroutine[Any, Any, _T]], *arguments: Any) -> Future[_T]:
        """Not by fsspec's `sync`, which waits."""
        fs = self._filesystem()
        return asyncio.run_coroutine_threadsafe(request(*arguments), fs.loop)

    def _wait(self, pieces: Sequence[Future[Any]], stopped: Callable[[], bool]) -> None:
        """Until all are there, or one has failed, which raises.

        Raises:
            CancelledError: somebody else has stopped one of them.
        """
        left = set(pieces)
        try:
            while left:
                done, left = wait(left, POLL_SECONDS, FIRST_EXCEPTION)
                for piece in done:
                    piece.result()
                if left and stopped():
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), self.url)
        except (OSError, CancelledError):
            if stopped():
                _cancel(left)
            raise
        except BaseException:
            _cancel(left)
            raise

    async def _get(self, at: int, nbytes: int) -> bytes:
        fs = self._fs
        async with self._gate:
            if self._is_http:
                total, data = await self._get_by_http(fs, at, nbytes)
                if total != self._size:
                    raise OSError(errno.ESTALE, f"the file has changed: it had {self._size} bytes, and has {total}", self.url)
            else:
                try:
                    data = await fs._cat_file(self._path, start=at, end=at + nbytes)
                except Exception as e:
                    raise _os_error(e, self.url, at) from e
                self._check_length(data, at, nbytes)
        return data

    async def _get_by_http(self, fs: Any, at: int, nbytes: int) -> tuple[int, bytes]:
        """How long the file is, and its bytes."""
        options = {key: value for key, value in fs.kwargs.items() if key != "headers"}
        headers = dict(fs.kwargs.get("headers") or {})
        headers |= {"Range": f"bytes={at}-{at + nbytes - 1}", "Accept-Encoding": "identity"}
        try:
            session = await fs.set_session()
            async with session.get(fs.encode_url(self._path), headers=headers, **options) as answer:
                try:
                    return await self._read_answer(answer, at, nbytes)
                finally:
                    if not answer.content.at_eof():
                        answer.close()  # aiohttp may use the connection again, and then wait for ever
        except OSError as e:
            raise e if e.filename == self.url else _os_error(e, self.url, at) from e
        except Exception as e:
            raise _os_error(e, self.url, at) from e

    async def _read_answer(self, answer: Any, at: int, nbytes: int) -> tuple[int, bytes]:
        """No more is taken from the server than was asked for."""
        said = answer.headers.get("Content-Range", "")
        first, total = _content_range(said)
        if answer.status == 416 and total == 0:
            return 0, b""  # an empty file has no ranges
        if answer.status == 200:
            raise OSError(errno.ESPIPE, f"the server does not send ranges of files; {_COPY}", self.url)
        answer.raise_for_status()
        if answer.status != 206 or first != at or total is None:
            raise OSError(
                errno.EPROTO,
                f"the server answers {answer.status} with Content-Range {said!r} (host offset {at:#x}); {_COPY}",
                self.url,
            )
        data = bytearray()
        while len(data) <= nbytes and (more := await answer.content.read(nbytes + 1 - len(data))):
            data += more
        self._check_length(data, at, min(nbytes, total - at))
        return total, bytes(data)

    def _check_length(self, data: bytes | bytearray, at: int, nbytes: int) -> None:
        if len(data) != nbytes:
            more = "more than" if len(data) > nbytes else f"{len(data)} of"
            raise OSError(errno.EIO, f"the server sends {more} the {nbytes} bytes asked for (host offset {at:#x})", self.url)


_COPY = "a local copy of it can be read, such as simplecache::URL makes"


def _content_range(said: str) -> tuple[int | None, int | None]:
    """The first byte and the length of the file in `bytes 0-99/1000`; None where it does not say so."""
    unit, _, rest = said.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not total.isdecimal():
        return None, None
    return int(first) if first.isdecimal() else None, int(total)


def _never() -> bool:
    return False


def _blocks_of(at: int, nbytes: int) -> range:
    return range(at // BLOCK, -(-(at + nbytes) // BLOCK)) if nbytes else range(0)


def _pieces(at: int, nbytes: int) -> list[Range]:
    return [(start, min(PIECE, at + nbytes - start)) for start in range(at, at + nbytes, PIECE)]


def _from_blocks(blocks: dict[int, _Block], at: int, nbytes: int) -> bytes:
    return b"".join(blocks[i].data[max(at - i * BLOCK, 0) : at + nbytes - i * BLOCK] for i in _blocks_of(at, nbytes))


def _has_failed(piece: Future[Any]) -> bool:
    return piece.done() and (piece.cancelled() or piece.exception() is not None)


def _cancel(pieces: Iterable[Future[Any]]) -> None:
    for piece in pieces:
        piece.cancel()


class StreamFile(_UrlFile):
    """A file of any other file system of fsspec, read by its own methods. Made by `open_url` or `open_file`.

    It pickles as its file system does, with the options that this was given.
    """

    def __init__(self, fs: Any, path: str, url: str, file: Any = None) -> None:
        super().__init__(fs, path, url)
        self._file = fs.open(path, "rb", block_size=BLOCK) if file is None else file
        self._lock = for_file(self._file)  # there are file systems that give the same object to all
        with self._lock.lock:
            self._size = int(self._ask(self._file.seek, 0, os.SEEK_END))

    def read(self, size: int | None = -1, /) -> bytes:
        with self._lock.lock:
            self._ask(self._file.seek, self._position)
            data: bytes = self._ask(self._file.read, -1 if size is None else size)
        self._position += len(data)
        return data

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _ask(self, method: Callable[..., Any], *arguments: int) -> Any:
        try:
            return method(*arguments)
        except Exception as e:
            raise _os_error(e, self.url, self._position) from e
