"""MNIST as one tensor, or synthetic digits in its place: an index makes a batch, and no PIL picture."""

import argparse
import atexit
import http.client
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import zlib
from pathlib import Path
from typing import Any

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
FALLBACK = 60_000  # synthetic training digits in MNIST's place: as many as it has


class Digits(TensorDataset):
    """Images uint8 (N, 28, 28) and labels int64 (N,), handed out a whole batch at a time.

    `name` is `mnist` or `synthetic-N`; `fallback` says why these are not the digits that were asked for.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, name: str, fallback: str = ""):
        super().__init__(images, labels)
        self.images, self.labels, self.name, self.fallback = images, labels, name, fallback

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        """The batch (B, 28, 28), (B,) at `indices`: DataLoader calls this once instead of B times `[]`."""
        return self[torch.tensor(indices, dtype=torch.int64)]  # of a rank without images, too

    def checksum(self) -> str:
        """Of name and content, to compare nodes by."""
        return f"{self.name} {zlib.crc32(self.labels.numpy().data, zlib.crc32(self.images.numpy().data)):08x}"


def fast(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """DataLoader's arguments for `Digits`: the batch is a tuple already, which `tuple` returns as it is."""
    # In each epoch it draws a seed for workers: by default of those random numbers that snapshots keep.
    own, workers = torch.Generator().manual_seed(torch.initial_seed()), args.num_workers
    how: dict[str, Any] = {"collate_fn": tuple, "pin_memory": device.type != "cpu", "generator": own}
    how |= {"num_workers": workers, "persistent_workers": workers > 0, "worker_init_fn": ignore_signals}
    if workers > 0 and sys.platform == "linux":
        # Python 3.14 would let a server start the workers. A SIGTERM to all processes would end it, and them.
        how["multiprocessing_context"] = "fork"
    return how


def ignore_signals(worker: int) -> None:
    """In a worker process: a signal is for the rank, which wants batches until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """When an error keeps a loader alive: Python would send SIGTERM, which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would report them as lost
    for worker in (child for child in multiprocessing.active_children() if child.daemon):  # no rank is
        worker.kill()


def load_mnist(data_dir: Path, num_samples: int | None = None) -> tuple[Digits, Digits]:
    """MNIST's training and test set, from `data_dir` or downloaded to it; `fail`s when files are damaged.

    Or synthetic digits: `num_samples`, and a sixth of it to test on; 60,000 without network and files.
    """
    raw, fallback = data_dir / "MNIST" / "raw", ""
    if num_samples is None:
        if not (problem := download(data_dir, raw)):
            train_images, train_labels, test_images, test_labels = (read(raw / name) for name in FILES)
            return Digits(train_images, train_labels, "mnist"), Digits(test_images, test_labels, "mnist")
        fallback = f"MNIST could not be downloaded ({problem}), so these are synthetic digits"
        warn(fallback)
    count = num_samples or FALLBACK
    name = f"synthetic-{count}"
    # Fixed seeds: the data is the same whatever `--seed` says, and on every rank.
    train, test = synthetic_digits(count, seed=0), synthetic_digits(max(1, count // 6), seed=1)
    return Digits(*train, name, fallback), Digits(*test, name, fallback)


def read(path: Path) -> torch.Tensor:
    """One of MNIST's files as uint8 images (N, 28, 28) or int64 labels (N,); `fail`s if it is damaged."""
    how = f"delete {path} to download it again, or point --data-dir elsewhere"
    try:
        content = path.read_bytes()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}; make it readable or point --data-dir elsewhere")
    header = 16 if (images := "images" in path.name) else 8
    # The third byte is the type (8: unsigned bytes), the fourth the number of dimensions.
    if len(content) != FILES[path.name] or content[:4] != bytes([0, 0, 8, 3 if images else 1]):
        fail(f"{path} is damaged: {len(content):,} bytes of {FILES[path.name]:,}, or a wrong header; {how}")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
    if not images and data.max() > 9:
        fail(f"{path} is damaged: it holds a label above 9; {how}")
    return data.view(-1, 28, 28) if images else data.long()


def download(data_dir: Path, raw: Path) -> str:
    """Let one process download MNIST to `raw` if need be; returns "", or why no mirror served. May `fail`."""
    asked, failure = time.time(), data_dir / ".mnist-download-failed"
    try:
        if all((raw / name).exists() for name in FILES):
            return ""
        with FileLock(data_dir / ".mnist-download-lock"):  # makes the folder, too
            if all((raw / name).exists() for name in FILES):
                return ""
            # Somebody tried while this process waited for the lock: all of them go by the same answer.
            if failure.exists() and failure.stat().st_mtime >= asked:
                return failure.read_text()
            if problem := fetch(data_dir, raw):
                failure.write_text(problem)
            return problem
    except OSError as error:
        fail(f"cannot download MNIST to {data_dir}: {error.strerror or error}; point --data-dir elsewhere")


def fetch(data_dir: Path, raw: Path) -> str:
    """Let torchvision try its mirrors; returns an empty string, or why none of them served."""
    from torchvision.datasets import MNIST  # takes seconds to import, so only when it is needed

    partial = data_dir / ".mnist-partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a process that was killed has left
    socket.setdefaulttimeout(10)  # torchvision sets none: a firewall that drops packets would hang us
    try:
        MNIST(partial, download=True)
    except (RuntimeError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[-1].strip("<>")
    finally:
        socket.setdefaulttimeout(None)
    # A file appears in `raw` under its name when it is whole, not before.
    raw.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        os.replace(partial / "MNIST" / "raw" / name, raw / name)
    shutil.rmtree(partial)
    return ""
