"""Runs a learner's file on 1, 2 and 3 ranks, and says which promise of its exercise it breaks.

An exercise is a folder in workshop/exercises with a page, an `exercise.toml`, a `start.py`, a `solution.py`
and a `judge.py`, which has a list of promises. A promise is a function that every rank calls. It tries the
learner's functions, and returns what it expects and what it has seen. Here the ranks are started, ended if
they hang, and compared. An exercise that is a whole script has a function `judge` instead, see turning.py.

A rank is a fork of this process, which has imported torch (tests/harness/forks.py): an answer takes a second.
"""

import contextlib
import gc
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "harness"), str(HERE)]

import forks  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

WORLD_SIZES = (1, 2, 3)  # three, because two numbers have one sum, and two neighbors are one
LOST = re.compile("by peer|Pair is not connected|Broken pipe")  # what gloo says when another rank has left
SECONDS = 8  # without a promise more that is through, until a file counts as one that hangs


@dataclass
class Promise:
    """What a learner's file must do.

    `check(theirs, rank, ranks)` runs on every rank, in a process group. It calls functions of the module
    `theirs`, and returns what is expected on this rank, and what was seen. Both are numbers, strings,
    tensors, or lists, tuples and dictionaries of them. `told` is where the pages tell of it.
    """

    says: str
    check: Callable[[ModuleType, int, int], tuple[Any, Any]]
    told: str
    world_sizes: tuple[int, ...] = WORLD_SIZES


@dataclass
class Verdict:
    """How a file has done: the promises that it has kept, and what it says of the first that it breaks."""

    kept: list[str] = field(default_factory=list)
    broken: str = ""
    lines: list[str] = field(default_factory=list)
    told: str = ""

    @property
    def passed(self) -> bool:
        return not self.broken


COMMUNICATION = [
    *("send", "recv", "isend", "irecv", "batch_isend_irecv", "broadcast", "all_reduce", "reduce"),
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "gather", "scatter", "all_to_all"),
    *("all_to_all_single", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "barrier"),
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("monitored_barrier", "send_object_list", "recv_object_list", "all_gather_coalesced"),
    *("all_reduce_coalesced", "gather_into_tensor", "gather_single"),
]
WAITING = ("wait", "synchronize", "is_completed", "result", "done", "value")  # methods of a Work or a Future


@dataclass
class Call:
    """A call of a function of torch.distributed."""

    name: str
    numbers: int  # in the tensor
    dst: int | None  # the rank that it sends to
    waits: int = 0  # how often the caller has waited for it; a call that blocks is one wait


class WatchedWork:
    """Stands in for a Work or a Future, and counts how often somebody waits for it."""

    def __init__(self, work: Any, call: Call):
        self.work = work
        self.call = call

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.work, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            if name in WAITING:
                self.call.waits += 1
            result = value(*args, **kwargs)
            return WatchedWork(result, self.call) if name == "get_future" else result

        return method if callable(value) else value


@contextlib.contextmanager
def calls(answer: ModuleType) -> Iterator[list[Call]]:
    """Record which functions of torch.distributed are called, also by names that `answer` has imported."""
    recorded: list[Call] = []
    originals = {name: getattr(dist, name) for name in COMMUNICATION if hasattr(dist, name)}

    def recording(name: str) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            call = Call(name, numbers=tensors[0].numel() if tensors else 0, dst=None)
            if name in ("send", "isend"):
                call.dst = kwargs["dst"] if "dst" in kwargs else args[1]
            recorded.append(call)
            result = originals[name](*args, **kwargs)
            if hasattr(result, "wait"):
                return WatchedWork(result, call)
            call.waits += 1
            return result

        return function

    with contextlib.ExitStack() as patches:
        for name, original in originals.items():
            patches.enter_context(mock.patch.object(dist, name, recording(name)))
            for imported, value in list(vars(answer).items()):  # `from torch.distributed import all_reduce`
                if value is original:
                    patches.enter_context(mock.patch.object(answer, imported, recording(name)))
        yield recorded


def load(path: Path) -> ModuleType:
    """A file of Python as a module, named after the file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def about(judge_py: str) -> dict[str, Any]:
    """What exercise.toml says, which lies beside a judge.py, of which this is the `__file__`."""
    return tomllib.loads(Path(judge_py).with_name("exercise.toml").read_text())


def alike(a: Any, b: Any) -> bool:
    """Whether two results are the same; floats within 1e-9, for sums in another order."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-9 * max(1.0, abs(a))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def shown(value: Any) -> str:
    """A result in a few characters."""
    if isinstance(value, torch.Tensor):
        return shown(value.tolist())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        some = [shown(each) for each in value[:8]]
        return f"[{', '.join(some)}{', …' if len(value) > 8 else ''}]"
    return str(value)


