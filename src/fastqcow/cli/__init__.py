"""The command `fastqcow`: qemu-img's letters, JSON and exit codes.

A command's file has `add(subparsers)` and `run(arguments)`, and may set `failure`, its exit code for errors. Whatever goes wrong
ends in one line on standard error: exit code 1 as of qemu-img, 130 after Ctrl-C and 143 after SIGTERM as of a shell.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main", "parser"]

_COMMANDS = ("info", "map", "convert", "check", "compare", "checksum", "snapshot", "bitmap", "serve", "bench", "completion")
_PASS_ON = ("serve",)  # what follows "--" belongs to the program that they run


class _Parser(argparse.ArgumentParser):
    """qemu-img exits with 1 on a bad argument, argparse with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}; try '{self.prog} --help'\n")


def parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Knows all commands, or if the first argument names one that alone: to load them all takes longer than some of them do."""
    from fastqcow import __version__

    made = _Parser(
        prog="fastqcow",
        description="Read qcow2 disk images, above all compressed ones, fast and right.",
        epilog="example: fastqcow convert -p disk.qcow2 disk.raw",
    )
    made.add_argument("--version", action="version", version=f"fastqcow {__version__}")
    made.set_defaults(failure=1)
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in argv[:1] if argv[:1] and argv[0] in _COMMANDS else _COMMANDS:
        importlib.import_module(f"fastqcow.cli.{name}").add(commands)
    return made


def _settle_output() -> None:
    """Output that cannot be written is dropped: Python would try once more at its end, complain, and exit with its own code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """In one line, as all that is said here, and without the line of code that Python would show."""
    _complain(f"warning: {message}", 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from fastqcow.errors import Error, explain

    argv = sys.argv[1:] if argv is None else argv
    passed_on: list[str] = []
    if argv[:1] and argv[0] in _PASS_ON and "--" in argv:
        argv, passed_on = list(argv[: argv.index("--")]), list(argv[argv.index("--") + 1 :])
    arguments = parser(argv).parse_args(argv, argparse.Namespace(passed_on=passed_on))
    gc.freeze()  # what is imported stays: no collection need look at it, not even the one at the end
    warnings.showwarning = _warn
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        return int(arguments.failure)  # whoever read our output has gone; there is nobody to tell
    except (Error, OSError, ValueError, KeyError, MemoryError, Warning) as e:
        return _complain(explain(e), arguments.failure)
    finally:
        signal.signal(signal.SIGTERM, before)
        _settle_output()


def _complain(message: str, code: int) -> int:
    from fastqcow.errors import printable

    print(f"fastqcow: {printable(message)}", file=sys.stderr)
    return code
