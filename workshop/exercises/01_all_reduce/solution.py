"""Exercise 01: an all-reduce from send and receive."""

import torch
import torch.distributed as dist


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors, on every rank, as a new tensor."""
    total = tensor.clone()
    if dist.get_rank() == 0:
        part = torch.empty_like(tensor)
        for other in range(1, dist.get_world_size()):
            dist.recv(part, other)
            total += part
        for other in range(1, dist.get_world_size()):
            dist.send(total, other)
    else:
        dist.send(tensor, 0)
        dist.recv(total, 0)
    return total
