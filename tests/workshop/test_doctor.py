"""The doctor: each check turns red when its thing is wrong, and the command that it prints fixes it.

And what `--prepare` collects is enough, in a network that leads nowhere, for a green doctor and an exercise.
"""

import ast
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import zipfile
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
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"


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


@pytest.fixture
def digits(tmp_path):
    """A folder with four files of MNIST's names and sizes: nothing is in them, nor on the disk."""
    raw = tmp_path / "digits" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in mnist.FILES.items():
        with open(raw / name, "wb") as file:
            file.truncate(size)
    yield tmp_path / "digits"
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
    """Without colours, because this is no terminal."""
    words = [sys.executable, "workshop/doctor.py", "--only=python", "--only=mnist", "--only=open-files"]
    status, out, err = finish(start([*words, f"--data-dir={digits}"], ROOT, real=True))
    print(out, err)
    assert (status, err) == (0, "")
    assert re.fullmatch(
        r"green   python         Python 3\.\d+\.\S+ \(the scripts have been tried with [\d., and]+\)\n"
        rf"green   mnist          in {digits}\n"
        r"(green   open-files     .*\n|yellow  open-files     .*\n        fix it with:  ulimit .*\n)"
        r"\n[23] green, [01] yellow, 0 red\. This machine is ready\.\n",
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
    colour: str = "red"


VERSION = "__version__ = '2.14.1'\nclass version:\n    cuda = '13.0'\n"
NO_GPU = """
class accelerator:
    current_accelerator = staticmethod(lambda check_available: None)
    device_count = staticmethod(lambda: 0)
"""
DISTRIBUTED = (
    "is_available = lambda: True\nis_gloo_available = lambda: False\nis_nccl_available = lambda: True\n"
)
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
        r"Python 3\.\S+, and the scripts need 3\.11 or newer",
        r"(python3\.\d+ -m venv --clear \S+/\.venv|.*(apt-get|brew) install python\S+.*)",
        files={"sitecustomize.py": "import sys\nsys.version_info = (3, 10, 13, 'final', 0)\n"},
        fixes=False,
    ),
    "an old torch": Red(
        "torch",
        r"torch 2\.3\.0, and the scripts need 2\.11",
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
    "a torchvision that wants another torch": Red(
        "torchvision",
        r"torchvision 0\.28\.0 wants torch == 2\.13\.0, and this is 2\.14\.1",
        REINSTALL,
        files={
            "torch/__init__.py": f"{VERSION}zeros = lambda *_: None\n",
            "torchvision/__init__.py": "__version__ = '0.28.0'\n",
            "torchvision/ops.py": "class nms:\n    def __init__(*_): pass\n    def tolist(_): return []\n",
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
        r"torch comes without gloo \(it has: nccl\)",
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
    "threads that are no number": Red(
        "threads",
        r"OMP_NUM_THREADS is 'all', and no number of threads",
        r"export OMP_NUM_THREADS=\d+",
        setup="export OMP_NUM_THREADS=all",
    ),
    "no such interface": Red(
        "host-name",
        r"GLOO_SOCKET_IFNAME names 'nosuch0', and there is: .*",
        r"unset GLOO_SOCKET_IFNAME",
        setup="export GLOO_SOCKET_IFNAME=nosuch0",
    ),
    "a name that leads nowhere": Red(
        "host-name",
        r"'nobody-knows-me' leads nowhere \(.*\), and torchrun's ranks meet there",
        r"export PET_LOCAL_ADDR=127\.0\.0\.1",
        setup=NOBODY,
        namespaces="--net --uts --mount",
    ),
    "a name that leads nowhere, and gloo that does not ask": Red(
        "host-name",
        r"'nobody-knows-me' leads nowhere \(.*\), and torchrun's ranks meet there",
        r"export PET_LOCAL_ADDR=127\.0\.0\.1",
        setup=f"{NOBODY}\nexport GLOO_SOCKET_IFNAME=lo",
        namespaces="--net --uts --mount",
    ),
    "a name that leads to another machine": Red(
        "host-name",
        r"'nobody-knows-me' leads to another machine \(10\.9\.9\.9\), and torchrun's ranks meet there",
        r"export PET_LOCAL_ADDR=127\.0\.0\.1",
        setup=ELSEWHERE,
        namespaces="--net --uts --mount",
    ),
    "a name, and ranks that do not meet elsewhere either": Red(
        "host-name",
        r"'nobody-knows-me' leads nowhere \(.*\); with PET_LOCAL_ADDR=127\.0\.0\.1, too, .* status 1",
        r"echo '127\.0\.0\.1 nobody-knows-me' \| tee -a /etc/hosts",
        setup=f"{NOBODY}\necho '127.0.0.1 localhost' >hosts; mount --bind hosts /etc/hosts",
        files={"torch/__init__.py": VERSION, "torch/distributed/run.py": "raise SystemExit(1)\n"},
        namespaces="--net --uts --mount",
    ),
    "an address of another machine": Red(
        "host-name",
        r"PET_LOCAL_ADDR: '10\.9\.9\.9' leads to another machine \(10\.9\.9\.9\)",
        r"unset PET_LOCAL_ADDR",
        setup="export PET_LOCAL_ADDR=10.9.9.9",
    ),
    "variables of another launcher": Red(
        "variables",
        r"torchrun takes PET_NNODES=2 for one of its flags, in every command",
        r"unset PET_NNODES PET_NPROC_PER_NODE",
        setup="export PET_NNODES=2 PET_NPROC_PER_NODE=8",
    ),
    "localhost leads nowhere": Red(
        "host-name",
        r"'localhost' leads nowhere \(.*\)",
        r"echo '127.0.0.1 localhost' \| tee -a /etc/hosts",
        setup=f"{NOBODY}\necho '127.0.0.1 nobody-knows-me' >hosts; mount --bind hosts /etc/hosts",
        namespaces="--net --uts --mount",
    ),
    "a name server that is silent": Red(
        "host-name",
        r"the name server is slow: \d+ s are lost each time that a rank asks it for a name",
        r"echo '::ffff:127\.0\.0\.1 localhost' \| tee -a /etc/hosts",
        setup=SILENT,
        namespaces="--net --mount",
        colour="yellow",
    ),
    "a loopback that is down": Red(
        "loopback",
        r"this machine cannot talk to itself at 127\.0\.0\.1 \(.*\)",
        r"ip link set lo up",
        setup="ip link set lo down",
        namespaces="--net",
    ),
    "a firewall that drops": Red(
        "loopback",
        r"this machine cannot talk to itself at 127\.0\.0\.1 \(timed out\)",
        r"iptables -I INPUT -i lo -j ACCEPT",
        setup="ip link set lo up; tc qdisc add dev lo root pfifo limit 0",  # a queue with no place in it
        namespaces="--net",
        fixes=False,
    ),
    "every port taken": Red(
        "port",
        r"every port that programs may have is taken",
        r"sysctl -w net\.ipv4\.ip_local_port_range='32768 60999'",
        setup=TAKEN,
        namespaces="--net",
    ),
    "ranks that do not find an interface": Red(
        "ranks",
        r"rank [01] failed to join the process group: .*nosuch0.*",
        r"unset GLOO_SOCKET_IFNAME",
        setup="export GLOO_SOCKET_IFNAME=nosuch0",
        fork=True,
    ),
    "ranks behind a firewall": Red(
        "ranks",
        r"not tried: this machine cannot talk to itself at 127\.0\.0\.1 \(.*\)",
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
        r"0\.0 GB are free, and [18] GB are needed",
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
        r"mount -o remount,size=1G /dev/shm",
        setup="mount -t tmpfs -o size=8m none /dev/shm",
        namespaces="--mount",
    ),
    "few open files": Red(
        "open-files",
        r"only 64 may be open at once: too few",
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
    assert found["status"] == case.colour
    assert re.fullmatch(case.says, found["found"])
    assert re.fullmatch(case.fix, found["fix"])
    if case.fixes:
        assert look("after", f"{found['fix']} >fixed")["status"] not in ("red", case.colour)


def test_every_check_has_been_seen_red():
    assert {case.check for case in REDS.values()} == {*doctor.checks(Path())}


def test_a_red_line_stands_above_its_command(tmp_path):
    process = shell("ulimit -S -n 64; $doctor --only open-files || exit $?", tmp_path)
    status, out, err = finish(process)
    print(out, err)
    assert (status, err) == (1, "")
    assert out == (
        "red     open-files     only 64 may be open at once: too few\n"
        "        fix it with:  ulimit -n 1024\n"
        "\n0 green, 0 yellow, 1 red. This machine is not ready.\n"
    )


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
    well, found, fix = doctor.ranks(seconds=0.05)
    assert (well, found) == (False, "rank 0 failed to import torch: no end within 0.05 s")
    assert "--force-reinstall torch torchvision" in fix


def test_folders_that_are_not_there(tmp_path):
    gone = tmp_path / "gone"
    assert doctor.disk(gone) == (False, f"{gone} is not there", f"mkdir -p {gone}")
    if LINUX:
        well, found, fix = doctor.shared_memory(gone)
        assert (well, found) == (False, f"{gone} is not there")
        assert fix.endswith(f"mount --mkdir -t tmpfs tmpfs {gone}")


def test_what_is_damaged_is_deleted(digits, monkeypatch):
    """By the command; the files that are whole stay."""
    raw = digits / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"short")
    well, found, fix = doctor.mnist(digits)
    print(found, fix)
    assert well is False
    subprocess.run(["bash", "-c", fix], check=True)
    assert doctor.damage(raw) == {"t10k-labels-idx1-ubyte": "is not there"}
    monkeypatch.setattr(doctor, "facts", dict)
    assert doctor.mnist(digits)[1].startswith(f"not in {digits}, and no mirror answers (")


def test_a_container_has_fewer_cores_than_the_machine(monkeypatch):
    """Seen here by its quota: half of the machine's cores, and a half."""
    monkeypatch.setattr(Path, "read_text", lambda self: "150000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert doctor.cores() == 2
    assert doctor.threads()[:2] == (True, "1 for each rank (the scripts' own choice), cores: 2")
    monkeypatch.setenv("OMP_NUM_THREADS", "32")
    said = "32 for each rank (OMP_NUM_THREADS), cores: 2: they would take turns"
    assert doctor.threads() == (False, said, "export OMP_NUM_THREADS=1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert doctor.threads()[0] is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.threads()[0] is True


def test_yellow_is_what_matters_sometimes(monkeypatch):
    """A card that the user has hidden, or one that a torch for CPUs, as a bundle has it, does not know."""
    monkeypatch.setattr(doctor, "nvidia_cards", lambda: ["GPU 0: Pretended"])
    monkeypatch.setattr(doctor, "facts", lambda: {"torch": "2.14.1+cpu", "cuda": None, "gpus": []})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    well, found, fix = doctor.gpus()
    assert (well, found) == (None, "GPU 0: Pretended, but this torch is for CPUs only") and fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.gpus()[::2] == (None, "unset CUDA_VISIBLE_DEVICES")


def test_it_knows_what_common_knows():
    assert doctor.MNIST == mnist.FILES


def test_an_older_python_can_read_it():
    """To say that it is too old. What its library lacks shows only when it is run there."""
    source = DOCTOR.read_text()
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations\n" in source


# --- Wrong questions


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only=nothing"], "argument --only: invalid choice: 'nothing'"),
        (["--prepare=a", "--install-from=b"], "not allowed with argument --prepare"),
        (["--platform=linux-x86_64"], "--platform goes with --prepare"),
        (["--prepare=a", "--json"], "--json and --only are for the checks"),
        (["--to=a"], "--to goes with --install-from"),
        (["--prepare=a", "--python=3"], "--python takes a version such as"),
        (["--prepare=a", "--platform=amiga-68k"], "for amiga-68k torch has no wheels"),
        (["--prepare=a", "--requirements=gone.txt"], "gone.txt is not there"),
        (["--install-from=."], "has no bundle that is whole"),
    ],
)
def test_a_wrong_question_is_one_line(tmp_path, flags, says):
    status, out, err = finish(start([sys.executable, str(DOCTOR), *flags], tmp_path))
    print(err)
    assert (status, out) == (2, "")
    assert len(errors(err)) == len(err.splitlines()) == 1 and says in err
    assert list(tmp_path.iterdir()) == []


# --- A room without a network


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> None:
    """Make a wheel of one module, which has its version."""
    module = name.replace("-", "_")
    about, files = f"{module}-{version}.dist-info", {f"{module}.py": f"version = '{version}'\n"}
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    files[f"{about}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-{tag}.whl", "w") as file:
        for path, content in files.items():
            file.writestr(path, content)


TINY = "tiny>=1\n# and of this, whatever there is:\ntorch\n"


@pytest.fixture
def indexes(tmp_path):
    """The address of two small indexes of packages, for `pip`'s own configuration and for CPU-only wheels."""
    own, cpu = tmp_path / "indexes" / "own", tmp_path / "indexes" / "cpu"
    linux, mac = "manylinux_2_28_x86_64", "macosx_11_0_arm64"
    wheel(own / "tiny", "tiny", "1.0", 'for-windows; platform_system == "Windows"', "for-all")
    wheel(own / "for-all", "for-all", "1.0", 'for-linux; sys_platform == "linux"')
    for name in ("for-windows", "for-linux"):
        wheel(own / name, name, "1.0")
    for tag in (linux, mac, "win_amd64"):
        wheel(own / "torch", "torch", "9.0", tag=f"py3-none-{tag}")
    wheel(cpu / "torch", "torch", "9.0+cpu", tag=f"py3-none-{linux}")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "indexes"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def teacher(tmp_path):
    """A copy of this repository, with one commit."""
    names = [".git", ".venv", "data", "checkpoints", "mine", "__pycache__", ".*_cache", ".mutants"]
    shutil.copytree(ROOT, tmp_path / "teacher", ignore=shutil.ignore_patterns(*names, "docs", "results"))
    git = ["git", "-C", tmp_path / "teacher", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=All"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path / "teacher"


def prepare(teacher: Path, folder: Path, index: str, *flags: str) -> tuple[int, str, str]:
    """Let the teacher collect in `folder`, from the small indexes."""
    (teacher.parent / "tiny.txt").write_text(TINY)
    (teacher.parent / "all.txt").write_text("-r tiny.txt  # and no more\n")
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"{index}/own", "PIP_NO_CACHE_DIR": "1"}
    pip |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": ""}
    words = [sys.executable, "workshop/doctor.py", f"--prepare={folder}", *flags]
    process = start([*words, f"--requirements={teacher.parent / 'all.txt'}"], teacher, real=True, **pip)
    status, out, err = finish(process)
    print(f"status {status}\n{out}{err}")
    return status, out, err


def test_what_a_platform_needs_is_collected_and_no_more(tmp_path, teacher, digits, indexes):
    """A requirement for Windows only is for a laptop with Windows, wherever it is collected."""
    here, others = tmp_path / "here", tmp_path / "others"
    linux = "torch-9.0-py3-none-manylinux_2_28_x86_64.whl"
    elsewhere = ["torch-9.0-py3-none-macosx_11_0_arm64.whl", "torch-9.0-py3-none-win_amd64.whl"]
    for folder, platforms, extra, wheels in (
        (here, ["linux-x86_64"], "for_linux", [linux]),
        (others, ["windows-amd64", "macos-arm64"], "for_windows", elsewhere),
    ):
        flags = [f"--data-dir={digits}", *(f"--platform={name}" for name in platforms)]
        status, out, _ = prepare(teacher, folder, indexes, *flags)
        assert status == 0
        found = sorted(path.name for path in (folder / "bundle" / "wheels").iterdir())
        assert {name.split("-")[0] for name in found} == {"tiny", "for_all", "torch", extra}
        assert [name for name in found if name.startswith("torch")] == wheels
        assert out.count("torch 9.0 (") == len(wheels)
        assert out.endswith("python3 bundle/doctor.py --install-from .\n")
    assert doctor.damage(others / "data" / "MNIST" / "raw") == {}
    assert (others / "bundle" / "requirements.txt").read_text() == "tiny>=1\ntorch\n"
    assert json.loads((others / "bundle" / "bundle.json").read_text())["platforms"] == platforms
    with tarfile.open(others / "bundle" / "repository.tar") as tar:
        packed = tar.getnames()
    assert {"README.md", "workshop/doctor.py", "05_fsdp/train.py"} <= {*packed} and ".git" not in packed


@pytest.mark.parametrize(("path", "build"), [("cpu", "9.0+cpu"), ("gone", "9.0")])
def test_cpu_only_wheels_where_they_exist(tmp_path, teacher, digits, indexes, path, build):
    """And where their index is not to be had, what there is, which is said."""
    flags = [f"--data-dir={digits}", f"--index-url={indexes}/{path}", "--platform=linux-x86_64"]
    status, out, _ = prepare(teacher, tmp_path / "stick", indexes, *flags)
    assert status == 0
    assert f"torch {build} (" in out
    assert ("is not to be had (File not found), so pip's own configuration alone counts" in out) == (
        path == "gone"
    )


def test_what_was_not_committed_is_counted(tmp_path, teacher, monkeypatch):
    """It is not packed: a solution that lies around would be."""
    monkeypatch.setattr(doctor, "ROOT", teacher)
    (teacher / "new.txt").write_text("new")
    said = doctor.pack_repository(tmp_path / "packed.tar", tmp_path)
    assert said == "its newest commit; not in it, because not committed: 1"
    with tarfile.open(tmp_path / "packed.tar") as tar:
        assert "new.txt" not in tar.getnames() and "README.md" in tar.getnames()


def test_without_git_the_folder_is_packed(teacher, monkeypatch):
    """Into itself, if need be; and without what is no part of it."""
    monkeypatch.setattr(doctor, "ROOT", teacher)
    shutil.rmtree(teacher / ".git")
    for name in ("checkpoints", ".venv", "common/__pycache__", "stick/bundle"):
        (teacher / name).mkdir(parents=True)
        (teacher / name / "file").touch()
    bundle = teacher / "stick" / "bundle"
    assert doctor.pack_repository(bundle / "repository.tar", bundle) == "this folder, because there is no git"
    with tarfile.open(bundle / "repository.tar") as tar:
        packed = {*tar.getnames()}
    assert "workshop/doctor.py" in packed and ".gitignore" in packed
    assert not [name for name in packed if re.search(r"stick|checkpoints|\.venv|__pycache__", name)]


def test_what_cannot_be_collected_leaves_no_bundle(tmp_path, teacher, digits, indexes):
    folder = tmp_path / "stick"
    assert prepare(teacher, folder, indexes, f"--data-dir={digits}")[0] == 0
    status, _, err = prepare(teacher, folder, indexes, f"--data-dir={digits}", "--platform=linux-aarch64")
    assert status == 1
    assert errors(err)[0].startswith("error: pip found no wheels for linux-aarch64 and Python ")
    status, _, err = finish(start([sys.executable, str(DOCTOR), f"--install-from={folder}"], tmp_path))
    assert status == 2 and "has no bundle that is whole" in err


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("python", "3.99", f"the wheels are for Python 3.99, and this is {OWN}: use python3.99"),
        ("platforms", ["amiga-68k"], "there are wheels for amiga-68k, and this is "),
    ],
)
def test_a_bundle_for_another_machine_is_refused(tmp_path, key, value, says):
    about = {
        "python": OWN,
        "platforms": [doctor.this_platform()],
        "requirements": "requirements.txt",
        key: value,
    }
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(about))
    status, _, err = finish(start([sys.executable, str(DOCTOR), f"--install-from={tmp_path}"], tmp_path))
    print(err)
    assert status == 2 and err.startswith(f"error: {says}")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_laptop_is_set_up_from_a_copy(tmp_path, teacher, digits, indexes):
    """Twice: the second time, what the learner has changed stays."""
    stick, laptop = tmp_path / "stick", tmp_path / "a laptop"
    assert prepare(teacher, stick, indexes, f"--data-dir={digits}")[0] == 0
    words = [sys.executable, str(stick / "bundle" / "doctor.py"), f"--install-from={stick}", f"--to={laptop}"]
    status, out, err = finish(start(words, tmp_path, real=True, PIP_INDEX_URL="http://127.0.0.1:1"))
    print(out, err)
    assert status == 0
    assert out.endswith(f"    cd '{laptop}' && .venv/bin/python workshop/doctor.py\n")
    said = "import tiny, for_all, torch; print(tiny.version, torch.version)"
    python = [str(laptop / ".venv" / "bin" / "python"), "-c", said]
    assert subprocess.run(python, capture_output=True, text=True, check=True).stdout == "1.0 9.0\n"
    assert doctor.damage(laptop / "data" / "MNIST" / "raw") == {}
    for name in ("README.md", ".gitignore", "05_fsdp/train.py", "launch_multinode.sh"):
        assert (laptop / name).read_bytes() == (teacher / name).read_bytes()
    assert os.access(laptop / "launch_multinode.sh", os.X_OK)
    # With another file than requirements.txt, make still has something to install.
    assert not (laptop / ".venv" / "installed").exists()
    (laptop / "README.md").write_text("mine")
    (laptop / "LICENSE").unlink()
    status, out, err = finish(start(words, tmp_path, real=True))
    print(out, err)
    assert status == 0 and "were there already: .ci, " in out
    assert (laptop / "README.md").read_text() == "mine" and (laptop / "LICENSE").exists()
    assert not [path.name for path in laptop.iterdir() if path.name.startswith(".unpacking")]


