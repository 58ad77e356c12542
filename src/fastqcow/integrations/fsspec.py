"""Images at URLs, by the package fsspec (extra `fsspec`).

`fastqcow.open` opens a URL by `open_url`. A file of an asynchronous file system (HTTP, S3, GCS, Azure, ...) becomes a RemoteFile:
it is asked for many ranges at once, and fetches them at the same time. Files of all others (archives, local copies, SFTP, ...) are
read by their own methods, one piece at a time.

HTTP is spoken here, over fsspec's session: its own `cat_file` takes whatever comes, and however much, where a server ignores that a
range was asked for. Failed requests are not made again, but by those file systems that do so themselves.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import io
import os
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import fsspec
from fsspec.asyn import AsyncFileSystem

from fastqcow.errors import UnsupportedError
from fastqcow.locks import ForkSafeLock, for_file

if TYPE_CHECKING:
    from fastqcow._types import Writable

__all__ = ["RemoteFile", "StreamFile", "open_file", "open_url"]

BLOCK = 128 << 10  # smaller reads fetch, and keep, blocks of so many bytes
CACHE_BLOCKS = 128  # kept for each file: 16 MiB
AHEAD_BLOCKS_MAX = 16  # fetched at once where small reads follow each other
STREAMS = 8  # that are told from each other
PIECE = 512 << 10  # more than that is fetched by several requests at the same time, ...
REQUESTS = 16  # ... but by no more than so many for one read
POLL_SECONDS = 0.05

Range: TypeAlias = tuple[int, int]  # host offset, bytes
_T = TypeVar("_T")


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
    # fsspec says of every URL that it cannot ask for that it is not there; then the cause says why.
    cause = e.__cause__ if isinstance(e, FileNotFoundError) and e.__cause__ else e
    status = getattr(cause, "status", None)
    if isinstance(cause, FileNotFoundError) or status == 404:
        number, said = errno.ENOENT, os.strerror(errno.ENOENT)
    elif status is not None:
        number = errno.EACCES if status in (401, 403) else errno.EIO
        said = f"the server answers {status} {getattr(cause, 'message', '')}".rstrip()
    else:
        number = (cause.errno if isinstance(cause, OSError) else None) or errno.EIO
        said = (cause.strerror if isinstance(cause, OSError) else None) or f"{type(cause).__name__} {cause}".rstrip()
    return OSError(number, f"{said} (host offset {host_off:#x})" if host_off else said, url)  # at 0, the file is being opened


class RemoteFile(io.RawIOBase):
    """A file of an asynchronous file system of fsspec. Made by `open_url` or `open_file`, and read by `fastqcow.open`.

    `read_ranges` may be called by many threads at once, and does not move the position, which `read` and `seek` share. Reads of
    less than 128 KiB fetch whole blocks of that size, and 16 MiB of these are kept; where such reads follow each other, each
    fetches twice as much as the last one, up to 2 MiB.

    It pickles as its file system does, with the options that this was given. After a fork it goes on with a file system of its own.

    Attributes:
        url: what it is called in errors.
    """

    def __init__(self, fs: Any, path: str, url: str) -> None:
        super().__init__()
        self.url = url
        self._fs, self._path, self._pid = fs, path, os.getpid()
        self._is_http = type(fs).__module__ == "fsspec.implementations.http"
        self._lock = ForkSafeLock()
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._streams: OrderedDict[int, int] = OrderedDict()  # the block behind what was fetched last: how many blocks that were
        self._position = 0
        self._size = self._open_http() if self._is_http else self._ask_size()

    def _open_http(self) -> int:
        """The first block tells how long the file is. Not so HEAD, which servers may answer by other rules than GET."""
        size, block = self._run(lambda fs: self._get_by_http(fs, 0, BLOCK), lambda: False)
        self._blocks[0], self._streams[1] = block, 1
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

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFile, (self._fs, self._path, self.url)

    def __repr__(self) -> str:
        return f"<fastqcow.RemoteFile {self.url!r} size={self._size}>"

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

    def read(self, size: int | None = -1, /) -> bytes:
        nbytes = self._size if size is None or size < 0 else size
        (data,) = self.read_ranges([(self._position, nbytes)], lambda: False)
        self._position += len(data)
        return data

    def readinto(self, buffer: Writable, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read_ranges(self, ranges: Sequence[Range], stopped: Callable[[], bool]) -> list[bytes]:
        """The bytes of each (host offset, number of bytes), short only at the end of the file.

        Args:
            stopped: asked some 20 times a second; if it says so, what is still being fetched is dropped, and an OSError raised.

        Raises:
            OSError: the server failed, or sent something else than it was asked for.
        """
        wanted = [(at, max(min(nbytes, self._size - at), 0)) for at, nbytes in ranges]
        needed = {i for at, nbytes in wanted if nbytes < BLOCK for i in _blocks_of(at, nbytes)}
        blocks = self._kept(needed)
        missing = self._to_fetch(sorted(needed - blocks.keys()))
        of_blocks = [piece for at, nbytes in missing for piece in _pieces(at, nbytes)]
        others = [piece for at, nbytes in wanted if nbytes >= BLOCK for piece in _pieces(at, nbytes)]
        fetched = self._fetch([*of_blocks, *others], stopped)
        for piece in of_blocks:
            blocks.update(zip(_blocks_of(*piece), _cut(fetched[piece]), strict=True))
        self._keep({i: blocks[i] for piece in of_blocks for i in _blocks_of(*piece)})
        return [
            b"".join(fetched[piece] for piece in _pieces(at, nbytes)) if nbytes >= BLOCK else _from_blocks(blocks, at, nbytes)
            for at, nbytes in wanted
        ]

    # Blocks

    def _kept(self, indices: set[int]) -> dict[int, bytes]:
        with self._lock.lock:
            found = {i: self._blocks[i] for i in indices if i in self._blocks}
            for i in found:
                self._blocks.move_to_end(i)
        return found

    def _keep(self, blocks: dict[int, bytes]) -> None:
        with self._lock.lock:
            self._blocks.update(blocks)
            while len(self._blocks) > CACHE_BLOCKS:
                self._blocks.popitem(last=False)

    def _to_fetch(self, missing: list[int]) -> list[Range]:
        """The ranges of these blocks, and of those that are likely to be wanted next."""
        runs: list[list[int]] = []
        for i in missing:
            if runs and runs[-1][1] == i:
                runs[-1][1] += 1
            else:
                runs.append([i, i + 1])
        if len(runs) <= 2:  # of a small read; a large one has its own way
            runs = [[first, self._ahead(first, end)] for first, end in runs]
        return [(first * BLOCK, min(end * BLOCK, self._size) - first * BLOCK) for first, end in runs]

    def _ahead(self, first: int, end: int) -> int:
        """Where to end in place of `end`: farther, if this carries on where something else ended."""
        with self._lock.lock:
            count = max(min(2 * self._streams.pop(first, 0), AHEAD_BLOCKS_MAX), end - first)
            last = min(first + count, -(-self._size // BLOCK))
            end = next((i for i in range(end, last) if i in self._blocks), last)
            self._streams[end] = end - first
            while len(self._streams) > STREAMS:
                self._streams.popitem(last=False)
        return end

    # Requests

    def _filesystem(self) -> Any:
        if self._pid != os.getpid():
            self._fs = type(self._fs)(*self._fs.storage_args, **self._fs.storage_options)
            self._pid = os.getpid()
        return self._fs

    def _run(self, make: Callable[[Any], Coroutine[Any, Any, _T]], stopped: Callable[[], bool]) -> _T:
        """Run a coroutine on the file system's loop. Not by fsspec's `sync`, which cannot be told to stop."""
        fs = self._filesystem()
        future = asyncio.run_coroutine_threadsafe(make(fs), fs.loop)
        try:
            while not concurrent.futures.wait([future], POLL_SECONDS).done:
                if stopped():
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), self.url)
            return future.result()
        finally:
            future.cancel()

    def _fetch(self, pieces: list[Range], stopped: Callable[[], bool]) -> dict[Range, bytes]:
        if not pieces:
            return {}
        get = self._get_ranges_by_http if self._is_http else self._cat_ranges
        return dict(zip(pieces, self._run(lambda fs: get(fs, pieces), stopped), strict=True))

    async def _cat_ranges(self, fs: Any, pieces: list[Range]) -> list[bytes]:
        starts, ends = [at for at, _ in pieces], [at + nbytes for at, nbytes in pieces]
        try:
            paths = [self._path] * len(pieces)
            found = await fs._cat_ranges(paths, starts, ends, batch_size=REQUESTS, on_error="return")
        except Exception as e:
            raise _os_error(e, self.url, starts[0]) from e
        for (at, nbytes), data in zip(pieces, found, strict=True):
            if isinstance(data, Exception):
                raise _os_error(data, self.url, at) from data
            self._check_length(data, at, nbytes)
        return cast("list[bytes]", found)

    async def _get_ranges_by_http(self, fs: Any, pieces: list[Range]) -> list[bytes]:
        gate = asyncio.Semaphore(REQUESTS)

        async def get(at: int, nbytes: int) -> bytes:
            async with gate:
                total, data = await self._get_by_http(fs, at, nbytes)
            if total != self._size:
                raise OSError(errno.ESTALE, f"the file has changed: it had {self._size} bytes, and has {total}", self.url)
            return data

        tasks = [asyncio.ensure_future(get(at, nbytes)) for at, nbytes in pieces]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

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


def _blocks_of(at: int, nbytes: int) -> range:
    return range(at // BLOCK, -(-(at + nbytes) // BLOCK)) if nbytes else range(0)


def _cut(data: bytes) -> list[bytes]:
    return [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]


def _pieces(at: int, nbytes: int) -> list[Range]:
    return [(start, min(PIECE, at + nbytes - start)) for start in range(at, at + nbytes, PIECE)]


def _from_blocks(blocks: dict[int, bytes], at: int, nbytes: int) -> bytes:
    spans = ((i, max(at - i * BLOCK, 0), at + nbytes - i * BLOCK) for i in _blocks_of(at, nbytes))
    return b"".join(blocks[i][start:end] for i, start, end in spans)


class StreamFile(io.RawIOBase):
    """A file of any other file system of fsspec, read by its own methods. Made by `open_url` or `open_file`.

    It pickles as its file system does, with the options that this was given.
    """

    def __init__(self, fs: Any, path: str, url: str, file: Any = None) -> None:
        super().__init__()
        self.url = url
        self._fs, self._path = fs, path
        self._file = fs.open(path, "rb", block_size=BLOCK) if file is None else file
        self._lock = for_file(self._file)  # there are file systems that give the same object to all
        self._position = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamFile, (self._fs, self._path, self.url)

    @property
    def name(self) -> str:
        return self.url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_SET:
            self._position = offset
            return offset
        with self._lock.lock:
            self._file.seek(self._position)
            self._position = int(self._ask(self._file.seek, offset, whence))
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        with self._lock.lock:
            self._ask(self._file.seek, self._position)
            data: bytes = self._ask(self._file.read, -1 if size is None else size)
        self._position += len(data)
        return data

    def readinto(self, buffer: Writable, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _ask(self, method: Callable[..., Any], *arguments: int) -> Any:
        try:
            return method(*arguments)
        except Exception as e:
            raise _os_error(e, self.url, self._position) from e
