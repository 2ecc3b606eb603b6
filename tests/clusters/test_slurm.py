"""04_multinode/slurm.sbatch on a real Slurm: a controller and two nodes, each in its own namespaces.

Promise: a job that Slurm preempts and requeues ends where an uninterrupted job ends (as root:
`make test-all`).
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    PROOF,
    ROOT,
    after_a_step,
    environment,
    largest_difference,
    planted,
    read_run,
)
from hosts import WHY, network, possible

from common.snapshot import snapshots

NEEDED = ["slurmctld", "slurmd", "sbatch", "munged"]
MISSING = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        bool(MISSING) or not possible(),
        reason=f"{WHY}, and Slurm: apt-get install slurmctld slurmd slurm-client munge",
    ),
]

CONFIG = """
ClusterName=rehearsal
SlurmctldHost=node1(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=node[1-2] NodeAddr=10.77.0.[1-2] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    def __init__(self, net, folder: Path):
        self.net, self.folder = net, folder
        self.project = folder / "project"
        for name in ("common", FOLDERS["04"]):
            shutil.copytree(ROOT / name, self.project / name)

    def up(self) -> None:
        munge = self.folder / "munge"
        for name in ("munge", "state", "spool.node1", "spool.node2"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        files = " ".join(f"--{what}-file={munge}/{what}" for what in ("key", "pid", "log", "seed"))
        # --force: it runs as root, and in a folder that is not munge's own
        self.net.hosts[0].run(f"/usr/sbin/munged --force --socket={munge}/socket {files}")
        self.run("/usr/sbin/slurmctld -i")
        for host in self.net.hosts:
            host.run(f"SLURM_CONF={self.folder}/slurm.conf /usr/sbin/slurmd")
        self.wait_for(lambda: self.run("sinfo -h -N -o %t").split() == ["idle", "idle"], "two idle nodes", 30)

    def run(self, line: str) -> str:
        """Run a Slurm command on the first node, in the project's folder."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": path, "RANKS": "1"}
        exports = [
            f"export {name}='{value}'"
            for name, value in {**environment(), **variables}.items()
            if "'" not in value and name.isidentifier()
        ]
        return self.net.hosts[0].run(*exports, f"cd {self.project}", line)

    def wait_for(self, condition, why: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{why}: not within {seconds} s"
            time.sleep(0.1)

    def submit(self, *flags: str, options: str = "") -> str:
        """Submit the script with sbatch's `options`; return the job's number."""
        disk = self.net.disk
        own = [f"--snapshot-dir={disk}/snapshots", f"--metrics={disk}/metrics.jsonl", "--use-gpu=0"]
        words = [*PROOF, f"--batch-size={GLOBAL_BATCH // 2}", *own, *flags]
        return self.run(f"sbatch --parsable {options} 04_multinode/slurm.sbatch {' '.join(words)}").strip()

    def state(self, job: str) -> str:
        return self.run(
            f"squeue --noheader --states=all --format=%T --jobs={job} 2>/dev/null || true"
        ).strip()

    def finish(self, job: str) -> str:
        """Wait for a job's end; return what it printed, all files together."""
        try:
            self.wait_for(
                lambda: self.state(job) in ("COMPLETED", "FAILED", "CANCELLED", ""), f"job {job}", 240
            )
        finally:
            files = sorted(self.project.glob(f"ddp-{job}*.out"))
            out = "".join(f"--- {path.name}\n{path.read_text()}" for path in files)
            print(out, self.run(f"scontrol show job {job} || true"))
        assert self.state(job) == "COMPLETED"
        assert [path.name for path in files] == [
            f"ddp-{job}-node1.out",
            f"ddp-{job}-node2.out",
            f"ddp-{job}.out",
        ]
        return out


@pytest.fixture
def cluster(tmp_path):
    # A short path: slurmd puts sockets there, whose paths may have at most 108 characters.
    short = tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")
    with network(tmp_path / "net", 2) as net, short as folder:
        made = Cluster(net, Path(folder))
        made.up()
        yield made


def check(cluster, proof) -> None:
    """Both nodes' snapshots are those of step 03 on one machine."""
    for host in cluster.net.hosts:
        state = torch.load(snapshots(host.disk / "snapshots")[0], weights_only=True)
        difference = largest_difference(state["model"], proof("03", 2).weights)
        print(f"{host.name}'s snapshot against step 03's: {difference}")
        assert difference == 0.0
    run = read_run("on Slurm", cluster.net.hosts[0].disk)
    assert torch.equal(run.losses, proof("03", 2).losses)


def test_a_job_equals_step_03(cluster, proof):
    cluster.finish(cluster.submit())
    check(cluster, proof)


def interrupted(cluster, proof, interrupt, options="") -> None:
    """`interrupt` makes a job save and queue again: the job must end like an uninterrupted one."""
    go = cluster.folder / "go"
    # Like `pause`, but for minutes: the signal may take a long time.
    waiting = f"self.global_step == 25 and not os.path.exists({str(go)!r})"
    planted(cluster.project, "04", after_a_step(f"[time.sleep(0.01) for _ in range(30000) if {waiting}]"))
    job = cluster.submit("--save-every=1", options=options)
    disk = cluster.net.hosts[1].disk / "snapshots"
    cluster.wait_for(
        lambda: snapshots(disk) and snapshots(disk)[0].stem >= "snapshot-00000024", "step 24", 120
    )
    interrupt(job)
    outs = [cluster.project / f"ddp-{job}-node{i}.out" for i in (1, 2)]
    told = "Received 15 death signal"  # torchrun got SIGTERM, which bash may send for another signal
    cluster.wait_for(lambda: all(told in path.read_text() for path in outs), told, 240)
    # Its ranks have not saved yet. A job that ended now would leave them behind, or kill them.
    end = time.monotonic() + 3
    while time.monotonic() < end:
        assert cluster.state(job) == "RUNNING", "the job did not wait for its ranks"
    # Once: another signal, more than a second later, would end the ranks before they have saved.
    assert all(path.read_text().count("closing signal SIGTERM") == 1 for path in outs)
    go.touch()
    cluster.wait_for(lambda: cluster.state(job) == "PENDING", "the job to be queued again", 60)
    # Slurm would wait two minutes. `now` is too early: nodes revoke a job's credentials up to this second.
    cluster.run(f"scontrol update JobId={job} StartTime=now+2 TimeLimit=10")
    out = cluster.finish(job)
    assert "SIGTERM: saved at step" in out and "SIGTERM: queueing again" in out and "resumed from" in out
    check(cluster, proof)


# It goes to the job's steps; with --batch, only to the script, as --signal=B:USR1@60; with --full, to both.
@pytest.mark.sample(2)
@pytest.mark.parametrize("signal", ["TERM", "USR1", "USR2", "USR1 --batch", "USR1 --full"])
def test_a_preempted_job_queues_again_and_equals_an_uninterrupted_one(cluster, proof, signal):
    interrupted(cluster, proof, lambda job: cluster.run(f"scancel --signal={signal} {job}"))


@pytest.mark.long
def test_a_job_with_signal_usr1_whose_time_is_nearly_up_does_the_same(cluster, proof):
    """Here, Slurm itself sends the signal: when one of four minutes is left, or up to a minute earlier."""
    interrupted(cluster, proof, lambda job: None, "--time=4 --signal=USR1@60")
