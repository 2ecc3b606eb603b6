"""Exercise 12: several batches in one step."""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP


def train_step(
    model: DDP, optimizer: torch.optim.Optimizer, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """One step of the optimizer on all `batches` of this rank: (images, labels), equally large.

    The gradient is that of the mean of F.cross_entropy(model(images), labels) over all images of all batches
    of all ranks. DDP averages over the ranks once, not once for each batch.
    """
    raise NotImplementedError("train_step: add up the gradients of all batches, and let DDP average once")
