"""How an open disk came about, so that it can be opened again elsewhere: that is what its pickle holds.

A pickle holds names and options, never a descriptor, and of file objects what these make of themselves. It holds no password: a
pickle is written to files and sent over networks by others who do not know that one is in it. A function that returns the password
is pickled by its name, and asks for it where it is called.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fastqcow.source import is_url

if TYPE_CHECKING:
    from fastqcow._types import BinaryFile, Path
    from fastqcow.diskfile import DiskFile
    from fastqcow.policy import Rule

__all__ = ["Origin", "lasting"]


class Origin(NamedTuple):
    """A call that opened a disk.

    Attributes:
        opener: the function that was called, `fastqcow.open` or `fastqcow.open_raw`.
        source: what it was given; a path as an absolute one.
        options: its keyword arguments.
        secret: whether it also needs a password that is not among them.
    """

    opener: Callable[..., DiskFile]
    source: Path | BinaryFile
    options: dict[str, Any]
    secret: bool = False

    def open(self) -> Any:
        return self.opener(self.source, **self.options)

    def with_options(self, **options: Any) -> Origin:
        return self._replace(options=self.options | options)

    def checked(self) -> Origin:
        """Itself, if it can be pickled, as far as a look at its file objects tells.

        Raises:
            TypeError: it needs a password, or a file object that does not pickle.
        """
        if self.secret:
            raise TypeError(
                "an image that was opened with a password does not pickle, as the password would be in the pickle; "
                "open it with password=FUNCTION, which returns the password wherever the image is opened again"
            )
        for given in (self.source, self.options.get("backing"), self.options.get("data_file")):
            if hasattr(given, "read") and type(given) is not io.BytesIO:
                _try(given)
        return self


class _Nowhere:
    def write(self, data: object, /) -> int:
        return 0


def _try(file: object) -> None:
    """Only a TypeError counts, which is what objects of the system raise. Names that pickle does not find, other picklers may."""
    import pickle  # which takes a tenth of the time of `import fastqcow`

    try:
        pickle.Pickler(_Nowhere()).dump(file)
    except TypeError as e:
        raise TypeError(
            f"the image was opened from a file object that does not pickle ({type(file).__name__}: {e}); open it by its path"
        ) from None
    except (AttributeError, pickle.PicklingError):
        pass


def lasting(given: Rule) -> Any:
    """What `open` was given, such that it means the same in another process: a path as an absolute one."""
    if not isinstance(given, (str, bytes, os.PathLike)) or given == "follow" or is_url(given):
        return given
    return os.path.abspath(os.fsdecode(given))
