"""Is this machine ready for the workshop? What is not ready has the command that fixes it.

    python workshop/doctor.py                         one line a check: green, yellow or red
    python workshop/doctor.py --only host-name        the same check again, after fixing
    python workshop/doctor.py --json                  everything as one JSON object
    python workshop/doctor.py --prepare DIR           for a room without a network: collect what it needs
    python DIR/bundle/doctor.py --install-from DIR    set a laptop up from a copy of that folder

The doctor itself needs Python only. Exit status: 0 when nothing is red, 1 when something is red, or could not
be collected or installed, 2 when the question was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import functools
import http.client
import importlib.metadata
import importlib.util
import json
import operator
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # An older Python reads this file too, to say that it is too old: back to 3.8.
    Finding = tuple[bool | None, str, str]

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]  # beside a bundle: the folder that becomes the repository
OLDEST = (3, 11)
TRIED = {
    "Python": ("3.11.2", "3.11.7", "3.12.1", "3.13.0"),
    "torch": ("2.11.0", "2.14.1", "2.15.0"),
}  # as in the README
COLOURS = {"red": "31", "green": "32", "yellow": "33"}
LINUX, MAC = sys.platform == "linux", sys.platform == "darwin"
LOOPBACK = "lo0" if MAC else "lo"  # the network interface
GB = 10**9

MNIST = {  # and their bytes, as in common/mnist.py, which needs torch
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}


def stop(message: str, status: int = 2) -> NoReturn:
    """Print `error: message` and exit: with 2 for a wrong question, with 1 for what did not work."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


# --- What a check returns: whether it is well, what was found, and the command that fixes it


def green(found: str) -> Finding:
    return True, found, ""


def yellow(found: str, fix: str) -> Finding:
    """For what matters only sometimes."""
    return None, found, fix


def red(found: str, fix: str) -> Finding:
    return False, found, fix


# --- Commands that fix


def as_root(command: str) -> str:
    """A command that only root may run."""
    return command if not hasattr(os, "geteuid") or os.geteuid() == 0 else f"sudo {command}"


def quoted(*words: object) -> str:
    """Words for a shell."""
    return shlex.join(map(str, words))


def python_of(folder: Path) -> Path:
    """The Python of a folder's environment."""
    return folder / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install_command(*packages: str) -> str:
    """What installs packages. Many systems protect their own Python, so it goes to an environment."""
    there = python_of(ROOT)
    if sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") == sys.prefix:
        install = quoted(sys.executable, "-m", "pip", "install", *packages)
        if importlib.util.find_spec("pip"):
            return install
        if shutil.which("uv"):  # it makes environments without pip
            return quoted("uv", "pip", "install", "--python", sys.executable, *packages)
        return f"{quoted(sys.executable, '-m', 'ensurepip')} && {install}"
    if there.exists():
        return f"source {quoted(there.parent / 'activate')}"
    make = quoted(sys.executable, "-m", "venv", ROOT / ".venv")
    return f"{make} && {quoted(there, '-m', 'pip', 'install', *packages)}"


def install_all() -> str:
    return install_command("-r", str(ROOT / "requirements.txt"))


def reinstall() -> str:
    """Both in one command, or pip takes two that do not fit each other."""
    return install_command("--upgrade", "--force-reinstall", "torch", "torchvision")


def fix_loopback(error: OSError) -> str:
    """What lets a machine talk to itself again."""
    if LINUX and error.errno in (errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH):
        return as_root("ip link set lo up")
    if LINUX:
        return as_root("iptables -I INPUT -i lo -j ACCEPT")
    if MAC:
        # Lets this Python in, and leaves the firewall on.
        return as_root(quoted("/usr/libexec/ApplicationFirewall/socketfilterfw", "--add", sys.executable))
    rule = "netsh advfirewall firewall add rule name=workshop dir=in action=allow"
    return f'{rule} program="{sys.executable}"'


# --- What a child process finds out, so that nothing it does can end the doctor


def part(*words: object) -> list[str]:
    """The command of a child: this file again, as one of PARTS."""
    return [sys.executable, str(HERE), "--part", *map(str, words)]


def numbers(version: str) -> tuple[int, ...]:
    """2.14.1+cpu as (2, 14, 1), 2.14 as (2, 14, 0): to compare versions by."""
    found = re.match(r"[\d.]*", version)
    parts = [int(each) for each in re.findall(r"\d+", found[0] if found else "")]
    return tuple([*parts, 0, 0, 0][:3])


