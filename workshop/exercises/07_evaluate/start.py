"""Exercise 07: an evaluation that counts each image once."""

import torch
import torch.distributed as dist
from torch import nn


def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """How many of the images the model gets right, and how many images there are: the same on every rank.

    All ranks have the same model, `images` of shape (n, ...) and `labels`, int64 of shape (n,). Each rank
    passes only its share of the images through the model, so that all together pass each image once, and no
    rank more than one image more than another. An image is right where the largest of the model's outputs
    (n, classes) is its label's. The model is used in eval mode, without gradients, and left in the mode that
    it was in.
    """
    raise NotImplementedError("evaluate: a share for each rank, then add up two integers over the ranks")
