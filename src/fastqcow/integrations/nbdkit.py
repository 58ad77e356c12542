"""An image as a disk that nbdkit serves: a script for its Python plugin. `fastqcow serve` runs nbdkit with it, and so can anybody:

    nbdkit python /path/to/fastqcow/integrations/nbdkit.py file=disk.qcow2

Parameters are those of `fastqcow serve` by their long names: file, format, snapshot, backing, data-file, password-file, threads and
cache-size. `serve` gives three more: site, where the packages of its interpreter are; socket, a path to remove at the end; and
announce, a line to print when clients can connect.

nbdkit does not import this file but runs it as __main__, in an interpreter that is part of the plugin. So it has to load its
package, and ends the process itself where the image cannot be opened: nbdkit would show a traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby, islice
from typing import TYPE_CHECKING, NoReturn

import nbdkit  # type: ignore[import-not-found]  # built into the plugin's interpreter

if TYPE_CHECKING:
    from fastqcow.diskfile import DiskFile, Extent

API_VERSION = 2

_EXTENTS_MAX = 4096  # looked at for one answer: some ms; the client asks again from where it ends
_NAMES = ("file", "format", "snapshot", "backing", "data-file", "password-file", "threads", "cache-size", "socket", "announce")

_parameters: dict[str, str] = {}
_disk: DiskFile
_socket: str | None = None
_stdout = -1


def _say(message: str) -> None:
    print(f"fastqcow: {message}", file=sys.stderr)


def _end(message: str) -> NoReturn:
    _say(message)
    os._exit(1)


def _load_package() -> None:
    """This file's own package, whatever other fastqcow can be found; and the packages beside it, after all others."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.append(os.path.dirname(package))
    spec = spec_from_file_location("fastqcow", os.path.join(package, "__init__.py"), submodule_search_locations=[package])
    assert spec
    assert spec.loader
    sys.modules["fastqcow"] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # in another Python anything can be
        version = ".".join(map(str, sys.version_info[:2]))
        _end(f"{package} cannot be loaded by Python {version}, which nbdkit's plugin runs: {e}")


if "FASTQCOW_SERVE_PATH" in os.environ:  # see cli/serve.py
    os.environ["PATH"] = os.environ.pop("FASTQCOW_SERVE_PATH")
sys.tracebacklimit = 0  # nbdkit prints what a callback raises: what is wrong is in the image, not here
warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
_load_package()


# What nbdkit calls as it starts and ends


def config(key: str, value: str) -> None:
    global _stdout
    if key == "announce":
        _stdout = os.dup(1)  # nbdkit is about to close it
    if key == "site":
        sys.path.append(value)
    elif key in _NAMES:
        _parameters[key] = value
    else:
        _end(f"{key} is not a parameter; there are {', '.join(_NAMES)}")


def config_complete() -> None:
    global _disk
    from fastqcow.errors import Error, explain, printable

    try:
        _disk = _opened(**{name.replace("-", "_"): value for name, value in _parameters.items()})
    except (Error, OSError, ValueError, KeyError, MemoryError) as e:
        _end(printable(explain(e)))


def _opened(
    file: str | None = None,
    format: str | None = None,  # noqa: A002 - the parameter's name
    snapshot: str | None = None,
    threads: str | None = None,
    cache_size: str | None = None,
    backing: str | None = None,
    data_file: str | None = None,
    password_file: str | None = None,
    **_: str,
) -> DiskFile:
    from argparse import Namespace

    from fastqcow.cli.common import at_snapshot, open_disk, opening

    if file is None:
        raise ValueError("no image is given; write file=PATH")
    options = opening(Namespace(backing=backing, data_file=data_file, password_file=password_file))
    options["threads"] = None if threads is None else int(threads)
    options["cache_size"] = None if cache_size is None else nbdkit.parse_size(cache_size)
    return at_snapshot(open_disk(file, format, guess_raw=False, whole_sectors=True, **options), snapshot)


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    """Clients can connect."""
    global _socket
    _socket = _parameters.get("socket")
    if _stdout >= 0:
        with contextlib.suppress(OSError), os.fdopen(_stdout, "w") as stdout:
            print(_parameters["announce"], file=stdout)


def cleanup() -> None:
    if _socket is not None:
        with contextlib.suppress(OSError):
            os.unlink(_socket)


# What it calls for each client; all have the same disk


class Connection:
    """A client, and the threads of nbdkit's that serve it and nobody else.

    The plugin makes each of its calls by PyGILState_Ensure and PyGILState_Release, which for a thread that Python has not started
    make a thread state and destroy it again: some 25 us, as much as all else in a read of what is cached. So a thread that reads
    takes its state once more, by which it stays. nbdkit joins its threads before it calls `close`, from the thread that called
    `open`; what they have left is destroyed there.
    """

    def __init__(self, disk: DiskFile) -> None:
        self.disk = disk
        self.states: set[int] = set()

    def keep_thread(self) -> None:
        """Called once by each thread."""
        _python.PyGILState_Ensure()
        _thread.kept = True
        self.states.add(_python.PyThreadState_Get())

    def close(self) -> None:
        own = _python.PyThreadState_Get()
        if own in self.states:  # nbdkit reads by this thread where it has one
            _python.PyGILState_Release(_GILSTATE_LOCKED)
            self.states.remove(own)
        if self.states:
            # To destroy another thread's state makes newer Pythons forget that of the thread that does so: one is made for it.
            destroying = threading.Thread(target=self._destroy)
            destroying.start()
            destroying.join()

    def _destroy(self) -> None:
        for state in self.states:
            _python.PyThreadState_Clear(state)
            _python.PyThreadState_Delete(state)


_GILSTATE_LOCKED = 0
_python = ctypes.pythonapi
_python.PyThreadState_Get.restype = ctypes.c_void_p
_python.PyThreadState_Clear.argtypes = _python.PyThreadState_Delete.argtypes = (ctypes.c_void_p,)
_python.PyThreadState_Clear.restype = _python.PyThreadState_Delete.restype = None
_thread = threading.local()


def open(readonly: bool) -> Connection:  # noqa: A001 - the callback's name
    return Connection(_disk)


def close(connection: Connection) -> None:
    connection.close()


def get_size(connection: Connection) -> int:
    return connection.disk.size


def can_multi_conn(connection: Connection) -> bool:
    return True


def pread(connection: Connection, buf: memoryview, guest_off: int, flags: int) -> None:
    if not hasattr(_thread, "kept"):
        connection.keep_thread()
    connection.disk.preadv((buf,), guest_off)


def extents(connection: Connection, nbytes: int, guest_off: int, flags: int) -> list[tuple[int, int, int]]:
    """Runs of data and of zeroes; as qemu-nbd, what reads as zeroes is called a hole wherever nothing is stored."""
    looked_at = islice(connection.disk.map(guest_off, nbytes), _EXTENTS_MAX)
    runs = (_run(data, list(found)) for data, found in groupby(looked_at, lambda extent: extent.data))
    return list(islice(runs, 1 if flags & nbdkit.FLAG_REQ_ONE else None))


def _run(data: bool, found: list[Extent]) -> tuple[int, int, int]:
    start, end = found[0].start, found[-1].start + found[-1].length
    return start, end - start, 0 if data else nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
