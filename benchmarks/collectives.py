"""Measures all-reduce, all-gather and reduce-scatter at several sizes. predict.py starts it like this:

    torchrun --standalone --nproc-per-node=2 benchmarks/collectives.py 1024,1048576

A size is that of the whole tensor in bytes: the output of an all-gather, the input of a reduce-scatter. Rank
0 prints JSON: for each collective, a list of [bytes, seconds].
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

# torch 2.14 has renamed these two functions; torch 2.11 does not have the new names.
warnings.filterwarnings("ignore", ".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)
SECONDS = 2  # about, for each collective at each size; but at least five rounds, and at most fifty


def compute() -> None:
    """Some milliseconds of work. After it, the ranks reach a collective at different times, as in a step."""
    matrix = torch.ones(192, 192)
    for _ in range(24):
        torch.mm(matrix, matrix)


def added_seconds(collective: Callable[[], Any], device: str) -> float:
    """The seconds that a collective adds to `compute`: the difference of two medians."""
    total_seconds = []
    compute_seconds = []

    def measure() -> None:
        dist.barrier()
        start = time.perf_counter()
        compute()
        compute_seconds.append(time.perf_counter() - start)
        collective()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        total_seconds.append(time.perf_counter() - start)

    for _ in range(3):  # warm-up
        measure()
    slowest = torch.tensor(total_seconds[-1], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # so that all ranks do the same number of rounds
    rounds = int(SECONDS / slowest.item())
    for _ in range(max(5, min(50, rounds))):
        measure()
    return statistics.median(total_seconds[3:]) - statistics.median(compute_seconds[3:])


def main(sizes: list[int]) -> None:
    dist.init_process_group()
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    device = "cpu"
    if dist.get_backend() == "nccl":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    points: dict[str, list[tuple[int, float]]] = {"all_reduce": [], "all_gather": [], "reduce_scatter": []}
    for size in sizes:
        elements_per_rank = size // 4 // world_size  # float32 has four bytes
        whole = torch.zeros(elements_per_rank * world_size, device=device)
        shard = whole.chunk(world_size)[rank].clone()
        collectives: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, shard),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, shard, whole),
        }
        for name, collective in collectives.items():
            points[name].append((size, added_seconds(collective, device)))
    if rank == 0:
        print(json.dumps(points))
    dist.destroy_process_group()


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1].split(",")])
