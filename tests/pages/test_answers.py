"""What the tables "When it goes wrong" and the questions quote from torch is what torch says.

Errors that can happen on a CPU are provoked here, and the remedy that the page names is tried. For errors
that need a GPU or Windows, the tests only check that the installed torch has these words.
"""

import importlib.util
import itertools
import mmap
import os
import re
import signal
import socketserver
import sys
from pathlib import Path

import pytest
import torch
from helpers import FOLDERS, ROOT, command, errors, finish, kill, start
from hosts import WHY, possible
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info

TORCH = Path(torch.__file__).parent
PAGES = {
    "": ROOT / "docs" / "reference" / "questions.md",
    **{step: ROOT / name / "README.md" for step, name in FOLDERS.items()},
}


def quoted(step, words):
    """Return `words`, which the page of a step (`""`: the questions) must quote."""
    assert words in PAGES[step].read_text(), f"{PAGES[step]} does not quote: {words}"
    return words


def torchrun(folder, ranks, script, *words, **variables):
    """Run a script's text on `ranks` ranks; return status, stdout and stderr."""
    (folder / "script.py").write_text(script)
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    status, out, err = finish(start([*module, str(folder / "script.py"), *words], folder, **variables), 60)
    print(out, err)
    return status, out, err


# --- Words


OLDER = ("Duplicate GPU detected", "using GPU 0 … as device used by this process")  # no longer printed
VARIABLE = r"…|\[c10d\]|(?:rank )?\b\d+\b|'[^']*'|\bnode\d|(?:run )?\b(?:cnn|vit)-\S+|[()<>]"
VARIABLE += r"|\b(?:IPv6|RANK|SIG[A-Z]+)\b"


def fragments(message):
    """The parts of a quoted message that do not differ from run to run."""
    parts = re.split(VARIABLE, re.sub(r"^(error|warning): ", "", message))
    return [part.strip(" :;,.") for part in parts if len(re.findall("[a-zA-Z]{2,}", part)) > 1]


def test_each_message_in_the_index_is_one_that_torch_or_this_project_prints():
    """Each of its fragments is in our code, torch's, Python's or a library's, or is Linux's."""
    ours = [*ROOT.glob("common/*.py"), *ROOT.glob("0*/*.py"), ROOT / "workshop" / "doctor.py"]
    text = "".join(path.read_text() for path in ours)
    text = re.sub(r'"\n\s+f?"', "", text)  # a message in two lines
    theirs = [*TORCH.rglob("*.py"), *Path(socketserver.__file__).parent.glob("multiprocessing/*.py")]
    text += "".join(path.read_text(errors="replace") for path in theirs)
    text += "".join(map(os.strerror, range(134)))
    text += "".join(signal.strsignal(number) or "" for number in signal.valid_signals())
    libraries = [*TORCH.glob("lib/libtorch_*.so"), *TORCH.parent.glob("nvidia/nccl/lib/libnccl.so.2")]
    libraries += {
        Path(path) for path in re.findall(r"/\S+libstdc\+\+\S+", Path("/proc/self/maps").read_text())
    }
    mapped_libraries = [mapped(path) for path in libraries]
    table = PAGES[""].read_text().split("<!-- table: messages -->")[1].split("<!-- end -->")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    quoted = [message for cell in cells for message in re.findall("`([^`]+)`", cell)]
    assert len(quoted) > 40
    unknown = [
        (message, part)
        for message in quoted
        for part in fragments(message)
        if not message.startswith(OLDER)
        and part not in text
        and not any(library.find(part.encode()) >= 0 for library in mapped_libraries)
    ]
    assert unknown == []


def mapped(path):
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


# --- Words of errors that need a GPU, or Windows


@pytest.mark.parametrize(
    ("step", "words", "file"),
    [
        ("02", "Cannot re-initialize CUDA in forked subprocess", "cuda/__init__.py"),
        ("02", "barrier(): using the device under current context", "distributed/distributed_c10d.py"),
        (
            "03",
            "use_libuv was requested but PyTorch was built without libuv support",
            "lib/libtorch_cpu.so",
        ),
        ("02", "NCCL_P2P_DISABLE", "../nvidia/nccl/lib/libnccl.so.2"),
        ("04", "unhandled system error", "../nvidia/nccl/lib/libnccl.so.2"),
    ],
)
def test_torch_has_the_words(step, words, file):
    path = TORCH / file
    if "nvidia" in file and not path.exists():
        pytest.skip("needs a torch with NCCL")
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(quoted(step, words).encode())
        print(f"{path}: at byte {place}")
        assert place >= 0


