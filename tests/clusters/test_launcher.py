"""launch_multinode.sh: what it prints, what it refuses, and that it leaves nothing running.

Promise: every command printed by `launch_multinode.sh` works. If the launcher is stopped, no process
survives on any node. If each of two nodes has its own snapshot folder, one of the folders is enough to
resume.
"""

import contextlib
import functools
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    GLOBAL_BATCH,
    PROOF,
    ROOT,
    children,
    environment,
    finish,
    kill,
    largest_difference,
    last_saved,
    newest,
    paths,
    read_run,
    start,
    wait_for_step,
    wait_until,
)
from hosts import WHY, commands_for, network, possible

from common.snapshot import snapshots

SCRIPT = str(ROOT / "launch_multinode.sh")

# Commands that a Mac does not have, and options that its other commands refuse, as shell patterns.
MISSING = ["flock", "getent", "ip", "nproc", "pidof", "seq", "setsid", "shuf", "ss", "tac", "timeout"]
REFUSED = {
    "base64": "-*[dw]*",  # -D there, before macOS 13
    "date": "-*d* | *%*N*",
    "grep": "-*[Pz]*",
    "readlink": "-*[efm]*",
    "sed": "-i | -*[rsz]*",
    "sort": "-*z*",
    "stat": "-*c*",
    "xargs": "-*[adr]*",
    **dict.fromkeys(["cat", "cut", "dirname", "ls", "mkfifo", "mktemp", "ps", "rm", "tail", "tr"], "--?*"),
}
# What is new in bash since 3.2, the version on every Mac, according to bash's CHANGES.
AFTER_BASH_3_2 = [
    r"\b(mapfile|readarray|coproc|BASHPID|SRANDOM|EPOCH\w+)\b|exec \{|&>>|\|&|;;?&",
    r"\b(declare|local|typeset) -\w*[Agnlu]|\bwait -[nfp]|\[\[ -[vR] |printf[^|;]*%\(|shopt",
    r"\$\{[^}]*(\^|,,|@[A-Za-z]\})|\w\[-\d|: -\d|\.\.\d+\.\.|\{0\d+\.\.",
    r"\bread [^|;<]*-(\w*[iN]|t ?\d*\.)",
]


def run(*words: str, real: bool = False) -> tuple[int, str, str]:
    status, out, err = finish(start([SCRIPT, *words], ROOT, PATH=paths(real)))
    print(f"$ launch_multinode.sh {' '.join(words)}\n{out}{err}")
    return status, out, err


def test_shellcheck_has_nothing_to_say():
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck: apt-get install shellcheck")
    scripts = [SCRIPT, *map(str, ROOT.glob("0*/*.sbatch"))]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0


def test_it_keeps_to_bash_3_2():
    """The script is read, not run: bash 3.2 cannot be installed where the tests run."""
    lines = [line for line in Path(SCRIPT).read_text().splitlines() if not line.lstrip().startswith("#")]
    found = [line for line in lines if any(re.search(new, line) for new in AFTER_BASH_3_2)]
    arrays = {name for line in lines for name in re.findall(r"\$\{(\w+)\[[@*]\]\}", line)}
    print(found, arrays)
    assert len(lines) > 200 and found == []
    assert arrays == {"logins", "ssh_words", "fixes"}  # never empty: with `set -u`, that is an error there


@pytest.fixture
def mac_path(tmp_path):
    """A PATH whose tools refuse what a Mac's tools refuse."""
    folder = tmp_path / "mac"
    folder.mkdir()
    for name in MISSING:
        (folder / name).write_text(f"#!/bin/sh\necho '{name}: command not found' >&2\nexit 127\n")
    for name, options in REFUSED.items():
        refuse = f'echo "{name}: illegal option -- $word" >&2 && exit 64'
        (folder / name).write_text(
            f"#!/bin/sh\nfor word; do case $word in --?* | {options}) {refuse} ;; esac; done\n"
            f'exec {shutil.which(name)} "$@"\n'
        )
    for file in folder.iterdir():
        file.chmod(0o755)
    return f"{folder}{os.pathsep}{paths(real=True)}"


