"""Which files that an image names are opened: backing files and external data files.

Whoever wrote the image chose the names in it, and might like to read a file of ours. So the one who opens the image sets the rule,
and the rule of those who set none is a safe one: what lies in the image's own directory or below, links followed. A name with a
protocol (`json:`, `nbd:`, ...) is never opened by itself. Nor is anything that an image at a URL names: what lies beside it cannot
be told from here, as servers follow links and redirect; and an absolute path in it is one of another machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastqcow.errors import FormatError, PolicyError
from fastqcow.header import DATA_FILE_RAW
from fastqcow.source import is_url, open_path, open_source, scheme_of

if TYPE_CHECKING:
    from fastqcow._reader import Source
    from fastqcow._types import BinaryFile, Path
    from fastqcow.header import Header

    # None: the safe rule. False: do without. "follow": open what is named. Else the file to take.
    FixedRule: TypeAlias = Literal[False] | Path | BinaryFile | None
    # (the name in the image, its format if the image says it, the path of the image) -> the rule for this file
    Gate: TypeAlias = Callable[[str, str | None, str], FixedRule]
    Rule: TypeAlias = FixedRule | Gate

__all__ = ["check_data_file", "named_path", "open_backing", "open_data_file"]


def open_backing(image: Source, header: Header, rule: Rule) -> tuple[Source | None, Rule]:
    """The backing file, None where there is none; and the rule for what that one names."""
    if header.backing_name is None:
        return None, rule
    return _open(image, header.backing_name, header.backing_format, rule, "backing file", "backing")


def open_data_file(image: Source, header: Header, rule: Rule) -> tuple[Source | None, Rule]:
    """The external data file, None where there is none; and the rule for those of the backing files."""
    if not header.has_data_file:
        check_data_file(image, header)
        return None, rule if rule == "follow" or callable(rule) else None
    if header.data_file_name is None and (rule is None or rule == "follow" or callable(rule)):
        raise FormatError("the image has an external data file and does not name it; give it with data_file=", path=image.path)
    found, below = _open(image, header.data_file_name or "", "raw", rule, "data file", "data_file")
    if found is None:
        raise PolicyError("the image cannot be read without its external data file", path=image.path)
    return found, below


def check_data_file(image: Source, header: Header) -> None:
    """Whether there can be one at all, as the header's features say it.

    Raises:
        FormatError: they contradict each other.
    """
    if header.autoclear & DATA_FILE_RAW and not header.has_data_file:
        raise FormatError("the external data file is raw, but there is none", path=image.path, host_off=88, value=header.autoclear)


def _open(image: Source, name: str, fmt: str | None, rule: Rule, what: str, option: str) -> tuple[Source | None, Rule]:
    below = rule
    # A file object may be callable too; what can be read is a file.
    if callable(rule) and not hasattr(rule, "read"):
        rule = rule(name, fmt, image.path)
    if rule is False:
        return None, below
    if rule is None or rule == "follow":
        return _open_named(image, name, what, option, follow=rule == "follow"), below
    # The file that was given stands for this one; what it names is under the safe rule again, or asked of the gate.
    return open_source(rule), below if callable(below) else None  # type: ignore[arg-type]


def _open_named(image: Source, name: str, what: str, option: str, *, follow: bool) -> Source:
    """Open a file that an image names: wherever it is, or only if it lies, links followed, in the image's directory or below."""
    path = named_path(image, name, what, option)
    if follow:
        return open_path(path, path)
    directory, real = os.path.dirname(os.path.realpath(image.path)), os.path.realpath(path)
    if not image.has_path or os.path.commonpath((directory, real)) != directory:
        raise PolicyError(
            f"the {what} {path!r} lies outside of the image's directory, and is not opened; "
            f"allow it with {option}='follow' (--{option.replace('_', '-')}=follow), or give the file with {option}=",
            path=image.path,
        )
    return open_path(path, real)


def named_path(image: Source, name: str, what: str, option: str) -> str:
    """The path that a name in an image stands for: relative names count from the image's directory.

    Raises:
        PolicyError: the name is not a path, or is relative to a directory that is not known.
    """
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    elif scheme_of(name):
        raise PolicyError(
            f"the {what} {name!r} is not a plain path, and is not opened; give the file with {option}=", path=image.path
        )
    if not image.has_path and is_url(image.path):
        raise PolicyError(
            f"the {what} {name!r} is named by an image at a URL, and is not opened; give the file, or its URL, with {option}=",
            path=image.path,
        )
    if not image.has_path and not os.path.isabs(name):
        raise PolicyError(
            f"the {what} {name!r} lies beside the image, which was opened from a file object without a path; "
            f"give the file with {option}=",
            path=image.path,
        )
    return os.path.join(os.path.dirname(image.path), name) if image.has_path else name
