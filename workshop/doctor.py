"""Is this machine ready for the workshop? If it is not, this program prints the commands that fix it.

    python workshop/doctor.py                     one line for each check: green, yellow or red
    python workshop/doctor.py --only host-name    repeat one check, after fixing
    python workshop/doctor.py --json              everything as one JSON object

It needs only Python. Exit status: 0 if nothing is red, 1 if something is red, 2 if the command was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import http.client
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # Python 3.8 can run this file, to say that it is too old, but not this line
    Finding = tuple[str, str, str]  # green, yellow or red; what was found; the command that fixes it

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
OLDEST_PYTHON = (3, 11)
LOCAL_ADDR = "PET_LOCAL_ADDR"  # torchrun reads it as --local-addr, the address at which the ranks meet
LINUX = sys.platform == "linux"
MAC = sys.platform == "darwin"

MNIST = {  # the sizes of the files in bytes, as in common/mnist.py, which needs torch
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}


def stop(message: str, status: int = 2) -> NoReturn:
    """Print `error: message` and exit: with 2 when the command was wrong, with 1 when something failed."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


# --- Commands that fix


def as_root(command: str) -> str:
    """Return the command that runs `command` as root."""
    is_root = not hasattr(os, "geteuid") or os.geteuid() == 0
    return command if is_root else f"sudo {command}"


def quoted(*words: object) -> str:
    """Return the words as one line for a shell."""
    return shlex.join(map(str, words))


def python_of(folder: Path) -> Path:
    """Return the path of the Python in a folder's environment."""
    return folder / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def activate() -> str:
    """Return the command that activates the repository's environment."""
    return f"source {quoted(python_of(ROOT).parent / 'activate')}"


def install_command(*packages: str) -> str:
    """Return the command that installs packages, or that activates the environment where they are."""
    python = python_of(ROOT)
    if sys.prefix == sys.base_prefix and os.environ.get("CONDA_PREFIX") != sys.prefix:
        # Many systems protect their own Python from pip.
        if python.exists():
            return activate()
        create = quoted(sys.executable, "-m", "venv", ROOT / ".venv")
        return f"{create} && {quoted(python, '-m', 'pip', 'install', *packages)}"
    install = quoted(sys.executable, "-m", "pip", "install", *packages)
    if importlib.util.find_spec("pip"):
        return install
    if shutil.which("uv"):  # uv creates environments without pip
        return quoted("uv", "pip", "install", "--python", sys.executable, *packages)
    return f"{quoted(sys.executable, '-m', 'ensurepip')} && {install}"


def install_all() -> str:
    return install_command("-r", str(ROOT / "requirements.txt"))


def reinstall() -> str:
    """Return one command for both packages: pip then chooses versions that fit each other."""
    return install_command("--upgrade", "--force-reinstall", "torch", "torchvision")


def fix_loopback(error: OSError) -> str:
    """Return the command that lets a machine connect to itself again."""
    if LINUX and error.errno in (errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH):
        return as_root("ip link set lo up")
    if LINUX:
        return as_root("iptables -I INPUT -i lo -j ACCEPT")
    if MAC:  # allows this Python to accept connections; the firewall stays on
        return as_root(quoted("/usr/libexec/ApplicationFirewall/socketfilterfw", "--add", sys.executable))
    rule = "netsh advfirewall firewall add rule name=workshop dir=in action=allow"
    return f'{rule} program="{sys.executable}"'


def add_to_hosts(address: str, name: str) -> str:
    """Return the command that gives a name an address, without a name server."""
    return f"echo '{address} {name}' | {as_root('tee -a /etc/hosts')}"


# --- What torch and torchvision say. A child process imports them, because a broken one can crash Python.


def look_at_torch() -> None:
    """In a child process: print what torch and torchvision say about themselves, as JSON in the last line."""
    facts: dict[str, Any] = {}
    try:
        import torch

        facts["torch"] = str(torch.__version__)
        facts["cuda"] = torch.version.cuda
        import torch.distributed as dist

        available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
        facts["backends"] = [name for name in available if available[name]]
        gpu = torch.accelerator.current_accelerator(check_available=True)
        if gpu:
            name = torch.cuda.get_device_name() if gpu.type == "cuda" else gpu.type
            facts["gpus"] = f"{torch.accelerator.device_count()} × {name}"
    except Exception as error:  # a broken installation can raise anything
        facts["torch_error"] = first_line(error)
    try:
        import torchvision.datasets

        facts["torchvision"] = str(torchvision.__version__)
        facts["mirrors"] = torchvision.datasets.MNIST.mirrors
        import torchvision.ops

        # Compiled for one version of torch. With another version, this call fails.
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:
        facts["torchvision_error"] = first_line(error)
    print(f"\n{json.dumps(facts)}")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


