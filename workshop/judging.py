"""Runs a learner's file on 1, 2 and 3 ranks, and finds the first promise of its exercise that it breaks.

An exercise is a folder in workshop/exercises with a page, an `exercise.toml`, a `start.py`, a `solution.py`
and a `judge.py`, which has a list of promises. A promise is a function that every rank calls. It calls the
learner's functions, and returns what it expects and what it has seen. This file starts the ranks, ends those
that hang, and compares. If the exercise is a whole script, its judge.py has a function `judge` instead: see
turning.py.

A rank is a fork of this process, which has imported torch (tests/harness/forks.py): judging takes a second.
"""

import contextlib
import functools
import gc
import importlib.util
import math
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

WORLD_SIZES = (1, 2, 3)  # with two ranks, the left and the right neighbor are the same rank
LOST = re.compile("by peer|Pair is not connected|Broken pipe")  # gloo's errors when another rank has exited
SELF = "rank should not be the same as the rank of the current process"  # of dist.send
SECONDS = 8  # a group of ranks hangs if it waits, or computes, for so long without finishing a promise
SAMPLE = 0.1  # seconds between two looks at what the ranks do
LONG = 100  # characters: longer values are not shown whole


class JudgeError(Exception):
    """The judge itself has failed, so nothing is known about the learner's file."""


@dataclass
class Promise:
    """What a learner's file must do.

    `check(answer, rank, ranks)` runs on every rank, in a process group. It calls functions of the module
    `answer`, the learner's file, and returns what is expected on this rank, and what was seen. Both are
    numbers, strings, tensors, or lists, tuples and dictionaries of them. `page` is where to read about it.
    """

    says: str
    check: Callable[[ModuleType, int, int], tuple[Any, Any]]
    page: str
    world_sizes: tuple[int, ...] = WORLD_SIZES


@dataclass
class Verdict:
    """The promises that a file keeps, up to the first that it breaks, and a message about that one."""

    kept: list[str] = field(default_factory=list)
    broken: str = ""
    lines: list[str] = field(default_factory=list)
    page: str = ""
    hung: bool = False  # some ranks had to be ended

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
    """Import a Python file as a module that is named after the file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def about(judge_py: str) -> dict[str, Any]:
    """The facts in the exercise.toml that is in the same folder as `judge_py`."""
    return tomllib.loads(Path(judge_py).with_name("exercise.toml").read_text())


def alike(a: Any, b: Any) -> bool:
    """Whether two results are equal. Floats may differ by 1e-9, because sums in another order do."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-9 * max(1.0, abs(a))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def shown(value: Any, digits: int = 6) -> str:
    """A result as a short text."""
    if isinstance(value, torch.Tensor):
        return shown(value.tolist(), digits)
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(entry, digits)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        some = [shown(entry, digits) for entry in value[:8]]
        return f"[{', '.join(some)}{', …' if len(value) > 8 else ''}]"
    return str(value)


@dataclass
class Ranks:
    """The processes of one world size, and the files that they write."""

    ranks: int
    folder: Path
    processes: list[subprocess.Popen[bytes]]
    hung: set[int] = field(default_factory=set)  # the ranks that had to be ended

    def text(self, rank: int, name: str) -> str:
        return (self.folder / f"{name}-{rank}").read_text(errors="replace")

    def results(self, rank: int) -> dict[int, tuple[Any, Any]]:
        """What a rank expected and saw, by the number of the promise, so far."""
        found = {}
        for path in sorted(self.folder.glob(f"found-{rank}-*")):
            if path.suffix != ".new":
                number, expected, seen = torch.load(path, weights_only=False)
                found[number] = (expected, seen)
        return found


def start(exercise: Path, file: Path, ranks: int, folder: Path) -> Ranks:
    """Start the ranks of one world size. Each of them tries all promises."""
    folder.mkdir()
    processes = []
    for rank in range(ranks):
        with open(folder / f"out-{rank}", "wb") as out, open(folder / f"err-{rank}", "wb") as err:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
            env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(HERE / "judging.py"), str(exercise), str(file), str(folder)]
            processes.append(
                subprocess.Popen(
                    command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                    start_new_session=True,
                )
            )  # fmt: skip
    return Ranks(ranks, folder, processes)


