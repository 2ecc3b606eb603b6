"""Exercise 15: your own FSDP of one linear layer."""

from typing import Any

import torch
import torch.distributed as dist


def gathered(shard: torch.Tensor) -> torch.Tensor:
    """The whole weight, of all ranks' shards."""
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard)
    return torch.cat(shards)


class ShardedLinear(torch.autograd.Function):
    """outputs = inputs @ weight.T, of which each rank has only its rows of `weight`."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
        """The outputs (batch, out). Between forward and backward, no rank keeps the whole weight."""
        ctx.save_for_backward(inputs, shard)
        return inputs @ gathered(shard).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of `inputs` and of `shard`; that of the shard is the mean over the ranks."""
        inputs, shard = ctx.saved_tensors
        own = torch.empty_like(shard)
        whole = grad.T @ inputs
        dist.reduce_scatter(own, list(whole.chunk(dist.get_world_size())))
        return grad @ gathered(shard), own / dist.get_world_size()