def test_make_has_nothing_left_to_install(tmp_path, monkeypatch):
    """Its own installation needs a network. Both stand in front of what `make` compares."""
    monkeypatch.setattr(doctor, "install_wheels", lambda bundle, to: (to / ".venv").mkdir())
    (bundle := tmp_path / "bundle").mkdir()
    shutil.copytree(ROOT / "common", tmp_path / "packed" / "common")
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path / "packed")
    with tarfile.open(bundle / "repository.tar", "w") as tar:
        tar.add(tmp_path / "packed", ".")
    for name, targets in (("requirements.txt", ["train"]), ("requirements-dev.txt", ["train", "test"])):
        about = {"python": OWN, "platforms": [doctor.this_platform()], "requirements": name}
        (bundle / "bundle.json").write_text(json.dumps(about))
        monkeypatch.setattr(doctor, "damage", lambda raw: {})
        assert doctor.install(tmp_path, tmp_path / name[:-4]) == 0
        for target in targets:
            words = ["make", "--dry-run", "--no-print-directory", target]
            said = subprocess.run(words, cwd=tmp_path / name[:-4], capture_output=True, text=True, check=True)
            print(said.stdout)
            assert "pip" not in said.stdout and said.stdout.count("\n") == 1


# The only way out of this network leads back.
NO_WAY_OUT = """
ip link set lo up
test -z "$(ip route show)"
! timeout 5 bash -c 'true >/dev/tcp/192.0.2.1/80' 2>refused
grep -q unreachable refused
"""
EXERCISE = "workshop/check.py 01 workshop/exercises/01_all_reduce/solution.py"


