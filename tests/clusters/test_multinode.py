"""Steps 04 and 05 on several hosts, each with its own disk, that can be slowed, cut off and killed.

Promise: two hosts with two ranks each do what step 03 does with four ranks, to the last bit. A node, its
disk or the link between nodes may be lost (as root: `make test-all`).
"""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    GLOBAL_BATCH,
    PROOF,
    ROOT,
    disagreements,
    environment,
    largest_difference,
    left_over,
    pause,
    planted,
    read_run,
    train,
    wait_until,
)
from hosts import WHY, Host, Network, commands_for, network, possible

from common.snapshot import snapshots

pytestmark = [pytest.mark.root, pytest.mark.skipif(not possible(), reason=WHY)]

STEPS = 106
# A lost node is noticed sooner than by default. With less than this, a slow node would count as lost.
ELASTIC = ["--elastic=1:2", "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=5"]


@pytest.fixture
def net(tmp_path):
    with network(tmp_path / "net", 2) as made:
        yield made


@pytest.fixture
def slow_net(tmp_path):
    with network(tmp_path / "net", 2, slow=(5, 50)) as made:  # 5 ms there, 5 ms back, 50 Mbit/s
        yield made


def printed(
    net: Network,
    options: list[str],
    *flags: str,
    hosts: list[Host] | None = None,
    ranks: int = 1,
    root: Path = ROOT,
) -> dict[Host, str]:
    """What `launch_multinode.sh` prints for each host, to start `ranks` ranks there."""
    hosts = hosts or net.hosts
    options = [*options, f"--nproc-per-node={ranks}"]
    batch = f"--batch-size={GLOBAL_BATCH // ranks // len(hosts)}"
    own = [f"--snapshot-dir={net.disk}/snapshots", f"--metrics={net.disk}/metrics.jsonl", "--use-gpu=0"]
    commands = commands_for(
        [host.name for host in hosts], *options, "--", *PROOF, batch, *own, *flags, root=root
    )
    return {host: commands[host.name] for host in hosts}


def launch(net: Network, options: list[str], *flags: str, **kwargs) -> dict[Host, subprocess.Popen[str]]:
    """Run on each host what is printed for it."""
    commands = printed(net, options, *flags, **kwargs)
    return {host: host.start(command, **environment()) for host, command in commands.items()}


def pausing(net: Network, folder: Path) -> tuple[Path, Path]:
    """A copy of the project in which step 04 waits for a file after step 25; returns both."""
    go = net.folder / "go"
    root = planted(folder, "04", pause(25, go))
    shutil.copy(ROOT / "launch_multinode.sh", root)
    return root, go


def ended(host: Host, process: subprocess.Popen[str], timeout: int = 300) -> tuple[int, str]:
    """Wait for a host's command; return its status and output."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        host.kill_all()
        print(f"--- {host.name} had to be killed\n{process.communicate()[0]}")
        raise
    print(f"--- {host.name} ended with {process.returncode}\n{out}")
    return process.returncode, out


def all_ended(running: dict[Host, subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [ended(host, process) for host, process in running.items()]


def newest(host: Host) -> int:
    """The step of the newest snapshot on a host's disk, or -1 if there is none."""
    found = snapshots(host.disk / "snapshots")
    return int(found[0].stem.removeprefix("snapshot-")) if found else -1


def wait_for_step(host: Host, step: int, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while newest(host) < step:
        assert time.monotonic() < end, f"{host.name} is at step {newest(host)} after {seconds} s, not {step}"
        time.sleep(0.01)


def weights(host: Host) -> dict[str, torch.Tensor]:
    return torch.load(snapshots(host.disk / "snapshots")[0], weights_only=True)["model"]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("options", "ranks"), [([], 2), (["--elastic=2:2", "--interface=eth0"], 1)], ids=["static", "c10d"]
)
def test_two_hosts_do_exactly_what_step_03_does(net, proof, options, ranks):
    assert [status for status, _ in all_ended(launch(net, options, ranks=ranks))] == [0, 0]
    in_one_machine = proof("03", 2 * ranks)
    for host in net.hosts:
        difference = largest_difference(weights(host), in_one_machine.weights)
        print(f"{host.name}'s snapshot against step 03's at {2 * ranks} ranks: {difference}")
        assert difference == 0.0
    run = read_run(f"2 hosts × {ranks} ranks", net.hosts[0].disk)
    assert torch.equal(run.losses, in_one_machine.losses)
    assert disagreements(run, proof("01")) == []