def look_at_torch() -> None:
    """In a child: print what torch and torchvision say of themselves, as JSON in the last line."""
    facts: dict[str, Any] = {}

    def tell(name: str, look: Callable[[], Any]) -> None:
        try:
            facts[name] = look()
        except Exception as error:  # whatever a broken installation raises
            facts[f"{name}_error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]

    def gpus() -> list[str]:
        torch = sys.modules["torch"]
        gpu = torch.accelerator.current_accelerator(check_available=True)
        count = torch.accelerator.device_count() if gpu else 0
        named = gpu is not None and gpu.type == "cuda"
        return [torch.cuda.get_device_name(i) if named else f"{gpu.type}:{i}" for i in range(count)]

    def backends() -> list[str]:
        dist = importlib.import_module("torch.distributed")
        if not dist.is_available():
            return []
        asked = {
            name: getattr(dist, f"is_{name}_available", bool) for name in ("gloo", "nccl", "xccl", "mpi")
        }
        return [name for name, there in asked.items() if there()]

    def operators() -> list[int]:
        # Those are compiled for one version of torch. With another one, this is what fails.
        ops, torch = importlib.import_module("torchvision.ops"), sys.modules["torch"]
        return list(ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5).tolist())

    def wants() -> list[str]:
        lines = importlib.metadata.requires("torchvision") or []
        return [line for line in lines if re.match(r"torch\b(?!-)", line)]

    tell("torch", lambda: str(importlib.import_module("torch").__version__))
    if "torch" in facts:
        tell("cuda", lambda: sys.modules["torch"].version.cuda)
        tell("gpus", gpus)
        tell("backends", backends)
        tell("torchvision", lambda: str(importlib.import_module("torchvision").__version__))
        tell("wants", wants)
    if "torchvision" in facts:
        tell("operators", operators)
        tell("mirrors", lambda: list(importlib.import_module("torchvision.datasets").MNIST.mirrors))
    print(f"\n{json.dumps(facts)}")


@functools.lru_cache(maxsize=None)  # noqa: UP033  # which Python 3.8 has
def facts() -> dict[str, Any]:
    """What `look_at_torch` found; `torch_error` when it did not come to an end."""
    seconds = 180  # the first import on a laptop with a virus scanner takes a minute
    try:
        done = subprocess.run(part("look"), capture_output=True, text=True, timeout=seconds, errors="replace")
    except subprocess.TimeoutExpired:
        return {"torch_error": f"no end of 'import torch' within {seconds} s"}
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return {"torch_error": f"'import torch' ended with status {done.returncode}: {why}"}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def no_torch() -> Finding:
    """What the checks say that need torch, when there is none."""
    return red("not tried, because torch cannot be imported", install_all())


# --- The checks


def tried(name: str) -> str:
    """With which versions the scripts have run so far."""
    return f"the scripts have been tried with {' and '.join([', '.join(TRIED[name][:-1]), TRIED[name][-1]])}"


def python() -> Finding:
    """A Python that the scripts can run on."""
    found = f"Python {platform.python_version()}"
    if sys.version_info[:2] >= OLDEST:
        return green(f"{found} ({tried('Python')})")
    oldest = ".".join(map(str, OLDEST))
    names = [f"python3.{minor}" for minor in range(OLDEST[1] + 8, OLDEST[1] - 1, -1)]
    newer = next((name for name in names if shutil.which(name)), None)
    install = {"darwin": f"brew install python@{oldest}", "win32": f"winget install Python.Python.{oldest}"}
    linux = as_root(f"apt-get install python{oldest} python{oldest}-venv")
    fix = install.get(sys.platform, linux)
    if sys.prefix == sys.base_prefix and python_of(ROOT).exists():
        fix = f"source {quoted(python_of(ROOT).parent / 'activate')}"
    elif newer:
        fix = quoted(newer, "-m", "venv", "--clear", ROOT / ".venv")
    return red(f"{found}, and the scripts need {oldest} or newer", fix)


def torch_is_there() -> Finding:
    """A torch that can be imported, as new as requirements.txt wants it."""
    if "torch" not in facts():
        return red(facts()["torch_error"], install_all())
    requirements = ROOT / "requirements.txt"
    wanted = re.search(r"^torch>=([\d.]+)", requirements.read_text() if requirements.exists() else "", re.M)
    if wanted and numbers(facts()["torch"]) < numbers(wanted[1]):
        return red(f"torch {facts()['torch']}, and the scripts need {wanted[1]}", reinstall())
    cuda = facts().get("cuda")
    kind = f"for CUDA {cuda}" if cuda else "without CUDA"
    return green(f"torch {facts()['torch']}, {kind} ({tried('torch')})")


def torchvision_fits() -> Finding:
    """A torchvision that was made for this torch."""
    if "torch" not in facts():
        return no_torch()
    for name in ("torchvision_error", "operators_error"):
        if name in facts():
            missing = "No module named 'torchvision'" in facts()[name]
            return red(facts()[name], install_all() if missing else reinstall())
    equal, less, more = operator.eq, operator.lt, operator.gt
    signs = {"==": equal, "!=": operator.ne, "<": less, "<=": operator.le, ">": more, ">=": operator.ge}
    found = f"torchvision {facts()['torchvision']}"
    for wanted in facts().get("wants", []):
        for sign, version in re.findall(r"(==|>=|<=|!=|<|>)\s*(\d[\d.]*)", wanted):
            if not signs[sign](numbers(facts()["torch"]), numbers(version)):
                why = f"{found} wants torch {sign} {version}, and this is {facts()['torch']}"
                return red(why, reinstall())
    return green(f"{found} fits torch {facts()['torch']}")