def be_a_rank(exercise: Path, file: Path, folder: Path) -> None:
    """In a rank: try the promises one after the other, and write the results to files."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    promises = load(exercise / "judge.py").PROMISES
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    judges_group: Any = dist.new_group(backend="gloo")  # the learner's barriers cannot meet the judge's in it
    answer = load(file)
    for number, promise in enumerate(promises):
        if ranks not in promise.world_sizes:
            continue
        torch.manual_seed(1000 * number + rank)
        found = promise.check(answer, rank, ranks)
        dist.barrier(group=judges_group)  # nothing that a slow rank still does belongs to the next promise
        path = folder / f"found-{rank}-{number:02}"
        torch.save((number, *found), f"{path}.new")
        os.replace(f"{path}.new", path)
    gc.collect()  # a DDP object that still holds a group could make Python abort at its end, or hang
    dist.destroy_process_group()


def judge(exercise: Path, file: Path) -> Verdict:
    """Judge a learner's file. If it hangs, try it once more, because a machine can stop for a while."""
    judge_py = load(exercise / "judge.py")
    if hasattr(judge_py, "judge"):  # the exercise is a whole script
        judge_once = judge_py.judge
    else:
        judge_once = functools.partial(judge_functions, exercise, judge_py.PROMISES)
    verdict: Verdict = judge_once(file)
    if verdict.hung:
        verdict = judge_once(file)
    return verdict


def judge_functions(exercise: Path, promises: list[Promise], file: Path) -> Verdict:
    """Try a learner's file on all world sizes at the same time."""
    with tempfile.TemporaryDirectory(prefix="judging-") as name:
        folder = Path(name)
        groups = [start(exercise, file, ranks, folder / str(ranks)) for ranks in WORLD_SIZES]
        try:
            wait(groups)
        finally:
            processes = [process for group in groups for process in group.processes]
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
            for process in processes:
                process.wait(10)
        return compare(promises, groups, file)


class Watch:
    """Waits for the ranks of one world size, and decides whether they hang.

    A busy machine must not make a correct answer look like one that hangs. So the time in which the ranks
    wait for the CPU does not count. What counts is the time in which all of them wait for something else,
    and the CPU time of the rank that computes most. Every finished promise starts the count again.
    """

    def __init__(self, group: Ranks):
        self.group = group
        self.running = set(range(group.ranks))
        self.finished = 0  # results of promises
        self.waited = 0.0  # seconds
        self.computed_before = 0.0  # CPU seconds up to the last finished promise
        self.failed_at = math.inf

    def is_over(self) -> bool:
        """Whether all ranks have ended, or one has failed and the others had a second to follow."""
        for rank in sorted(self.running):
            status = self.group.processes[rank].poll()
            if status is not None:
                self.running.discard(rank)
                if status:
                    self.failed_at = min(self.failed_at, time.monotonic())
        return not self.running or time.monotonic() > self.failed_at + 1

    def hangs(self) -> bool:
        """Call this every SAMPLE seconds."""
        finished = len(list(self.group.folder.glob("found-*")))
        activities = [activity(self.group.processes[rank].pid) for rank in self.running]
        computed = max((seconds for _, seconds in activities), default=0.0)
        if finished != self.finished:
            self.finished = finished
            self.waited = 0.0
            self.computed_before = computed
        elif not any(active for active, _ in activities):
            self.waited += SAMPLE
        return self.waited > SECONDS or computed - self.computed_before > SECONDS


def activity(pid: int) -> tuple[bool, float]:
    """Whether a process computes, or would if it had a CPU or its disk, and its CPU seconds.

    Without Linux's /proc, each process seems to wait.
    """
    states = []
    seconds = 0.0
    with contextlib.suppress(OSError):  # it has ended, or this is not Linux
        for path in Path(f"/proc/{pid}/task").glob("*/stat"):
            fields = path.read_text().rpartition(")")[2].split()
            states.append(fields[0])
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return any(state in "RDTt" for state in states), seconds


def wait(groups: list[Ranks]) -> None:
    """Wait for the ranks of all world sizes. Those that hang write down where they are."""
    watches = [Watch(group) for group in groups]
    next_sample = time.monotonic()
    while watches:
        watches = [watch for watch in watches if not end(watch, watch.is_over())]
        if time.monotonic() > next_sample:
            watches = [watch for watch in watches if not end(watch, watch.hangs())]
            next_sample = time.monotonic() + SAMPLE
        time.sleep(0.01)


