"""What exercise 17 promises."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from judging import Promise, load

PAGE = "05_fsdp/README.md, Saving"
bounds = load(Path(__file__).with_name("start.py")).bounds


def whole(length):
    return torch.arange(length, dtype=torch.float64) + 0.1  # float32 has no such numbers


def written(answer, length, ranks):
    """A folder into which so many ranks have saved, one after another."""
    folder = Path(tempfile.mkdtemp(dir="."))
    for rank in range(ranks):
        begin, end = bounds(length, rank, ranks)
        answer.save(whole(length)[begin:end].clone(), length, rank, ranks, folder)
    return folder


def read(answer, length, ranks, folder):
    """What each of so many ranks should read, and what it reads."""
    expected = {}
    seen = {}
    for rank in range(ranks):
        begin, end = bounds(length, rank, ranks)
        reader = f"reader {rank} of {ranks}"
        expected[reader] = whole(length)[begin:end]
        seen[reader] = answer.load(length, rank, ranks, folder)
    return expected, seen


def from_to(length, before, after):
    def check(answer, rank, ranks):
        return read(answer, length, after, written(answer, length, before))

    return check


def together(answer, rank, ranks):
    """The ranks write at the same time, to one folder. There is one reader more than there were ranks."""
    folder = Path("together")
    folder.mkdir(exist_ok=True)
    begin, end = bounds(8, rank, ranks)
    answer.save(whole(8)[begin:end].clone(), 8, rank, ranks, folder)
    dist.barrier()
    return read(answer, 8, ranks + 1, folder)


def missing(answer, rank, ranks):
    folder = written(answer, 3, 3)
    files = sorted(folder.iterdir())
    files[1].unlink()  # one number is missing
    try:
        answer.load(3, 0, 1, folder)
    except FileNotFoundError:
        return "FileNotFoundError", "FileNotFoundError"
    return "FileNotFoundError", "no error"


def own_files(answer, rank, ranks):
    folder = written(answer, 8, 3)
    return {"files": 3}, {"files": len(list(folder.iterdir()))}


ALONE = (1,)
PROMISES = [
    Promise("written by 2, read by 2", from_to(8, 2, 2), PAGE, ALONE),
    Promise("each rank has written a file of its own", own_files, PAGE, ALONE),
    Promise("written by 3, read by 2", from_to(8, 3, 2), PAGE, ALONE),
    Promise("written by 2, read by 3", from_to(8, 2, 3), PAGE, ALONE),
    Promise("written by 12, read by 1: more files than digits", from_to(24, 12, 1), PAGE, ALONE),
    Promise("written by real ranks at the same time", together, PAGE),
    Promise("a file that is missing is an error, and no zeros", missing, PAGE, ALONE),
]