def test_help_names_every_option():
    status, out, _ = run("--help")
    source = Path(SCRIPT).read_text()
    options = {
        word
        for line in source.splitlines()
        if line.startswith("    --")
        for word in line.split(")")[0].split()
        if word.startswith("--")
    }
    print(sorted(options))
    assert status == 0 and len(options) >= 15
    assert all(
        f"  {option}" in out or f"[{option}" in out for option in options - {"--", "--master-port", "--*=*"}
    )


BAD = {
    "--nproc-per-node=0": "--nproc-per-node must be a whole number, 1 or more, not '0'",
    "--nproc-per-node=08": "--nproc-per-node must be a whole number",
    "--threads=x": "--threads must be a whole number",
    "--step=03": "--step is 04 or 05, not '03'",
    "--port=70000": "--port must be below 65536",
    "--port=": "",  # as if it were not given
    "--local=0": "--local must be a whole number, 1 or more",
    "--local": "--local needs a value",
    "--local=2 --hosts=a,b": "--local runs here: leave out --hosts",
    "--local=2 --run": "--run and --local cannot be used together",
    "--run --local=2": "--local and --run cannot be used together",
    "--port=x": "--port must be a whole number, 1 or more, not 'x'",
    "--check --run": "--run and --check cannot be used together",
    "--run": "--run needs the nodes: --hosts A,B,…",
    "--check": "--check needs the nodes: --hosts A,B,…",
    "--hosts=a,a": "--hosts names a twice",
    "--hosts=a,": "",  # one comma too many
    "--hosts=a,,b": "'' in --hosts is not a host name",
    "--hosts=a,-oProxyCommand=x": "'-oProxyCommand=x' in --hosts is not a host name",
    "--hosts=-lroot@a,b": "'-lroot@a' in --hosts is not a host name",
    "--hosts=localhost,b": "'localhost' means a different machine on each node",
    "--hosts=a,127.0.0.1": "'127.0.0.1' means a different machine on each node",
    "--hosts=a,b --master-addr=localhost": "--master-addr localhost leads every node to itself",
    "--hosts=a,b --master-addr=127.0.1.1": "--master-addr 127.0.1.1 leads every node to itself",
    "--hosts=a,b --master-addr=;ls": "';ls' in --master-addr is not a host name or address",
    "--hosts=a,b --elastic=2": "--elastic is MIN:MAX, such as 1:4, not '2'",
    "--hosts=a,b --elastic=3:4": "--elastic 3:4, but --hosts names 2",
    "--hosts=a,b --elastic=2:1": "--elastic 2:1, but --hosts names 2",
    "--hosts=a,b --max-restarts=3": "need --elastic",
    "--hosts=a,b --elastic=2:2 --max-restarts=-1": "--max-restarts must be a whole number, 0 or more",
    "--hosts=a,b --elastic=2:2 --rdzv-id=a;b": "--rdzv-id is a word",
    "--hosts=a,b --elastic=2:2 --rdzv-conf=x": "--rdzv-conf is K=V,…",
    "--hosts=a,b --interface=$(ls)": "--interface takes one name, such as eth0",
    "--epochs=3": "unknown option '--epochs' (--help lists the options; training flags come after --)",
    "--interface-to=no.such.host.invalid": "cannot resolve 'no.such.host.invalid'",
    "train": "unknown option 'train'",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_line(words):
    status, out, err = run(*words.split())
    if not BAD[words]:
        assert status == 0
        return
    assert status == 2 and out == ""
    assert err.startswith("error: ") and BAD[words] in err and err.count("\n") == 1


def test_it_prints_what_each_node_is_to_run():
    status, out, _ = run(
        "--hosts=bob@alpha,beta,gamma", "--nproc-per-node=8", "--", "--data-dir=my data", "--epochs=5"
    )
    assert status == 0
    for rank, (name, peer) in enumerate([("alpha", "beta"), ("beta", "alpha"), ("gamma", "alpha")]):
        block = out.split(f"# --- on {name}\n")[1].split("\n\n")[0]
        assert f"--interface-to {peer})" in block
        assert "GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME==$interface OMP_NUM_THREADS=1" in block
        assert (
            f"--nnodes=3 --nproc-per-node=8 --node-rank={rank} --master-addr=alpha --master-port=29500"
            in block
        )
        assert r"04_multinode/train.py --data-dir=my\ data --epochs=5" in block
    assert "firewalls" in out and "same commit" in out and "SSH to every node" in out


def test_it_prints_what_each_node_has_to_do_before_and_what_it_needs():
    _, out, _ = run("--hosts=a,b", "--setup=module load cuda", "--step=05")
    assert out.count(" && module load cuda &&\n") == 2 and "on one disk that all nodes have in common" in out
    _, out, _ = run("--hosts=a,b", "--setup=")
    assert out.count(" &&  &&") == 0 and "on one disk" not in out


def test_without_the_command_ip_it_asks_for_the_interface(tmp_path):
    folders = [Path(folder) for folder in paths(real=True).split(os.pathsep)]
    for name, file in {file.name: file for folder in folders[::-1] for file in folder.glob("*")}.items():
        if name != "ip":
            (tmp_path / name).symlink_to(file)
    status, _, err = finish(start([SCRIPT, "--interface-to", "127.0.0.1"], ROOT, PATH=str(tmp_path)))
    assert status == 2
    assert err == "error: no 'ip' command here (package iproute2): give --interface NAME\n"


def test_elastic_commands_differ_in_who_is_host():
    blocks = commands_for(["alpha", "beta"], "--elastic=1:4", "--rdzv-id=x", "--interface=ib0", "--port=1234")
    for name, host in (("alpha", 1), ("beta", 0)):
        print(blocks[name])
        assert "GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME==ib0" in blocks[name]
        assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in blocks[name]
        assert (
            "--nnodes=1:4 --nproc-per-node=2 --max-restarts=3 --rdzv-backend=c10d --rdzv-id=x" in blocks[name]
        )
        assert f"--rdzv-endpoint=alpha:1234 --rdzv-conf=is_host={host} --local-addr={name}" in blocks[name]


def test_without_hosts_it_says_whose_names_these_are():
    status, out, _ = run()
    assert status == 0 and out.startswith("# For two nodes called node1 and node2. Name yours: ")


def training(folder: Path) -> list[str]:
    flags = ["--num-samples=647", f"--batch-size={GLOBAL_BATCH // 2}", "--use-gpu=0"]
    return [*flags, f"--snapshot-dir={folder}/snapshots", f"--metrics={folder}/metrics.jsonl"]


def free_port() -> int:
    """A free port below those that the system gives to connections; torchrun's --master-port refuses 0."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("none of 100 ports is free")


def marked(folder: Path) -> list[str]:
    """The processes of a run: torchrun and its ranks have `folder` on their command lines."""
    out = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in out.splitlines() if str(folder) in line]


@pytest.mark.slow
def test_local_nodes_train(proof, tmp_path):
    """Two nodes are two torchruns that meet on a free port; they do what step 03 does, to the last bit."""
    own, taken = training(tmp_path)[3:], contextlib.ExitStack()
    with contextlib.suppress(OSError):  # the other modes' port is in use: by this, or by something else
        taken.enter_context(socket.create_server(("127.0.0.1", 29500)))
    with taken:
        status, out, err = run("--local=2", "--nproc-per-node=1", "--", *PROOF, "--batch-size=6", *own)
    assert status == 0 and err == ""
    assert read_run("", tmp_path).events[0]["use_gpu"] == 0
    assert "[node 0] done: " in out and all(line.startswith("[node ") for line in out.splitlines())
    difference = largest_difference(newest(tmp_path / "snapshots")["model"], proof("03", 2).weights)
    losses = read_run("", tmp_path).losses
    print(f"two nodes on this machine against step 03 at two ranks: {difference} (must be 0.0)")
    assert difference == 0.0 and torch.equal(losses, proof("03", 2).losses)


@pytest.mark.sample(2)
@pytest.mark.few(1)
@pytest.mark.parametrize("lost", ["node 0's disk", "node 1's disk", "neither"])
def test_two_nodes_with_folders_of_their_own(proof, tmp_path, lost):
    """Two torchruns with two ranks each, without root: one rank of each saves, and one copy is enough."""

    def both(*flags: str) -> list[str]:
        nodes = []
        port = free_port()
        for node in range(2):
            rendezvous = [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
            words = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc-per-node=2",
                *rendezvous,
            ]
            own = [
                f"--snapshot-dir=disk-{node}",
                f"--metrics=metrics-{node}.jsonl",
                "--use-gpu=0",
                "--verbose",
            ]
            script = str(ROOT / "04_multinode" / "train.py")
            nodes.append(
                start([*words, script, *PROOF, f"--batch-size={GLOBAL_BATCH // 4}", *own, *flags], tmp_path)
            )
        ends = [finish(node) for node in nodes]
        assert [status for status, _, _ in ends] == [0, 0], "\n".join(node.story for node in nodes)
        return [out for _, out, _ in ends]

    outs = both("--epochs=1")
    savers = [re.findall(r"\[rank (\d)\] saved ", out) for out in outs]
    print(f"saved by ranks {savers}")
    assert savers == [["0"], ["2"]]
    if lost != "neither":
        shutil.rmtree(tmp_path / f"disk-{lost[5]}")
    outs = both()
    assert "step 53\n" in outs[0]
    weights = [newest(tmp_path / f"disk-{node}")["model"] for node in range(2)]
    assert largest_difference(*weights) == 0.0
    difference = largest_difference(weights[0], proof("01").weights)
    print(f"after an epoch, without {lost}, against step 01: {difference:.1e} (<= 1e-10)")
    assert difference <= 1e-10  # as in disagreements()


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        pytest.param(signal.SIGINT, 130, marks=[pytest.mark.slow, pytest.mark.sample(1)]),
        pytest.param(signal.SIGTERM, 143, marks=[pytest.mark.slow, pytest.mark.sample(1)]),
        pytest.param(signal.SIGKILL, -9, marks=[pytest.mark.slow, pytest.mark.sample(1)]),
    ],
    ids=str,
)
def test_a_launcher_that_is_stopped_leaves_nothing(tmp_path, number, expected):
    """All processes are real: the test finds them by their command lines."""
    flags = [*training(tmp_path), "--epochs=1000", "--save-every=5"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = [SCRIPT, "--local=2", "--nproc-per-node=1", "--", *flags]
    process = start(words, ROOT, PATH=paths(real=True), TMPDIR=str(scratch))
    try:
        wait_for_step(process, tmp_path / "snapshots")
        if number == signal.SIGINT:  # a terminal sends it to the whole group
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        process.process.wait(60)
        wait_until(lambda: not marked(tmp_path), f"the end of all: {marked(tmp_path)}", 45)
    finally:
        kill([int(line.split()[0]) for line in marked(tmp_path)])
        status, out, err = finish(process)
    print(out, err)
    assert status == expected
    if number != signal.SIGKILL:
        assert "SIGTERM: saved at step" in out and "stopping all nodes" in err
        assert [path.name for path in scratch.iterdir() if path.name.startswith(("launch.", "ranks."))] == []


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    "without",
    [
        "GNU tools",
        pytest.param("/proc", marks=[pytest.mark.root, pytest.mark.skipif(not possible(), reason=WHY)]),
    ],
)
def test_a_node_that_fails_stops_the_others(tmp_path, mac_path, without):
    """Also on a Mac, which has neither, and also if a rank hangs when its torchrun is killed."""
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$0" "$@"']
    flags = [*training(tmp_path), "--epochs=1000", "--save-every=5"]
    words = [SCRIPT, "--local=2", "--nproc-per-node=1", "--", *flags]
    process = start(hide * (without == "/proc") + words, ROOT, PATH=mac_path)
    try:
        wait_for_step(process, tmp_path / "snapshots")
        torchruns = [line for line in marked(tmp_path) if "torchrun" in line and "bash -c" not in line]
        victim = next(int(line.split()[0]) for line in torchruns if "--node-rank=1" in line)
        kill(children(victim), signal.SIGSTOP)
        kill([victim])
        process.process.wait(60)
        left = marked(tmp_path)
    finally:
        kill([int(line.split()[0]) for line in marked(tmp_path)])
        status, out, err = finish(process)
    print(out, err)
    assert len(torchruns) == 2 and status not in (0, 2)
    assert re.search(r"^node [01] failed with status \d+: stopping all nodes$", err, re.M)
    assert "illegal option" not in err
    assert left == []


needs_ssh = pytest.mark.skipif(
    not possible() or not Path("/usr/sbin/sshd").exists(),
    reason=f"{WHY}, and sshd: apt-get install openssh-server openssh-client",
)


@pytest.fixture
def net(tmp_path):
    """Two nodes, each with an SSH server, and a third host to work from."""
    key, config = tmp_path / "key", tmp_path / "ssh_config"
    with network(tmp_path / "net", 3) as made:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        shutil.copy(f"{key}.pub", tmp_path / "authorized")
        config.write_text(
            f"IdentityFile {key}\nUser root\nBatchMode yes\nConnectTimeout 5\nLogLevel ERROR\n"
            "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        )
        sshd = f"/usr/sbin/sshd -f /dev/null -h {key} -o AuthorizedKeysFile={tmp_path}/authorized"
        sshd += " -o StrictModes=no -o PidFile=none"
        for host in made.hosts[:2]:
            host.run("mkdir /run/sshd", sshd)
        made.ssh = f"ssh -F {config}"
        yield made


@pytest.fixture
def launcher(net, mac_path):
    """Starts the launcher on the third host, whose tools act like a Mac's."""
    return functools.partial(launch, net, mac_path)


def launch(net, mac_path, mode, *words):
    setup = f"export PATH={paths(real=True)}; export CUDA_VISIBLE_DEVICES="
    line = [
        SCRIPT,
        mode,
        "--hosts=node1,node2",
        f"--ssh={net.ssh}",
        f"--setup={setup}",
        "--nproc-per-node=1",
        *words,
    ]
    command = f"PATH='{mac_path}' exec " + " ".join(f"'{word}'" for word in line)
    return net.hosts[2].start(command, **environment())


@pytest.mark.root
@needs_ssh
def test_check_finds_two_nodes_ready(net, launcher):
    (net.folder / "data" / "MNIST" / "raw").mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (net.folder / "data" / "MNIST" / "raw" / f"{name}-ubyte").touch()
    process = launcher("--check", "--", f"--data-dir={net.folder}/data")
    out, _ = process.communicate(timeout=60)
    print(out)
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(" node")}
    assert process.returncode == 0 and "All nodes are ready." in out and "!" not in out
    assert out.split("\n")[0].split() == [
        "node",
        "ssh",
        "python",
        "torch",
        "commit",
        "29500",
        "interface",
        "data",
    ]
    version = torch.__version__.partition("+")[0]
    for name, port in (("node1", "free"), ("node2", "open")):
        cells = rows[name].split()
        assert cells[:3] == [name, "ok", platform.python_version()] and cells[3].startswith(version)
        assert len(cells) == 8 and cells[5:] == [port, "eth0", "mnist"]
    columns = [[match.start() for match in re.finditer(r"\S+", line)] for line in out.splitlines()[:3]]
    assert columns[0] == columns[1] == columns[2]


