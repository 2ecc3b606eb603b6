"""How many of the machine's CPU cores this process may use."""

import contextlib
import math
import os
from pathlib import Path


def count_cores() -> int:
    """The cores that this process may use, at least 1.

    A container, or a job of a cluster, may have fewer than the machine: `os.cpu_count` does not know that.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """The number of cores whose time Linux's control groups give this process, `inf` without a limit.

    Each group that the process is in may have a limit, in version 2 (`cpu.max`) and in version 1
    (docs.kernel.org, "Control Group v2" and "CFS Bandwidth Control"). `root` is the root of the file system.
    """
    quotas = [math.inf]
    groups = ""
    with contextlib.suppress(OSError):  # not on Linux
        groups = (root / "proc/self/cgroup").read_text()
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup/cpu"
        else:
            continue
        group = mount / path.lstrip("/")
        # Groups above it count, too. In a container, `path` may be the host's: then only `mount` is there.
        while group.is_relative_to(mount):
            quotas.append(quota_of(group))
            group = group.parent
    return min(quotas)


def quota_of(group: Path) -> float:
    """The limit of one control group, in cores: a quota of microseconds in each period."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # there is no such file, or no limit: "max"
        return math.inf