@dataclass
class Ranks:
    """The processes of one world size, and the files that they leave."""

    ranks: int
    folder: Path
    processes: list[subprocess.Popen[bytes]]
    hung: set[int] = field(default_factory=set)  # those that had to be ended

    def text(self, rank: int, name: str) -> str:
        return (self.folder / f"{name}-{rank}").read_text(errors="replace")

    def results(self, rank: int) -> list[Any]:
        """What a rank has found, promise by promise, so far."""
        found = []
        for path in sorted(self.folder.glob(f"found-{rank}-*")):
            found.append(torch.load(path, weights_only=False))
        return found


def start(exercise: Path, file: Path, ranks: int, folder: Path) -> Ranks:
    """Start the ranks of one world size; each tries all promises."""
    folder.mkdir()
    processes = []
    for rank in range(ranks):
        with open(folder / f"out-{rank}", "wb") as out, open(folder / f"err-{rank}", "wb") as err:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
            env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            words = [sys.executable, str(HERE / "judging.py"), str(exercise), str(file), str(folder)]
            processes.append(
                subprocess.Popen(
                    words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                    start_new_session=True,
                )
            )  # fmt: skip
    return Ranks(ranks, folder, processes)


def be_a_rank(exercise: Path, file: Path, folder: Path) -> None:
    """In a rank: try the promises one after the other, and leave what was found in files."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    promises = load(exercise / "judge.py").PROMISES
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    ours: Any = dist.new_group(backend="gloo")  # or a barrier of the learner's would meet one of these
    theirs = load(file)
    for number, promise in enumerate(promises):
        if ranks not in promise.world_sizes:
            continue
        torch.manual_seed(1000 * number + rank)
        found = promise.check(theirs, rank, ranks)
        dist.barrier(group=ours)  # or what one rank does late would be seen in the next promise
        path = folder / f"found-{rank}-{number:02}"
        torch.save((number, *found), f"{path}.new")
        os.replace(f"{path}.new", path)
    gc.collect()  # a DDP that still held a group could make Python abort as it ends, or hang
    dist.destroy_process_group()


def judge(exercise: Path, file: Path) -> Verdict:
    """Try a learner's file on all world sizes at once."""
    judge_py = load(exercise / "judge.py")
    if hasattr(judge_py, "judge"):  # of an exercise that is a whole script
        return judge_py.judge(file)
    with tempfile.TemporaryDirectory(prefix="judging-") as name:
        folder = Path(name)
        groups = [start(exercise, file, ranks, folder / str(ranks)) for ranks in WORLD_SIZES]
        try:
            for group in groups:
                wait(group)
        finally:
            processes = [process for group in groups for process in group.processes]
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
            for process in processes:
                process.wait(10)
        return verdict(judge_py.PROMISES, groups, file)


def wait(group: Ranks) -> None:
    """Until all ranks have ended, or one has failed and the others had a second to follow, or they hang."""
    alive, end = set(range(group.ranks)), 0.0
    # A promise that is through leaves a file, and the folder has its time.
    while alive and time.time() < (end or group.folder.stat().st_mtime + SECONDS):
        for rank in sorted(alive):
            if (status := group.processes[rank].poll()) is not None:
                alive.discard(rank)
                end = end or (time.time() + 1 if status else 0.0)
        time.sleep(0.01)
    group.hung = alive
    for rank in alive:  # let it write down where it stands
        with contextlib.suppress(ProcessLookupError):
            os.kill(group.processes[rank].pid, forks.STACKS)
    end = time.monotonic() + 1
    while time.monotonic() < end and not all(
        "most recent call first" in group.text(rank, "err") for rank in alive
    ):
        time.sleep(0.01)


def verdict(promises: list[Promise], groups: list[Ranks], file: Path) -> Verdict:
    """What the ranks have found, in the order of the promises: up to the first that is broken."""
    result = Verdict()
    found = {group.ranks: [dict_of(group.results(rank)) for rank in range(group.ranks)] for group in groups}
    for number, promise in enumerate(promises):
        for group in groups:
            if group.ranks not in promise.world_sizes:
                continue
            pairs: list[Any] = [of_rank.get(number) for of_rank in found[group.ranks]]
            if None in pairs:
                result.broken, result.lines = promise.says, what_happened(group, pairs, file)
            elif not all(alike(expected, seen) for expected, seen in pairs):
                result.broken, result.lines = promise.says, differences(group.ranks, pairs)
            if result.broken:
                result.told = promise.told
                return result
        result.kept.append(promise.says)
    return result


