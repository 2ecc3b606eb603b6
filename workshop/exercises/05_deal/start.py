"""Exercise 05: deal out the data."""

import torch


def share(length: int, epoch: int, seed: int, rank: int, ranks: int) -> list[int]:
    """The indices of the images that this rank trains on in this epoch, in their order.

    Of `length` images each is in the share of one rank at most, and all shares are equally long: with a
    length that `ranks` does not divide, the last images of the order are left out. The order is shuffled,
    differs from epoch to epoch and from seed to seed, and is the same whenever the same is asked.
    """
    raise NotImplementedError("share: the same shuffled order on all ranks, and of it every N-th image")
