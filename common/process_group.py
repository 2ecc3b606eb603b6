"""The process group: its backends, and work in it that may take longer than a time-out."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

BEAT = 1.0  # seconds between two messages of a rank that is still at work


def backends(device: torch.device) -> str:
    """For `init_process_group`: gloo for what is in the CPU's memory, and for a GPU its own, such as NCCL.

    Objects then go from CPU to CPU, and not through the memory of the GPUs.
    """
    if device.type == "cpu":
        return "cpu:gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


@contextlib.contextmanager
def others_wait(group: Any = None) -> Iterator[None]:
    """Around work that may take longer than `--timeout` on some of the ranks, such as a save.

    All ranks of `group` enter it, and leave it together, also after an error. The group must not be used
    inside. If the others waited in a collective, they would call a slow rank lost. In here, every rank says
    each second that it is still at work, and only a rank that falls silent is lost.

    Raises RuntimeError if a rank falls silent, or ends.
    """
    if not dist.is_initialized():
        yield
        return
    done = threading.Event()
    problems: list[RuntimeError] = []

    def beat() -> None:
        try:
            at_work = torch.ones(1)
            while at_work.item():
                at_work.fill_(not done.wait(BEAT))
                dist.all_reduce(at_work, group=group)
        except RuntimeError as error:  # a lost connection, or a time-out
            problems.append(error)

    thread = threading.Thread(target=beat, name="others_wait", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if problems:
        raise problems[0]
