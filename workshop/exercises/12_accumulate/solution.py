"""Exercise 12: several batches in one step."""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP


def train_step(
    model: DDP, optimizer: torch.optim.Optimizer, batches: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """One step of the optimizer on all `batches` of this rank: (images, labels), equally large."""
    optimizer.zero_grad()
    for number, (images, labels) in enumerate(batches, start=1):
        last = number == len(batches)
        with contextlib.nullcontext() if last else model.no_sync():
            loss = F.cross_entropy(model(images), labels) / len(batches)
            loss.backward()
    optimizer.step()
