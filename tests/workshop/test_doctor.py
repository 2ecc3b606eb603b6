"""The doctor: each check turns red when something is wrong, and the command that it prints fixes this."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import ROOT, Started, errors, finish, paths, start
from hosts import WHY, possible

from common import mnist
from workshop import doctor

pytestmark = pytest.mark.long
DOCTOR = ROOT / "workshop" / "doctor.py"
LINUX = sys.platform == "linux"


def shell(script: str, folder: Path, namespaces: str = "", fork: bool = False, **extra: str) -> Started:
    """Start a script of bash, in namespaces of its own if any are named; `$doctor` stands for the doctor.

    As a fork it has torch at once, but nothing that the script has changed besides variables.
    """
    python = "python" if fork else sys.executable
    apart = ["unshare", *namespaces.split(), "--fork", "--kill-child"] if namespaces else []
    extra |= {"PATH": paths()} if fork else {}
    return start([*apart, "bash", "-ec", f"doctor='{python} {DOCTOR}'\n{script}"], folder, **extra)


def heard(process: Started, timeout: float = 120) -> tuple[int, dict]:
    """The exit status and the checks by their names, of a doctor that prints JSON."""
    status, out, err = finish(process, timeout)
    print(f"status {status}\n{out}{err}")
    assert not err
    said = json.loads(out)
    assert status == (0 if said["ok"] else 1)
    return status, {each["check"]: each for each in said["checks"]}


def make_digits(folder: Path) -> Path:
    """Make four files of MNIST's names and sizes: nothing is in them, nor on the disk."""
    raw = folder / "digits" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in mnist.FILES.items():
        with open(raw / name, "wb") as file:
            file.truncate(size)
    return folder / "digits"


@pytest.fixture
def digits(tmp_path):
    yield make_digits(tmp_path)
    shutil.rmtree(tmp_path)  # or pytest would keep the copies, which take room


# --- Green


def test_a_machine_that_can_run_the_tests_is_ready(tmp_path, digits):
    status, found = heard(shell(f"$doctor --json --data-dir {digits}", tmp_path, fork=True))
    assert status == 0
    assert list(found) == list(doctor.checks(digits))
    assert all(each["status"] != "red" and each["found"] for each in found.values())
    assert all(bool(each["fix"]) == (each["status"] == "yellow") for each in found.values())
    assert "two have added up over gloo" in found["ranks"]["found"]


def test_it_says_the_same_in_lines(digits):
    """Without colors, because this is no terminal."""
    words = [sys.executable, "workshop/doctor.py", "--only=python", "--only=mnist", "--only=open-files"]
    status, out, err = finish(start([*words, f"--data-dir={digits}"], ROOT, real=True))
    print(out, err)
    assert (status, err) == (0, "")
    assert re.fullmatch(
        r"green   python         Python 3\.\d+\.\S+\n"
        rf"green   mnist          in {digits}\n"
        r"green   open-files     enough may be open at the same time\n"
        r"\n3 green, 0 yellow, 0 red\. This machine is ready\.\n",
        out,
    )


# --- Red


@dataclass
class Red:
    """Something that is wrong: how to make it so, which check notices, what it says, and what fixes it."""

    check: str
    says: str
    fix: str  # a regular expression for the whole command
    setup: str = ""  # lines of bash, in a folder of the test's own
    files: dict[str, str] = field(default_factory=dict)  # which Python finds before what is installed
    namespaces: str = ""  # for what only root can break
    fixes: bool = True  # the command is tried
    fork: bool = False  # for what is only a variable, and needs torch
    color: str = "red"