@functools.lru_cache(maxsize=None)  # noqa: UP033  # Python 3.8 has no functools.cache
def facts() -> dict[str, Any]:
    """Return what `look_at_torch` found, or only `torch_error` if it did not finish."""
    seconds = 180  # the first import on a laptop with a virus scanner takes a minute
    try:
        command = [sys.executable, str(HERE), "--look-at-torch"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, errors="replace")
    except subprocess.TimeoutExpired:
        return {"torch_error": f"'import torch' did not finish within {seconds} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"torch_error": f"'import torch' ended with status {done.returncode}: {lines[-1]}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def no_torch() -> Finding:
    """Return the finding of a check that needs torch, when there is none."""
    return "red", "not tried, because torch cannot be imported", install_all()


def version_numbers(version: str) -> tuple[int, ...]:
    """Return 2.14.1+cpu as (2, 14, 1) and 2.14 as (2, 14, 0), so that versions can be compared."""
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
    return tuple([*numbers, 0, 0][:3])


# --- The checks


def python() -> Finding:
    """A Python that the scripts can run on."""
    found = f"Python {platform.python_version()}"
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return "green", found, ""
    oldest = f"{OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}"
    found += f", but the scripts need {oldest} or newer"
    if sys.prefix == sys.base_prefix and python_of(ROOT).exists():
        return "red", found, activate()
    for minor in range(OLDEST_PYTHON[1] + 8, OLDEST_PYTHON[1] - 1, -1):
        if shutil.which(f"python3.{minor}"):
            return "red", found, quoted(f"python3.{minor}", "-m", "venv", "--clear", ROOT / ".venv")
    if MAC:
        return "red", found, f"brew install python@{oldest}"
    if os.name == "nt":
        return "red", found, f"winget install Python.Python.{oldest}"
    return "red", found, as_root(f"apt-get install python{oldest} python{oldest}-venv")


def torch_is_there() -> Finding:
    """A torch that can be imported, in a version that requirements.txt allows."""
    if "torch" not in facts():
        return "red", facts()["torch_error"], install_all()
    if "torch_error" in facts():  # it can be imported, but not used
        return "red", facts()["torch_error"], reinstall()
    version = facts()["torch"]
    requirements = ROOT / "requirements.txt"
    text = requirements.read_text() if requirements.exists() else ""
    oldest = re.search(r"^torch>=([\d.]+)", text, re.MULTILINE)
    if oldest and version_numbers(version) < version_numbers(oldest[1]):
        return "red", f"torch {version}, but the scripts need {oldest[1]} or newer", reinstall()
    cuda = facts().get("cuda")
    return "green", f"torch {version}, {f'for CUDA {cuda}' if cuda else 'without CUDA'}", ""


def torchvision_fits() -> Finding:
    """A torchvision that was compiled for this torch."""
    if "torch" not in facts():
        return no_torch()
    if "torchvision_error" in facts():
        missing = "No module named 'torchvision'" in facts()["torchvision_error"]
        return "red", facts()["torchvision_error"], install_all() if missing else reinstall()
    torch = facts()["torch"]
    torchvision = facts()["torchvision"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("torchvision") or []:
            needed = re.match(r"torch\s*\(?==\s*([\d.]+)", requirement)
            if needed and version_numbers(torch) != version_numbers(needed[1]):
                return "red", f"torchvision {torchvision} needs torch {needed[1]}, not {torch}", reinstall()
    return "green", f"torchvision {torchvision} fits torch {torch}", ""


def nvidia_gpus() -> list[str]:
    """Return the GPUs that NVIDIA's driver knows, even if torch cannot use them."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.partition(" (UUID")[0] for line in listed.splitlines() if line.startswith("GPU ")]


def gpus() -> Finding:
    """GPUs, which nobody needs. Red: torch should be able to use a GPU, but cannot."""
    if "gpus" in facts():
        return "green", facts()["gpus"], ""
    unused = nvidia_gpus()
    if not unused:
        return "green", "none, so the scripts use the CPU", ""
    if "torch" not in facts():
        return no_torch()
    if not facts().get("cuda"):
        return "yellow", f"{unused[0]}, but this torch is only for CPUs", reinstall()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        found = f"{unused[0]}, hidden by CUDA_VISIBLE_DEVICES='{visible}'"
        return "yellow", found, "unset CUDA_VISIBLE_DEVICES"
    found = f"torch for CUDA {facts()['cuda']} cannot use {unused[0]}: is its driver too old?"
    return "red", found, "export CUDA_VISIBLE_DEVICES=  # use the CPU until there is a newer driver"


def backends() -> Finding:
    """Libraries for collectives: gloo for everybody, NCCL for NVIDIA's GPUs."""
    if "torch" not in facts():
        return no_torch()
    names = facts().get("backends", [])
    if "gloo" not in names:
        return "red", f"torch has no gloo (it has: {', '.join(names) or 'none'})", reinstall()
    if facts().get("cuda") and facts().get("gpus") and "nccl" not in names:
        return "yellow", "gloo, but no NCCL for the GPUs: add --use-gpu 0", reinstall()
    return "green", ", ".join(names), ""


def cores() -> int:
    """Return how many CPU cores this process may use: a container may have fewer than the machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(usable, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is no such file, or the quota is "max"
        return usable


def threads() -> Finding:
    """No more threads in a rank than cores. The scripts give each of two ranks half of the cores."""
    half = max(1, cores() // 2)
    fix = f"export OMP_NUM_THREADS={half}"
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked is None:
        return "green", f"{half} for each rank (the scripts' own choice), cores: {cores()}", ""
    if not re.fullmatch(r"[1-9][0-9]*", asked):
        return "red", f"OMP_NUM_THREADS is '{asked}', which is not a number of threads", fix
    found = f"{asked} for each rank (OMP_NUM_THREADS), cores: {cores()}"
    if int(asked) > cores():
        return "red", f"{found}: they would take turns", fix
    if 2 * int(asked) > cores() > 1:
        return "yellow", f"{found}: two ranks would take turns", fix
    return "green", found, ""


def variables() -> Finding:
    """No variable that torchrun would take for one of its flags, such as PET_NNODES for --nnodes."""
    names = sorted(name for name in os.environ if name.startswith("PET_") and name != LOCAL_ADDR)
    if not names:
        return "green", "none is set that torchrun takes for a flag", ""
    found = f"torchrun takes {names[0]}={os.environ[names[0]]} for one of its flags, in every command"
    return "red", found, f"unset {' '.join(names)}"


def not_here(name: str) -> str:
    """Return why ranks cannot meet at this name on this machine, or "" if it has one of its addresses."""
    try:
        found = socket.getaddrinfo(name, 0, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return f"'{name}' has no address ({getattr(error, 'strerror', None) or error})"
    for family, kind, _, _, address in found:
        # A socket can be bound only to an address of this machine.
        with contextlib.suppress(OSError), socket.socket(family, kind) as bound:
            bound.bind(address)
            return ""
    return f"'{name}' belongs to another machine ({found[0][4][0]})"


def host_name() -> Finding:
    """An address of this machine at which the ranks can meet, and a name server that is not slow."""
    interfaces = [name for _, name in socket.if_nameindex()]
    for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(","):
        if name and name not in interfaces:
            found = f"GLOO_SOCKET_IFNAME is '{name}', but this machine has: {', '.join(interfaces)}"
            return "red", found, "unset GLOO_SOCKET_IFNAME"
    problem = not_here("localhost")
    if problem:
        return "red", problem, add_to_hosts("127.0.0.1", "localhost")
    meeting = os.environ.get(LOCAL_ADDR) or socket.getfqdn()  # as in torchrun
    problem = not_here(meeting)
    if problem and LOCAL_ADDR in os.environ:
        return "red", f"{LOCAL_ADDR}: {problem}", f"unset {LOCAL_ADDR}"
    if problem:
        problem += ", and torchrun's ranks meet there"
        color, found, _ = ranks()  # they meet at 127.0.0.1
        if color == "green":
            return "red", problem, f"export {LOCAL_ADDR}=127.0.0.1"
        found = f"{problem}; with {LOCAL_ADDR}=127.0.0.1: {found}"
        return "red", found, add_to_hosts("127.0.0.1", meeting)
    begun = time.monotonic()
    with contextlib.suppress(OSError):  # what the answer is does not matter, only when it comes
        socket.getnameinfo(("::ffff:127.0.0.1", 0), 0)  # torch's store asks this for each rank
    seconds = time.monotonic() - begun
    if seconds > 3:
        found = f"the name server is slow: a rank loses {seconds:.0f} s each time that it asks for a name"
        return "yellow", found, add_to_hosts("::ffff:127.0.0.1", "localhost")
    return "green", f"torchrun's ranks meet at '{meeting}', which is this machine", ""


def loopback() -> Finding:
    """A free port, and a connection from this machine to itself: no firewall is between ranks."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            setting = "net.inet.ip.portrange.first=49152"
            if LINUX:
                setting = "net.ipv4.ip_local_port_range='32768 60999'"
            return "red", "every port that programs may use is taken", as_root(f"sysctl -w {setting}")
        reason = error.strerror or error
        return "red", f"this machine cannot connect to itself at 127.0.0.1 ({reason})", fix_loopback(error)
    return "green", "127.0.0.1 answers", ""


def be_a_rank() -> None:
    """In a child of torchrun: join the other rank and add up."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1000))
    dist.destroy_process_group()


def ranks(seconds: float = 180) -> Finding:
    """Two ranks of torchrun that meet at 127.0.0.1 and do an all-reduce."""
    color, found, fix = loopback()
    if color == "red":  # the ranks would wait for each other until the end
        return "red", f"not tried: {found}", fix
    if "torch" not in facts():
        return no_torch()
    begun = time.monotonic()
    status, output = run_torchrun(seconds)
    if status == 0:
        return "green", f"two have added up over gloo, in {time.monotonic() - begun:.0f} s", ""
    error = re.search(r"^(?:\[rank\d\]: )?(?:\w+\.)*(\w+(?:Error|Exception): .+)$", output, re.MULTILINE)
    if error:
        why = error[1]
    elif status is None:
        why = f"they did not finish within {seconds:g} s"
    else:
        why = f"torchrun ended with status {status}"
    # With this interface, gloo stays on this machine, and does not look up its name.
    fix = f"export GLOO_SOCKET_IFNAME={'lo0' if MAC else 'lo'}"
    if "GLOO_SOCKET_IFNAME" in os.environ:
        fix = "unset GLOO_SOCKET_IFNAME"
    return "red", f"two ranks failed to add up: {why}"[:300], fix


def run_torchrun(seconds: float) -> tuple[int | None, str]:
    """Let torchrun run `be_a_rank` twice. Return its exit status, or None after so long, and its output."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(HERE), "--be-a-rank"]
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("PET_")}
    environment[LOCAL_ADDR] = "127.0.0.1"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        status = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then gives its ranks 30 s to end
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
        output.seek(0)
        return status, output.read().decode(errors="replace")


def reach(url: str) -> str:
    """Return "" if there is something at this address, or why not."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", None) or error)


def damage(raw: Path) -> dict[str, str]:
    """Return which of MNIST's files are missing or have a wrong size: what is wrong, by their names."""
    problems = {}
    for name, size in MNIST.items():
        path = raw / name
        if not path.is_file():
            problems[name] = "is missing"
        elif path.stat().st_size != size:
            problems[name] = f"is damaged: {path.stat().st_size:,} bytes of {size:,}"
    return problems


def mnist(data_dir: Path) -> Finding:
    """MNIST is here, or one of torchvision's mirrors has it. Without it, only some things do not work."""
    raw = data_dir / "MNIST" / "raw"
    problems = damage(raw)
    if not problems:
        return "green", f"in {data_dir}", ""
    damaged = [name for name in problems if problems[name] != "is missing"]
    if damaged:
        found = f"{raw / damaged[0]} {problems[damaged[0]]}"
        return "red", found, quoted("rm", *(raw / name for name in damaged))
    if "mirrors" not in facts():
        return "red", f"not in {data_dir}, and downloading it needs torchvision", install_all()
    why = "there is none"
    for mirror in facts()["mirrors"]:
        why = reach(f"{mirror}train-images-idx3-ubyte.gz")
        if not why:
            return "green", f"not in {data_dir} yet; the first run downloads it", ""
    copy = f"mkdir -p {quoted(data_dir)} && cp -r /where/there/is/a/copy/of/MNIST {quoted(data_dir)}/"
    return "yellow", f"not in {data_dir}, and no mirror answers ({why})", copy


def disk() -> Finding:
    """Room for what runs write, and for torch if it is not installed yet."""
    try:
        tempfile.TemporaryFile(dir=ROOT).close()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return "red", f"cannot write to {ROOT} ({error.strerror})", quoted("chmod", "u+w", ROOT)
    needed = 1 if importlib.util.find_spec("torch") else 8
    free = shutil.disk_usage(ROOT).free / 10**9
    if free < needed:
        clean = quoted(sys.executable, "-m", "pip", "cache", "purge")
        return "red", f"{free:.1f} GB are free, but {needed} GB are needed", clean
    return "green", f"{free:.1f} GB are free", ""


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Room in /dev/shm, where data loaders' workers put their batches, and NCCL its messages."""
    if not LINUX:
        return "green", "this system needs none", ""
    if not folder.is_dir():
        return "red", f"{folder} does not exist", as_root(f"mount --mkdir -t tmpfs tmpfs {quoted(folder)}")
    usage = shutil.disk_usage(folder)
    free = usage.free / 10**6
    found = f"{free:,.0f} MB are free in {folder}"
    larger = usage.total // 10**6 + 1000
    fix = as_root(f"mount -o remount,size={larger}M {quoted(folder)}")
    if free < 32:
        return "red", f"{found}: too little for --num-workers", fix
    if free < 256:
        return "yellow", f"{found}: enough for MNIST, but little for larger images and for NCCL", fix
    return "green", found, ""


def open_files() -> Finding:
    """How many files and connections a process may have open at the same time."""
    try:
        import resource
    except ImportError:  # Windows
        return "green", "this system sets no such limit", ""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 128:  # step 05 with workers fails with 40, runs with 64
        return "red", f"only {soft} may be open at the same time: too few", "ulimit -n 1024"
    return "green", "enough may be open at the same time", ""


# --- The report and the command line


def checks(data_dir: Path) -> dict[str, Callable[[], Finding]]:
    """Return all checks by name. A cause comes before what it breaks."""
    return {
        "python": python,
        "torch": torch_is_there,
        "torchvision": torchvision_fits,
        "gpus": gpus,
        "backends": backends,
        "threads": threads,
        "variables": variables,
        "host-name": host_name,
        "loopback": loopback,
        "ranks": ranks,
        "mnist": functools.partial(mnist, data_dir),
        "disk": disk,
        "shared-memory": shared_memory,
        "open-files": open_files,
    }


def examine(data_dir: Path, only: list[str], as_json: bool) -> int:
    """Run the checks, print what they find, and return the exit status."""
    results = []
    colors = {}
    count = {"green": 0, "yellow": 0, "red": 0}
    for name, check in checks(data_dir).items():
        if only and name not in only:
            continue
        color, found, fix = check()
        colors[name] = color
        count[color] += 1
        results.append({"check": name, "status": color, "found": found, "fix": fix})
        if not as_json:
            print(f"{painted(color)}  {name:<13}  {found}", flush=True)
            if fix:
                print(f"{'':8}fix it with:  {fix}", flush=True)
    if as_json:
        print(json.dumps({"ok": not count["red"], **count, "checks": results}, indent=1))
    else:
        counted = ", ".join(f"{number} {color}" for color, number in count.items())
        print(f"\n{counted}. {verdict(colors)}")
    return 1 if count["red"] else 0


def verdict(colors: dict[str, str]) -> str:
    """Return what the machine is ready for, as a sentence."""
    if "red" in colors.values():
        return "This machine is not ready."
    if colors.get("mnist") == "yellow":
        return "This machine is ready, but not for MNIST: use --num-samples, which needs no download."
    return "This machine is ready."


def painted(color: str) -> str:
    """Return the word for a color, in that color if this is a terminal."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return f"{color:<6}"
    code = {"red": 31, "green": 32, "yellow": 33}[color]
    return f"\033[{code}m{color:<6}\033[0m"


class OneLineParser(argparse.ArgumentParser):
    """Answers a wrong flag with one line."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help lists the flags)")


def main() -> int:
    if sys.argv[1:] == ["--look-at-torch"]:
        look_at_torch()
        return 0
    if sys.argv[1:] == ["--be-a-rank"]:
        be_a_rank()
        return 0
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = list(checks(Path()))
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--only", action="append", choices=names, default=[], metavar="CHECK", help=", ".join(names))
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is, or goes (data)")
    args = parser.parse_args()
    return examine(args.data_dir, args.only, args.json)


if __name__ == "__main__":
    sys.exit(main())
