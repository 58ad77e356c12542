"""docs/formats.md claims nothing that no test holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
ROWS = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ") and "| state |" not in line]


def test_there_are_rows() -> None:
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_row(row: list[str]) -> None:
    feature, state, tests = (cell.strip() for cell in row)
    assert feature
    assert re.match(r"(read|refused|kept|not yet)\b", state)
    named = re.findall(r"`([^`]+)`", tests)
    assert named or state == "not yet"
    for name in named:
        path, function, _, parameter = re.fullmatch(r"([\w/]+\.py)::(\w+)(\[(.*)\])?", name).groups()  # type: ignore[union-attr]
        source = (Path(__file__).parent / path).read_text()
        assert f"\ndef {function}(" in source
        assert parameter is None or f'"{parameter}"' in source or re.search(r"\d+", parameter)