def gpus() -> Finding:
    """GPUs, which nobody needs: red is a card that torch should be able to use, and cannot."""
    names = facts().get("gpus", [])
    if names:
        return green(f"{len(names)}: {', '.join(names)}")
    cards = nvidia_cards()
    if not cards:
        return green("none, so the scripts use the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return yellow(f"{cards[0]}, hidden by CUDA_VISIBLE_DEVICES='{hidden}'", "unset CUDA_VISIBLE_DEVICES")
    if "torch" not in facts():
        return no_torch()
    if not facts().get("cuda"):
        return yellow(f"{cards[0]}, but this torch is for CPUs only", reinstall())
    found = f"torch for CUDA {facts()['cuda']} cannot use {cards[0]}: is its driver too old?"
    return red(found, "export CUDA_VISIBLE_DEVICES=  # for the CPU, until there is a newer driver")


def nvidia_cards() -> list[str]:
    """The cards that NVIDIA's driver knows of, whatever torch says."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.partition(" (UUID")[0] for line in listed.splitlines() if line.startswith("GPU ")]


def backends() -> Finding:
    """Libraries for collectives: gloo for everybody, NCCL for NVIDIA's GPUs."""
    if "torch" not in facts():
        return no_torch()
    found = facts().get("backends", [])
    if "gloo" not in found:
        return red(f"torch comes without gloo (it has: {', '.join(found) or 'none'})", reinstall())
    if facts().get("cuda") and facts().get("gpus") and "nccl" not in found:
        return yellow("gloo, but no NCCL for the GPUs: add --use-gpu 0", reinstall())
    return green(", ".join(found))


def cores() -> int:
    """The CPU cores that this process may use: a container may have fewer than the machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(usable, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # not there, or "max"
        return usable


def threads() -> Finding:
    """No rank has more threads than there are cores. The scripts give each of two ranks half of the cores."""
    asked, fix = os.environ.get("OMP_NUM_THREADS"), f"export OMP_NUM_THREADS={max(1, cores() // 2)}"
    if asked is not None and not (asked.isascii() and asked.isdigit() and int(asked)):
        return red(f"OMP_NUM_THREADS is '{asked}', and no number of threads", fix)
    each = int(asked) if asked else max(1, cores() // 2)
    why = "OMP_NUM_THREADS" if asked else "the scripts' own choice"
    found = f"{each} for each rank ({why}), cores: {cores()}"
    if each > cores():
        return red(f"{found}: they would take turns", fix)
    if 2 * each > cores() > 1:
        return yellow(f"{found}: two ranks would take turns", fix)
    return green(found)


def within(seconds: float, function: Callable[..., Any], *words: Any) -> Any:
    """What a function that may hang returns; raises what it raises, or TimeoutError."""
    answers: list[Any] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(function(*words))
        except Exception as error:  # which the caller gets
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds} s")
    return answers[0]


def variables() -> Finding:
    """No variable is left that torchrun would take for one of its flags: PET_NNODES for --nnodes."""
    left = sorted(name for name in os.environ if name.startswith("PET_") and name != LOCAL_ADDR)
    if left:
        found = f"torchrun takes {left[0]}={os.environ[left[0]]} for one of its flags, in every command"
        return red(found, f"unset {' '.join(left)}")
    return green("none is set that torchrun takes for a flag")


LOCAL_ADDR = "PET_LOCAL_ADDR"  # torchrun takes it for --local-addr, the address at which the ranks meet


def host_name() -> Finding:
    """This machine's name leads to this machine: torchrun lets the ranks meet there, and gloo looks it up."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    there = [each for _, each in socket.if_nameindex()]
    missing = [each for each in chosen.split(",") if chosen and each not in there]
    if missing:
        found = f"GLOO_SOCKET_IFNAME names '{missing[0]}', and there is: {', '.join(there)}"
        return red(found, "unset GLOO_SOCKET_IFNAME")
    if problem := leads_elsewhere("localhost"):
        return red(problem, f"echo '127.0.0.1 localhost' | {as_root('tee -a /etc/hosts')}")
    given = os.environ.get(LOCAL_ADDR, "")
    if given and (problem := leads_elsewhere(given)):
        return red(f"{LOCAL_ADDR}: {problem}", f"unset {LOCAL_ADDR}")
    try:
        name = within(10, socket.getfqdn)  # torchrun's own question
    except TimeoutError:
        name = socket.gethostname()
    if not given and (problem := leads_elsewhere(name)):
        hosts = f"echo '127.0.0.1 {name}' | {as_root('tee -a /etc/hosts')}"
        if "torch" not in facts():
            return red(f"{problem}, and torchrun's ranks meet there", hosts)
        trouble = two_ranks_of_torchrun({LOCAL_ADDR: "127.0.0.1"})
        if trouble:
            return red(f"{problem}; with {LOCAL_ADDR}=127.0.0.1, too, {trouble}", hosts)
        return red(f"{problem}, and torchrun's ranks meet there", f"export {LOCAL_ADDR}=127.0.0.1")
    begin = time.monotonic()
    with contextlib.suppress(OSError):  # it need not have a name, and how long that takes is the question
        within(30, socket.getnameinfo, ("::ffff:127.0.0.1", 0), 0)  # as torch's store asks for each rank's
    if (took := time.monotonic() - begin) > 3:
        found = f"the name server is slow: {took:.0f} s are lost each time that a rank asks it for a name"
        return yellow(found, f"echo '::ffff:127.0.0.1 localhost' | {as_root('tee -a /etc/hosts')}")
    if given:
        return green(f"torchrun's ranks meet at {given} ({LOCAL_ADDR})")
    return green(f"'{name}' is an address of this machine")


def leads_elsewhere(name: str) -> str:
    """Why nobody can meet at this name on this machine; an empty string for one of its own addresses."""
    try:
        found = within(10, socket.getaddrinfo, name, 0, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return f"'{name}' leads nowhere ({getattr(error, 'strerror', None) or error})"
    for family, kind, _, _, address in found:
        # Only an own address can be bound. An IPv6 address on a machine without IPv6 is none.
        with contextlib.suppress(OSError), socket.socket(family, kind) as one:
            one.bind(address)
            return ""
    return f"'{name}' leads to another machine ({found[0][4][0]})"


def two_ranks_of_torchrun(variables: dict[str, str], seconds: float = 120) -> str:
    """Let torchrun start two ranks that add up; an empty string, or what went wrong."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*words, *part("torchrun")[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **variables},
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"two ranks of torchrun do not meet within {seconds:g} s"
    finally:
        process.terminate()  # it ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)  # torchrun gives its ranks 30 s
        process.kill()
        process.wait()
    return f"torchrun ends with status {status}" if status else ""


def be_a_rank_of_torchrun() -> None:
    """In a child of torchrun: meet the other rank, and add up a thousand numbers."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1000))
    dist.destroy_process_group()


def loopback() -> Finding:
    """A connection from this machine to itself, and a word each way: no firewall is between ranks."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5) as there:
                here = server.accept()[0]
                with here:
                    here.settimeout(5)
                    there.sendall(b"ping")
                    here.sendall(here.recv(4))
                    heard = there.recv(4)
        if heard != b"ping":
            raise ConnectionError("the connection was cut")
    except OSError as error:
        reason = error.strerror or str(error)
        return red(f"this machine cannot talk to itself at 127.0.0.1 ({reason})", fix_loopback(error))
    return green("127.0.0.1 answers")


def port() -> Finding:
    """A port that the system can give to the launcher."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return green(f"{server.getsockname()[1]} is free")
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return red(f"no port to be had ({error.strerror})", fix_loopback(error))
    name, span = "net.inet.ip.portrange.first", "49152"
    if LINUX:
        name, span = "net.ipv4.ip_local_port_range", "32768 60999"
    return red("every port that programs may have is taken", as_root(f"sysctl -w {name}='{span}'"))


STAGES = ("import torch", "open a store", "find the store", "join the process group", "add up")


def be_a_rank(rank: str, folder: str, seconds: str) -> None:
    """In a child: one of two ranks. It prints what it is about to do, one of STAGES, before it does it."""
    try:
        talk(int(rank), Path(folder), float(seconds))
    except Exception:
        print(f"failed at {time.monotonic()}", flush=True)  # one clock for all processes of a machine
        raise


def talk(rank: int, folder: Path, seconds: float) -> None:
    """Meet the other rank at a store, and add up a thousand numbers."""
    limit, end = datetime.timedelta(seconds=seconds), time.monotonic() + seconds
    print(STAGES[0], flush=True)
    import torch
    import torch.distributed as dist

    address = folder / "port"
    if rank == 0:
        print(STAGES[1], flush=True)
        store = dist.TCPStore("127.0.0.1", 0, 2, True, limit, wait_for_workers=False)
        (folder / "new").write_text(str(store.port))
        os.replace(folder / "new", address)
    else:
        print(STAGES[2], flush=True)
        while not address.exists() and time.monotonic() < end:
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(address.read_text()), 2, False, limit)
    print(STAGES[3], flush=True)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    print(STAGES[4], flush=True)
    given = torch.full((1000,), rank + 1.0)
    dist.all_reduce(given)
    print(f"sum {given.sum().item():.0f}", flush=True)
    store.set(f"done {rank}", "")
    store.wait(["done 0", "done 1"], limit)  # neither goes while the other one still needs it
    dist.destroy_process_group()


def ranks(seconds: float = 120) -> Finding:
    """Two ranks that really talk: a store, a process group, an all-reduce."""
    well, found, fix = loopback()
    if not well:  # a store would try for two minutes
        return red(f"not tried: {found}", fix)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        statuses = start_ranks(Path(folder), seconds)
        said = [Path(folder, f"rank-{rank}").read_text(errors="replace") for rank in range(2)]
    if statuses == [0, 0] and all("sum 3000" in text.splitlines() for text in said):
        return green(f"two have added up over gloo, in {time.monotonic() - begun:.0f} s")
    stages = [[STAGES.index(line) for line in text.splitlines() if line in STAGES] for text in said]
    reached = [max(each, default=0) for each in stages]
    times = [re.findall(r"^failed at (\S+)$", text, re.M) for text in said]
    # The first that failed is why the other one did, or waits. One that crashed could not say when.
    failed = [rank for rank in range(2) if statuses[rank] not in (0, None)] or [0, 1]
    _, rank = min((float((times[rank] or ["0"])[0]), rank) for rank in failed)
    errors = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception): .*)$", said[rank], re.M)
    why = errors[-1] if errors else f"it ended with status {statuses[rank]}"
    if statuses[rank] is None:
        why = f"no end within {seconds:g} s"
    return red(f"rank {rank} failed to {STAGES[reached[rank]]}: {why}"[:300], fix_ranks(reached[rank]))


