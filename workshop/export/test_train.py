"""A run that is interrupted ends as one that is not, and an evaluation counts each image once.

On synthetic digits, so that it needs no download, and on the CPU in float64, so that weights can be compared
bit for bit. Real runs with real signals: `python -m pytest`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common import snapshot
from common.mnist import load_mnist
from common.models import build_model

HERE = Path(__file__).resolve().parent
START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
SAMPLES = 335  # and 55 to test on: neither number divides by two
FLAGS = [f"--num-samples={SAMPLES}", "--batch-size=16", "--precision=float64", "--use-gpu=0"]


def start(folder: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """Start training; its output, its metrics and its snapshots go to `folder`."""
    folder.mkdir(exist_ok=True)
    own = [f"--snapshot-dir={folder}", f"--metrics={folder / 'metrics.jsonl'}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # or sums could be added up in another order
    with open(folder / "output", "a") as output:
        return subprocess.Popen(
            [*START, *FLAGS, *own, *flags], cwd=HERE, env=env, stdout=output, stderr=output
        )


def train(folder: Path, epochs: int) -> None:
    """Train to the end."""
    process = start(folder, f"--epochs={epochs}")
    try:
        status = process.wait(600)
    finally:
        process.kill()
    assert status == 0, (folder / "output").read_text()


def saved(folder: Path) -> list[Path]:
    """The snapshots in `folder`, newest first."""
    return snapshot.snapshots(folder)


def newest(folder: Path) -> dict[str, Any]:
    """What the newest snapshot holds."""
    state, problem = snapshot.read(saved(folder)[0])
    assert not problem, problem
    return state


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a run that SIGTERM has interrupted and that has gone on to its end; its epochs."""
    folder = tmp_path_factory.mktemp("runs") / "resumed"
    process = start(folder, "--epochs=100000", "--save-every=1")  # more than anybody waits for
    try:
        end = time.monotonic() + 600
        while not saved(folder):
            assert process.poll() is None and time.monotonic() < end, (folder / "output").read_text()
            time.sleep(0.01)
    finally:
        process.terminate()
        process.wait(60)
    state = newest(folder)
    print(f"interrupted in epoch {state['epoch']} after {state['samples_seen']} samples")
    epochs = state["epoch"] + 2  # the rest of this one, and another
    train(folder, epochs)
    place = f"epoch {state['epoch']}, step {state['global_step']}"
    assert f"resumed from {folder}: {place}\n" in (folder / "output").read_text()
    return folder, epochs


def test_an_interrupted_run_ends_with_the_same_weights(resumed: tuple[Path, int]) -> None:
    folder, epochs = resumed
    train(folder.parent / "whole", epochs)
    whole, state = newest(folder.parent / "whole"), newest(folder)
    print(f"steps: {state['global_step']}, and without interruption {whole['global_step']}")
    assert state["global_step"] == whole["global_step"]
    assert state["model"].keys() == whole["model"].keys()
    for name, weights in whole["model"].items():
        print(f"{name}: {(state['model'][name] - weights).abs().max().item()} (must be 0.0)")
        assert torch.equal(state["model"][name], weights)


def test_an_evaluation_counts_each_image_once(resumed: tuple[Path, int]) -> None:
    folder, _ = resumed
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "eval"][-1]
    state = newest(folder)
    model = build_model("cnn", precision="float64")
    model.load_state_dict(state["model"])
    images, labels = load_mnist(folder, SAMPLES)[1].tensors
    with torch.no_grad():
        outputs = model.eval()(images)
    right = int((outputs.argmax(dim=1) == labels).sum())
    loss = F.cross_entropy(outputs, labels).item()
    print(f"told: {told['correct']} of {told['total']}, loss {told['loss']}; here: {right}, {loss}")
    assert (told["correct"], told["total"]) == (right, len(labels))
    assert abs(told["loss"] - loss) < 1e-10  # a sum in another order