VERSION = "__version__ = '2.14.1'\nclass version:\n    cuda = '13.0'\n"
NO_GPU = """
class accelerator:
    current_accelerator = staticmethod(lambda check_available: None)
    device_count = staticmethod(lambda: 0)
"""
DISTRIBUTED = "is_gloo_available = lambda: False\nis_nccl_available = lambda: True\n"
INSTALL = r"\S+ -m pip install -r \S+/requirements\.txt"
REINSTALL = r"\S+ -m pip install --upgrade --force-reinstall torch torchvision"
NOTHING_LISTENS = """
class MNIST:
    mirrors = ["http://127.0.0.1:1/", "http://127.0.0.1:1/other/"]
"""
DAMAGED = """
mkdir -p data/MNIST/raw
for name in train-images-idx3 train-labels-idx1 t10k-images-idx3; do echo >data/MNIST/raw/$name-ubyte; done
truncate --size 10008 data/MNIST/raw/t10k-labels-idx1-ubyte
"""
ALONE = "ip link set lo up"
NOBODY = """
ip link set lo up
hostname nobody-knows-me
echo 'hosts: files' >nsswitch.conf
mount --bind nsswitch.conf /etc/nsswitch.conf
"""
ELSEWHERE = f"""
{NOBODY}
ip link add nowhere type veth peer name wall
ip address add 10.1.1.1/24 dev nowhere
ip link set nowhere up
ip link set wall up
ip route add default via 10.1.1.2
echo '127.0.0.1 localhost' >hosts
echo '10.9.9.9 nobody-knows-me' >>hosts
mount --bind hosts /etc/hosts
"""
SILENT = """
unset RES_OPTIONS  # which the tests shorten
ip link set lo up
ip link add nowhere type veth peer name wall
ip address add 10.1.1.1/24 dev nowhere
ip link set nowhere up
ip link set wall up
ip neighbour add 10.1.1.2 lladdr 02:00:00:00:00:02 dev nowhere
echo 'hosts: files dns' >nsswitch.conf
mount --bind nsswitch.conf /etc/nsswitch.conf
echo 'nameserver 10.1.1.2' >resolv.conf
mount --bind resolv.conf /etc/resolv.conf
echo "127.0.0.1 localhost $(hostname)" >hosts
mount --bind hosts /etc/hosts
"""
TAKEN = """
ip link set lo up
echo 50000 50001 >/proc/sys/net/ipv4/ip_local_port_range
mkfifo alive held
python3 -c '
import socket
servers = [socket.create_server(("127.0.0.1", port)) for port in (50000, 50001)]
open("held", "w").close()
open("alive").read()
' &
exec 9<>alive
read <held || true
"""
SMALL_DISK = """
mkdir small
mount -t tmpfs -o size=4m none small
mkdir small/workshop
cp {doctor} small/workshop/
doctor="${{doctor/ */}} small/workshop/doctor.py"
"""

