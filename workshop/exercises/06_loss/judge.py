"""What exercise 06 promises."""

import torch
from judging import Promise

TOLD = "02_multigpu_spawn/README.md, The loss of all ranks"


def own(rank, count):
    return torch.arange(1, count + 1, dtype=torch.float64) ** 2 + 100 * rank


def mean(counts):
    return torch.cat([own(rank, count) for rank, count in enumerate(counts)]).mean().item()


def full(theirs, rank, ranks):
    return mean([4] * ranks), theirs.mean_loss(own(rank, 4))


def ragged(theirs, rank, ranks):
    counts = [4, 1, 2][:ranks]
    return mean(counts), theirs.mean_loss(own(rank, counts[rank]))


def none(theirs, rank, ranks):
    counts = [3, 2, 0][:ranks] if ranks > 2 else [3, 0][:ranks]
    return mean(counts), theirs.mean_loss(own(rank, counts[rank]))


def unchanged(theirs, rank, ranks):
    mine = own(rank, 3)
    theirs.mean_loss(mine)
    return own(rank, 3), mine


PROMISES = [
    Promise("equal batches: the mean over all images, on every rank", full, TOLD),
    Promise("a ragged batch: the mean over all images, not the mean of means", ragged, TOLD),
    Promise("a rank without images counts for nothing", none, TOLD),
    Promise("the losses that were given stay as they were", unchanged, TOLD),
]
