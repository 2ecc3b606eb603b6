"""Exercise 02: the ring."""

import torch
import torch.distributed as dist


def ring_all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors, on every rank, as a new tensor.

    Every rank calls this at the same time, with a tensor of one dimension, of the same length and type; the
    length need not be a multiple of the number of ranks (`tensor.tensor_split(n)` cuts any length into n).
    `tensor` itself stays as it was. A rank sends to rank + 1 only, the last one to rank 0, and sends
    2 (ranks - 1) chunks in all. Use `dist.isend(tensor, dst)`, which returns at once an object to `.wait()`
    for, and `dist.recv(tensor, src)`.
    """
    raise NotImplementedError(
        "ring_all_reduce: N - 1 steps in which chunks are added, N - 1 in which they are copied"
    )
