"""The fixtures of alternating.py, for every suite here. (In a module of its own, since `conftest` cannot be imported by name:
tests/ has one too.)"""

from alternating import alternating, image, pytest_terminal_summary, zlib_image, zstd_image

__all__ = ["alternating", "image", "pytest_terminal_summary", "zlib_image", "zstd_image"]