@pytest.mark.root
@pytest.mark.skipif(not possible(), reason=WHY)
def test_a_room_without_a_network_is_enough(tmp_path, teacher, digits, indexes, request):
    """The doctor is green there, and an exercise passes.

    The wheels are tiny here, and torch is the tests' own. `BUNDLE=<what --prepare has made>` takes that one.
    """
    own, stick = {}, Path(os.environ.get("BUNDLE", tmp_path / "stick")).resolve()
    if "BUNDLE" not in os.environ:
        assert prepare(teacher, stick, indexes, f"--data-dir={digits}")[0] == 0
        own["PYTHONPATH"] = sysconfig.get_path("purelib")
    doctor_there = f"{sys.executable} {stick}/bundle/doctor.py"
    script = f"{NO_WAY_OUT}\n{doctor_there} --install-from {stick} --to {tmp_path}/laptop"
    status, out, err = finish(shell(script, tmp_path, "--net"), 900)
    print(out, err)
    assert status == 0
    next_command = out.splitlines()[-1].strip()
    _, found = heard(shell(f"{NO_WAY_OUT}\n{next_command} --json || exit $?", tmp_path, "--net", **own))
    assert all(each["status"] == "green" for each in found.values()), found
    if (tmp_path / "laptop" / "workshop" / "check.py").exists():
        script = f"{NO_WAY_OUT}\ncd laptop; .venv/bin/python {EXERCISE} || exit $?"
        status, out, err = finish(shell(script, tmp_path, "--net", **own))
        print(out, err)
        assert status == 0 and "passed in " in out
