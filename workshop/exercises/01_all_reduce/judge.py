"""What exercise 01 promises."""

import torch
from judging import Promise, calls

PAGE = "02_multigpu_spawn/README.md, The process group"


def own(rank):
    """A rank's tensor, which any rank can compute: each has other numbers."""
    return torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64) * (rank + 1) ** 2


def sums(answer, rank, ranks):
    return sum(map(own, range(ranks))), answer.all_reduce(own(rank))


def again(answer, rank, ranks):
    """A second time, with another shape and type."""
    mine = torch.full((2, 3), rank + 1)
    answer.all_reduce(own(rank))
    return torch.full((2, 3), ranks * (ranks + 1) // 2), answer.all_reduce(mine)


def unchanged(answer, rank, ranks):
    mine = own(rank)
    answer.all_reduce(mine)
    return own(rank), mine


def by_hand(answer, rank, ranks):
    with calls(answer) as called:
        answer.all_reduce(own(rank))
    return [], sorted({call.name for call in called} - {"send", "recv"})


PROMISES = [
    Promise("every rank has the sum of all ranks' tensors", sums, PAGE),
    Promise("a second all-reduce, of another shape, gives its own sum", again, PAGE),
    Promise("the tensor that was given stays as it was", unchanged, PAGE),
    Promise("only send and recv move numbers between ranks", by_hand, PAGE),
]
