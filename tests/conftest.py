"""What the tests share: starting a step as a user would, and saying how two runs differ."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from common.snapshot import read, snapshots, step_of  # noqa: E402

FOLDERS = {path.parent.name[:2]: path.parent.name for path in sorted(ROOT.glob("0[1-9]_*/train.py"))}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-dir", type=Path, help="a folder with MNIST in it, for the tests that need it")
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped has failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome, report.longrepr = "failed", f"skipped, with --no-skips: {report.longrepr}"
    return report


@pytest.fixture
def mnist_dir(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--data-dir")
    if folder is None or not (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip("needs MNIST: make test DATA_DIR=<the folder that holds MNIST/raw>")
    return folder.resolve()


def command(step: str, ranks: int, root: Path = ROOT) -> list[str]:
    """The command that starts a step, without its flags."""
    script = str(root / FOLDERS[step] / "train.py")
    if step == "01":
        return [sys.executable, script]
    if step == "02":
        return [sys.executable, script, f"--world-size={ranks}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, script]


def environment(**extra: str) -> dict[str, str]:
    """CPUs and one thread, so that runs can be compared bit for bit; no proxy before a local server."""
    fixed = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "no_proxy": "127.0.0.1",
    }
    return {**os.environ, **fixed, **extra}


def start(words: list[str], folder: Path, **extra: str) -> subprocess.Popen[str]:
    """Start a command in `folder`, as the leader of its own process group."""
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: int = 240) -> tuple[int, str, str]:
    """Wait for a command; status, stdout and stderr. None of its processes is left behind."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun's workers are no children of the group: it must end them itself
        process.communicate(timeout=90)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def children(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have, on Linux; without helpers."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found + [grandchild for child in found for grandchild in children(child)]


def newest(folder: Path) -> dict[str, Any]:
    """What the newest snapshot in `folder` holds; step 05's by way of its convert.py."""
    path = max([*snapshots(folder), *snapshots(folder, sharded=True)], key=step_of)
    if path.is_file():
        return torch.load(path, weights_only=True)
    spec = importlib.util.spec_from_file_location("convert", ROOT / "05_fsdp" / "convert.py")
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    return convert.gather(path, read(path)[0])


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
        """The global loss of every step, float64."""
        parts = [event["losses"] for event in self.events if event["event"] == "train"]
        return torch.tensor([loss for part in parts for loss in part], dtype=torch.float64)

    @property
    def test(self) -> dict[str, Any]:
        """The last evaluation."""
        return [event for event in self.events if event["event"] == "eval"][-1]

    @property
    def state(self) -> dict[str, Any]:
        """The newest snapshot's, as steps 01 to 04 save it."""
        return newest(self.snapshot_dir)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.state["model"]


def train(step: str, ranks: int, folder: Path, *flags: str, root: Path = ROOT, **extra: str) -> Run:
    """Run a step to its end in `folder`, with its snapshots in `folder/snapshots`."""
    folder.mkdir(parents=True, exist_ok=True)
    own = ["--snapshot-dir=snapshots", "--metrics=metrics.jsonl", "--use-gpu=0"]
    words = [*command(step, ranks, root), *own, *flags]
    status, out, err = finish(start(words, folder, **extra))
    assert status == 0, f"{' '.join(words)} exited with {status}\n{out}\n{err}"
    # torch says so when a process leaves without it.
    assert "destroy_process_group" not in err, err
    return read_run(f"step {step} at {ranks} ranks", folder, out, err)


def read_run(name: str, folder: Path, out: str = "", err: str = "") -> Run:
    """What a run has left in `folder`: `metrics.jsonl` and `snapshots`."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(name, out, err, events, folder / "snapshots")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def disagreements(run: Run, reference: Run, tolerance: float = 1e-10) -> list[str]:
    """What two float64 runs of the same training do not agree in; prints what it compares.

    1e-10: reordered sums differ by 1e-16 a step, and AdamW's division by the root of tiny second
    moments makes up to 1e-11 of it in 100 steps. A wrong gradient is seen at 1e-4 and more.
    """
    weights = largest_difference(run.weights, reference.weights)
    steps = min(len(run.losses), len(reference.losses))
    losses = (run.losses[:steps] - reference.losses[:steps]).abs().max().item()
    tests = [(one.test["correct"], one.test["total"]) for one in (run, reference)]
    print(
        f"{run.name}, {len(run.losses)} steps, against {reference.name}: weights {weights:.1e}, "
        f"losses {losses:.1e}, right {tests[0][0]} of {tests[0][1]} and {tests[1][0]} of {tests[1][1]}"
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


# 24 divides by 1, 2 and 3, but neither 1,291 images do nor the 215 test images that come with them:
# every tail is ragged. 53 steps an epoch, and the second one shuffles anew: 106 in all.
GLOBAL_BATCH = 24
PROOF = ["--num-samples=1291", "--epochs=2", "--precision=float64"]


@pytest.fixture(scope="session")
def proof(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Run]:
    """The run of a step with the flags PROOF, made once for all processes that test."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def get(step: str, ranks: int = 1, model: str = "cnn") -> Run:
        folder = shared / f"proof-{step}-{ranks}-{model}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "out").exists():
                flags = [*PROOF, f"--model={model}", f"--batch-size={GLOBAL_BATCH // ranks}"]
                (folder / "out").write_text(train(step, ranks, folder, *flags).out)
        return read_run(f"step {step} at {ranks} ranks", folder, (folder / "out").read_text())

    return get