def test_stopped_on_one_host_and_resumed_without_a_shared_disk(net, proof, tmp_path):
    """SIGTERM only to node2's torchrun: all ranks save after the same step. Then node1's disk is lost."""
    first, second = net.hosts
    root, go = pausing(net, tmp_path / "root")
    running = launch(net, [], "--save-every=1", root=root)
    wait_for_step(second, 20)
    second.run("pkill -TERM -f torchrun")
    go.touch()
    assert [status for status, _ in all_ended(running)] == [1, 1]
    stopped = newest(first)
    print(f"stopped after step {stopped}")
    assert 20 <= stopped < STEPS - 10 and newest(second) == stopped
    shutil.rmtree(first.disk / "snapshots")
    assert [status for status, _ in all_ended(launch(net, []))] == [0, 0]
    for host in net.hosts:
        difference = largest_difference(weights(host), proof("03", 2).weights)
        print(f"{host.name}, resumed at step {stopped}: {difference}")
        assert difference == 0.0
    run = read_run("the resumed run", first.disk)
    assert len(run.losses) == STEPS and torch.equal(run.losses, proof("03", 2).losses)


@pytest.mark.parametrize("shared", [False, True], ids=["own disks", "one disk"])
def test_one_rank_saves_on_each_disk(net, shared):
    first, second = net.hosts
    if shared:
        second.run(f"mount --bind {first.disk} {net.disk}")
    results = all_ended(launch(net, [], "--epochs=1", "--num-samples=120", "--verbose", ranks=2))
    savers = [re.findall(r"\[rank (\d)\] saved ", out) for _, out in results]
    print(f"saved by rank {savers}")
    assert savers == [["0"], [] if shared else ["2"]]
    assert [newest(host) for host in net.hosts] == [10, -1 if shared else 10]
    assert left_over(first.disk / "snapshots") == []


def test_a_rank_dies_and_all_are_started_again(net, proof, tmp_path):
    second = net.hosts[1]
    root, go = pausing(net, tmp_path / "root")
    running = launch(net, ["--elastic=2:2"], "--save-every=1", root=root)
    wait_for_step(second, 20)
    second.run("pkill -KILL -f -- '-u 04_multinode/train.py'")
    go.touch()
    (status, out), (other_status, _) = all_ended(running)
    assert (status, other_status) == (0, 0) and "resumed from" in out
    for host in net.hosts:
        difference = largest_difference(weights(host), proof("03", 2).weights)
        print(f"{host.name}, after a restart: {difference}")
        assert difference == 0.0


def test_a_node_dies_and_comes_back(net):
    """Two thousand epochs would take half an hour, so the run never ends before it is stopped."""
    first, second = net.hosts
    commands = printed(net, ELASTIC, "--save-every=1", "--epochs=2000")
    running = {host: host.start(command, **environment()) for host, command in commands.items()}
    wait_for_step(second, 20)
    second.kill_all()
    lost = newest(second)
    ended(second, running.pop(second))
    wait_for_step(first, lost + 30)  # alone
    running[second] = second.start(commands[second], **environment())

    def sizes_of_starts():
        events = read_run("", first.disk).events
        return [event["world_size"] for event in events if event["event"] == "start"]

    wait_until(lambda: len(sizes_of_starts()) == 3, "a third start")
    wait_for_step(second, newest(first) + 2)  # together
    for host in net.hosts:
        host.run("pkill -TERM -f torchrun")
    (_, out), _ = all_ended(running)
    sizes = sizes_of_starts()
    resumed = [int(step) for step in re.findall(r"resumed from .* step (\d+)", out)]
    saved = [int(step) for step in re.findall(r"SIGTERM: saved at step (\d+)", out)]
    print(f"ranks {sizes}; node2 lost after step {lost}, resumed at {resumed}, saved on SIGTERM at {saved}")
    assert sizes == [2, 1, 2]
    # One less if node2 saved a step, and died before node1 knew that this step was done.
    assert resumed[0] >= lost - 1 and resumed[1] == saved[0]
    assert newest(first) == newest(second) == saved[1]
    assert largest_difference(weights(first), weights(second)) == 0.0


def test_the_first_node_dies(net, proof, tmp_path):
    """The other node stops at once. Started again as the first node, it continues from its own disk."""
    first, second = net.hosts
    root, go = pausing(net, tmp_path / "root")
    running = launch(net, ELASTIC, "--save-every=1", root=root)
    wait_for_step(second, 20)
    first.kill_all()
    go.touch()
    status, out = ended(second, running[second], timeout=60)
    assert status == 1 and "RendezvousConnectionError" in out
    stopped = newest(second)
    ((status, out),) = all_ended(launch(net, [], hosts=[second]))
    assert status == 0 and f"step {stopped}\n" in out
    difference = largest_difference(weights(second), proof("01").weights)
    print(f"2 ranks up to step {stopped}, then 1 on node2: {difference:.1e} from step 01")
    assert 20 <= stopped < STEPS and difference <= 1e-10  # as in disagreements()


