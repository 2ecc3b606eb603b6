"""Exercise 13: which rank saves on two nodes."""

from pathlib import Path

import torch.distributed as dist


def saves(folder: Path) -> bool:
    """Whether this rank is the one that saves to the disk on which `folder` is.

    Every rank calls this with the folder of its node, which exists. Ranks whose folders are on one disk see
    each other's files in it. Of the ranks that share a disk exactly one saves: the one with the lowest rank.
    When the function returns, on any rank, the folder is as it was. It may be called again.
    """
    raise NotImplementedError(
        "saves: leave a mark in the folder, see whose marks are there, and take it away"
    )