def start_ranks(folder: Path, seconds: float) -> list[int | None]:
    """Start both ranks, and end them: their statuses, None for one that had to be ended."""
    begun, end = [], time.monotonic() + seconds
    try:
        for rank in range(2):
            with open(folder / f"rank-{rank}", "wb") as file:
                words = part("rank", rank, folder, seconds)
                begun.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file))
        while time.monotonic() < end and None in [process.poll() for process in begun]:
            if any(process.returncode for process in begun):
                end = min(end, time.monotonic() + 2)  # for the other one to see it
            time.sleep(0.02)
        return [process.poll() for process in begun]
    finally:
        for process in begun:
            process.kill()
            process.wait()


def fix_ranks(stage: int) -> str:
    """What helps two ranks that got stuck at this one of STAGES."""
    if stage == 0:
        return reinstall() if importlib.util.find_spec("torch") else install_all()
    if stage < 3:
        return fix_loopback(OSError())
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return "unset GLOO_SOCKET_IFNAME"
    return f"export GLOO_SOCKET_IFNAME={LOOPBACK}"  # gloo stays on this machine, whatever its name leads to


def reach(url: str, seconds: float = 10) -> str:
    """Ask whether there is a page; an empty string, or why it is not to be had."""
    request = urllib.request.Request(url, method="HEAD")
    try:  # its own timeout does not count while a name is looked up
        within(seconds, lambda: urllib.request.urlopen(request, timeout=seconds).close())
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", None) or error)


