"""What exercise 18 promises."""

import itertools
import time

import torch.distributed as dist
from judging import Promise

PAGE = "02_multigpu_spawn/README.md, When it goes wrong"
NUMBERS = itertools.count()


def roll_call(answer, rank, ranks):
    """A new one, in a corner of the store of its own."""
    store = dist.PrefixStore(f"roll-call-{next(NUMBERS)}", dist.distributed_c10d._get_default_store())
    return answer.RollCall(store, rank, ranks)


def timed(call):
    begun = time.monotonic()
    found = call()
    return list(found), time.monotonic() - begun


def all_here(answer, rank, ranks):
    found, _ = timed(lambda: roll_call(answer, rank, ranks).missing(2.0))
    return [], found


def at_once(answer, rank, ranks):
    _, took = timed(lambda: roll_call(answer, rank, ranks).missing(2.0))
    return "at once", "at once" if took < 1.5 else f"after {took:.1f} s"


def last_away(answer, rank, ranks):
    mine = roll_call(answer, rank, ranks)
    if ranks > 1 and rank == ranks - 1:
        return [ranks - 1], [ranks - 1]  # this is the one that does not come
    return ([ranks - 1] if ranks > 1 else []), list(mine.missing(0.5))


def two_away(answer, rank, ranks):
    mine = roll_call(answer, rank, ranks)
    return ([1, 2], [1, 2]) if rank else ([1, 2], list(mine.missing(0.5)))


def in_time(answer, rank, ranks):
    mine = roll_call(answer, rank, ranks)
    if rank:
        return "in time", "in time"
    _, took = timed(lambda: mine.missing(0.6))
    return "in time", "in time" if took < 1.15 else f"after {took:.1f} s"


def late(answer, rank, ranks):
    mine = roll_call(answer, rank, ranks)
    time.sleep(0.3 * rank)
    return [], list(mine.missing(2.0))


def second(answer, rank, ranks):
    """All come to the first call, the last rank does not come to the second."""
    mine = roll_call(answer, rank, ranks)
    mine.missing(2.0)
    if ranks > 1 and rank == ranks - 1:
        return [ranks - 1], [ranks - 1]
    return ([ranks - 1] if ranks > 1 else []), list(mine.missing(0.5))


PROMISES = [
    Promise("all come: nobody is missing", all_here, PAGE),
    Promise("all come: the answer comes at once", at_once, PAGE),
    Promise("the last rank does not come: it is named, on all others", last_away, PAGE, (2, 3)),
    Promise("two ranks do not come: both are named", two_away, PAGE, (3,)),
    Promise("the answer comes in time, however many are missing", in_time, PAGE),
    Promise("a rank that comes late, but in time, is not missing", late, PAGE),
    Promise("a second call looks again", second, PAGE),
]
