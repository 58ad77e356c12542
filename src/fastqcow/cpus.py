"""How many CPUs there are for us: those that the process may run on, and of their time what its control groups allow."""

from __future__ import annotations

import os

__all__ = ["available_cpus"]

_quota: int | None = None  # 0: there is none


def available_cpus() -> int:
    """CPUs that this process may keep busy, at least 1. What its control groups allow is looked up once."""
    global _quota
    count = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    if _quota is None:
        _quota = cgroup_quota("/proc/self/cgroup", "/sys/fs/cgroup")
    return min(count, _quota) if _quota else count


def cgroup_quota(membership: str, root: str) -> int:
    """CPUs' worth of time in each period, rounded up: the least of the process's groups and those above them; 0 if none limits it.

    A container often sees its own group as the root: then the path that it is told of leads nowhere, and the root counts.
    """
    quotas = []
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, found = root, _quota_v2
        elif "cpu" in controllers.split(","):
            top, found = os.path.join(root, "cpu"), _quota_v1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        quotas += [found(os.path.join(top, *parts[:n])) for n in range(len(parts) + 1)]
    return min((quota for quota in quotas if quota), default=0)


def _quota_v2(group: str) -> int:
    words = _read(os.path.join(group, "cpu.max")).split()
    return _cpus(*words) if len(words) == 2 else 0


def _quota_v1(group: str) -> int:
    return _cpus(_read(os.path.join(group, "cpu.cfs_quota_us")).strip(), _read(os.path.join(group, "cpu.cfs_period_us")).strip())


def _cpus(quota: str, period: str) -> int:
    """No limit is "max", or -1."""
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return 0
    return -(-int(quota) // int(period))


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            return f.read()
    except OSError:
        return ""
