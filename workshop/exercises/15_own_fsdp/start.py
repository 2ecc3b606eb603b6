"""Exercise 15: your own FSDP of one linear layer."""

from typing import Any

import torch
import torch.distributed as dist


class ShardedLinear(torch.autograd.Function):
    """outputs = inputs @ weight.T, of which each rank has only its rows of `weight`.

    Used as `ShardedLinear.apply(inputs, shard)` on all ranks at the same time. `shard` (out / ranks, in) is
    this rank's part of the weight (out, in): rank 0 has the first rows. `inputs` (batch, in) are the rank's
    own, as many on each rank.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
        """The outputs (batch, out). Between forward and backward, no rank keeps the whole weight."""
        raise NotImplementedError(
            "ShardedLinear.forward: gather the weight, multiply, save what backward needs"
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of `inputs` and of `shard`; that of the shard is the mean over the ranks.

        `grad` (batch, out) is the gradient of this rank's outputs.
        """
        raise NotImplementedError(
            "ShardedLinear.backward: gather again; reduce-scatter the weight's gradient"
        )
