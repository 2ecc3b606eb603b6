"""Samplers for training that can be interrupted in the middle of an epoch."""

import itertools
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler


class ShuffledSampler(Sampler[int]):
    """All indices of `data` in random order. Seed and epoch alone decide it, as in DistributedSampler."""

    def __init__(self, data: Sized, seed: int):
        self.data = data
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(len(self.data), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.data)


class ResumableSampler(Sampler[int]):
    """The indices of another sampler, without the first `start`, which an interrupted run has seen already.

    `sampler` is ShuffledSampler, DistributedSampler, or any other with `set_epoch` and a length.
    """

    def __init__(self, sampler: Any):
        self.sampler = sampler
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of this epoch, and how many of its indices to leave out."""
        self.sampler.set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.sampler, self.start, None)

    def __len__(self) -> int:
        return len(self.sampler) - self.start
