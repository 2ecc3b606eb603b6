"""Exercise 17: sharded snapshots at another world size."""

from pathlib import Path

import torch


def bounds(length: int, rank: int, ranks: int) -> tuple[int, int]:
    """Begin and end of a rank's shard. Nothing to write in here: the first ranks have one number more."""
    size, more = divmod(length, ranks)
    begin = rank * size + min(rank, more)
    return begin, begin + size + (rank < more)


def save(shard: torch.Tensor, length: int, rank: int, ranks: int, folder: Path) -> None:
    """Write this rank's `shard` of a tensor with `length` numbers to a file of its own in `folder`.

    Every rank calls this, at the same time, and knows nothing of the others' numbers.
    """
    raise NotImplementedError("save: a file for each rank, which says where in the tensor its numbers belong")


def load(length: int, rank: int, ranks: int, folder: Path) -> torch.Tensor:
    """The shard (float64) that this rank of so many has, from the files that `save` has written.

    They were written by any number of ranks. Raises FileNotFoundError if some of the numbers that this rank
    needs are in none of the files.
    """
    raise NotImplementedError("load: from each file, the part that lies within this rank's bounds")
