"""SECURITY.md promises nothing that no test holds, and states no limit that is not the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
PAGE = (TOP / "SECURITY.md").read_text()
TESTS = sorted(set(re.findall(r"`([\w/]+\.(?:py|c))(?:::(\w+))?`", PAGE)))
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
LIMITS = [row for row in ROWS if re.fullmatch(r"`\S+/\S+::[A-Z]\w+`", row[-1])]
PROMISES = [row for row in ROWS if len(row) == 2]
UNITS = {"": 1, "times": 1, "ns": 1, "ms": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def test_there_are_rows() -> None:
    assert len(LIMITS) > 20
    assert len(PROMISES) > 12
    assert len(TESTS) > 20


@pytest.mark.parametrize("row", PROMISES, ids=lambda row: row[0][:40])
def test_each_promise_has_a_test(row: list[str]) -> None:
    assert row[1] == "held by" or re.search(r"`[\w/]+\.(py::\w+|c)`", row[1])


@pytest.mark.parametrize(("path", "function"), TESTS)
def test_each_test_is_there(path: str, function: str) -> None:
    file = TOP / "tests" / path.removeprefix("tests/")
    if path.startswith(("src/", "csrc/")):
        file = TOP / path
    assert file.is_file()
    assert not function.startswith("test_") or f"\ndef {function}(" in file.read_text()


@pytest.mark.parametrize("row", LIMITS, ids=lambda row: row[0][:40])
def test_each_limit_is_the_codes(row: list[str]) -> None:
    _, stated, place = row
    path, name = place.strip("`").split("::")
    found = re.findall(rf"\b{name} = ([\d <*()]+)", (TOP / path).read_text())
    assert len(found) == 1, f"{name} is not in {path}, once and as a number"
    number, unit = re.fullmatch(r"([\d^]+) ?(\w*)", stated).groups()  # type: ignore[union-attr]
    base, _, exponent = number.partition("^")
    assert int(base) ** int(exponent or 1) * UNITS[unit] == eval(found[0])


def test_the_site_has_it_word_for_word() -> None:
    assert "{include} ../SECURITY.md" in (TOP / "docs" / "security.md").read_text()
