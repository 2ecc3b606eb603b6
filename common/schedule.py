"""The learning rate as a function of how much of the training is done."""

import math

from torch.optim import Optimizer


class Schedule:
    """Scales the learning rates with which `optimizer` was built, of each group its own.

    `name` is `constant`, which never touches the optimizer, or `one-cycle`.
    """

    def __init__(self, optimizer: Optimizer, name: str):
        self.optimizer = optimizer
        self.name = name
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]

    def set_progress(self, done: float) -> None:
        """Set the learning rates for a moment when a fraction `done` of the training, from 0 to 1, is done.

        Steps would not tell: after a resume with other ranks or another batch size there are more, or fewer.
        """
        if self.name == "one-cycle":
            self.scale(one_cycle(done))

    def reset(self) -> None:
        """Set the learning rates with which the optimizer was built, in place of those of a snapshot."""
        self.scale(1.0)

    def scale(self, factor: float) -> None:
        """Set each group's learning rate to `factor` times the one that it was built with."""
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor


def one_cycle(done: float) -> float:
    """The factor when a fraction `done` of the training, from 0 to 1, is done.

    It rises from 1/25 to 1 during the first 30 %, and then falls to 0. Both are halves of a cosine (Smith,
    2018, arxiv.org/abs/1803.09820; torch's OneCycleLR ends a little above 0, and changes momentum as well).
    """
    warm_up = 0.3
    if done < warm_up:
        return cosine(1 / 25, 1.0, done / warm_up)
    return cosine(1.0, 0.0, min(1.0, (done - warm_up) / (1 - warm_up)))


def cosine(start: float, end: float, done: float) -> float:
    """A number between `start` and `end`: half of a cosine, of which a fraction `done` is done."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
