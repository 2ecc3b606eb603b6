"""The buckets in which DDP sums gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from common.loading import to_device


def fix_bucket_order(
    model: nn.Module,
    loss: Callable[[Any], torch.Tensor],
    autocast: Any,
    loader: DataLoader[Any],
    device: torch.device,
) -> None:
    """Let DDP see a backward pass, of two samples, that trains nothing.

    Call it before a snapshot is loaded: the dataset may draw random numbers here, and loading restores them.

    DDP sums the gradients of several parameters at a time, a bucket. After the first backward pass it
    regroups the buckets once, in the order in which the gradients were ready. The grouping decides in which
    order the ranks' numbers are added. So the first step of a resumed run would round differently from the
    same step of a run that was not interrupted. After this pass, all steps have the same buckets.

    `loss` is the Trainer's. The samples are of the dataset of `loader`, and made as the loader makes them.
    """
    loader_of_two = DataLoader(
        loader.dataset,
        batch_size=2,
        collate_fn=loader.collate_fn,
        # A file that a dataset opens when it is first asked must be opened in a worker, if there are any.
        num_workers=min(1, loader.num_workers),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )
    batch = to_device(next(iter(loader_of_two)), device)
    model.eval()  # the averages of batch norm stay, and dropout draws no random numbers
    # cuDNN's LSTM has no backward pass in eval mode, torch's own has.
    with torch.compiler.set_stance("force_eager"), torch.backends.cudnn.flags(enabled=False), autocast:
        loss(batch).backward()
    model.zero_grad()
