"""What the tests share: start a step, wait for it, plant a bug in it, and say how two runs differ.

What a test starts is a fork of a process that has imported torch (forks.py). With `real=True`, it is started
as a user starts it instead: test_real_start.py does that for every step.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import forks

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "05_fsdp")]

import torch  # noqa: E402

import sharded  # noqa: E402  # from step 05's folder
from common import snapshot  # noqa: E402
from common.snapshot import snapshots, step_of  # noqa: E402

FOLDERS = {path.parent.name[:2]: path.parent.name for path in sorted(ROOT.glob("0[1-9]_*/train.py"))}
GROWN = [step for step in FOLDERS if step != "01"]
UNDER_TORCHRUN = [step for step in FOLDERS if step > "02"]
SHARDED = "05"  # its snapshots are folders

# --- Start something, and wait for it


def ranks_of(step: str) -> int:
    """The number of ranks in most tests: one for step 01, two for the others."""
    return 1 if step == "01" else 2


def command(step: str, ranks: int, root: Path = ROOT, python: str = sys.executable) -> list[str]:
    """The command that starts a step, without its flags."""
    script = str(root / FOLDERS[step] / "train.py")
    if step == "01":
        return [python, script]
    if step == "02":
        return [python, script, f"--world-size={ranks}"]
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, script]


def environment(**extra: str) -> dict[str, str]:
    """Variables for a run: CPUs and one thread, for bit-for-bit comparisons; no proxy for local servers."""
    fixed = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "no_proxy": "127.0.0.1",
    }
    return {**os.environ, **fixed, **extra}


class Started:
    """A running command, the leader of its own session: what it has printed, and how it ends."""

    def __init__(self, words: list[str], folder: Path, real: bool, env: dict[str, str]):
        self.words = words
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  # deleted with this object
        self.process: subprocess.Popen[bytes] | forks.Job
        with open(os.devnull) as nothing:
            out, err = self.files
            if real or words[0] != sys.executable:
                self.process = subprocess.Popen(
                    words, cwd=folder, env=env, stdin=nothing, stdout=out, stderr=err, start_new_session=True
                )
            else:
                files = [nothing.fileno(), out.fileno(), err.fileno()]
                self.process = forks.Job(words, folder, env, files)
        self.pid = self.process.pid

    def text(self, which: int) -> str:
        file = self.files[which]
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

    @property
    def out(self) -> str:
        """Everything that it has printed so far."""
        return self.text(0)

    @property
    def err(self) -> str:
        """The same for standard error."""
        return self.text(1)

    @property
    def story(self) -> str:
        """What to print when it did not do what it should."""
        return f"$ {' '.join(self.words)}\n{self.out}\n{self.err}"

    def ranks(self) -> list[int]:
        """The process ids of the ranks. Step 01 has no launcher, so there it is the command's own."""
        return children(self.pid) or [self.pid]

    def poll(self) -> int | None:
        return self.process.poll()

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_for(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Wait until its output matches `pattern`, a regular expression; AssertionError if it ends first."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.out)):
            assert self.poll() is None or re.search(pattern, self.out), (
                f"it ended without '{pattern}'\n{self.story}"
            )
            if time.monotonic() > end:
                show_stacks(self)
                raise AssertionError(f"no '{pattern}' within {seconds} s\n{self.story}")
            time.sleep(0.01)
        return match


def paths(real: bool = False) -> str:
    """A PATH whose `python` and `torchrun` make forks or, with `real`, are those that run the tests."""
    first = Path(sys.executable).parent if real else Path(os.environ[forks.SOCKET]).parent / "bin"
    return f"{first}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def start(words: list[str], folder: Path, real: bool = False, **extra: str) -> Started:
    """Start a command in `folder`, with `extra` variables."""
    return Started(words, folder, real, environment(**extra))


def finish(process: Started, timeout: float = 120) -> tuple[int, str, str]:
    """Wait for a command, and return its status, stdout and stderr. None of its processes is left behind."""
    try:
        status = process.process.wait(timeout)
    except subprocess.TimeoutExpired:
        show_stacks(process)
        states = "\n".join(map(state, [process.pid, *children(process.pid)]))
        kill([*children(process.pid), process.pid])
        process.process.wait(30)
        raise AssertionError(f"it hung: no end within {timeout} s\n{states}\n{process.story}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return status, process.out, process.err


def show_stacks(process: Started) -> None:
    """Make the processes of a command that hangs print where they hang, unless `real=True` started them."""
    if isinstance(process.process, forks.Job):
        for pid in [process.pid, *children(process.pid)]:  # one by one, or they print into each other's lines
            kill([pid], forks.STACKS)
            time.sleep(0.3)  # nothing says how many threads there are, and the test has failed anyway


def state(pid: int) -> str:
    """What Linux says about a process. D waits for a disk and gets no signal; Z has ended unnoticed."""
    said = [f"process {pid}"]
    with contextlib.suppress(OSError):  # it has just ended, or this is not Linux
        names = ("Name", "State", "PPid", "Threads", "SigPnd", "ShdPnd", "SigBlk")
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        said += [" ".join(line.split()) for line in lines if line.partition(":")[0] in names]
        said += [f"in the kernel: {Path(f'/proc/{pid}/wchan').read_text()}"]
    return ", ".join(said)


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes. Some of them may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int) -> list[int]:
    """All descendants of a process, on Linux, except Python's resource trackers."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found + [grandchild for child in found for grandchild in children(child)]


def has_ended(pid: int) -> bool:
    """Whether a process has ended, even if its parent has not noticed yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    """Wait until a condition is true; after `seconds`, raise an AssertionError that names `what`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def wait_for_step(process: Started, folder: Path, step: int = 1) -> None:
    """Wait until a run has saved step `step`, or a later one; AssertionError if it ends first."""

    def there() -> bool:
        assert process.poll() is None or last_saved(folder) >= step, (
            f"it ended before it saved step {step}\n{process.story}"
        )
        return last_saved(folder) >= step

    wait_until(there, f"a snapshot of step {step} in {folder}")


def errors(text: str) -> list[str]:
    """The lines that tell a user what to fix."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


# --- Plant a bug


def quoted_pattern(quoted: str) -> re.Pattern[str]:
    """A pattern for a quoted block in an output: `…` is part of a line or, alone on a line, any lines."""
    found = "^"
    for line in quoted.splitlines():
        found += r"(?:.*\n)*?" if line == "…" else ".*?".join(map(re.escape, line.split("…"))) + r"[ ]*\n"
    return re.compile(found, re.M)


def after_a_step(code: str) -> tuple[str, str]:
    """An edit of a train.py: run `code` after every training step."""
    counts = "            self.global_step += 1\n"
    return counts, f"{counts}            import os, signal, time\n            {code}\n"


def telling(step: str) -> tuple[str, str]:
    """An edit of a train.py: a rank that ends by itself prints whether it has left the process group."""
    arguments = "rank, port, args" if step == "02" else "args"
    head, inner = (f"def {name}({arguments}):\n" for name in ("worker", "inner"))
    call = f"    try:\n        inner({arguments})\n"
    return head, f"{head}{call}    finally:\n        print('left', not dist.is_initialized())\n\n\n{inner}"


def pause(step: int, until: Path) -> tuple[str, str]:
    """An edit of a train.py: after step `step`, wait until the file `until` exists, at most a minute.

    So the run has not ended yet when a test interrupts it.
    """
    waiting = f"self.global_step == {step} and not os.path.exists({str(until)!r})"
    return after_a_step(f"[time.sleep(0.01) for _ in range(6000) if {waiting}]")


class CannotPlantError(AssertionError):
    """The text that an edit replaces is not there, or is there more than once."""


def planted(root: Path, name: str, *edits: tuple[str, str], steps: tuple[str, ...] = ()) -> Path:
    """A copy, in `root`, of `common` and a step, with one of their files changed.

    Args:
        root: where the copy goes.
        name: the step whose train.py is changed, such as "02", or a file such as "common/models.py".
        edits: (the text to replace, which is there exactly once; the new text).
        steps: other steps to copy.

    Returns `root`. Raises CannotPlantError.
    """
    script = f"{FOLDERS[name]}/train.py" if name in FOLDERS else name
    folders = {"common", *(FOLDERS[step] for step in steps), Path(script).parts[0]}
    for folder in sorted(folders):
        if not (root / folder).exists():
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (root / script).read_text()
    for right, wrong in edits:
        if source.count(right) != 1:
            raise CannotPlantError(f"{script} has this {source.count(right)} times: {right}")
        source = source.replace(right, wrong)
    (root / script).write_text(source)
    return root


RELU = "nn.ReLU(),\n        nn.Flatten()"
# An edit of common/models.py: the small model has averages, too; each rank computes them from its own images.
NORMED = (RELU, "nn.Sequential(nn.BatchNorm2d(32), nn.ReLU()),\n        nn.Flatten()")


def traced(root: Path) -> Path:
    """Make the data set in `root` write down each batch that it returns; `drawn` reads that."""
    draws = "return self[torch.tensor(indices)]"
    writes = "print('drew', len(self), *indices, file=open(f'drawn-{os.getpid()}', 'a'))"
    return planted(root, "common/mnist.py", (draws, f"{writes}\n        {draws}"))


def drawn(folder: Path, size: int) -> list[list[list[int]]]:
    """For each process of a `traced` run in `folder`, its batches from the data set of `size` images."""
    processes = []
    for file in sorted(folder.glob("drawn-*")):
        lines = [list(map(int, line.split()[1:])) for line in file.read_text().splitlines()]
        batches = [indices for length, *indices in lines if length == size]
        processes.append(batches[batches[0] == [0, 1] :])  # without DDP's first pass
    return processes


def load(script: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- What a run leaves behind, and how two runs differ


def saved(folder: Path) -> list[int]:
    """The steps of all snapshots in `folder`, files and folders, newest first."""
    found = [*snapshots(folder), *snapshots(folder, sharded=True)]
    return sorted(map(step_of, found), reverse=True)


def last_saved(folder: Path) -> int:
    """The step of the newest snapshot in `folder`; 0 if there is none."""
    return max(saved(folder), default=0)


def left_over(folder: Path) -> list[str]:
    """The hidden files in `folder` other than the lock, which stays."""
    return sorted(path.name for path in folder.glob(".*") if path.name != ".lock")


def newest(folder: Path) -> dict[str, Any]:
    """What the newest snapshot in `folder` holds. Step 05's is read with its convert.py."""
    path = max([*snapshots(folder), *snapshots(folder, sharded=True)], key=step_of)
    if path.is_file():
        state, _ = snapshot.read(path)
        return {name: value for name, value in state.items() if name not in ("checksum", "writer")}
    return dict(load(ROOT / FOLDERS[SHARDED] / "convert.py").gather(sharded.read(path)[0]))


@dataclass
class Run:
    """A finished training run."""

    name: str
    out: str
    err: str
    events: list[dict[str, Any]]
    snapshot_dir: Path

    @property
    def losses(self) -> torch.Tensor:
        """The global loss of every step, in float64."""
        parts = [event["losses"] for event in self.events if event["event"] == "train"]
        return torch.tensor([loss for part in parts for loss in part], dtype=torch.float64)

    @property
    def test(self) -> dict[str, Any]:
        """The last evaluation."""
        return [event for event in self.events if event["event"] == "eval"][-1]

    @property
    def state(self) -> dict[str, Any]:
        """The state in the newest snapshot, in the form that steps 01 to 04 save."""
        return newest(self.snapshot_dir)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.state["model"]


def train(
    step: str,
    ranks: int,
    folder: Path,
    *flags: str,
    root: Path = ROOT,
    real: bool = False,
    timeout: float = 120,
    python: str = sys.executable,
    **extra: str,
) -> Run:
    """Run a step to its end in `folder`, within `timeout` seconds; `folder/snapshots` has its snapshots.

    With a `python` other than this one, the step is really started. `extra` are environment variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = ["--snapshot-dir=snapshots", "--metrics=metrics.jsonl", "--use-gpu=0"]
    process = start([*command(step, ranks, root, python), *own, *flags], folder, real, **extra)
    status, out, err = finish(process, timeout)
    assert status == 0, f"ended with status {status}, not 0\n{process.story}"
    return read_run(f"step {step} at {ranks} ranks", folder, out, err)


def read_run(name: str, folder: Path, out: str = "", err: str = "") -> Run:
    """The run that left `metrics.jsonl` and `snapshots` in `folder`."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(name, out, err, events, folder / "snapshots")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two states with the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def states_equal(a: Any, b: Any) -> bool:
    """Whether two states hold the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return bool(a == b)


def disagreements(run: Run, reference: Run, tolerance: float = 1e-10) -> list[str]:
    """What two float64 runs of the same training disagree in; prints what it compares.

    Why 1e-10: reordered sums differ by 1e-16 a step. AdamW divides by the root of tiny second moments, which
    turns this into up to 1e-11 in 100 steps. A wrong gradient makes a difference of 1e-4 or more.
    """
    weights = largest_difference(run.weights, reference.weights)
    steps = min(len(run.losses), len(reference.losses))
    losses = (run.losses[:steps] - reference.losses[:steps]).abs().max().item()
    tests = [(one.test["correct"], one.test["total"]) for one in (run, reference)]
    print(
        f"{run.name}, {len(run.losses)} steps, against {reference.name}, {len(reference.losses)} steps: "
        f"weights {weights:.1e}, losses {losses:.1e} (at most {tolerance}), "
        f"correct {tests[0][0]} of {tests[0][1]} and {tests[1][0]} of {tests[1][1]}"
    )
    found = []
    if len(run.losses) != len(reference.losses):
        found.append("steps")
    if not weights <= tolerance:
        found.append("weights")
    if not losses <= tolerance:
        found.append("losses")
    if tests[0] != tests[1] or abs(run.test["loss"] - reference.test["loss"]) > tolerance:
        found.append("evaluation")
    return found


# 12 is divisible by 1, 2 and 3. 647, the number of images, is not divisible by 2 or 3, nor is 107, the
# number of test images: there is always a remainder. An epoch has 53 steps, and the second epoch shuffles
# again: 106 steps in all.
GLOBAL_BATCH = 12
PROOF = ["--num-samples=647", "--epochs=2", "--precision=float64"]
# vit gets batches four times as large. With 12, its gradients jump, and on some processors a difference in a
# step's last bit becomes 1e-10 of a loss within 100 steps. With 48, four seeds gave at most 1e-13.
PROOF_OF_VIT = ["--model=vit", "--vit-depth=2", "--num-samples=2591", *PROOF[1:]]
