"""What exercise 05 promises."""

import random

import torch
import torch.distributed as dist
from judging import Promise

PAGE = "02_multigpu_spawn/README.md, What changed since step 01"


def shares(answer, rank, ranks, **given):
    """All ranks' shares, as each of them has computed its own."""
    asked = {"length": 60, "epoch": 0, "seed": 0} | given
    found = [None] * ranks
    dist.all_gather_object(found, list(map(int, answer.share(**asked, rank=rank, ranks=ranks))))
    return found


def once(answer, rank, ranks):
    dealt = sorted(index for share in shares(answer, rank, ranks) for index in share)
    return {"all shares together, sorted": list(range(60))}, {"all shares together, sorted": dealt}


def equal(answer, rank, ranks):
    """61 images: one is left over at 2 and 3 ranks."""
    found = shares(answer, rank, ranks, length=61)
    return [61 // ranks] * ranks, [len(share) for share in found]


def once_of_61(answer, rank, ranks):
    found = shares(answer, rank, ranks, length=61)
    dealt = [index for share in found for index in share]
    return {"images": 61 // ranks * ranks, "different ones": 61 // ranks * ranks}, {
        "images": len(dealt),
        "different ones": len(set(dealt)),
    }


def shuffled(answer, rank, ranks):
    [share, *_] = shares(answer, rank, ranks)
    return "not in order", "in order" if share == sorted(share) else "not in order"


def epochs(answer, rank, ranks):
    differ = shares(answer, rank, ranks, epoch=0) != shares(answer, rank, ranks, epoch=1)
    return "another order", "another order" if differ else "the same order"


def seeds(answer, rank, ranks):
    differ = shares(answer, rank, ranks, seed=0) != shares(answer, rank, ranks, seed=7)
    return "another order", "another order" if differ else "the same order"


def repeats(answer, rank, ranks):
    torch.manual_seed(rank)
    one = shares(answer, rank, ranks, epoch=3)
    torch.manual_seed(
        rank + 10
    )  # what else draws random numbers must not matter: a resumed run differs in it
    return "the same", "the same" if shares(answer, rank, ranks, epoch=3) == one else "another"


def like_cards(answer, rank, ranks):
    """One rank alone gets the whole order. Of 61 images, the last one of the order is left over."""
    order = list(map(int, answer.share(61, 2, 5, 0, 1)))
    expected = order[: 61 // ranks * ranks][rank::ranks]
    return expected, list(map(int, answer.share(61, 2, 5, rank, ranks)))


def global_state(answer, rank, ranks):
    before = {"torch": torch.get_rng_state().tolist(), "random": random.getstate()}
    answer.share(length=60, epoch=0, seed=0, rank=rank, ranks=ranks)
    after = {"torch": torch.get_rng_state().tolist(), "random": random.getstate()}
    seen = {name: "as it was" if before[name] == after[name] else "changed" for name in before}
    return dict.fromkeys(before, "as it was"), seen


PROMISES = [
    Promise("60 images: each is dealt out once", once, PAGE),
    Promise("all shares are equally long", equal, PAGE),
    Promise("61 images: none is dealt out twice", once_of_61, PAGE),
    Promise("the order is shuffled", shuffled, PAGE),
    Promise("the next epoch has another order", epochs, PAGE),
    Promise("another seed has another order", seeds, PAGE),
    Promise("asked again, it is the same share, whatever else has drawn random numbers", repeats, PAGE),
    Promise("dealt like cards: rank r takes every N-th image, beginning with the r-th", like_cards, PAGE),
    Promise("the global random state stays as it was", global_state, PAGE),
]