def damage(raw: Path) -> dict[str, str]:
    """What is wrong with MNIST's files, by their names: missing, or of a wrong size."""
    found = {}
    for name, size in MNIST.items():
        path = raw / name
        if not path.is_file():
            found[name] = "is not there"
        elif path.stat().st_size != size:
            found[name] = f"is damaged: {path.stat().st_size:,} bytes of {size:,}"
    return found


def mnist(data_dir: Path) -> Finding:
    """MNIST is here, or one of torchvision's mirrors has it."""
    raw = data_dir / "MNIST" / "raw"
    wrong = damage(raw)
    if not wrong:
        return green(f"in {data_dir}")
    damaged = [name for name in wrong if wrong[name] != "is not there"]
    if damaged:
        found = f"{raw / damaged[0]} {wrong[damaged[0]]}"
        return red(found, quoted("rm", *(raw / name for name in damaged)))
    why = "without torchvision nobody knows a mirror"
    for mirror in facts().get("mirrors", []):
        why = reach(f"{mirror}{next(iter(MNIST))}.gz")
        if not why:
            return green(f"not in {data_dir} yet, but to be had: the first run downloads it")
    copy = f"mkdir -p {quoted(data_dir)} && cp -r /where/there/is/a/copy/of/MNIST {quoted(data_dir)}/"
    return red(f"not in {data_dir}, and no mirror answers ({why})", copy)


def disk(folder: Path = ROOT) -> Finding:
    """Room for what runs write, and for torch where it is not installed yet."""
    if not folder.is_dir():
        return red(f"{folder} is not there", quoted("mkdir", "-p", folder))
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return red(f"cannot write to {folder} ({error.strerror})", quoted("chmod", "u+w", folder))
    need = 1 if importlib.util.find_spec("torch") else 8
    free = shutil.disk_usage(folder).free / GB
    found = f"{free:.1f} GB are free"
    if free < need:
        cache = quoted(sys.executable, "-m", "pip", "cache", "purge")
        return red(f"{found}, and {need} GB are needed", cache)
    return green(found)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Room in /dev/shm: the loaders' workers hand their batches over there, and NCCL its messages."""
    if not LINUX:
        return green("this system needs none")
    if not folder.is_dir():
        return red(f"{folder} is not there", as_root(f"mount --mkdir -t tmpfs tmpfs {quoted(folder)}"))
    free = shutil.disk_usage(folder).free / 10**6
    found, fix = (
        f"{free:,.0f} MB are free in {folder}",
        as_root(f"mount -o remount,size=1G {quoted(folder)}"),
    )
    if free < 32:
        return red(f"{found}: too little for --num-workers", fix)
    if free < 256:
        return yellow(f"{found}: enough for MNIST, but little for larger images and for NCCL", fix)
    return green(found)


