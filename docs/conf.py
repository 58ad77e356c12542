"""Sphinx builds the site of these pages: `script/docs`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import fastqcow
from fastqcow.cli import parser

project = "fastqcow"
author = "the fastqcow developers"
copyright = "the fastqcow developers"  # noqa: A001 - Sphinx's word
release = version = fastqcow.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fastqcow {version}"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = [name for name in ("dask", "numpy") if not find_spec(name)]  # which new Pythons do not have yet
autodoc_default_options = {"members": True, "inherited-members": False, "show-inheritance": True}
intersphinx_mapping: dict[str, tuple[str, None]] = {}  # nothing is fetched while building


def commands(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def write_commands() -> None:
    """The page of the commands: what `--help` says of each."""
    said = ["# Commands", "", "What `fastqcow COMMAND --help` says.", ""]
    for name, command in commands(parser()).items():
        said += [f"## {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    Path(__file__).with_name("commands.md").write_text("\n".join(said))


write_commands()
