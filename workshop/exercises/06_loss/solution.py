"""Exercise 06: the loss of all ranks."""

import torch
import torch.distributed as dist


def mean_loss(losses: torch.Tensor) -> float:
    """The mean over all images of all ranks, the same on each rank."""
    totals = torch.stack([losses.sum(), torch.tensor(len(losses), dtype=losses.dtype)])
    dist.all_reduce(totals)
    total, count = totals.tolist()
    return total / count
