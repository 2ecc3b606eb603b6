"""What loading the data costs: against torchvision's usual way, and within an epoch of step 01.

    python benchmarks/overhead.py --data-dir data

Needs MNIST. Takes turns (A B A B …) and gives medians and their range, because other programs on
the machine disturb single timings.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from common.mnist import fast, load_mnist  # noqa: E402
from common.models import build_model  # noqa: E402
from common.options import fail, make_parser, name_run  # noqa: E402
from common.ranks import Control  # noqa: E402


def step_01() -> ModuleType:
    """The script of step 01 as a module."""
    spec = importlib.util.spec_from_file_location("step_01", ROOT / "01_single_gpu" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def drain(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def loading(data: Any, args: argparse.Namespace) -> None:
    """Images per second of two DataLoaders over the training set, nothing else done with the batches."""
    from torchvision import datasets, transforms

    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    theirs = datasets.MNIST(args.data_dir, transform=normalise)
    usual = DataLoader(theirs, batch_size=args.batch_size, shuffle=True)
    ours = DataLoader(data, batch_size=args.batch_size, shuffle=True, **fast(args, torch.device("cpu")))
    rates: dict[str, list[float]] = {"usual": [], "ours": []}
    for _ in range(args.rounds):
        rates["usual"].append(len(data) / seconds(lambda: drain(usual)))
        rates["ours"].append(len(data) / seconds(lambda: drain(ours)))
    ratios = [a / b for a, b in zip(rates["ours"], rates["usual"], strict=True)]
    for name, values in rates.items():
        print(
            f"{name:>6}: {statistics.median(values):,.0f} images/s ({min(values):,.0f} to {max(values):,.0f})"
        )
    print(f"ours / usual: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})\n")


def epoch(data: Any, args: argparse.Namespace) -> None:
    """An epoch of step 01, reports and snapshot included, against the bare loop over batches in memory."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = build_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    name_run(args, args.model, data.name)
    trainer = step_01().Trainer(args, device, model, optimizer, data, data)
    trainer.control = Control()
    order = torch.randperm(len(data))[: len(data) // args.batch_size * args.batch_size]
    batches = [(data.images[rows], data.labels[rows]) for rows in order.split(args.batch_size)]

    def bare() -> None:
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    bare()
    pairs = [(seconds(trainer.run_epoch), seconds(bare)) for _ in range(args.rounds)]
    ratios = [a / b for a, b in pairs]
    print(f"step 01: {statistics.median(a for a, _ in pairs):.2f} s an epoch")
    print(f"bare loop: {statistics.median(b for _, b in pairs):.2f} s")
    print(f"step 01 / bare loop: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
    parser = make_parser(__file__, __doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each side is timed (5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, _ = load_mnist(args.data_dir)
    if data.fallback:
        fail("this compares with torchvision's MNIST: give its folder as --data-dir")
    print(f"torch {torch.__version__}, 1 thread of {os.cpu_count()} cores, batch {args.batch_size}\n")
    loading(data, args)
    with tempfile.TemporaryDirectory() as folder:
        args.snapshot_dir = Path(folder)
        epoch(data, args)


if __name__ == "__main__":
    main()
