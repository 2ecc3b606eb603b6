"""Exercise 07: an evaluation that counts each image once."""

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """How many of the images the model gets right, and how many images there are: the same on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    was_training = model.training
    model.eval()
    outputs = model(images[rank::ranks])
    right = (outputs.argmax(dim=1) == labels[rank::ranks]).sum()
    model.train(was_training)
    totals = torch.tensor([int(right), len(outputs)])
    dist.all_reduce(totals)
    right, count = totals.tolist()
    return right, count
