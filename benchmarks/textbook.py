"""What the speed of the steps is measured beside: a textbook's loop, and the bare one.

    python benchmarks/textbook.py --data-dir data --batch-sizes 64,256,1024
    python benchmarks/textbook.py --data-dir data --until 99 --epochs 8

The textbook's is written as github.com/pytorch/examples trains on MNIST: a picture and two transforms for
each image, one worker process, `loss.item()` every ten batches. The bare one has its batches on the device
before it starts. Both train the steps' `cnn`. Prints one line of JSON: images/s at each batch size.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

from common.mnist import Digits, load_mnist  # noqa: E402
from common.models import MEAN, STD, build_model, cnn  # noqa: E402
from common.options import make_parser, pick_device  # noqa: E402


def big_net() -> nn.Module:
    """The net of pytorch/examples: two convolutions without padding, dropout, 1,199,882 parameters."""
    return nn.Sequential(
        *(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.25),
        ),
        *(nn.Flatten(), nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )


class Pictures(Dataset[Any]):
    """Digits one by one, as torchvision.datasets.MNIST hands them out."""

    def __init__(self, digits: Digits, transform: Callable[[Image.Image], torch.Tensor]):
        self.digits, self.transform = digits, transform

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.fromarray(self.digits.images[index].numpy(), mode="L")
        return self.transform(picture), int(self.digits.labels[index])


def train(
    model: torch.nn.Module,
    device: torch.device,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    log_every: int | None,
) -> None:
    """One epoch; with `log_every`, the CPU waits for the loss in every so many batches."""
    model.train()
    for index, (data, target) in enumerate(loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
        if log_every and index % log_every == 0:
            loss.item()


def rate(epoch: Callable[[], None], images: int, rounds: int, device: torch.device) -> int:
    """Images per second, the median of some epochs; the one before them is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        epoch()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - begin)
    return round(images / statistics.median(seconds[1:]))


def on_gpu(device: torch.device) -> dict[str, Any]:
    """What the textbook's loader is given more, where there is a GPU."""
    more = {"num_workers": 1, "persistent_workers": True, "pin_memory": True}
    return more if device.type != "cpu" else {}


def textbook(args: argparse.Namespace, device: torch.device, digits: Digits, batch_size: int) -> int:
    """Images per second of the textbook's loop."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    pictures = Pictures(digits, transform)
    loader: DataLoader[Any] = DataLoader(pictures, batch_size, shuffle=True, **on_gpu(device))
    model = cnn(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    return rate(lambda: train(model, device, loader, optimizer, 10), len(digits), args.rounds, device)


def bare(args: argparse.Namespace, device: torch.device, digits: Digits, batch_size: int) -> int:
    """Images per second of a loop that loads and reports nothing."""
    count = len(digits) // batch_size * batch_size
    rows = torch.randperm(len(digits))[:count].split(batch_size)
    batches = [(digits.images[some].to(device), digits.labels[some].to(device)) for some in rows]
    model = build_model(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=device.type != "cpu")
    return rate(lambda: train(model, device, batches, optimizer, None), count, args.rounds, device)


def until(percent: float, epochs: int, device: torch.device, digits: Digits, test: Digits) -> None:
    """Print the accuracy after each epoch, until it is reached; all is as in pytorch/examples."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    workers = on_gpu(device)
    loader: DataLoader[Any] = DataLoader(Pictures(digits, transform), 64, shuffle=True, **workers)
    test_loader: DataLoader[Any] = DataLoader(Pictures(test, transform), 1000, **workers)
    model = big_net().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for _ in range(epochs):
        train(model, device, loader, optimizer, 10)
        scheduler.step()
        model.eval()
        with torch.no_grad():
            right = 0
            for data, target in test_loader:
                right += int((model(data.to(device)).argmax(1) == target.to(device)).sum())
        print(100 * right / len(test), flush=True)
        if 100 * right >= percent * len(test):
            return


def main() -> None:
    parser = make_parser(__file__, __doc__ or "")
    parser.add_argument(
        "--batch-sizes", default="64,256,1024", metavar="N,N", help="64,256,1024 unless given"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="epochs that are timed (3)")
    parser.add_argument("--until", type=float, metavar="X", help="instead, train until X %% are right")
    args = parser.parse_args()
    device = pick_device(args.use_gpu)
    digits, test = load_mnist(args.data_dir, args.num_samples)
    if args.until:
        return until(args.until, args.epochs, device, digits, test)
    sizes = [int(size) for size in args.batch_sizes.split(",")]
    print(
        json.dumps(
            {
                loop.__name__: {size: loop(args, device, digits, size) for size in sizes}
                for loop in (textbook, bare)
            }
        )
    )


if __name__ == "__main__":
    main()