@pytest.mark.root
@needs_ssh
def test_check_says_how_to_fix_what_is_wrong(net, launcher, tmp_path):
    first, second, _ = net.hosts
    other = tmp_path / "models.py"
    other.write_text((ROOT / "common" / "models.py").read_text() + "# changed\n")
    second.run(
        f"mount --bind {other} {ROOT}/common/models.py",
        "echo 127.0.0.1 node1 > /tmp/h && mount --bind /tmp/h /etc/hosts".replace("/tmp/h", f"{tmp_path}/h"),
    )
    listener = (
        "import socket, time; s = socket.create_server(('', 29500)); print(1, flush=True); time.sleep(99)"
    )
    taken = first.start(f'python3 -c "{listener}"')
    assert taken.stdout.readline() == "1\n"
    process = launcher("--check", "--hosts=node1,node2,node3")
    out, _ = process.communicate(timeout=60)
    print(out)
    assert process.returncode == 1
    for fix in (
        "! node1: port 29500 is in use there: stop what is listening (ss -tlnp), or choose another --port",
        "! node1: no MNIST in data: copy it there",
        "! node2: its code is not node1's (",
        "! node2: cannot connect to node1:29500: open it",
        "! node2: the other node's name resolves to this node itself: fix /etc/hosts",
        "! node3: SSH: ssh: connect to host node3 port 22: Connection refused. Try: ",
    ):
        assert fix in out, fix
    assert re.search(r"^ node3 +!no +$", out, re.M) and re.search(
        r"^ node2 +ok .*!none +!lo +!none", out, re.M
    )


