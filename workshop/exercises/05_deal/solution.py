"""Exercise 05: deal out the data."""

import torch


def share(length: int, epoch: int, seed: int, rank: int, ranks: int) -> list[int]:
    """The indices of the images that this rank trains on in this epoch, in their order."""
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(length, generator=generator).tolist()
    return order[: length // ranks * ranks][rank::ranks]
