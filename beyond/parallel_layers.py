"""Linear layers that the ranks divide between them, by hand (Shoeybi et al., 2019, arxiv.org/abs/1909.08053).

PyTorch's weight of a linear layer is (out, in), and the paper writes it the other way round: a layer whose
outputs are divided has rows of our weight, and is called column-parallel all the same.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class CopyToRanks(torch.autograd.Function):
    """Before a column-parallel layer: all ranks have the same `x`, and use it for different outputs.

    So the gradient of `x` is the sum of the ranks' gradients.
    """

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)  # `grad` belongs to autograd
        dist.all_reduce(total)
        return total


class SumOverRanks(torch.autograd.Function):
    """After a row-parallel layer: the output is the sum of what the ranks have computed.

    So the gradient of each rank's part is the gradient of the sum, which all ranks have.
    """

    @staticmethod
    def forward(ctx, partial):
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad


class ColumnParallelLinear(nn.Module):
    """Some of the outputs of `linear`: (B, L, in) to (B, L, out / ranks).

    Its input has to go through CopyToRanks: once, where several layers have the same input.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = shard(linear.weight, dim=0)
        self.bias = shard(linear.bias, dim=0)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """All outputs of `linear`, from some of its inputs: (B, L, in / ranks) to (B, L, out)."""

    def __init__(self, linear):
        super().__init__()
        self.weight = shard(linear.weight, dim=1)
        self.bias = linear.bias

    def forward(self, x):
        partial = F.linear(x, self.weight)
        # After the sum: otherwise, the bias would be added once for each rank.
        return SumOverRanks.apply(partial) + self.bias


def shard(parameter, dim):
    """This rank's part of a parameter that is divided along `dim`, as a parameter."""
    parts = parameter.detach().chunk(dist.get_world_size(), dim)
    part = nn.Parameter(parts[dist.get_rank()].clone())  # a view would keep the whole in memory
    part.sharded_dim = dim
    return part


def copy_to_ranks(module, inputs):
    """A hook, for `register_forward_pre_hook`: CopyToRanks before a whole module."""
    [x] = inputs
    return CopyToRanks.apply(x)
