"""What exercise 17 promises."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from judging import Promise, load

TOLD = "05_fsdp/README.md, Saving"
bounds = load(Path(__file__).with_name("start.py")).bounds


def whole(length):
    return torch.arange(length, dtype=torch.float64) + 0.5


def written(theirs, length, ranks):
    """A folder into which so many ranks have saved, and all calls of theirs."""
    folder = Path(tempfile.mkdtemp(dir="."))
    for rank in range(ranks):
        begin, end = bounds(length, rank, ranks)
        theirs.save(whole(length)[begin:end].clone(), length, rank, ranks, folder)
    return folder


def read(theirs, length, ranks, folder):
    """What so many ranks read, and what each should."""
    expected, seen = [], []
    for rank in range(ranks):
        begin, end = bounds(length, rank, ranks)
        expected.append(whole(length)[begin:end])
        seen.append(theirs.load(length, rank, ranks, folder))
    return expected, seen


def from_to(length, before, after):
    def check(theirs, rank, ranks):
        return read(theirs, length, after, written(theirs, length, before))

    return check


def together(theirs, rank, ranks):
    """The ranks write at the same time, to one folder; with what they wrote, one rank more goes on."""
    folder = Path("together")
    folder.mkdir(exist_ok=True)
    begin, end = bounds(8, rank, ranks)
    theirs.save(whole(8)[begin:end].clone(), 8, rank, ranks, folder)
    dist.barrier()
    return read(theirs, 8, ranks + 1, folder)


def missing(theirs, rank, ranks):
    folder = written(theirs, 8, 3)
    sizes = sorted(folder.iterdir(), key=lambda path: path.name)
    sizes[1].unlink()
    try:
        theirs.load(8, 0, 1, folder)
    except FileNotFoundError:
        return "FileNotFoundError", "FileNotFoundError"
    return "FileNotFoundError", "no error"


def own_files(theirs, rank, ranks):
    folder = written(theirs, 8, 3)
    return {"files": 3}, {"files": len(list(folder.iterdir()))}


ALONE = (1,)
PROMISES = [
    Promise("written by 2, read by 2", from_to(8, 2, 2), TOLD, ALONE),
    Promise("each rank has written a file of its own", own_files, TOLD, ALONE),
    Promise("written by 3, read by 2", from_to(8, 3, 2), TOLD, ALONE),
    Promise("written by 2, read by 3", from_to(8, 2, 3), TOLD, ALONE),
    Promise("written by 12, read by 1: more files than digits", from_to(24, 12, 1), TOLD, ALONE),
    Promise("written by real ranks at the same time", together, TOLD),
    Promise("a file that is missing is an error, and no zeros", missing, TOLD, ALONE),
]
