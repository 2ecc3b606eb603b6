"""Exercise 04: talk while computing."""

import torch
import torch.distributed as dist
from torch import nn


class Overlapped:
    """Averages the gradients of a model over the ranks, while backward() still computes.

    All ranks make one, for the same model, and use it for many steps. Gradients are None, or were set to
    None, when a backward pass begins.
    """

    def __init__(self, model: nn.Module):
        """Register a hook on each parameter of `model` that needs a gradient.

        `parameter.register_post_accumulate_grad_hook(function)` calls `function(parameter)` as soon as
        `parameter.grad` is complete; with `register_hook` it would be too early. With `async_op=True` a
        collective returns at once, and what it returns has a method `wait`.
        """
        raise NotImplementedError("Overlapped.__init__: a hook that begins an all-reduce, and does not wait")

    def finish(self) -> None:
        """Return when each gradient of this backward pass is the mean over the ranks."""
        raise NotImplementedError("Overlapped.finish: wait for what is under way, make means of sums")
