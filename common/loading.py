"""Batches: how a DataLoader makes them, and how they get to the device."""

import atexit
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import default_collate

from common.options import fail
from common.run import name_of
from common.stopping import SIGNALS


def loader_options(num_workers: int, device: torch.device) -> dict[str, Any]:
    """Arguments for a DataLoader of any map-style dataset, whose batches go to `device`.

    Also seeds Python's and numpy's random numbers, so that a dataset that draws them in this process draws
    the same in each run.
    """
    seed_python_and_numpy(torch.initial_seed())
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": ignore_signals,
        "collate_fn": collate,
        "pin_memory": device.type != "cpu",  # memory from which a GPU can copy while the CPU works on
        # For the seeds of the workers. Without it, each epoch would take a number of the global generator.
        # A resumed run would take one more, and its dropout would differ.
        "generator": torch.Generator().manual_seed(torch.initial_seed()),
    }
    if num_workers > 0:
        check_socket_paths()
    if num_workers > 0 and sys.platform == "linux":
        # Python 3.14 lets a server start the workers. A SIGTERM to all processes would end it, and them.
        options["multiprocessing_context"] = "fork"
    return options


def seed_python_and_numpy(seed: int) -> None:
    """Seed the other generators that datasets draw from. In worker processes, the DataLoader does it."""
    random.seed(seed)
    if "numpy" in sys.modules:  # torch imports it where it is installed
        sys.modules["numpy"].random.seed(seed % 2**32)


def check_socket_paths() -> None:
    """`fail` if the temporary folder's name is too long for the sockets through which workers send tensors.

    Otherwise, each worker would report it, and this process would wait forever for its first batch.
    """
    longest = 107 if sys.platform == "linux" else 103  # bytes of a socket's name: man 7 unix
    name = "/pymp-12345678/listener-12345678"  # in Python's multiprocessing
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder + name)) > longest:
        fail(f"the path {folder} is too long for the sockets of --num-workers: set TMPDIR to a shorter one")


def collate(samples: Any) -> Any:
    """The batch of `samples`, as PyTorch makes it: stacked tensors, in the structure of a sample.

    A dataset whose `__getitems__` has returned a whole batch, and not a list of samples, is left alone.
    """
    return default_collate(samples) if isinstance(samples, list) else samples


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch, in which each tensor is on `device`. Tuples, lists and dictionaries may be nested.

    From pinned memory, a GPU copies while the CPU works on.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [to_device(value, device) for value in batch]
        is_named = hasattr(batch, "_fields")
        return type(batch)(*values) if is_named else type(batch)(values)
    return batch


def group_batches(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` batches each. An incomplete list at the end is left out."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def fingerprint(data: Any) -> str:
    """What nodes compare, to see that they have the same data: its checksum, if it has one, or its length."""
    if hasattr(data, "checksum"):
        return str(data.checksum())
    return f"{name_of(data)} of {len(data)} samples"


def ignore_signals(worker: int) -> None:
    """In a worker process: ignore signals, because the rank needs batches until it has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End the workers of a loader that an error has kept alive.

    Otherwise, Python would send them SIGTERM, which they ignore, and wait for them forever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as lost
    for child in multiprocessing.active_children():
        if child.daemon:  # a worker: step 02's ranks are no daemons
            child.kill()