def open_files() -> Finding:
    """How many files and connections a process may have open at once."""
    try:
        import resource
    except ImportError:
        return green("this system sets no such limit")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 256:
        return green(f"{'any number' if soft == resource.RLIM_INFINITY else f'{soft:,}'} may be open")
    within_hard = hard == resource.RLIM_INFINITY or hard >= 1024 or not LINUX
    fix = "ulimit -n 1024" if within_hard else as_root("prlimit --pid $$ --nofile=1024:1024")
    found = f"only {soft} may be open at once"
    # Seen with step 05 and two workers for each rank: 40 are too few, 64 are enough.
    return red(f"{found}: too few", fix) if soft < 128 else yellow(f"{found}: few for many workers", fix)


def checks(data_dir: Path) -> dict[str, Callable[[], Finding]]:
    """All checks by their names, in an order in which the cause comes before what it breaks."""
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
        "port": port,
        "ranks": ranks,
        "mnist": functools.partial(mnist, data_dir),
        "disk": disk,
        "shared-memory": shared_memory,
        "open-files": open_files,
    }


def examine(data_dir: Path, only: list[str], as_json: bool) -> int:
    """Run the checks and print what they find; the exit status."""
    found = []
    for name, check in checks(data_dir).items():
        if only and name not in only:
            continue
        begun = time.perf_counter()
        well, what, fix = check()
        colour = {True: "green", None: "yellow", False: "red"}[well]
        seconds = round(time.perf_counter() - begun, 2)
        found.append({"check": name, "status": colour, "found": what, "fix": fix, "seconds": seconds})
        if not as_json:
            print(f"{painted(colour)}  {name:<13}  {what}", flush=True)
            if fix:
                print(f"{'':8}fix it with:  {fix}", flush=True)
    count = {colour: sum(each["status"] == colour for each in found) for colour in ("green", "yellow", "red")}
    if as_json:
        print(json.dumps({"ok": not count["red"], **count, "checks": found}, indent=1))
    else:
        ready = "This machine is not ready." if count["red"] else "This machine is ready."
        print(f"\n{', '.join(f'{number} {colour}' for colour, number in count.items())}. {ready}")
    return 1 if count["red"] else 0


def painted(colour: str) -> str:
    """The word for a colour, in that colour if this is a terminal."""
    word = f"{colour:<6}"
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return word if plain else f"\033[{COLOURS[colour]}m{word}\033[0m"


# --- For a room without a network: collect, and install


def manylinux(machine: str) -> list[str]:
    """pip's names for a Linux with glibc 2.28 or newer (2018), which is what torch needs."""
    newest = [f"manylinux_2_{minor}_{machine}" for minor in range(28, 4, -1)]
    return [
        *newest,
        *(f"{old}_{machine}" for old in ("manylinux2014", "manylinux2010", "manylinux1", "linux")),
    ]


