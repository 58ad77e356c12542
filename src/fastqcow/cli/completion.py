"""`fastqcow completion`: what a shell needs to complete the command's arguments."""

from __future__ import annotations

import argparse

from fastqcow.cli.common import Commands

__all__ = ["add", "run"]

SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("IMAGE", "IMAGE1", "IMAGE2", "OUTPUT", "PATH", "FILE")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "completion",
        help="print what a shell needs to complete arguments",
        description="Print what a shell needs to complete the arguments of fastqcow: to be evaluated, or put where the shell looks "
        "for it. Needs the package shtab: pip install fastqcow[completion].",
        epilog='example: eval "$(fastqcow completion bash)"',
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise ValueError("completion needs the package shtab, which is not installed: pip install fastqcow[completion]") from None
    from fastqcow.cli import parser

    top = parser()
    for command in [top, *_commands(top)]:
        for action in command._actions:
            if action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, arguments.shell))
    return 0


def _commands(top: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    (found,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return list(found.choices.values())
