"""An interrupted run ends with the weights of an uninterrupted one, and evaluation counts each image once.

The tests start train.py on synthetic digits, so they need no download. They use the CPU and float64, so that
weights can be compared bit for bit. To run them: `python -m pytest`.
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

HERE = Path(__file__).resolve().parent
START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
SAMPLES = 335  # and 55 to test on: both odd, so that the last batches are not full
FLAGS = [f"--num-samples={SAMPLES}", "--batch-size=16", "--precision=float64", "--use-gpu=0"]


def start(folder: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """Start training. Output, metrics and snapshots go to `folder`."""
    folder.mkdir(exist_ok=True)
    words = [*START, *FLAGS, f"--snapshot-dir={folder}", f"--metrics={folder / 'metrics.jsonl'}", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads may add in another order
    with open(folder / "output", "a") as output:
        return subprocess.Popen(words, cwd=HERE, env=env, stdout=output, stderr=output)


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
    """The state in the newest snapshot."""
    state, problem = snapshot.read(saved(folder)[0])
    assert not problem, problem
    return state


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that SIGTERM interrupted and that then resumed: its folder, and its number of epochs."""
    folder = tmp_path_factory.mktemp("runs") / "resumed"
    process = start(folder, "--epochs=100000", "--save-every=1")  # it does not end by itself
    try:
        deadline = time.monotonic() + 600
        while not saved(folder):
            assert process.poll() is None, (folder / "output").read_text()
            assert time.monotonic() < deadline, (folder / "output").read_text()
            time.sleep(0.01)
    finally:
        process.terminate()
        process.wait(60)
    state = newest(folder)
    interrupted_at = f"epoch {state['epoch']}, step {state['global_step']}"
    print(f"interrupted at {interrupted_at}")
    epochs = state["epoch"] + 2  # the rest of this epoch, and one more
    train(folder, epochs)
    assert f"resumed from {folder}: {interrupted_at}\n" in (folder / "output").read_text()
    return folder, epochs


def test_an_interrupted_run_ends_with_the_same_weights(resumed: tuple[Path, int]) -> None:
    folder, epochs = resumed
    train(folder.parent / "whole", epochs)
    state = newest(folder)
    whole = newest(folder.parent / "whole")
    print(f"steps: {state['global_step']}, and without interruption {whole['global_step']}")
    assert state["global_step"] == whole["global_step"]
    assert state["model"].keys() == whole["model"].keys()
    for name, weights in whole["model"].items():
        print(f"{name}: {(state['model'][name] - weights).abs().max().item()} (must be 0.0)")
        assert torch.equal(state["model"][name], weights)


def test_an_evaluation_counts_each_image_once(resumed: tuple[Path, int]) -> None:
    # Replace these two, and the evaluation below, when you replace the digits and their model.
    from common.mnist import load_mnist
    from common.models import build_model

    folder, _ = resumed
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reported = [event for event in events if event["event"] == "eval"][-1]
    model = build_model("cnn", precision="float64")
    model.load_state_dict(newest(folder)["model"])
    model.eval()
    _, test_data = load_mnist(folder, SAMPLES)
    images, labels = test_data.tensors
    with torch.no_grad():
        logits = model(images)
    correct = (logits.argmax(dim=1) == labels).sum().item()
    loss = F.cross_entropy(logits, labels).item()
    print(f"reported: {reported['correct']} of {reported['total']}, loss {reported['loss']}")
    print(f"here: {correct} of {len(labels)}, loss {loss}")
    assert reported["correct"] == correct
    assert reported["total"] == len(labels)
    assert abs(reported["loss"] - loss) < 1e-10  # a sum in another order
