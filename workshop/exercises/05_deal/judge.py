"""What exercise 05 promises."""

import random

import torch
import torch.distributed as dist
from judging import Promise

TOLD = "02_multigpu_spawn/README.md, What changed since step 01"


def shares(theirs, rank, ranks, **given):
    """All ranks' shares, as each of them has computed its own."""
    asked = {"length": 60, "epoch": 0, "seed": 0} | given
    found = [None] * ranks
    dist.all_gather_object(found, list(map(int, theirs.share(**asked, rank=rank, ranks=ranks))))
    return found


def once(theirs, rank, ranks):
    dealt = sorted(index for share in shares(theirs, rank, ranks) for index in share)
    return {"all shares together, sorted": list(range(60))}, {"all shares together, sorted": dealt}


def equal(theirs, rank, ranks):
    """61 images: one is left over at 2 and 3 ranks."""
    found = shares(theirs, rank, ranks, length=61)
    return [61 // ranks] * ranks, [len(share) for share in found]


def once_of_61(theirs, rank, ranks):
    found = shares(theirs, rank, ranks, length=61)
    dealt = [index for share in found for index in share]
    return {"images": 61 // ranks * ranks, "different ones": 61 // ranks * ranks}, {
        "images": len(dealt),
        "different ones": len(set(dealt)),
    }


def shuffled(theirs, rank, ranks):
    [share, *_] = shares(theirs, rank, ranks)
    return "not in order", "in order" if share == sorted(share) else "not in order"


def epochs(theirs, rank, ranks):
    differ = shares(theirs, rank, ranks, epoch=0) != shares(theirs, rank, ranks, epoch=1)
    return "another order", "another order" if differ else "the same order"


def seeds(theirs, rank, ranks):
    differ = shares(theirs, rank, ranks, seed=0) != shares(theirs, rank, ranks, seed=7)
    return "another order", "another order" if differ else "the same order"


def repeats(theirs, rank, ranks):
    torch.manual_seed(rank)
    one = shares(theirs, rank, ranks, epoch=3)
    torch.manual_seed(
        rank + 10
    )  # what else draws random numbers must not matter: a resumed run differs in it
    return "the same", "the same" if shares(theirs, rank, ranks, epoch=3) == one else "another"


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
    Promise("60 images: each is dealt out once", once, TOLD),
    Promise("all shares are equally long", equal, TOLD),
    Promise("61 images: none is dealt out twice", once_of_61, TOLD),
    Promise("the order is shuffled", shuffled, TOLD),
    Promise("the next epoch has another order", epochs, TOLD),
    Promise("another seed has another order", seeds, TOLD),
    Promise("asked again, it is the same share, whatever else has drawn random numbers", repeats, TOLD),
    Promise("dealt like cards: rank r takes every N-th image, beginning with the r-th", like_cards, TOLD),
    Promise("the global random state stays as it was", global_state, TOLD),
]
