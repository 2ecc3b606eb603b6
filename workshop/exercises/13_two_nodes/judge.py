"""What exercise 13 promises."""

import sys
import time
from pathlib import Path

import torch.distributed as dist
from judging import Promise, calls

PAGE = "04_multinode/README.md, The idea"


def everywhere(mine, ranks):
    found = [None] * ranks
    dist.all_gather_object(found, mine)
    return named(found)


def named(answers):
    return {f"rank {rank} saves": answer for rank, answer in enumerate(answers)}


def folder(name, disk):
    """The folder of a node whose disk has that number."""
    path = Path(f"{name}-disk-{disk}")
    path.mkdir(exist_ok=True)
    dist.barrier()
    return path


def own(answer, rank, ranks):
    """Three ranks: 0 and 1 on one node, 2 on the other; two: one on each."""
    disk = rank if ranks < 3 else rank // 2
    found = everywhere(bool(answer.saves(folder("own", disk))), ranks)
    return named([True, False, True] if ranks == 3 else [True] * ranks), found


def slow(answer, rank, ranks):
    """All but rank 0 look late: their disk is slow. First of all, or chance would choose the message."""
    real = Path.exists

    def late(self, **words):
        time.sleep(0.2 if rank else 0.0)
        return real(self, **words)

    path = folder("slow", 0)
    Path.exists = late
    try:
        mine = bool(answer.saves(path))
    finally:
        Path.exists = real
    return named([True, False, False][:ranks]), everywhere(mine, ranks)


def late_mark(answer, rank, ranks):
    """Rank 0 comes late."""
    path = folder("late", 0)
    time.sleep(0.2 if rank == 0 else 0.0)
    return named([True, False, False][:ranks]), everywhere(bool(answer.saves(path)), ranks)


def gone(answer, rank, ranks):
    """After its last removal, a rank waits for the others: their marks may still be in the folder."""
    calls_before_removal = [0]
    path = folder("gone", 0)
    with calls(answer) as called:

        def note_removal(event, arguments):
            if event in ("os.remove", "os.rmdir"):
                calls_before_removal.append(len(called))

        sys.addaudithook(note_removal)  # hears of each removal, whichever function is used for it
        answer.saves(path)
    waits = len(called) > calls_before_removal[-1]
    return "waits for the others", "waits for the others" if waits else "returns at once"


def clean(answer, rank, ranks):
    path = folder("clean", 0)
    answer.saves(path)
    dist.barrier()
    return [], sorted(each.name for each in path.iterdir())


def again(answer, rank, ranks):
    """After a restart on the nodes' own disks."""
    answer.saves(folder("again", 0))
    return named([True] * ranks), everywhere(bool(answer.saves(folder("again-own", rank))), ranks)


PROMISES = [
    Promise("one disk for all: rank 0 saves, and nobody else, though the others look late", slow, PAGE),
    Promise("so it is when rank 0 comes late", late_mark, PAGE),
    Promise("a disk in each node: the lowest rank of each node saves", own, PAGE),
    Promise("the folder is left as it was", clean, PAGE),
    Promise("after a rank has removed its mark, it waits until all marks are gone", gone, PAGE, (2, 3)),
    Promise("a second call looks again", again, PAGE),
]
