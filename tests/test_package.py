"""The package as it is installed: what it brings, what it imports, what it says of itself."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import fastqcow


def test_modules_are_there_without_being_imported() -> None:
    code = "import fastqcow; fastqcow.checking.check; fastqcow.conversion; fastqcow.Kind; fastqcow.check"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastqcow.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_version() -> None:
    assert importlib.metadata.version("fastqcow") == fastqcow.__version__


def test_all_is_there() -> None:
    assert sorted(fastqcow.__all__) == list(fastqcow.__all__)
    for name in fastqcow.__all__:
        assert getattr(fastqcow, name).__doc__, name


def test_the_reference_names_all_that_is_public() -> None:
    """Of the package and of the integrations, of which not all can be imported everywhere."""
    reference = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    package = Path(__file__).parents[1] / "src" / "fastqcow"
    public = {f"fastqcow.{name}" for name in fastqcow.__all__}
    for path in (package / "integrations").rglob("*.py"):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if found := re.search(r"^__all__ = (\[.*?\])", path.read_text(), re.DOTALL | re.MULTILINE):
            public |= {f"{module}.{name}" for name in ast.literal_eval(found[1])}
    assert "fastqcow.integrations.dissect.QCow2" in public
    named = re.findall(r"^\.\. auto(?:class|exception|function):: (\S+)$", reference, re.MULTILINE)
    assert sorted(named) == sorted(public)


def test_typing_files_are_installed() -> None:
    files = {file.name for file in importlib.resources.files(fastqcow).iterdir()}
    assert {"py.typed", "_reader.pyi", "_inflate.pyi", "_l2.pyi"} <= files


@pytest.mark.parametrize("module", ["_reader", "_inflate", "_l2", "_check", "_write"])
def test_stubs_name_what_the_modules_have(module: str) -> None:
    stub = (importlib.resources.files(fastqcow) / f"{module}.pyi").read_text()
    built = getattr(__import__(f"fastqcow.{module}"), module)
    for node in ast.parse(stub).body:
        if isinstance(node, ast.FunctionDef):
            assert callable(getattr(built, node.name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = ast.unparse(node.annotation)
            assert hasattr(built, node.target.id) if kind == "object" else isinstance(getattr(built, node.target.id), int)
        elif isinstance(node, ast.ClassDef) and hasattr(built, node.name):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    assert hasattr(getattr(built, node.name), member.name), f"{node.name}.{member.name}"


def test_sdist_holds_every_source(tmp_path: Path) -> None:
    """What it takes to build and to test: setuptools leaves out whatever it does not know, such as Cython's files."""
    checkout = Path(__file__).parents[1]
    pytest.importorskip("Cython")
    tracked = subprocess.run(["git", "-C", checkout, "ls-files"], capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("this is no git checkout")
    copy = tmp_path / "copy"
    for name in tracked.stdout.splitlines():
        if (checkout / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkout / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        held = {name.split("/", 1)[-1] for name in sdist.getnames()}
    wanted = {name for name in tracked.stdout.splitlines() if not name.startswith(".")}
    assert wanted - held - {"MANIFEST.in"} == set()


NOTICES = {
    "libdeflate": ("libdeflate.txt", "Copyright 2016 Eric Biggers"),
    "libisal": ("isa-l.txt", "Copyright(c) 2011-2024 Intel Corporation"),
    "libzstd": ("zstd.txt", "Copyright (c) Meta Platforms, Inc."),
}


def test_the_licence_notice_of_each_library_that_a_wheel_carries_is_in_it() -> None:
    package = importlib.metadata.distribution("fastqcow")
    assert package.metadata["License-Expression"] == "MIT AND BSD-3-Clause"
    files = package.files or []
    notices = {file.name: file.read_text() for file in files if "licenses" in file.parts}
    assert set(notices) == {"LICENSE", *(name for name, _ in NOTICES.values())}
    for name, holder in NOTICES.values():
        assert holder in notices[name]
    carried = {re.split(r"[-.]", file.name)[0] for file in files if file.parent.name in ("fastqcow.libs", ".dylibs")}
    assert carried <= set(NOTICES)


def test_import_needs_the_standard_library_alone() -> None:
    code = "import sys, json; before = set(sys.modules); import fastqcow; print(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.split(".")[0] for name in json.loads(done.stdout)}
    # Cython puts the types that its modules share into one of its own making.
    others = {
        name for name in imported - sys.stdlib_module_names - {"fastqcow"} if not name.startswith(("_cython_", "cython_runtime"))
    }
    assert others == set()


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this interpreter has a GIL")
def test_the_gil_stays_off() -> None:
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined]