REDS = {
    "an old Python": Red(
        "python",
        r"Python 3\.\S+, but the scripts need 3\.11 or newer",
        r"(python3\.\d+ -m venv --clear \S+/\.venv|.*(apt-get|brew) install python\S+.*)",
        files={"sitecustomize.py": "import sys\nsys.version_info = (3, 10, 13, 'final', 0)\n"},
        fixes=False,
    ),
    "an old torch": Red(
        "torch",
        r"torch 2\.3\.0, but the scripts need 2\.11 or newer",
        REINSTALL,
        files={"torch/__init__.py": "__version__ = '2.3.0'\n"},
        fixes=False,
    ),
    "a torch that ends Python": Red(
        "torch",
        r"'import torch' ended with status -11: .*",
        INSTALL,
        files={"torch/__init__.py": "import os\nos.kill(os.getpid(), 11)\n"},
        fixes=False,
    ),
    "a torchvision for another torch": Red(
        "torchvision",
        r"RuntimeError: operator torchvision::nms does not exist",
        REINSTALL,
        files={
            "torch/__init__.py": VERSION,
            "torchvision/__init__.py": "raise RuntimeError('operator torchvision::nms does not exist')\n",
        },
        fixes=False,
    ),
    "a torchvision that needs another torch": Red(
        "torchvision",
        r"torchvision 0\.28\.0 needs torch 2\.13\.0, not 2\.14\.1",
        REINSTALL,
        files={
            "torch/__init__.py": f"{VERSION}zeros = lambda *_: None\n",
            "torchvision/__init__.py": "__version__ = '0.28.0'\n",
            "torchvision/datasets.py": NOTHING_LISTENS,
            "torchvision/ops.py": "nms = lambda *_: []\n",
            "torchvision-0.28.0.dist-info/METADATA": "Name: torchvision\nVersion: 0.28.0\n"
            "Requires-Dist: numpy\nRequires-Dist: torch (==2.13.0)\n",
        },
        fixes=False,
    ),
    "a card that torch cannot use": Red(
        "gpus",
        r"torch for CUDA 13\.0 cannot use GPU 0: Pretended: is its driver too old\?",
        r"export CUDA_VISIBLE_DEVICES=  # .*",
        setup='unset CUDA_VISIBLE_DEVICES; chmod +x found/nvidia-smi; PATH="$PWD/found:$PATH"',
        files={
            "torch/__init__.py": VERSION + NO_GPU,
            "nvidia-smi": "#!/bin/sh\necho 'GPU 0: Pretended (UUID: GPU-0)'\n",
        },
    ),
    "no gloo": Red(
        "backends",
        r"torch has no gloo \(it has: nccl\)",
        REINSTALL,
        files={"torch/__init__.py": VERSION, "torch/distributed.py": DISTRIBUTED},
        fixes=False,
    ),
    "too many threads": Red(
        "threads",
        r"9999 for each rank \(OMP_NUM_THREADS\), cores: \d+: they would take turns",
        r"export OMP_NUM_THREADS=\d+",
        setup="export OMP_NUM_THREADS=9999",
    ),
    "threads that are not a number": Red(
        "threads",
        r"OMP_NUM_THREADS is 'all', which is not a number of threads",
        r"export OMP_NUM_THREADS=\d+",
        setup="export OMP_NUM_THREADS=all",
    ),
    "no such interface": Red(
        "host-name",
        r"GLOO_SOCKET_IFNAME is 'nosuch0', but this machine has: .*",
        r"unset GLOO_SOCKET_IFNAME",
        setup="export GLOO_SOCKET_IFNAME=nosuch0",
    ),
    "a name without an address": Red(
        "host-name",
        r"'nobody-knows-me' has no address \(.*\), and torchrun's ranks meet there",
        r"export PET_LOCAL_ADDR=127\.0\.0\.1",
        setup=NOBODY,
        namespaces="--net --uts --mount",
    ),
    "a name without an address, and gloo that does not look it up": Red(
        "host-name",
        r"'nobody-knows-me' has no address \(.*\), and torchrun's ranks meet there",
        r"export PET_LOCAL_ADDR=127\.0\.0\.1",
        setup=f"{NOBODY}\nexport GLOO_SOCKET_IFNAME=lo",
        namespaces="--net --uts --mount",
    ),
    "a name of another machine": Red(
        "host-name",
        r"'nobody-knows-me' belongs to another machine \(10\.9\.9\.9\), and torchrun's ranks meet there",
        r"export PET_LOCAL_ADDR=127\.0\.0\.1",
        setup=ELSEWHERE,
        namespaces="--net --uts --mount",
    ),
    "a name, and ranks that do not meet elsewhere either": Red(
        "host-name",
        r"'nobody-knows-me' has no address \(.*\), and torchrun's ranks meet there; "
        r"with PET_LOCAL_ADDR=127\.0\.0\.1: two ranks failed to add up: torchrun ended with status 1",
        r"echo '127\.0\.0\.1 nobody-knows-me' \| tee -a /etc/hosts",
        setup=f"{NOBODY}\necho '127.0.0.1 localhost' >hosts; mount --bind hosts /etc/hosts",
        files={"torch/__init__.py": VERSION, "torch/distributed/run.py": "raise SystemExit(1)\n"},
        namespaces="--net --uts --mount",
    ),
    "an address of another machine": Red(
        "host-name",
        r"PET_LOCAL_ADDR: '10\.9\.9\.9' belongs to another machine \(10\.9\.9\.9\)",
        r"unset PET_LOCAL_ADDR",
        setup="export PET_LOCAL_ADDR=10.9.9.9",
    ),
    "variables of another launcher": Red(
        "variables",
        r"torchrun takes PET_NNODES=2 for one of its flags, in every command",
        r"unset PET_NNODES PET_NPROC_PER_NODE",
        setup="export PET_NNODES=2 PET_NPROC_PER_NODE=8",
    ),
    "localhost without an address": Red(
        "host-name",
        r"'localhost' has no address \(.*\)",
        r"echo '127.0.0.1 localhost' \| tee -a /etc/hosts",
        setup=f"{NOBODY}\necho '127.0.0.1 nobody-knows-me' >hosts; mount --bind hosts /etc/hosts",
        namespaces="--net --uts --mount",
    ),
    "a name server that is silent": Red(
        "host-name",
        r"the name server is slow: a rank loses \d+ s each time that it asks for a name",
        r"echo '::ffff:127\.0\.0\.1 localhost' \| tee -a /etc/hosts",
        setup=SILENT,
        namespaces="--net --mount",
        color="yellow",
    ),
    "a loopback that is down": Red(
        "loopback",
        r"this machine cannot connect to itself at 127\.0\.0\.1 \(.*\)",
        r"ip link set lo up",
        setup="ip link set lo down",
        namespaces="--net",
    ),
    "a firewall that drops": Red(
        "loopback",
        r"this machine cannot connect to itself at 127\.0\.0\.1 \(timed out\)",
        r"iptables -I INPUT -i lo -j ACCEPT",
        setup="ip link set lo up; tc qdisc add dev lo root pfifo limit 0",  # a queue with no place in it
        namespaces="--net",
        fixes=False,
    ),
    "every port taken": Red(
        "loopback",
        r"every port that programs may use is taken",
        r"sysctl -w net\.ipv4\.ip_local_port_range='32768 60999'",
        setup=TAKEN,
        namespaces="--net",
    ),
    "ranks that do not find an interface": Red(
        "ranks",
        r"two ranks failed to add up: RuntimeError: .*nosuch0.*",
        r"unset GLOO_SOCKET_IFNAME",
        setup="export GLOO_SOCKET_IFNAME=nosuch0",
        fork=True,
    ),
    "ranks behind a firewall": Red(
        "ranks",
        r"not tried: this machine cannot connect to itself at 127\.0\.0\.1 \(.*\)",
        r"ip link set lo up",
        setup="ip link set lo down",
        namespaces="--net",
    ),
    "no MNIST and no network": Red(
        "mnist",
        r"not in data, and no mirror answers \(.*Connection refused.*\)",
        r"mkdir -p data && cp -r \S+/MNIST data/",
        files={
            "torch/__init__.py": VERSION,
            "torchvision/__init__.py": "__version__ = '0.29.1'\n",
            "torchvision/datasets.py": NOTHING_LISTENS,
        },
        fixes=False,
        color="yellow",
    ),
    "a damaged MNIST": Red(
        "mnist",
        r"data/MNIST/raw/train-images-idx3-ubyte is damaged: 1 bytes of 47,040,016",
        r"rm( data/MNIST/raw/(train|t10k)-(images-idx3|labels-idx1)-ubyte){3}",
        setup=DAMAGED,
        fixes=False,  # see test_what_is_damaged_is_deleted
    ),
    "a full disk": Red(
        "disk",
        r"0\.0 GB are free, but [18] GB are needed",
        r"\S+ -m pip cache purge",
        setup=SMALL_DISK.format(doctor=DOCTOR),
        namespaces="--mount",
        fixes=False,
    ),
    "a disk that is only for reading": Red(
        "disk",
        r"cannot write to \S+/small \(Read-only file system\)",
        r"chmod u\+w \S+/small",
        setup=f"{SMALL_DISK.format(doctor=DOCTOR)}\nmount -o remount,ro small",
        namespaces="--mount",
        fixes=False,
    ),
    "little shared memory": Red(
        "shared-memory",
        r"\d MB are free in /dev/shm: too little for --num-workers",
        r"mount -o remount,size=\d+M /dev/shm",
        setup="mount -t tmpfs -o size=8m none /dev/shm",
        namespaces="--mount",
    ),
    "few open files": Red(
        "open-files",
        r"only 64 may be open at the same time: too few",
        r"ulimit -n 1024",
        setup="ulimit -S -n 64",
    ),
}


