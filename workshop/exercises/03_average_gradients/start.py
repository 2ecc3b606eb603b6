"""Exercise 03: average the gradients."""

import torch
import torch.distributed as dist
from torch import nn


def same_start(model: nn.Module) -> None:
    """Give each parameter and each buffer of `model`, in place, the values that it has on rank 0."""
    raise NotImplementedError("same_start: broadcast each parameter and each buffer from rank 0")


def average_gradients(model: nn.Module) -> None:
    """Make each gradient, in place, the mean of that gradient over the ranks.

    Every rank calls this after its backward pass. A parameter without a gradient (`grad` is None, on all
    ranks alike) keeps none.
    """
    raise NotImplementedError("average_gradients: all-reduce each gradient, and make the sum a mean")
