"""The exceptions of fastqcow, and the one place that makes them out of what the core reports."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CheckWarning",
    "CorruptWarning",
    "Error",
    "FormatError",
    "PasswordError",
    "PolicyError",
    "UnsupportedError",
    "VerifyError",
]


class Error(Exception):
    """An image cannot be read, for a reason that lies in the image.

    Attributes (each None where it means nothing):
        path: the file that the error is in; in a backing chain not always the one that was opened.
        guest_off: offset on the virtual disk, in bytes.
        host_off: offset in the file, in bytes.
        value: the table entry or the number that was wrong.
    """

    def __init__(
        self,
        reason: str,
        *,
        path: str | None = None,
        guest_off: int | None = None,
        host_off: int | None = None,
        value: int | None = None,
    ) -> None:
        self.reason = reason
        self.path = path
        self.guest_off = guest_off
        self.host_off = host_off
        self.value = value
        super().__init__(printable((f"{path}: " if path else "") + reason + place_text(guest_off, host_off, value)))

    def __reduce__(self) -> tuple[object, ...]:
        state = {"path": self.path, "guest_off": self.guest_off, "host_off": self.host_off, "value": self.value}
        return _restore, (type(self), self.reason, state)


class FormatError(Error):
    """The file is no qcow2 image, or a damaged one."""


class UnsupportedError(Error):
    """A valid image that needs a feature which fastqcow does not have."""


class PolicyError(Error):
    """The image names another file, and the rules it was opened under do not allow that file to be opened."""


class PasswordError(Error):
    """The image is encrypted, and the password is missing or wrong."""


class VerifyError(Error):
    """What a conversion wrote was read back, and is something else. `path` is the target, whose name it never got."""


class CheckWarning(UserWarning):
    """A check before a conversion found space that is lost, or that is in use for different things at once."""


class CorruptWarning(UserWarning):
    """The image is marked as corrupt. It is read as far as its tables make sense."""


def explain(error: BaseException) -> str:
    """What to tell a person of an error, without its type and without Python's quotes."""
    if isinstance(error, OSError) and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)


@contextlib.contextmanager
def naming(target: str) -> Iterator[None]:
    """Errors of calls that know a descriptor only get the name of its file."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, target) from None


def place_text(guest_off: int | None, host_off: int | None, value: int | None) -> str:
    """The place of what is wrong, to be put behind a sentence."""
    places = (("guest offset", guest_off), ("host offset", host_off), ("value", value))
    where = ", ".join(f"{name} {number:#x}" for name, number in places if number is not None)
    return f" ({where})" if where else ""


class _Printable(dict[int, str]):
    """What stands for a character: each is looked at once, in however long a text."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = character if character.isprintable() else ascii(character)[1:-1]
        return self[code]


def printable(text: str) -> str:
    """The text in one line that does nothing to a terminal: names in it come from the image."""
    return text if text.isprintable() else text.translate(_Printable())


def _restore(cls: type[Error], reason: str, state: dict[str, object]) -> Error:
    return cls(reason, **state)  # type: ignore[arg-type]


def from_core(
    name: str,
    sentence: str,
    *,
    sys_errno: int,
    path: str | None,
    guest_off: int | None,
    host_off: int | None,
    value: int | None,
) -> Exception:
    """The exception for a status of the core: `name` says which kind, the rest is what the core knows of the place."""
    if name == "os":
        return OSError(sys_errno, os.strerror(sys_errno), path)
    if name == "memory":
        return MemoryError(sentence)
    if name == "argument":
        return ValueError(sentence)
    return FormatError(sentence, path=path, guest_off=guest_off, host_off=host_off, value=value)