def end(watch: Watch, is_over: bool) -> bool:
    """If a group's time is over, let the ranks that still run write down where they are."""
    if is_over:
        group = watch.group
        group.hung = set(watch.running)
        for rank in group.hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(group.processes[rank].pid, forks.STACKS)
        give_up = time.monotonic() + 10
        while time.monotonic() < give_up and not all(
            "most recent call first" in group.text(rank, "err") or group.processes[rank].poll() is not None
            for rank in group.hung
        ):
            time.sleep(0.01)
    return is_over


def compare(promises: list[Promise], groups: list[Ranks], file: Path) -> Verdict:
    """Compare what the ranks have found, promise by promise, up to the first that is broken."""
    result = Verdict(hung=any(group.hung for group in groups))
    found = {group.ranks: [group.results(rank) for rank in range(group.ranks)] for group in groups}
    for number, promise in enumerate(promises):
        for group in groups:
            if group.ranks not in promise.world_sizes:
                continue
            pairs: list[Any] = [results.get(number) for results in found[group.ranks]]
            if None in pairs:
                result.broken = promise.says
                result.lines = what_happened(group, pairs, file)
            elif not all(alike(expected, seen) for expected, seen in pairs):
                result.broken = promise.says
                result.lines = differences(group.ranks, pairs)
            if result.broken:
                result.page = promise.page
                return result
        result.kept.append(promise.says)
    return result


def with_ranks(ranks: int) -> str:
    return "with 1 rank" if ranks == 1 else f"with {ranks} ranks"


def differences(ranks: int, pairs: list[tuple[Any, Any]]) -> list[str]:
    """What was expected, and what was seen on each rank; of long results, the first entry that differs."""
    lines = [f"{with_ranks(ranks)}:"]
    if any(max(len(shown(expected)), len(shown(seen))) > LONG for expected, seen in pairs):
        for rank, (expected, seen) in enumerate(pairs):
            lines.append(f"  rank {rank}: {long_difference(expected, seen)}")
        return lines
    differing = [pair for pair in pairs if not alike(*pair)]
    digits = 12 if any(shown(expected) == shown(seen) for expected, seen in differing) else 6
    same = all(alike(pairs[0][0], expected) for expected, _ in pairs)
    if same:
        lines.append(f"  expected on every rank: {shown(pairs[0][0], digits)}")
    for rank, (expected, seen) in enumerate(pairs):
        wanted = "" if same else f"expected {shown(expected, digits)}, "
        mark = "" if alike(expected, seen) else f"{times_expected(expected, seen)}   <--"
        lines.append(f"  rank {rank}: {wanted}seen {shown(seen, digits)}{mark}")
    return lines


def long_difference(expected: Any, seen: Any) -> str:
    if alike(expected, seen):
        return "as expected"
    place, wanted, found = first_difference(expected, seen)
    digits = 12 if shown(wanted) == shown(found) else 6
    entry = f"at {place.strip('.')}, " if place else ""
    text = f"{entry}expected {shown(wanted, digits)}, seen {shown(found, digits)}"
    return f"{text}{times_expected(expected, seen)}   <--"


def first_difference(expected: Any, seen: Any) -> tuple[str, Any, Any]:
    """The place of the first entry in which two results differ, and the entry in each of them."""
    if isinstance(expected, torch.Tensor) and isinstance(seen, torch.Tensor):
        if expected.shape != seen.shape:
            return ".shape", list(expected.shape), list(seen.shape)
        return first_difference(expected.tolist(), seen.tolist())
    keys: list[Any] = []
    if isinstance(expected, dict) and isinstance(seen, dict) and expected.keys() == seen.keys():
        keys = list(expected)
    elif isinstance(expected, (list, tuple)) and isinstance(seen, (list, tuple)):
        if len(expected) != len(seen):
            return ".length", len(expected), len(seen)
        keys = list(range(len(expected)))
    for key in keys:
        if not alike(expected[key], seen[key]):
            place, a, b = first_difference(expected[key], seen[key])
            return f"{f'.{key}' if isinstance(key, str) else f'[{key}]'}{place}", a, b
    return "", expected, seen