def test_steps_name_their_gpu_to_the_process_group():
    """So that no barrier has to guess it."""
    for step in FOLDERS:
        if step != "01":
            text = (ROOT / FOLDERS[step] / "train.py").read_text()
            assert 'device_id=device if device.type == "cuda" else None' in text, step


def test_step_03_trains_without_libuv(tmp_path):
    """What the page says to do on Windows, done on Linux. torch then uses another store."""
    quoted("03", "USE_LIBUV=0")
    flags = ["--num-samples=256", "--epochs=1", "--use-gpu=0"]
    process = start([*command("03", 2), *flags], tmp_path, USE_LIBUV="0", TORCH_CPP_LOG_LEVEL="INFO")
    status, out, err = finish(process)
    print(out, err)
    assert status == 0 and "done: 256 samples" in out


# --- DDP

UNUSED = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x, skip):
        return self.first(x) if skip else self.second(self.first(x))

dist.init_process_group("gloo")
ddp = DDP(Net(), find_unused_parameters="fixed" in sys.argv)
last = dist.get_rank() == dist.get_world_size() - 1
for _ in range(3):
    ddp(torch.ones(1), skip=last).sum().backward()
dist.destroy_process_group()
print("trained")
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_layer_that_a_rank_skips(tmp_path, ranks):
    words = quoted("02", "Expected to have finished reduction in the prior iteration")
    status, out, err = torchrun(tmp_path, ranks, UNUSED)
    assert status == 1 and words in err and "trained" not in out
    quoted("02", "DDP(model, find_unused_parameters=True")
    status, out, err = torchrun(tmp_path, ranks, UNUSED, "fixed")
    assert status == 0 and out.count("trained") == ranks


UNEQUAL = """
import contextlib, sys, torch, torch.distributed as dist
from datetime import timedelta
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo", timeout=timedelta(seconds=30))
ddp = DDP(torch.nn.Linear(1, 1))
batches = iter(range(2 + dist.get_rank()))
steps = 0
with ddp.join() if "join" in sys.argv else contextlib.nullcontext():
    while True:
        more = torch.tensor(next(batches, None) is not None, dtype=torch.int64)
        if "shortest" in sys.argv:
            dist.all_reduce(more, dist.ReduceOp.MIN)
        if not more:
            break
        ddp(torch.ones(1)).sum().backward()
        steps += 1
print(f"steps {steps}\\n", end="")  # in one piece: the ranks share a pipe
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_unequally_many_batches(tmp_path, ranks):
    """They fail. With `join`, each uses all its batches; stopped together, all take two steps."""
    quoted("", "model.join()")
    quoted("", "ReduceOp.MIN")
    status, out, err = torchrun(tmp_path, ranks, UNEQUAL)
    assert status == 1 and re.search("Connection (closed|reset) by peer|Timed out", err)
    status, out, err = torchrun(tmp_path, ranks, UNEQUAL, "join")
    assert status == 0
    assert sorted(out.splitlines()) == [f"steps {2 + rank}" for rank in range(ranks)]
    status, out, err = torchrun(tmp_path, ranks, UNEQUAL, "shortest")
    assert status == 0 and out.splitlines() == ["steps 2"] * ranks


# --- Data


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("step", "ranks"),
    [("01", 1), *((step, ranks) for step in FOLDERS if step != "01" for ranks in (1, 2, 3))],
)
def test_less_data_than_a_global_batch(tmp_path, step, ranks):
    few = 64 * ranks - 1
    loader = DataLoader(range(63), 64, drop_last=True)
    print(f"DataLoader alone: {list(loader)}")
    assert list(loader) == []  # and prints nothing
    flags = [f"--num-samples={few}", "--epochs=1", "--use-gpu=0"]
    status, _out, err = finish(start([*command(step, ranks), *flags], tmp_path))
    print(err)
    assert status == (1 if step > "02" else 2)  # torchrun's, which does not pass on the ranks' 2
    said = f"error: a step takes {64 * ranks} samples, synthetic-{few} has {few}: lower --batch-size"
    assert errors(err) == [said]
    quoted("01", "error: a step takes 64 samples, … has 63: lower --batch-size")


class Stream(IterableDataset):
    """Numbers, divided among ranks and workers by the expression on the page of questions."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        info = get_worker_info()
        names = {"source": range(20), "rank": self.rank, "world_size": self.world_size}
        names |= {"itertools": itertools, "worker": info.id if info else 0}
        names["workers"] = info.num_workers if info else 1
        return eval(SPLIT, names)


