"""Types of arguments, for annotations alone: nothing imports this at run time."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Readable: TypeAlias = Buffer
    Writable: TypeAlias = Buffer

    class BinaryFile(Protocol):
        """What fastqcow asks of an open file: any seekable binary file has it."""

        def read(self, size: int, /) -> bytes: ...
        def seek(self, offset: int, whence: int = 0, /) -> int: ...

    class Digest(Protocol):
        """What `hashlib` makes."""

        def update(self, data: Readable, /) -> object: ...
        def hexdigest(self) -> str: ...

    Path: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]