@pytest.mark.root
@needs_ssh
def test_check_tells_what_has_still_to_be_installed(net, launcher):
    for words, said, fix in (
        (["--dir=/nowhere"], "ok", "there is no /nowhere: git clone the project there, or say where it is"),
        (
            ["--setup=export PATH=/usr/bin:/bin"],
            "none",
            "no torchrun: python3 -m venv .venv && .venv/bin/pip",
        ),
    ):
        process = launcher("--check", *words)
        out, _ = process.communicate(timeout=60)
        print(out)
        assert process.returncode == 1
        for node in ("node1", "node2"):
            assert f"! {node}: {fix}" in out and re.search(rf"^ {node} .*!{said}\b", out, re.M)


@pytest.mark.root
@needs_ssh
def test_run_trains_on_both_nodes(net, launcher, proof):
    flags = [*PROOF, f"--batch-size={GLOBAL_BATCH // 2}", *training(net.disk)[2:]]
    process = launcher("--run", "--", *flags)
    out, _ = process.communicate(timeout=120)
    print(out)
    assert process.returncode == 0
    assert "[node1] done: " in out and all(line.startswith("[node") for line in out.splitlines())
    for host in net.hosts[:2]:
        state = torch.load(snapshots(host.disk / "snapshots")[0], weights_only=True)
        difference = largest_difference(state["model"], proof("03", 2).weights)
        print(f"{host.name}'s snapshot against step 03's: {difference}")
        assert difference == 0.0


