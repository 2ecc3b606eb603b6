"""Exercise 10: resume exactly where it stopped."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Training:
    """Trains a small net on 24 samples, in batches of 4: six steps an epoch. Nothing to write in here."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.seed = seed
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(99)
        self.inputs = torch.randn(24, 3, generator=generator)
        self.targets = self.inputs[:, :2].cos()
        self.epoch = self.samples_seen = 0  # of this epoch

    def step(self) -> None:
        """Train on the next batch of the epoch's order; begin another epoch behind its last one."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(24, generator=generator)
        rows = order[self.samples_seen : self.samples_seen + 4]
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self.inputs[rows]), self.targets[rows]).backward()
        self.optimizer.step()
        self.samples_seen += 4
        if self.samples_seen == 24:
            self.epoch, self.samples_seen = self.epoch + 1, 0


def state(training: Training) -> dict[str, Any]:
    """All that the rest of the training depends on, as a dictionary that torch.save can write."""
    raise NotImplementedError("state: what does the next step depend on? Return all of it")


def resume(training: Training, saved: dict[str, Any]) -> None:
    """Let a new `training`, with the same seed, go on from what `state` has returned, in another process."""
    raise NotImplementedError("resume: put each thing that state() has saved back in its place")