def dict_of(found: list[tuple[int, Any, Any]]) -> dict[int, tuple[Any, Any]]:
    return {number: (expected, seen) for number, expected, seen in found}


def differences(ranks: int, pairs: list[Any]) -> list[str]:
    """What was expected, and what was seen on each rank."""
    lines = [f"with {ranks} rank{'s' * (ranks > 1)}:"]
    same = all(alike(pairs[0][0], expected) for expected, _ in pairs)
    if same:
        lines.append(f"  expected on every rank: {shown(pairs[0][0])}")
    for rank, (expected, seen) in enumerate(pairs):
        wanted = "" if same else f"expected {shown(expected)}, "
        mark = "" if alike(expected, seen) else "   <--"
        lines.append(f"  rank {rank}: {wanted}seen {shown(seen)}{mark}")
    return lines


def what_happened(group: Ranks, pairs: list[Any], file: Path) -> list[str]:
    """Why a promise has no answer from each rank: an error, or a rank for which the others wait."""
    ranks, lines = group.ranks, []
    head = f"with {ranks} rank{'s' * (ranks > 1)}"
    failures: list[tuple[int, str, int]] = []
    for rank, process in enumerate(group.processes):
        error = error_in(group.text(rank, "err"), file)
        if error and process.returncode and rank not in group.hung:
            failures.append((rank, *error))
    # A lost connection comes of another rank's end: tell that one's error, if there is one.
    own = [failure for failure in failures if not LOST.search(failure[1])] or failures
    if own:
        rank, what, line = own[0]
        where = f" in line {line} of {file.name}" if line else ""
        if what.startswith("NotImplementedError: "):
            return [f"not written yet{where}: {what.partition(': ')[2]}"]
        lines = [f"{head}, rank {rank} ended with an error{where}:", f"  {what}"]
        if LOST.search(what):
            lines.append("  another rank has already exited: is this call in an `if`, or after a `return`?")
        return lines
    lines.append(f"{head}, it hangs: a rank waits for another that does not come.")
    for rank, process in enumerate(group.processes):
        place = place_in(group.text(rank, "err"), file)
        if process.returncode == 0:
            lines.append(f"  rank {rank} has ended")
        elif place is None:
            came = "is done" if pairs[rank] is not None else "does not come: it is no longer in your file"
            lines.append(f"  rank {rank} {came}")
        else:
            line, waits = place
            text = file.read_text().splitlines()[line - 1].strip()
            lines.append(f"  rank {rank} {'waits' if waits else 'is'} at line {line}: {text}")
    return lines


def error_in(text: str, file: Path) -> tuple[str, int] | None:
    """The error that ended a rank, and its line in the learner's file (0: none), from its traceback."""
    text = re.sub(r"^\[rank\d+\]: ", "", text, flags=re.M)  # as torch prints it, when there is a group
    if "Traceback (most recent call last)" not in text:
        return None
    last = text.rpartition("Traceback (most recent call last)")[2]
    lines = [int(number) for number in re.findall(rf'File "{re.escape(str(file))}", line (\d+)', last)]
    errors = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception|Interrupt|Exit)\b.*)$", last, re.M)
    return (errors[0] if errors else last.strip().splitlines()[-1]), (lines[-1] if lines else 0)


def place_in(text: str, file: Path) -> tuple[int, bool] | None:
    """Where a rank stands in the learner's file, and whether it waits in torch.distributed from there."""
    stack = text.rpartition("most recent call first")[2]
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack)
    names = [name for name, _ in frames]
    if str(file) not in names:
        return None
    at = names.index(str(file))
    return int(frames[at][1]), any("torch/distributed" in name for name in names[:at])


def prepare() -> None:
    """Let this process's children be forks of it, as those of the tests are."""
    import torch.distributed.run
    import torch.multiprocessing

    if subprocess.Popen is not forks.Fork:
        torch.multiprocessing.spawn = forks.spawn
        forks.PATH.extend(sys.path)
        forks.MODULES.update(sys.modules)
        subprocess.Popen = forks.Fork  # type: ignore[misc]


if __name__ == "__main__":
    be_a_rank(*map(Path, sys.argv[1:4]))
