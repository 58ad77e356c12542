"""`fastqcow serve`: an image over NBD, by nbdkit and the plugin in integrations/nbdkit.py.

The process becomes nbdkit, so signals and the exit code are nbdkit's own; and so is a socket handed over in systemd's way, which
libnbd's tools do, too: `nbdcopy -- [ fastqcow serve disk.qcow2 ] disk.raw`.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import fastqcow
from fastqcow.chain import make_options
from fastqcow.cli.common import FORMATS, Commands, add_image, add_opening, size_argument
from fastqcow.source import is_url

__all__ = ["add", "run"]

PORT = 10809  # NBD's, as registered
PACKAGE = Path(fastqcow.__file__).absolute().parent
PLUGIN = PACKAGE / "integrations" / "nbdkit.py"


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve an image over NBD",
        description="Serve the contents of an image read-only over NBD, to any number of clients, until SIGTERM or Ctrl-C: with "
        "nbdkit, whose Python plugin has to be installed too. Prints the disk's URI when clients can connect. "
        "What follows -- is handed to nbdkit: with -- --filter=cow clients can write, and nothing of it is kept; "
        "with -- --run COMMAND it ends with a command.",
        epilog="example: fastqcow serve -k /tmp/disk.sock disk.qcow2",
    )
    add_image(parser, FORMATS)
    parser.add_argument("-k", "--socket", metavar="PATH", help="the Unix socket to listen on; it is removed at the end")
    parser.add_argument("-p", "--port", type=_port, metavar="PORT", help=f"the TCP port to listen on ({PORT})")
    parser.add_argument("-b", "--bind", metavar="ADDRESS", help="the address to listen on with TCP (127.0.0.1)")
    parser.add_argument("-l", "--snapshot", metavar="SNAPSHOT", help="an internal snapshot, by id or name, in place of the disk")
    parser.add_argument(
        "-m",
        "--threads",
        type=int,
        metavar="N",
        help="threads for one read, and as many reads of each client at once; by default one for each CPU, and a read less",
    )
    parser.add_argument("--cache-size", type=size_argument, metavar="SIZE", help="inflated clusters to keep, in bytes (32M)")
    add_opening(parser)
    for letter, name in (("-r", "--read-only"), ("-t", "--persistent")):
        parser.add_argument(letter, name, action="store_true", help="accepted for qemu-nbd's sake: it is always so")
    parser.add_argument("-e", "--shared", metavar="N", help="accepted for qemu-nbd's sake: any number of clients can connect")
    parser.set_defaults(run=run)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; write a number from 1 to 65535")
    return int(text)


def run(arguments: argparse.Namespace) -> NoReturn:
    nbdkit = find_nbdkit()
    # Python looks for its library where the PATH has a python3, and the plugin's would take that of a virtual environment for its
    # own. The plugin puts the PATH back.
    environment = {**os.environ, "PATH": os.devnull}
    check_plugin(nbdkit, environment)
    environment["FASTQCOW_SERVE_PATH"] = os.environ.get("PATH", os.defpath)
    listening, uri = listen(arguments)
    # Each request of a client that is worked on at once needs a CPU, and the client one: nbdkit's 16 are only slower. One alone is
    # handed to no other thread, and so a quarter faster than several. Those that wait for a server are better off at once.
    threads = make_options(threads=arguments.threads).threads
    reads = threads if arguments.threads else max(1, threads - 1)
    at_once = [] if is_url(arguments.image) else [f"--threads={reads}"]
    options = ["--foreground", *at_once, *listening, *arguments.passed_on]
    command = [nbdkit, *options, "python", str(PLUGIN), *parameters(arguments, uri)]
    sys.stdout.flush()
    os.execve(nbdkit, command, environment)


def find_nbdkit() -> str:
    """Raises ValueError: it is not installed."""
    found = shutil.which("nbdkit", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin")))
    if found is None:
        raise ValueError("nbdkit is not installed; on Debian and Ubuntu it is in nbdkit and nbdkit-plugin-python")
    return os.path.abspath(found)


def check_plugin(nbdkit: str, environment: dict[str, str]) -> None:
    """Whether nbdkit has its Python plugin, and that one an interpreter which this package is built for.

    Raises:
        ValueError: one of the two is not so.
    """
    done = subprocess.run([nbdkit, "--dump-plugin", "python"], env=environment, capture_output=True, text=True, check=False)
    said = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if done.returncode or "python_version" not in said:
        raise ValueError("nbdkit has no Python plugin; on Debian and Ubuntu it is in nbdkit-plugin-python")
    major, minor = said["python_version"].split(".")[:2]
    if not any(PACKAGE.glob(f"_reader.cpython-{major}{minor}-*.so")):
        own = sysconfig.get_config_var("SOABI")
        raise ValueError(
            f"nbdkit's plugin runs Python {major}.{minor}, and this fastqcow is built for another ({own}): "
            f"install fastqcow for python{major}.{minor}, and serve with that"
        )


def listen(arguments: argparse.Namespace) -> tuple[list[str], str | None]:
    """nbdkit's options, and the URI to print: none where who started this has a socket, or nbdkit runs a command, which is told it.

    Raises:
        ValueError: options that exclude each other.
        OSError: something else is where the socket should be.
    """
    runs = any(word.startswith("--run") for word in arguments.passed_on)
    over_tcp = arguments.port is not None or arguments.bind is not None
    if arguments.socket is not None and over_tcp:
        raise ValueError("a Unix socket (-k) and a TCP port or address (-p, -b) exclude each other")
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        if arguments.socket is not None or over_tcp:
            raise ValueError("there is a socket to listen on from who started this, and -k, -p and -b name another")
        return [], None
    if arguments.socket is not None:
        path = os.path.abspath(arguments.socket)
        remove_stale(path)
        return [f"--unix={path}"], None if runs else f"nbd+unix:///?socket={quote(path)}"
    if runs and not over_tcp:
        return ["--unix=-"], None
    port, address = arguments.port or PORT, arguments.bind or "127.0.0.1"
    host = f"[{address}]" if ":" in address else address
    return [f"--port={port}", f"--ipaddr={address}"], None if runs else f"nbd://{host}:{port}"


def remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more: a server that was killed leaves it, and it would be in the way.

    Raises:
        OSError: somebody listens, or it is not a socket.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "exists, and is not a socket", path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "a server listens on this socket already", path)


def parameters(arguments: argparse.Namespace, uri: str | None) -> list[str]:
    """The plugin's parameters.

    Raises:
        ValueError: one that nbdkit does not hand on.
    """
    given = {
        "file": arguments.image,
        "format": arguments.source_format,
        "snapshot": arguments.snapshot,
        "threads": arguments.threads,
        "cache-size": arguments.cache_size,
        "backing": arguments.backing,
        "data-file": arguments.data_file,
        "password-file": arguments.password_file,
        "socket": None if arguments.socket is None else os.path.abspath(arguments.socket),
        "announce": uri,
    }
    made = [f"{name}={value}" for name, value in given.items() if value is not None]
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} - {str(PACKAGE.parent)}
    made += [f"site={site}" for site in sorted(sites)]
    for text in made:
        if not text.isprintable() and any("\udc80" <= character <= "\udcff" for character in text):
            raise ValueError(f"{text}: nbdkit hands on names in UTF-8 only")
    return made
