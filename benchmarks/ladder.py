"""Measures the ideas that lead from a textbook script to 99 % in one epoch: each rung adds one of them.

    python benchmarks/ladder.py --data-dir data --seeds 3

Each rung trains one epoch of MNIST on this machine's CPU, and tests. The first rung trains like the MNIST
example of github.com/pytorch/examples: its net, its optimizer, a PIL image and two transforms for each
sample, `loss.item()` in every tenth step. Each further rung changes one thing. The last one is the recipe of
`benchmarks/speedrun.py`, here with a bare loop. The program prints a table, and JSON in the last line.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import transforms  # noqa: E402

from benchmarks.label_smoothing import BETAS, SMOOTHING  # noqa: E402
from benchmarks.textbook import Pictures, big_net  # noqa: E402
from common.mnist import Digits, load_mnist  # noqa: E402
from common.models import MEAN, STD, Normalized, cnn  # noqa: E402
from common.options import fail, whole_number  # noqa: E402
from common.schedule import Schedule  # noqa: E402


@dataclass(frozen=True)
class Rung:
    """How a rung trains. The defaults are those of the textbook script, the first rung."""

    idea: str
    picture_by_picture: bool = True
    item_every: int = 10  # steps between two calls of `loss.item()`; 0: no calls
    net: Callable[[], nn.Module] = big_net
    adamw: bool = False  # with learning rate 0.001, or one cycle up to 0.01; otherwise Adadelta with 1.0
    batch: int = 64
    schedule: str = "constant"
    smoothing: float = 0.0


def rungs() -> list[Rung]:
    """All rungs. Each one is the rung before it with one change."""
    ladder = [Rung("a textbook's script")]
    for change in (
        {"idea": "a batch is one index into one tensor", "picture_by_picture": False},
        {"idea": "no .item() in the loop", "item_every": 0},
        {"idea": "a smaller net, AdamW", "net": cnn, "adamw": True},
        {"idea": "a larger batch", "batch": 256},
        {"idea": "one cycle of the learning rate, up to 0.01", "schedule": "one-cycle"},
        {"idea": "label smoothing", "smoothing": SMOOTHING},
    ):
        ladder.append(replace(ladder[-1], **change))
    return ladder


def batches(rung: Rung, digits: Digits, seed: int) -> Iterator[Any]:
    """The batches of an epoch, shuffled: float images (B, 1, 28, 28), or uint8 images (B, 28, 28)."""
    generator = torch.Generator().manual_seed(seed)
    if rung.picture_by_picture:
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
        yield from DataLoader(Pictures(digits, transform), rung.batch, shuffle=True, generator=generator)
        return
    for rows in torch.randperm(len(digits), generator=generator).split(rung.batch):
        yield digits.images[rows], digits.labels[rows]


def climb(rung: Rung, train: Digits, test: Digits, seed: int) -> tuple[float, float]:
    """Train one epoch, then test: seconds of training, and accuracy in percent."""
    torch.manual_seed(seed)
    net = rung.net()
    model = net if rung.picture_by_picture else Normalized(net, rung.idea)
    optimizer: torch.optim.Optimizer
    if not rung.adamw:
        optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    elif rung.schedule == "constant":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=BETAS)
    schedule = Schedule(optimizer, rung.schedule)
    steps = math.ceil(len(train) / rung.batch)
    start = time.perf_counter()
    for step, (images, labels) in enumerate(batches(rung, train, seed)):
        schedule.set_progress(step / steps)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels, label_smoothing=rung.smoothing)
        loss.backward()
        optimizer.step()
        if rung.item_every and step % rung.item_every == 0:
            loss.item()
    train_seconds = time.perf_counter() - start
    model = Normalized(net, rung.idea)
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in zip(test.images.split(1000), test.labels.split(1000), strict=True):
            correct += int((model(images).argmax(1) == labels).sum())
    return train_seconds, 100 * correct / len(test)


def main(args: argparse.Namespace) -> None:
    train, test = load_mnist(args.data_dir)
    if train.fallback:
        fail("these are not MNIST's images: give the folder of MNIST as --data-dir")
    results: dict[str, dict[str, Any]] = {}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.seeds} seeds\n")
    print("| one idea a rung | s an epoch | accuracy after it |\n|---|---:|---:|")
    for rung in rungs():
        runs = [climb(rung, train, test, seed) for seed in range(args.seeds)]
        seconds = [run_seconds for run_seconds, _ in runs]
        accuracies = [accuracy for _, accuracy in runs]
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"| {rung.idea} | {spread} | {statistics.mean(accuracies):.2f}% |", flush=True)
        rounded = [round(run_seconds, 2) for run_seconds in seconds]
        results[rung.idea] = {"seconds": rounded, "accuracies": accuracies}
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rungs": results}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is (data)"
    )
    parser.add_argument("--seeds", type=whole_number, default=3, metavar="N", help="runs of each rung (3)")
    main(parser.parse_args())