def param(name: str):
    marks = [pytest.mark.skipif(not LINUX, reason="breaks a machine as Linux can be broken: Linux only")]
    if REDS[name].namespaces:
        marks += [pytest.mark.root, pytest.mark.skipif(not possible(), reason=WHY)]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [param(name) for name in REDS])
def test_what_is_wrong_is_red_and_the_command_fixes_it(tmp_path, name):
    case = REDS[name]
    for path, content in case.files.items():
        (tmp_path / "found" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "found" / path).write_text(content)
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    ask = f"$doctor --json --only {case.check} || exit $?"

    def look(folder: str, fix: str) -> dict:
        shutil.copytree(tmp_path / "found", tmp_path / folder / "found") if case.files else None
        script = f"{case.setup}\n{fix}\n{ask}"
        extra = {"PYTHONPATH": str(tmp_path / folder / "found")} if case.files else {}
        return heard(shell(script, tmp_path / folder, case.namespaces, case.fork, **extra))[1][case.check]

    found = look("before", "")
    assert found["status"] == case.color
    assert re.fullmatch(case.says, found["found"])
    assert re.fullmatch(case.fix, found["fix"])
    if case.fixes:
        assert look("after", f"{found['fix']} >fixed")["status"] not in ("red", case.color)


def test_every_check_has_been_seen_red():
    assert {case.check for case in REDS.values()} == {*doctor.checks(Path())}


