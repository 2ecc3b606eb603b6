"""Seconds of all-reduce, all-gather and reduce-scatter at some sizes. Started in ranks, as predict.py does:

    torchrun --standalone --nproc-per-node=2 benchmarks/collectives.py 1024,1048576

A size is that of the whole tensor, in bytes: of an all-gather what comes out, of a reduce-scatter what goes
in. Rank 0 prints JSON: for each collective a list of [bytes, median of the seconds].
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# Since torch 2.14 they have another name, which 2.11 does not know.
warnings.filterwarnings("ignore", ".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)
SECONDS = 2  # for each collective at each size, or at least five rounds


def compute() -> None:
    """Some milliseconds of work, so that a collective meets the ranks as a step leaves them: apart."""
    matrix = torch.ones(192, 192)
    for _ in range(24):
        torch.mm(matrix, matrix)


def median(work: Callable[[], Any], device: str) -> float:
    """Of the seconds by which a collective makes a piece of work longer, which all ranks begin together."""
    whole, own = [], []

    def once() -> None:
        dist.barrier()
        begun = time.perf_counter()
        compute()
        computed = time.perf_counter()
        work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        whole.append(time.perf_counter() - begun)
        own.append(computed - begun)

    for _ in range(3):
        once()
    slowest = torch.tensor(whole[-1], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # or the ranks would not measure equally often
    for _ in range(max(5, min(50, int(SECONDS / slowest.item())))):
        once()
    return statistics.median(whole[3:]) - statistics.median(own[3:])


def main(sizes: list[int]) -> None:
    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = "cpu"
    if dist.get_backend() == "nccl":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    found: dict[str, list[tuple[int, float]]] = {"all_reduce": [], "all_gather": [], "reduce_scatter": []}
    for size in sizes:
        whole = torch.zeros(size // 4 // ranks * ranks, device=device)
        part = whole.chunk(ranks)[rank].clone()
        for name, work in {
            "all_reduce": lambda: dist.all_reduce(whole),  # noqa: B023
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part),  # noqa: B023
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),  # noqa: B023
        }.items():
            found[name].append((size, median(work, device)))
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1].split(",")])
