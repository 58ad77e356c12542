"""The fixtures of alternating.py, for every suite here. (In a module of its own, since `conftest` cannot be imported by name:
tests/ has one too.)"""

import pytest
from alternating import alternating, image, large_raw, pytest_terminal_summary, raw, raw_of, readers, zlib_image, zstd_image

__all__ = [
    "alternating",
    "image",
    "large_raw",
    "pytest_terminal_summary",
    "raw",
    "raw_of",
    "readers",
    "zlib_image",
    "zstd_image",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="also run on a large image, of files of this machine")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "image" in metafunc.fixturenames:
        large = ["large zlib", "large zstd"] if metafunc.config.getoption("--large") else []
        metafunc.parametrize("image", ["zlib", "zstd", *large], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Some peers leave closing their files to the garbage collector."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