def numbers_in(value: Any) -> list[float]:
    """All floats in a result, in order; nothing else may be in it."""
    if isinstance(value, torch.Tensor):
        return numbers_in(value.tolist())
    if isinstance(value, dict):
        return numbers_in(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [number for entry in value for number in numbers_in(entry)]
    return [value] if isinstance(value, float) else [math.nan]


def times_expected(expected: Any, seen: Any) -> str:
    """Say so if all numbers are the expected ones times the same whole number, or divided by it."""
    pairs = list(zip(numbers_in(expected), numbers_in(seen), strict=False))
    if len(numbers_in(expected)) == len(numbers_in(seen)) and any(a for a, _ in pairs):
        for factor in range(2, 101):
            if all(alike(a * factor, b) for a, b in pairs):
                return f" ({factor} × the expected numbers)"
            if all(alike(a, b * factor) for a, b in pairs):
                return f" (the expected numbers / {factor})"
    return ""


def what_happened(group: Ranks, pairs: list[Any], file: Path) -> list[str]:
    """Why some ranks have no result for a promise: an error, or a hang."""
    head = with_ranks(group.ranks)
    failures: list[tuple[int, str, int]] = []
    for rank, process in enumerate(group.processes):
        error = error_in(group.text(rank, "err"), file)
        if error and process.returncode and rank not in group.hung:
            failures.append((rank, *error))
    # A lost connection follows from another rank's end: show that rank's error, if there is one.
    causes = [failure for failure in failures if not LOST.search(failure[1])] or failures
    if causes:
        rank, error_text, line = causes[0]
        where = f" in line {line} of {file.name}" if line else ""
        if error_text.startswith("NotImplementedError: "):
            return [f"not written yet{where}: {error_text.partition(': ')[2]}"]
        lines = [f"{head}, rank {rank} ended with an error{where}:", f"  {error_text}"]
        if SELF in error_text or (LOST.search(error_text) and group.ranks == 1):
            lines[1] = "  a rank cannot send to itself or receive from itself; a rank that is alone need not"
        elif LOST.search(error_text):
            lines.append("  another rank has already exited: is this call in an `if`, or after a `return`?")
        return lines
    lines = [f"{head}, it hangs: a rank waits for another that does not come, or never stops computing."]
    source = file.read_text(errors="replace").splitlines()
    for rank, process in enumerate(group.processes):
        place = place_in(group.text(rank, "err"), file)
        if process.returncode == 0:
            lines.append(f"  rank {rank} has exited")
        elif place is None:
            state = "is done" if pairs[rank] is not None else f"has returned: it is no longer in {file.name}"
            lines.append(f"  rank {rank} {state}")
        else:
            line, waits = place
            verb = "waits" if waits else "is"
            lines.append(f"  rank {rank} {verb} in {file.name}, line {line}: {source[line - 1].strip()}")
    return lines


def error_in(text: str, file: Path) -> tuple[str, int] | None:
    """The error that ended a rank, and its line in the learner's file (0 if it is not in there)."""
    text = re.sub(r"^\[rank\d+\]: ", "", text, flags=re.M)  # torch's prefix
    if "Traceback (most recent call last)" not in text:
        return None
    last = text.rpartition("Traceback (most recent call last)")[2]
    lines = [int(number) for number in re.findall(rf'File "{re.escape(str(file))}", line (\d+)', last)]
    errors = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception|Interrupt|Exit)\b.*)$", last, re.M)
    return (errors[0] if errors else last.strip().splitlines()[-1]), (lines[-1] if lines else 0)


def place_in(text: str, file: Path) -> tuple[int, bool] | None:
    """The line of the learner's file that a rank is at, and whether it waits there in torch.distributed."""
    stack = text.rpartition("most recent call first")[2]
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack)
    names = [name for name, _ in frames]
    if str(file) not in names:
        return None
    first = names.index(str(file))
    waits = any("torch/distributed" in name for name in names[:first])
    return int(frames[first][1]), waits


def prepare() -> None:
    """From now on, start Python processes as forks of this one, as the tests do."""
    import torch.distributed.run
    import torch.multiprocessing
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    if subprocess.Popen is not forks.Fork:
        torch.multiprocessing.spawn = forks.spawn
        forks.PATH.extend(sys.path)
        forks.MODULES.update(sys.modules)
        subprocess.Popen = forks.Fork  # type: ignore[misc]
        subprocess_handler.Popen = forks.Fork  # type: ignore[misc]  # torchrun has imported the name


if __name__ == "__main__":
    be_a_rank(*map(Path, sys.argv[1:4]))