@pytest.mark.sample(1)
@pytest.mark.root
@needs_ssh
@pytest.mark.parametrize("how", ["Ctrl-C", "a node fails"])
def test_run_stops_all_nodes_and_leaves_nothing(net, launcher, how):
    process = launcher("--run", "--", *training(net.disk), "--epochs=1000", "--save-every=5")
    try:
        wait_until(lambda: last_saved(net.hosts[1].disk / "snapshots"), "a snapshot on node2")
        if how == "Ctrl-C":
            net.hosts[2].run("pkill -INT -o -f launch_multinode.sh")
        else:
            net.hosts[1].run("pkill -KILL -f 04_multinode/train.py")
        out, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    print(out)
    assert "stopping all nodes" in out
    if how == "Ctrl-C":
        assert process.returncode == 130 and "[node1] SIGTERM: saved at step" in out
    else:
        assert process.returncode not in (0, 130)
        assert re.search(r"^node[12] failed with status \d+: stopping all nodes$", out, re.M)
    for host in net.hosts:
        left = [line for line in host.processes() if "sshd" not in line]
        print(f"{host.name}: {left}")
        assert left == []


def test_a_slurm_job_with_fewer_cores_than_ranks_ends_at_once():
    """Eight GPUs, but only the two cores that the script requests by default: ranks would be very slow."""
    job = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    words = ["bash", str(ROOT / "04_multinode" / "slurm.sbatch")]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **job}, cwd=ROOT)
    print(result.returncode, result.stdout, result.stderr)
    said = "error: 8 ranks on each node, but --cpus-per-task is 2: raise it\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", said)
