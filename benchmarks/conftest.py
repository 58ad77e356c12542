"""The fixtures of alternating.py, for every suite here. (In a module of its own, since `conftest` cannot be imported by name:
tests/ has one too.)"""

import pytest
from alternating import alternating, image, pytest_terminal_summary, raw, zlib_image, zstd_image

__all__ = ["alternating", "image", "pytest_terminal_summary", "raw", "zlib_image", "zstd_image"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Some peers leave closing their files to the garbage collector."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