def test_the_link_is_cut(net):
    first, second = net.hosts
    running = launch(net, [], "--timeout=5", "--epochs=1000", "--save-every=1")
    wait_for_step(second, 20)
    second.cable("down")
    cut = time.monotonic()
    for host, process in running.items():
        status, out = ended(host, process, timeout=60)
        print(f"{host.name}: {time.monotonic() - cut:.0f} s after the cut")
        assert status == 1
        # The second message, when the step and the vote about SIGTERM both wait, and the other one was first.
        assert "Timed out waiting 5000ms" in out or "Application timeout caused pair closure" in out
        assert re.search(rf"Seen by rank \d on {host.name}", out)
    assert newest(first) >= 20 and newest(second) >= 20


def test_on_a_slow_link_accumulated_batches_are_the_big_batch(slow_net, tmp_path):
    net = slow_net
    small = ["--num-samples=240", "--epochs=1"]
    bytes_sent = []
    for accumulate in (1, 4):
        before = net.hosts[0].sent()
        flags = [*small, f"--accumulate={accumulate}", f"--snapshot-dir={net.disk}/{accumulate}"]
        flags += [f"--metrics={net.disk}/{accumulate}.jsonl"]
        assert [status for status, _ in all_ended(launch(net, [], *flags))] == [0, 0]
        bytes_sent.append(net.hosts[0].sent() - before)
    (folder := tmp_path / "accumulated").mkdir()
    shutil.copy(net.hosts[0].disk / "4.jsonl", folder / "metrics.jsonl")
    shutil.copytree(net.hosts[0].disk / "4", folder / "snapshots")
    big = train("01", 1, tmp_path / "big", *PROOF, *small, f"--batch-size={4 * GLOBAL_BATCH}")
    run = read_run("--accumulate=4", folder)
    print(f"bytes that node1 sent for 240 images: {bytes_sent[0]:,}, with --accumulate=4 {bytes_sent[1]:,}")
    assert len(run.losses) == 5 and disagreements(run, big) == []
    # A quarter of the all-reduces; everything else (start, evaluation, TCP's headers) stays the same.
    assert bytes_sent[1] < bytes_sent[0] / 3


@pytest.mark.sample(1)
@pytest.mark.parametrize("replicas", [1, 2])
def test_step_05_on_two_hosts_with_one_disk_does_what_step_03_does(net, proof, replicas):
    first, second = net.hosts
    second.run(f"mount --bind {first.disk} {net.disk}")
    results = all_ended(launch(net, ["--step=05"], f"--replicas={replicas}", ranks=2))
    assert [status for status, _ in results] == [0, 0]
    run, other = read_run("2 hosts × 2 ranks", first.disk), proof("03", 4)
    difference = largest_difference(run.weights, other.weights)
    print(f"step 05 on two hosts, {replicas} replicas: {difference} from step 03 at 4 ranks")
    assert difference <= 1e-12  # four numbers, added in another order
    assert disagreements(run, proof("01")) == []


def test_step_05_on_two_hosts_refuses_two_disks(net):
    results = all_ended(launch(net, ["--step=05"]))
    for status, out in results:
        assert status == 1 and "exitcode  : 2" in out
        lines = [line for line in out.splitlines() if line.startswith("error: ")]
        print(lines)
        assert lines == [f"error: {net.disk}/snapshots is not on a disk that all nodes share: use one"]
    for host in net.hosts:
        assert {path.name for path in (host.disk / "snapshots").iterdir()} <= {".lock"}


def test_nodes_that_differ_are_told_what_in(net, tmp_path):
    first, second = net.hosts
    file = ROOT / "common" / "synthetic.py"
    other = tmp_path / "synthetic.py"
    assert "manual_seed(seed)" in file.read_text()
    other.write_text(file.read_text().replace("manual_seed(seed)", "manual_seed(seed + 1)"))
    second.run(f"mount --bind {other} {file}")
    commands = printed(net, [])
    running = {
        first: first.start(commands[first]),
        second: second.start(f"{commands[second].strip()} --lr=0.01"),
    }
    for status, out in all_ended(running):
        lines = [line for line in out.splitlines() if line.startswith("error: ")]
        print(lines)
        assert status == 1 and "exitcode  : 2" in out and len(lines) == 1
        assert lines[0].startswith("error: rank 1 on node2 has --lr 0.01, rank 0 on node1 has 0.001; ")
        for what in ("code", "data synthetic-647"):
            assert f"rank 1 on node2 has {what} " in lines[0]
