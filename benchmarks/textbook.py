"""A script as in a textbook. bench.py compares the steps with it, and ladder.py starts from it.

    python benchmarks/textbook.py --data-dir data --epochs 8 --until 99

It trains like the MNIST example of github.com/pytorch/examples: its net and its optimizer, a PIL image and
two transforms for each sample, `loss.item()` every ten batches, and on a GPU one worker process. After each
epoch, it prints the accuracy in percent. It stops when the accuracy reaches `--until`, or after `--epochs`.
"""

import sys
from collections.abc import Callable
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

from common.device import setup_device  # noqa: E402
from common.mnist import Digits, load_mnist  # noqa: E402
from common.models import MEAN, STD  # noqa: E402
from common.options import make_parser  # noqa: E402


def big_net() -> nn.Module:
    """The net of pytorch/examples: two convolutions without padding, dropout, 1,199,882 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.25),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


class Pictures(Dataset[Any]):
    """Samples one by one, as torchvision.datasets.MNIST returns them."""

    def __init__(self, digits: Digits, transform: Callable[[Image.Image], torch.Tensor]):
        self.digits = digits
        self.transform = transform

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.fromarray(self.digits.images[index].numpy(), mode="L")
        return self.transform(picture), int(self.digits.labels[index])


def main() -> None:
    parser = make_parser(__file__, __doc__ or "")
    parser.add_argument(
        "--until", type=float, default=100.0, metavar="X", help="stop at an accuracy of X %% (100)"
    )
    args = parser.parse_args()
    device = setup_device(args.use_gpu)
    train, test = load_mnist(args.data_dir, args.num_samples)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    options: dict[str, Any] = {}
    if device.type != "cpu":
        options = {"num_workers": 1, "persistent_workers": True, "pin_memory": True}
    train_loader: DataLoader[Any] = DataLoader(Pictures(train, transform), 64, shuffle=True, **options)
    test_loader: DataLoader[Any] = DataLoader(Pictures(test, transform), 1000, **options)
    model = big_net().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    for _ in range(args.epochs):
        model.train()
        for step, (images, labels) in enumerate(train_loader):
            images = images.to(device)
            labels = labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                loss.item()
        scheduler.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in test_loader:
                predictions = model(images.to(device)).argmax(dim=1)
                correct += int((predictions == labels.to(device)).sum())
        print(100 * correct / len(test), flush=True)
        if 100 * correct >= args.until * len(test):
            return


if __name__ == "__main__":
    main()
