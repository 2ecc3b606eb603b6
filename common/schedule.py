"""The learning rate of each step: a function of its number, so that no snapshot has to keep it."""

import argparse
import math

from torch.optim import Optimizer


def set_learning_rate(optimizer: Optimizer, args: argparse.Namespace, step: int, steps: int) -> None:
    """Set the rate and AdamW's betas for `step`, counted from 0, of the run's `steps`.

    By default `--lr` and torch's betas. With `--schedule one-cycle` the rate rises from a 25th of `--lr` to
    all of it in the first 30 % of the run, and falls to 0: halves of a cosine (Smith, 2018,
    arxiv.org/abs/1803.09820, as in torch's OneCycleLR). Smaller betas remember less: so short a run needs it.
    """
    rate, betas = args.lr, (0.9, 0.999)
    if args.schedule == "one-cycle":
        done, betas = min(1.0, step / steps), (0.7, 0.9)
        low, fallen = (0.04, 1 - done / 0.3) if done < 0.3 else (0.0, (done - 0.3) / 0.7)
        rate *= low + (1 - low) * (1 + math.cos(math.pi * fallen)) / 2
    for group in optimizer.param_groups:
        group.update(lr=rate, betas=betas)
