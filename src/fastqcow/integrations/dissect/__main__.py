"""`python -m fastqcow.integrations.dissect COMMAND`: one of dissect's commands, with fastqcow as its qcow2 reader."""

from __future__ import annotations

import importlib.metadata
import sys

from fastqcow.integrations.dissect import install


def main(arguments: list[str]) -> int:
    """Run one of the commands that packages of dissect install, with this reader in place."""
    if not arguments or arguments[0] in ("-h", "--help"):
        usage = "usage: python -m fastqcow.integrations.dissect COMMAND [ARGUMENT ...]"
        purpose = "Run a command of dissect, such as target-fs, with fastqcow as its qcow2 reader."
        print(f"{usage}\n\n{purpose}", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 1
    command, *_ = arguments
    found = importlib.metadata.entry_points(group="console_scripts", name=command)
    if not found:
        print(f"fastqcow: there is no command {command!r} in this Python's packages", file=sys.stderr)
        return 1
    install()
    sys.argv = arguments
    result = next(iter(found)).load()()
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
