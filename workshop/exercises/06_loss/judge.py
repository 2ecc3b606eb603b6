"""What exercise 06 promises."""

import torch
from judging import Promise

PAGE = "02_multigpu_spawn/README.md, The loss of all ranks"


def own(rank, count):
    return torch.arange(1, count + 1, dtype=torch.float64) ** 2 + 100 * rank


def mean(counts):
    return torch.cat([own(rank, count) for rank, count in enumerate(counts)]).mean().item()


def full(answer, rank, ranks):
    return mean([4] * ranks), answer.mean_loss(own(rank, 4))


def ragged(answer, rank, ranks):
    counts = [4, 1, 2][:ranks]
    return mean(counts), answer.mean_loss(own(rank, counts[rank]))


def none(answer, rank, ranks):
    counts = [3, 2, 0][:ranks] if ranks > 2 else [3, 0][:ranks]
    return mean(counts), answer.mean_loss(own(rank, counts[rank]))


def unchanged(answer, rank, ranks):
    mine = own(rank, 3)
    answer.mean_loss(mine)
    return own(rank, 3), mine


PROMISES = [
    Promise("equal batches: the mean over all images, on every rank", full, PAGE),
    Promise("a ragged batch: the mean over all images, not the mean of means", ragged, PAGE),
    Promise("a rank without images counts for nothing", none, PAGE),
    Promise("the losses that were given stay as they were", unchanged, PAGE),
]
