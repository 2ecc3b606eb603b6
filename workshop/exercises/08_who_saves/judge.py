"""What exercise 08 promises."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from judging import Promise
from torch import nn

PAGE = "02_multigpu_spawn/README.md, Who saves"


def net(value):
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


class Saves:
    """While this is entered, torch.save notes for which file it is called, and waits for another rank."""

    def __init__(self, waits_for=None, fails=False):
        self.paths, self.waits_for, self.fails, self.real = [], waits_for, fails, torch.save

    def __call__(self, content, file, *rest, **words):
        self.paths.append(Path(str(getattr(file, "name", file))))
        if self.fails:  # as a kill in the middle: half of a file is on the disk
            Path(self.paths[-1]).write_bytes(b"half")
            raise KeyboardInterrupt
        end = time.monotonic() + 1.0
        while self.waits_for and not self.waits_for.exists() and time.monotonic() < end:
            time.sleep(0.01)
        self.real(content, file, *rest, **words)

    def __enter__(self):
        torch.save = self
        return self

    def __exit__(self, *error):
        torch.save = self.real
        return bool(error and error[0] is KeyboardInterrupt)


def read(path):
    """What is in a file, or why that cannot be told."""
    if not path.exists():
        return "there is no file"
    try:
        return next(iter(torch.load(path).values())).flatten().tolist()  # whatever name it has
    except Exception as error:
        return f"no whole file: {type(error).__name__}"


def round_trip(answer, rank, ranks):
    model = net(0.0)
    answer.save(net(7.0), Path("once.pt"))
    answer.load(model, Path("once.pt"))
    return [7.0, 7.0], model.weight.flatten().tolist()


def who(answer, rank, ranks):
    with Saves() as saves:
        answer.save(net(1.0), Path("who.pt"))
    return {"files that this rank writes": int(rank == 0)}, {"files that this rank writes": len(saves.paths)}


def whole(answer, rank, ranks):
    """Rank 0 is slow, until another rank is through before it, which must not be."""
    through = Path("through")
    with Saves(waits_for=through if rank == 0 and ranks > 1 else None):
        answer.save(net(2.0), Path("slow.pt"))
    found = read(Path("slow.pt"))
    through.touch()
    return [2.0, 2.0], found


def killed(answer, rank, ranks):
    """Rank 0 alone, as the others would wait for it: it dies in the middle of the second save."""
    path = Path("killed.pt")
    answer.save(net(3.0), path)
    if rank == 0:
        with Saves(fails=True):
            answer.save(net(4.0), path)
    elif ranks > 1:
        dist.barrier()  # stands in for the one that rank 0 does not come to
    if rank == 0 and ranks > 1:
        dist.barrier()
    return [3.0, 3.0], read(path)


def names(answer, rank, ranks):
    answer.save(net(5.0), Path("names.pt"))
    return ["weight"], sorted(torch.load("names.pt"))


def nothing_left(answer, rank, ranks):
    answer.save(net(6.0), Path("left.pt"))
    return ["left.pt"], sorted(path.name for path in Path(".").glob("*left*"))


PROMISES = [
    Promise("when save returns, the file is there and whole, on every rank", whole, PAGE),
    Promise("what is loaded is what was saved", round_trip, PAGE),
    Promise("rank 0 writes, and nobody else", who, PAGE),
    Promise("the file has the names of the model's state_dict", names, PAGE),
    Promise("a run that is killed while it saves leaves the file from before", killed, PAGE),
    Promise("no other file is left", nothing_left, PAGE),
]
