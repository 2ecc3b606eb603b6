"""MNIST, or synthetic digits in its place, as tensors: an index gives a whole batch, without PIL images."""

import http.client
import os
import shutil
import socket
import time
import zlib
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.data import TensorDataset

from common.options import fail, warn
from common.synthetic import synthetic_digits

FILES = {  # and their bytes: 16 or 8 of header, one a pixel or label (http://yann.lecun.com/exdb/mnist)
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
FALLBACK_SAMPLES = 60_000  # synthetic training digits in MNIST's place: as many as it has


class Digits(TensorDataset):
    """Images uint8 (N, 28, 28) and labels int64 (N,), handed out a whole batch at a time.

    `name` is `mnist` or `synthetic-N`; `fallback` says why these are not the digits that were asked for.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, name: str, fallback: str = ""):
        super().__init__(images, labels)
        self.images = images
        self.labels = labels
        self.name = name
        self.fallback = fallback

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        """The batch (B, 28, 28), (B,) at `indices`: DataLoader calls this once instead of B times `[]`."""
        return self[torch.tensor(indices)]

    def checksum(self) -> str:
        """Name and CRC-32 of the content, to compare nodes by."""
        crc = zlib.crc32(self.images.numpy().data)
        crc = zlib.crc32(self.labels.numpy().data, crc)
        return f"{self.name} {crc:08x}"


def load_mnist(data_dir: Path, num_samples: int | None = None) -> tuple[Digits, Digits]:
    """MNIST's training and test set, from `data_dir` or downloaded to it; `fail`s when files are damaged.

    Or synthetic digits: `num_samples`, and a sixth of it to test on; 60,000 without network and files.
    """
    if num_samples is not None:
        return synthetic(num_samples)
    raw = data_dir / "MNIST" / "raw"
    problem = download(data_dir, raw)
    if problem:
        fallback = f"MNIST could not be downloaded ({problem}), so training uses synthetic digits"
        warn(fallback)
        return synthetic(FALLBACK_SAMPLES, fallback)
    train_images, train_labels, test_images, test_labels = [read(raw / name) for name in FILES]
    return Digits(train_images, train_labels, "mnist"), Digits(test_images, test_labels, "mnist")


def synthetic(count: int, fallback: str = "") -> tuple[Digits, Digits]:
    """`count` synthetic digits to train on, and a sixth of it to test on."""
    name = f"synthetic-{count}"
    # Fixed seeds: the data is the same whatever `--seed` says, and on every rank.
    train_images, train_labels = synthetic_digits(count, seed=0)
    test_images, test_labels = synthetic_digits(max(1, count // 6), seed=1)
    train_data = Digits(train_images, train_labels, name, fallback)
    test_data = Digits(test_images, test_labels, name, fallback)
    return train_data, test_data


def read(path: Path) -> torch.Tensor:
    """One of MNIST's files as uint8 images (N, 28, 28) or int64 labels (N,); `fail`s if it is damaged."""
    remedy = f"delete {path} to download it again, or point --data-dir elsewhere"
    try:
        content = path.read_bytes()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}; make it readable or point --data-dir elsewhere")
    holds_images = "images" in path.name
    header_size = 16 if holds_images else 8
    # The third byte is the type (8: unsigned bytes), the fourth the number of dimensions.
    magic = bytes([0, 0, 8, 3 if holds_images else 1])
    if len(content) != FILES[path.name] or not content.startswith(magic):
        sizes = f"{len(content):,} bytes of {FILES[path.name]:,}"
        fail(f"{path} is damaged: {sizes}, or a wrong header; {remedy}")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header_size)
    if holds_images:
        return data.view(-1, 28, 28)
    if data.max() > 9:
        fail(f"{path} is damaged: it holds a label above 9; {remedy}")
    return data.long()


def download(data_dir: Path, raw: Path) -> str:
    """Let one process download MNIST to `raw` if need be; returns "", or why no mirror served. May `fail`.

    The processes that wait for it take its answer, which a file keeps. If each tried by itself, one might
    succeed where another has failed, and the ranks would train on different data.
    """
    started = time.time()
    failure = data_dir / ".mnist-download-failed"
    try:
        if is_complete(raw):
            return ""
        with FileLock(data_dir / ".mnist-download-lock"):  # makes the folder, too
            if is_complete(raw):
                return ""
            if failure.exists() and failure.stat().st_mtime >= started:
                return failure.read_text()
            problem = fetch(data_dir, raw)
            if problem:
                failure.write_text(problem)
            return problem
    except OSError as error:
        fail(f"cannot download MNIST to {data_dir}: {error.strerror or error}; point --data-dir elsewhere")


def is_complete(raw: Path) -> bool:
    """Whether all files of MNIST are in the folder `raw`."""
    return all((raw / name).exists() for name in FILES)


def fetch(data_dir: Path, raw: Path) -> str:
    """Let torchvision try its mirrors; returns an empty string, or why none of them served.

    A .gz file in `raw` is not downloaded again if its checksum is right.
    """
    from torchvision.datasets import MNIST  # takes seconds to import, so only when it is needed

    partial = data_dir / ".mnist-partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a process that was killed has left
    archives = partial / "MNIST" / "raw"  # where torchvision looks for them
    archives.mkdir(parents=True)
    for archive in raw.glob("*.gz"):
        shutil.copy(archive, archives)
    socket.setdefaulttimeout(10)  # torchvision sets none: a firewall that drops packets would hang us
    try:
        MNIST(partial, download=True)
    except (RuntimeError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = str(error).strip() or type(error).__name__
        return reason.splitlines()[-1].strip("<>")
    finally:
        socket.setdefaulttimeout(None)
    # A file appears in `raw` under its name when it is whole, not before.
    raw.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        os.replace(partial / "MNIST" / "raw" / name, raw / name)
    shutil.rmtree(partial)
    return ""
