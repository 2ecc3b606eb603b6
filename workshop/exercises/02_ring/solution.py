"""Exercise 02: the ring."""

import torch
import torch.distributed as dist


def ring_all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors, on every rank, as a new tensor."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    total = tensor.clone()
    chunks = total.tensor_split(ranks)  # views: what is written to them is written to `total`
    for step in range(2 * (ranks - 1)):
        out, into = chunks[(rank - step) % ranks], chunks[(rank - step - 1) % ranks]
        came = torch.empty_like(into)
        sent = dist.isend(out, (rank + 1) % ranks)
        dist.recv(came, (rank - 1) % ranks)
        sent.wait()
        if step < ranks - 1:
            into += came
        else:
            into.copy_(came)
    return total