SPLIT = "itertools.islice(source, rank * workers + worker, None, world_size * workers)"


def test_a_distributed_sampler_refuses_a_stream():
    words = quoted("", "has no len()")
    with pytest.raises(TypeError, match=re.escape(words)) as refusal:
        DistributedSampler(Stream(0, 2), num_replicas=2, rank=0)
    print(refusal.value)
    words = quoted("", "DataLoader with IterableDataset: expected unspecified sampler option")
    with pytest.raises(ValueError, match=re.escape(words)):
        DataLoader(Stream(0, 2), sampler=range(20))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_stream_is_dealt_out_once(world_size, workers):
    quoted("", SPLIT)
    parts = [[*DataLoader(Stream(rank, world_size), None, num_workers=workers)] for rank in range(world_size)]
    print(parts)
    assert sorted(itertools.chain(*parts)) == list(range(20))


# --- Processes


@pytest.mark.slow
def test_what_a_notebook_defines_cannot_be_spawned(tmp_path):
    """A function without a file, as in a notebook's cell: the new process does not find it."""
    words = quoted("02", "Can't get attribute 'worker' on <module '__main__'")
    script = (
        "import torch.multiprocessing as mp\n"
        "def worker(rank): pass\n"
        "if __name__ == '__main__': mp.spawn(worker, nprocs=1)\n"
    )
    alone = [sys.executable, "-c", script]
    status, _, err = finish(start(alone, tmp_path, real=True))
    print(err)
    assert status == 1 and words in err
    (tmp_path / "script.py").write_text(script)  # what %%writefile does
    status, _out, err = finish(start([sys.executable, "script.py"], tmp_path, real=True))
    assert status == 0, err


def test_a_rank_that_linux_kills(tmp_path):
    script = "import os, time\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    status, _out, err = torchrun(tmp_path, 2, script)
    assert status == 1
    assert quoted("05", "exitcode  : -9") in err
    assert quoted("05", "Signal 9 (SIGKILL) received by PID") in err


@pytest.mark.root
@pytest.mark.skipif(not possible(), reason=WHY)
def test_a_small_dev_shm(tmp_path):
    """As in a container: workers that load data cannot pass it on. Without workers, nothing needs it."""
    words = quoted("04", "unable to allocate shared memory(shm)")
    script = f"{sys.executable} {ROOT}/{FOLDERS['01']}/train.py"
    flags = "--num-samples=4000 --batch-size=1000 --epochs=1 --use-gpu=0"

    def begin(*more):
        small = f"mount -t tmpfs -o size=512k tmpfs /dev/shm && exec {script} {flags} {' '.join(more)} 2>&1"
        return start(["unshare", "--mount", "bash", "-c", small], tmp_path)

    process = begin("--num-workers=1")
    try:
        process.wait_for(re.escape(words), 60)
    finally:
        kill([process.pid])
        finish(process)
    status, out, _ = finish(begin("--num-workers=0"))
    print(out)
    assert status == 0 and "done: 4,000 samples" in out


def test_torchrun_can_be_told_of_usr1():
    """At least from torch 2.11 on. The ranks themselves do not handle this signal."""
    quoted("04", "--signals-to-handle")
    spec = importlib.util.find_spec("torch.distributed.run")
    assert '"--signals-to-handle"' in Path(spec.origin).read_text()
