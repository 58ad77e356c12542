"""The Python floor on the corpus of its fuzz target, and on changed copies of it; script/fuzz goes on from there.

The targets of C are replayed by `script/fuzz replay`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import python_floor
from fastqcow import luks

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus" / "python").iterdir())
COPIES = 5


def changed(data: bytes, rng: random.Random) -> bytes:
    """With some bytes changed, put in or left out, mostly within the first cluster."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(made), rng.choice((120, 600, len(made)))) or 1)
        match rng.randrange(4):
            case 0:
                made[at:at] = rng.randbytes(rng.randint(1, 9))
            case 1:
                del made[at : at + rng.randint(1, 64)]
            case _:
                made[at : at + 1] = bytes([rng.choice((0, 1, 255, rng.randrange(256)))])
    return bytes(made)


def test_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "HASHINGS_MAX", python_floor.HASHINGS_MAX)
    target = python_floor.Target(tmp_path)
    rng = random.Random(1)
    assert CORPUS
    for path in CORPUS:
        data = path.read_bytes()
        for tried in (data, *(changed(data, rng) for _ in range(COPIES))):
            try:
                target.try_image(tried)
            except BaseException:
                (tmp_path / "failed").write_bytes(tried)
                print(f"{path}, or a copy of it, which is in {tmp_path / 'failed'}")
                raise
