"""What exercise 02 promises."""

import torch
from judging import Promise, calls

PAGE = "docs/reference/prediction.md, and 02_multigpu_spawn/README.md, The process group"


def own(rank, length):
    """A rank's tensor, which any rank can compute."""
    return torch.arange(1, length + 1, dtype=torch.float64) * 10**rank


def total(ranks, length):
    return sum(own(rank, length) for rank in range(ranks))


def sums(answer, rank, ranks):
    return total(ranks, 6), answer.ring_all_reduce(own(rank, 6))


def ragged(answer, rank, ranks):
    lengths = (7, 4, 1)  # of four numbers, `chunk(3)` makes two pieces
    expected = {f"{length} numbers": total(ranks, length) for length in lengths}
    return expected, {f"{length} numbers": answer.ring_all_reduce(own(rank, length)) for length in lengths}


def unchanged(answer, rank, ranks):
    mine = own(rank, 6)
    answer.ring_all_reduce(mine)
    return own(rank, 6), mine


def neighbors(answer, rank, ranks):
    with calls(answer) as called:
        answer.ring_all_reduce(own(rank, 6))
    receivers = sorted({call.dst for call in called if call.dst is not None})
    return [(rank + 1) % ranks] if ranks > 1 else [], receivers


def sent(answer, rank, ranks):
    with calls(answer) as called:
        answer.ring_all_reduce(own(rank, 6))
    numbers = sum(call.numbers for call in called if call.dst is not None)
    return {"numbers sent": 2 * (ranks - 1) * 6 // ranks}, {"numbers sent": numbers}


def by_hand(answer, rank, ranks):
    with calls(answer) as called:
        answer.ring_all_reduce(own(rank, 6))
    return [], sorted({call.name for call in called} - {"send", "recv", "isend", "irecv"})


PROMISES = [
    Promise("every rank has the sum of all ranks' tensors", sums, PAGE),
    Promise("also if the length is not a multiple of the number of ranks", ragged, PAGE),
    Promise("the tensor that was given stays as it was", unchanged, PAGE),
    Promise("only send and receive move numbers between ranks", by_hand, PAGE),
    Promise("a rank sends to its right neighbor, and to nobody else", neighbors, PAGE),
    Promise("a rank sends 2 (N - 1) chunks, not whole tensors", sent, PAGE),
]
