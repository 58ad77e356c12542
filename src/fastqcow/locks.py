"""Locks that survive a fork.

A lock that another thread holds at the moment of a fork stays locked in the child for ever, since that thread is not there to
let go of it. The locks here are made anew in the child. (What the lock protected may be half changed there; here that is a
position, which a read sets before it uses it, or a child after a fork has to set anyway.)
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ForkSafeLock", "for_file"]


class ForkSafeLock:
    """Has a lock, to be taken as `with x.lock:`. With threading.RLock as `make` a signal handler may take it that runs within the
    thread which holds it: what it protects has to bear that.
    """

    def __init__(self, make: Callable[[], threading.Lock | threading.RLock] = threading.Lock) -> None:
        self.make = make
        self.lock = make()
        _all.add(self)


_all: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
# By id() of the file object, which is its own as long as a source holds it, and with it the lock.
_of_files: weakref.WeakValueDictionary[int, ForkSafeLock] = weakref.WeakValueDictionary()
_of_files_lock = ForkSafeLock()


def for_file(file: object) -> ForkSafeLock:
    """The lock of a file object: the same for all who read it, as they share its position."""
    with _of_files_lock.lock:
        lock = _of_files.get(id(file))
        if lock is None:
            lock = _of_files[id(file)] = ForkSafeLock()
        return lock


def _renew() -> None:
    for each in list(_all):
        each.lock = each.make()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
