"""How many cores a process may use."""

import math
import os
import sys

import pytest
from helpers import ROOT, finish, start

from common.cores import count_cores, cpu_quota


def test_the_cores_are_those_that_the_process_may_use(tmp_path):
    """Slurm, Docker and taskset let a process run on some of the cores; os.cpu_count counts all."""
    core = min(os.sched_getaffinity(0))
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from common.cores import count_cores; "
    code += f"os.sched_setaffinity(0, [{core}]); print(count_cores())"
    status, out, err = finish(start([sys.executable, "-c", code], tmp_path))
    assert (status, out) == (0, "1\n"), err
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        # Slurm and systemd: a group in a group, each with its own limit
        ("0::/jobs/7/step\n", {"jobs/7/cpu.max": "400000 100000\n", "cpu.max": "max 100000\n"}, 4),
        ("0::/jobs/7\n", {"jobs/7/cpu.max": "max 100000\n", "jobs/cpu.max": "200000 50000"}, 4),
        ("0::/jobs:7\n", {"jobs:7/cpu.max": "100000 100000\n"}, 1),
        ("0::/jobs/7\n", {"jobs/8/cpu.max": "100000 100000\n"}, math.inf),
        # Docker without a namespace for groups: the path is the host's, and the limit is at the top
        (
            "4:memory:/docker/1f\n2:cpu,cpuacct:/docker/1f\n",
            {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        (
            "1:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
    ],
    ids=[
        "no file",
        "no limit",
        "a part",
        "a group in a group",
        "above",
        "colon",
        "another's",
        "docker",
        "both",
    ],
)
def test_the_limits_of_linux_control_groups_count(tmp_path, groups, files, cores):
    """The groups are only files here: real ones need root, and a kernel that supports their version."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cpu_quota(tmp_path) == cores


def test_where_there_are_no_control_groups_nothing_is_limited(tmp_path):
    assert cpu_quota(tmp_path) == math.inf