def test_a_red_line_stands_above_its_command(tmp_path):
    process = shell("ulimit -S -n 64; $doctor --only open-files || exit $?", tmp_path)
    status, out, err = finish(process)
    print(out, err)
    assert (status, err) == (1, "")
    assert out == (
        "red     open-files     only 64 may be open at the same time: too few\n"
        "        fix it with:  ulimit -n 1024\n"
        "\n0 green, 0 yellow, 1 red. This machine is not ready.\n"
    )


def test_without_mnist_the_rest_is_ready(tmp_path):
    """The exercises and the cards train on synthetic digits."""
    case = REDS["no MNIST and no network"]
    for path, content in case.files.items():
        (tmp_path / "found" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "found" / path).write_text(content)
    process = shell("$doctor --only mnist --only disk", tmp_path, PYTHONPATH=str(tmp_path / "found"))
    status, out, err = finish(process)
    print(out, err)
    assert (status, err) == (0, "")
    ready = "This machine is ready, but not for MNIST: use --num-samples, which needs no download."
    assert out.endswith(f"\n1 green, 1 yellow, 0 red. {ready}\n")


@pytest.mark.parametrize("with_uv", [False, True])
def test_without_torch_the_doctor_says_so(tmp_path, digits, with_uv):
    """In an environment with nothing in it, not even pip: uv makes such ones."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    python, requirements = f"{tmp_path}/.venv/bin/python", f"-r {ROOT}/requirements.txt"
    fix = f"{python} -m ensurepip && {python} -m pip install {requirements}"
    path = os.environ["PATH"]
    if with_uv:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "uv").symlink_to("/bin/true")
        path = f"{tmp_path / 'bin'}:{path}"
        fix = f"uv pip install --python {python} {requirements}"
    ask = f"PYTHONPATH= PATH={path} exec .venv/bin/python {DOCTOR} --json --data-dir {digits}"
    status, found = heard(shell(ask, tmp_path))
    assert status == 1
    of_torch = {name: each for name, each in found.items() if each["fix"] == fix}
    assert list(of_torch) == ["torch", "torchvision", "backends", "ranks"]
    assert of_torch["torch"]["found"] == "ModuleNotFoundError: No module named 'torch'"
    assert all(each["status"] == "red" for each in of_torch.values())
    rest = [each["status"] for name, each in found.items() if name not in (*of_torch, "disk")]
    assert "red" not in rest


def test_outside_of_an_environment_one_is_made_or_entered(tmp_path, monkeypatch):
    """Debian, Ubuntu and Homebrew let pip install nothing beside their own packages."""
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    pip = f"{tmp_path}/.venv/bin/python -m pip install tqdm"
    assert doctor.install_command("tqdm") == f"{sys.executable} -m venv {tmp_path}/.venv && {pip}"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert doctor.install_command("tqdm") == f"source {tmp_path}/.venv/bin/activate"
    monkeypatch.setenv("CONDA_PREFIX", "/conda")  # of another Python than this one
    assert doctor.install_command("tqdm") == f"source {tmp_path}/.venv/bin/activate"
    monkeypatch.setenv("CONDA_PREFIX", sys.prefix)
    assert doctor.install_command("tqdm") == f"{sys.executable} -m pip install tqdm"


def test_ranks_that_do_not_end_are_ended():
    color, found, fix = doctor.ranks(seconds=0.05)
    assert (color, found) == ("red", "two ranks failed to add up: they did not finish within 0.05 s")
    assert re.fullmatch(r"export GLOO_SOCKET_IFNAME=lo0?", fix)


@pytest.mark.skipif(not LINUX, reason="other systems need no shared memory")
def test_a_folder_that_does_not_exist(tmp_path):
    gone = tmp_path / "gone"
    color, found, fix = doctor.shared_memory(gone)
    assert (color, found) == ("red", f"{gone} does not exist")
    assert fix.endswith(f"mount --mkdir -t tmpfs tmpfs {gone}")


def test_what_is_damaged_is_deleted(digits, monkeypatch):
    """By the command; the files that are whole stay."""
    raw = digits / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"short")
    color, found, fix = doctor.mnist(digits)
    print(found, fix)
    assert color == "red"
    subprocess.run(["bash", "-c", fix], check=True)
    assert doctor.damage(raw) == {"t10k-labels-idx1-ubyte": "is missing"}
    monkeypatch.setattr(doctor, "facts", dict)
    assert doctor.mnist(digits)[1] == f"not in {digits}, and downloading it needs torchvision"


def test_a_container_has_fewer_cores_than_the_machine(monkeypatch):
    """Seen here by its quota: half of the machine's cores, and a half."""
    monkeypatch.setattr(Path, "read_text", lambda self: "150000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert doctor.cores() == 2
    assert doctor.threads()[:2] == ("green", "1 for each rank (the scripts' own choice), cores: 2")
    monkeypatch.setenv("OMP_NUM_THREADS", "32")
    said = "32 for each rank (OMP_NUM_THREADS), cores: 2: they would take turns"
    assert doctor.threads() == ("red", said, "export OMP_NUM_THREADS=1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert doctor.threads()[0] == "yellow"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.threads()[0] == "green"


def test_yellow_is_what_matters_sometimes(monkeypatch):
    """A card that the user has hidden, or one that a torch for CPUs, as a bundle has it, does not know."""
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: ["GPU 0: Pretended"])
    monkeypatch.setattr(doctor, "facts", lambda: {"torch": "2.14.1+cpu", "cuda": None})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    color, found, fix = doctor.gpus()
    assert (color, found) == ("yellow", "GPU 0: Pretended, but this torch is only for CPUs") and fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as Slurm sets it: nothing is hidden
    assert doctor.gpus()[1] == found
    monkeypatch.setattr(doctor, "facts", lambda: {"torch": "2.14.1", "cuda": "13.0"})
    assert doctor.gpus()[0] == "red"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.gpus()[::2] == ("yellow", "unset CUDA_VISIBLE_DEVICES")


def test_a_torch_that_can_be_imported_but_not_used_says_why(monkeypatch):
    facts = {"torch": "2.14.1", "torch_error": "RuntimeError: CUDA driver initialization failed"}
    monkeypatch.setattr(doctor, "facts", lambda: facts)
    assert doctor.torch_is_there() == ("red", facts["torch_error"], doctor.reinstall())


def test_it_knows_what_common_knows():
    assert doctor.MNIST == mnist.FILES


@pytest.mark.parametrize("script", [DOCTOR, DOCTOR.with_name("bundle.py")], ids=lambda path: path.name)
def test_an_older_python_can_read_it(script):
    """To say that it is too old. What its library lacks shows only when it is run there."""
    source = script.read_text()
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations\n" in source


# --- Wrong commands


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only=nothing"], "argument --only: invalid choice: 'nothing'"),
        (["--platform=linux-x86_64"], "unrecognized arguments: --platform=linux-x86_64"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, flags, says):
    status, out, err = finish(start([sys.executable, str(DOCTOR), *flags], tmp_path))
    print(err)
    assert (status, out) == (2, "")
    assert len(errors(err)) == len(err.splitlines()) == 1 and says in err
    assert list(tmp_path.iterdir()) == []