POSIX = {"os_name": "posix"}
PLATFORMS: dict[
    str, tuple[list[str], dict[str, str]]
] = {  # pip's names for it, and what markers ask about it
    "linux-x86_64": (
        manylinux("x86_64"),
        {**POSIX, "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    ),
    "linux-aarch64": (
        manylinux("aarch64"),
        {**POSIX, "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    ),
    "macos-arm64": (
        ["macosx_14_0_arm64"],  # pip adds the older ones
        {**POSIX, "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
    ),
    "windows-amd64": (
        ["win_amd64"],
        {
            "os_name": "nt",
            "sys_platform": "win32",
            "platform_system": "Windows",
            "platform_machine": "AMD64",
        },
    ),
}


def this_platform() -> str:
    """The name of this machine's platform."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    return f"{system}-{platform.machine().lower()}"


def be_pip(name: str, version: str, *words: str) -> None:
    """In a child: be pip, for another platform.

    Its own --platform chooses wheels for another platform, but not requirements: whether one with
    `platform_system == "Linux"` counts, pip asks the machine that it runs on. Here the answer is the other's.
    """
    from pip._internal.cli.main import main as pip
    from pip._vendor.packaging import markers

    own = markers.default_environment
    other = {**PLATFORMS[name][1], "python_version": version, "python_full_version": f"{version}.0"}
    markers.default_environment = lambda: {**own(), **other}
    sys.exit(pip(list(words)))


def required(file: Path) -> list[str]:
    """The requirements in a file, and in those that it names with -r."""
    found = []
    for line in file.read_text().splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        further = re.match(r"(?:-r|--requirement)[\s=]+(.+)", line)
        found += required(file.parent / further[1]) if further else [line] if line else []
    return found


def collect_wheels(bundle: Path, name: str, version: str, index: str) -> None:
    """Download what a platform needs into the bundle's wheels, with pip as it is configured here."""
    words = ["download", "--only-binary=:all:", f"--dest={bundle / 'wheels'}", "--progress-bar=off"]
    words += [f"--requirement={bundle / 'requirements.txt'}", f"--python-version={version}"]
    words += ["--implementation=cp", *(f"--platform={each}" for each in PLATFORMS[name][0])]
    if index and name.startswith("linux"):
        why = reach(f"{index.rstrip('/')}/torch/")
        if why:
            print(f"{name}: {index} is not to be had ({why}), so pip's own configuration alone counts")
        else:
            words.append(f"--extra-index-url={index}")
    print(f"{name}: wheels for Python {version} …", flush=True)
    if subprocess.run(part("pip", name, version, *words)).returncode:
        stop(f"pip found no wheels for {name} and Python {version}; its own words are above", 1)


def describe_torch(wheels: Path) -> list[str]:
    """Which builds of torch there are: CPU-only ones are a tenth of the others."""
    found = []
    for path in sorted(wheels.glob("torch-*.whl")):
        _, version, _, _, tags = path.name.replace("%2B", "+").split("-")
        cuda = "manylinux" in tags and "+cpu" not in version and any(wheels.glob("nvidia_*.whl"))
        found.append(f"torch {version} ({tags[:-4]}): {'with CUDA' if cuda else 'for CPUs only'}")
    return found


def collect_mnist(data_dir: Path, to: Path) -> None:
    """Copy MNIST's files from `data_dir`, which they are downloaded to if need be."""
    raw = data_dir / "MNIST" / "raw"
    if damage(raw):
        sys.path.insert(0, str(ROOT))
        try:
            from common.mnist import download
        except ImportError as error:
            stop(f"MNIST is not in {data_dir}, and without torch it is not downloaded ({error})", 1)
        if problem := download(data_dir, raw):
            stop(f"MNIST is not in {data_dir}, and could not be downloaded ({problem}); see --data-dir", 1)
    for name, wrong in damage(raw).items():
        stop(f"{raw / name} {wrong}; delete it, or give another --data-dir", 1)
    copy_mnist(raw, to / "MNIST" / "raw")


def copy_mnist(raw: Path, to: Path) -> None:
    """Copy those files that are not there yet. Each appears when it is whole."""
    to.mkdir(parents=True, exist_ok=True)
    for name in damage(to):
        shutil.copyfile(raw / name, to / f"{name}.new")
        os.replace(to / f"{name}.new", to / name)


LEFT_OUT = {".git", ".venv", "data", "checkpoints", "mine", "__pycache__", ".DS_Store", ".mutants"}


def pack_repository(file: Path, bundle: Path) -> str:
    """Pack this repository, as its newest commit has it; returns what to know about that."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(ROOT)]
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
        words = [*git, "archive", "--format=tar", f"--output={file}", "HEAD"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            stop(f"git could not pack the repository: {done.stderr.strip()}", 1)
        count = len(changed.splitlines())
        return (
            f"its newest commit; not in it, because not committed: {count}" if count else "its newest commit"
        )

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(member.name)
        cache = path.name.startswith(".") and path.name.endswith("_cache")
        inside = (ROOT / path).resolve() == bundle.parent.resolve()
        return None if path.name in LEFT_OUT or cache or inside else member

    with tarfile.open(file, "w") as tar:
        for path in sorted(ROOT.iterdir()):
            tar.add(path, path.name, filter=wanted)
    return "this folder, because there is no git"


def prepare(folder: Path, args: argparse.Namespace) -> int:
    """Collect in `folder` what laptops without a network need; the exit status."""
    bundle, names = folder / "bundle", args.platform or [this_platform()]
    unknown = [name for name in names if name not in PLATFORMS]
    if unknown:
        stop(f"for {unknown[0]} torch has no wheels; --platform takes: {', '.join(PLATFORMS)}")
    if not args.requirements.is_file():
        stop(f"{args.requirements} is not there: --requirements takes a file such as requirements.txt")
    if importlib.util.find_spec("pip") is None:
        stop(f"this Python has no pip: {quoted(sys.executable, '-m', 'ensurepip')}", 1)
    (bundle / "wheels").mkdir(parents=True, exist_ok=True)
    (bundle / "bundle.json").unlink(missing_ok=True)  # which says that a bundle is whole
    print(f"repository: {pack_repository(bundle / 'repository.tar', bundle)}", flush=True)
    collect_mnist(args.data_dir, folder / "data")
    print("MNIST: copied", flush=True)
    (bundle / "requirements.txt").write_text("\n".join(required(args.requirements)) + "\n")
    for name in names:
        collect_wheels(bundle, name, args.python, args.index_url)
    shutil.copyfile(HERE, bundle / "doctor.py")
    about = {"python": args.python, "platforms": names, "requirements": args.requirements.name}
    (bundle / "bundle.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 10**6
    print(
        "\n".join(
            [*describe_torch(bundle / "wheels"), f"{folder} has {size:,.0f} MB. Copy it to each laptop."]
        )
    )
    print(f"There, with Python {args.python}:\n\n    python3 bundle/doctor.py --install-from .")
    return 0


def install(folder: Path, to: Path) -> int:
    """Set this machine up from what `prepare` has collected, without a network; the exit status."""
    folder, to, bundle = folder.resolve(), to.resolve(), folder.resolve() / "bundle"
    if not (bundle / "bundle.json").is_file():
        stop(f"{folder} has no bundle that is whole: make one with --prepare, and copy all of it")
    about = json.loads((bundle / "bundle.json").read_text())
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if mine != about["python"]:
        stop(f"the wheels are for Python {about['python']}, and this is {mine}: use python{about['python']}")
    if this_platform() not in about["platforms"]:
        stop(f"there are wheels for {', '.join(about['platforms'])}, and this is {this_platform()}")
    to.mkdir(parents=True, exist_ok=True)
    kept = unpack(bundle / "repository.tar", to)
    print(f"repository: in {to}{f', where these were there already: {kept}' if kept else ''}", flush=True)
    for name, wrong in damage(folder / "data" / "MNIST" / "raw").items():
        stop(f"{folder / 'data' / 'MNIST' / 'raw' / name} {wrong}: copy it again", 1)
    copy_mnist(folder / "data" / "MNIST" / "raw", to / "data" / "MNIST" / "raw")
    print("MNIST: in data", flush=True)
    print(f"wheels: going to {to / '.venv'} …", flush=True)
    install_wheels(bundle, to)
    # What make would touch after its own installation, which needs a network.
    made = {"requirements.txt": ["installed"], "requirements-dev.txt": ["installed", "installed-dev"]}
    for name in made.get(about["requirements"], []):
        (to / ".venv" / name).touch()
    print(
        f"wheels: installed\n\nNext:\n\n    cd {quoted(to)} && {quoted(python_of(Path()))} workshop/doctor.py"
    )
    return 0


def unpack(file: Path, to: Path) -> str:
    """Unpack the repository into `to`; returns what was there before, and stays as it was."""
    with tempfile.TemporaryDirectory(dir=to, prefix=".unpacking-") as scratch:
        with tarfile.open(file) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(scratch, filter="data")
            else:  # Python 3.11.3 and older
                tar.extractall(scratch)
        kept = []
        for path in sorted(Path(scratch).iterdir()):
            if (to / path.name).exists():
                kept.append(path.name)
            else:
                os.replace(path, to / path.name)
    return ", ".join(kept)


def install_wheels(bundle: Path, to: Path) -> None:
    """Make an environment in `to`, and install all wheels that were asked for in it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    clean["PIP_CONFIG_FILE"] = os.devnull  # or a laptop's own settings would send pip to a network
    offline = ["--quiet", "--no-index", f"--find-links={bundle / 'wheels'}", "--disable-pip-version-check"]
    wanted = f"--requirement={bundle / 'requirements.txt'}"
    if subprocess.run([sys.executable, "-m", "venv", str(to / ".venv")]).returncode:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        stop(f"no environment; on Debian and Ubuntu it needs the package python{version}-venv", 1)
    words = [str(python_of(to)), "-m", "pip", "install", *offline, wanted]
    if subprocess.run(words, env=clean).returncode:
        stop("pip could not install the wheels; its own words are above", 1)


# --- The command line

PARTS: dict[str, Callable[..., None]] = {
    "look": look_at_torch,
    "rank": be_a_rank,
    "torchrun": be_a_rank_of_torchrun,
    "pip": be_pip,
}


class OneLineParser(argparse.ArgumentParser):
    """Answers a bad flag with one line."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help lists the flags)")


def parse_args(words: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names, own = list(checks(Path())), f"{sys.version_info[0]}.{sys.version_info[1]}"
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--only", action="append", choices=names, default=[], metavar="CHECK", help=", ".join(names))
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is, or goes (data)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prepare", type=Path, metavar="DIR", help="collect in DIR what a laptop needs")
    what.add_argument("--install-from", type=Path, metavar="DIR", help="set this machine up from DIR")
    add("--to", type=Path, metavar="FOLDER", help="where --install-from makes the repository (in DIR)")
    add(
        "--platform",
        action="append",
        metavar="NAME",
        help=f"for --prepare: {', '.join(PLATFORMS)} (this one)",
    )
    add("--python", metavar="X.Y", help=f"for --prepare: the laptops' Python ({own})")
    add("--requirements", type=Path, metavar="FILE", help="for --prepare: what to collect (requirements.txt)")
    add("--index-url", metavar="URL", help="for --prepare: more wheels for Linux, such as CPU-only ones")
    args = parser.parse_args(words)
    if args.prepare is None:
        for name in ("platform", "python", "requirements", "index_url"):
            if getattr(args, name) is not None:
                stop(f"--{name.replace('_', '-')} goes with --prepare")
    if args.to is not None and args.install_from is None:
        stop("--to goes with --install-from")
    if (args.json or args.only) and (args.prepare or args.install_from):
        stop("--json and --only are for the checks")
    if args.python is not None and not re.fullmatch(r"3\.[1-9]\d?", args.python):
        stop(f"--python takes a version such as {own}, not '{args.python}'")
    args.python, args.index_url = args.python or own, args.index_url or ""
    args.requirements = args.requirements or ROOT / "requirements.txt"
    return args


def main() -> int:
    if sys.argv[1:2] == ["--part"]:  # before argparse, which would take pip's flags for ours
        PARTS[sys.argv[2]](*sys.argv[3:])
        return 0
    args = parse_args(sys.argv[1:])
    if args.prepare:
        return prepare(args.prepare, args)
    if args.install_from:
        return install(args.install_from, args.to or args.install_from)
    return examine(args.data_dir, args.only, args.json)


if __name__ == "__main__":
    sys.exit(main())
