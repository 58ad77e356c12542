"""docs/formats.md, docs/faults.md and the findings of docs/trust.md claim nothing that no test holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def rows(page: str) -> list[list[str]]:
    lines = (DOCS / page).read_text().splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("| ") and not line.endswith("| tests |")]


FORMATS, FAULTS = rows("formats.md"), rows("faults.md")
FINDINGS = [row for row in rows("trust.md") if "::" in row[-1]]


def test_there_are_rows() -> None:
    assert len(FORMATS) > 40
    assert len(FAULTS) > 30
    assert len(FINDINGS) > 20


def check_tests(cell: str) -> int:
    """Whether the tests that are named are there; how many."""
    named = re.findall(r"`([^`]+)`", cell)
    for name in named:
        path, function, _, parameter = re.fullmatch(r"([\w/]+\.(?:py|c))::(\w+)(\[(.*)\])?", name).groups()  # type: ignore[union-attr]
        source = (Path(__file__).parent / path).read_text()
        assert f"\n{'def' if path.endswith('.py') else 'static void'} {function}(" in source
        assert parameter is None or f'"{parameter}"' in source or re.search(r"\d+", parameter)
    return len(named)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row[0].strip())
def test_row(row: list[str]) -> None:
    feature, state, tests = (cell.strip() for cell in row)
    assert feature
    assert re.match(r"(read|refused|kept|not yet)\b", state)
    assert check_tests(tests) or state == "not yet"


@pytest.mark.parametrize("row", FAULTS + FINDINGS, ids=lambda row: row[0].strip())
def test_fault(row: list[str]) -> None:
    """What happens, or was found, and what comes of it, or was done about it."""
    fault, outcome, tests = (cell.strip() for cell in row)
    assert fault
    assert outcome
    assert check_tests(tests)
