"""Exercise 17: sharded snapshots at another world size."""

from pathlib import Path

import torch


def bounds(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """Begin and end of a rank's shard. Nothing to write in here: the first ranks have one number more."""
    size, more = divmod(length, ranks)
    begin = rank * size + min(rank, more)
    return begin, begin + size + (rank < more)


def save(shard: torch.Tensor, length: int, rank: int, ranks: int, folder: Path) -> None:
    """Write this rank's `shard` of a tensor with `length` numbers to a file of its own in `folder`."""
    begin, _ = bounds(length, rank, ranks)
    torch.save({"begin": begin, "numbers": shard.clone()}, folder / f"shard-{rank}.pt")


def load(length: int, rank: int, ranks: int, folder: Path) -> torch.Tensor:
    """The shard (float64) that this rank of so many has, from the files that `save` has written."""
    begin, end = bounds(length, rank, ranks)
    shard = torch.empty(end - begin, dtype=torch.float64)
    found = 0
    for file in folder.glob("shard-*.pt"):
        part = torch.load(file)
        first, last = max(begin, part["begin"]), min(end, part["begin"] + len(part["numbers"]))
        if first < last:
            shard[first - begin : last - begin] = part["numbers"][
                first - part["begin"] : last - part["begin"]
            ]
            found += last - first
    if found < end - begin:
        raise FileNotFoundError(f"{folder} has {found} of the {end - begin} numbers of rank {rank}")
    return shard
