"""Small experiments on two ranks. Each refutes a sentence that can be read somewhere: see workshop/README.md.

    python workshop/refute.py step

Models have one weight where that is enough, so that a result can be checked with a pencil. All of it runs on
CPUs.
"""

import contextlib
import gc
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

RANKS = 2


def tell(text: str) -> None:
    """Print a line of each rank, in order; rank 0 prints them all, so that they do not mix."""
    lines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, text)
    if dist.get_rank() == 0:
        print(*(f"  rank {rank}: {line}" for rank, line in enumerate(lines)), sep="\n", flush=True)


def title(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def one_weight() -> nn.Linear:
    """A model with one weight, w = 1, and no bias: it answers w · x."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def torchrun() -> None:
    """A training like any other, without a process group, on four images: x = 1, 2, 3, 4."""
    images = torch.arange(1.0, 5.0).reshape(4, 1)
    model = one_weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for image in images:
        optimizer.zero_grad()
        model(image).mean().backward()
        optimizer.step()
    started, group = os.environ.get("WORLD_SIZE", "1"), "a" if dist.is_initialized() else "no"
    # One call, or the other process would write between a line and its end.
    sys.stdout.write(
        f"one of {started}, {group} process group, trained on {len(images)} of 4 images, "
        f"weight {model.weight.item():.1f}\n"
    )


def step() -> None:
    """Rank 0 sees x = 1, rank 1 sees 2. The loss is w · x, so the gradient is x; the learning rate is 1."""
    x = torch.tensor([[dist.get_rank() + 1.0]])
    for name, wrap in (("without DDP", nn.Sequential), ("with DDP", DistributedDataParallel)):
        title(name)
        model = wrap(one_weight())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        [weight] = model.parameters()
        model(x).mean().backward()
        gradient = weight.grad
        assert gradient is not None
        optimizer.step()
        tell(f"gradient after backward() {gradient.item()}, weight after step() {weight.item()}")


def seeds() -> None:
    """Each rank draws its first weight with a seed of its own; then DDP takes the model."""
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(1, 1, bias=False)
    title("before DDP")
    tell(f"weight {model.weight.item():.3f}")
    DistributedDataParallel(model)
    title("after DDP's constructor")
    tell(f"weight {model.weight.item():.3f}")


def ragged() -> None:
    """Rank 0 has one image left, with a loss of 3; rank 1 has three of loss 1. The mean of all is 1.5."""
    losses = torch.tensor([3.0]) if dist.get_rank() == 0 else torch.ones(3)
    mean = losses.mean()
    dist.all_reduce(mean)
    sums = torch.stack([losses.sum(), torch.tensor(float(len(losses)))])
    dist.all_reduce(sums)
    title("the mean of all ranks' means")
    tell(f"{mean.item() / dist.get_world_size()}")
    title("the sum of all losses over the number of all images")
    tell(f"{(sums[0] / sums[1]).item()}")


def batch_norm() -> None:
    """Rank 0 sees images of 1, rank 1 of 2. With a momentum of 1, batch norm keeps the last batch's mean."""
    model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(1, momentum=1.0)))
    [norm] = model.module
    model(torch.full((4, 1), dist.get_rank() + 1.0))
    title("after a forward pass")
    tell(f"running mean {norm.running_mean.item()}")
    norm.eval()
    model(torch.ones(4, 1))
    title("after the next one, in which DDP sends rank 0's buffers to all")
    tell(f"running mean {norm.running_mean.item()}")


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called inside of a `with` block; torch's name for them is c10d."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "c10d":
            self.counts[name.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def calls(train: Callable[[], None]) -> str:
    """How often `train` calls each collective, once DDP and FSDP have arranged themselves, in two passes."""
    train()
    train()
    with Collectives() as seen:
        train()
    return ", ".join(f"{count} × {name}" for name, count in sorted(seen.counts.items()))


def accumulate() -> None:
    """Two batches before a step: x is 1 and 3 on rank 0, 2 and 4 on rank 1. The gradient of both is 5."""
    first, last = torch.tensor([[[1.0]], [[3.0]]]) + dist.get_rank()
    for name, way in (
        ("without no_sync()", contextlib.nullcontext),
        ("with no_sync()", DistributedDataParallel.no_sync),
    ):
        model = DistributedDataParallel(one_weight())

        def train(model: nn.Module = model, way: Any = way) -> None:
            model.zero_grad()
            with way(model):
                model(first).mean().backward()
            model(last).mean().backward()

        title(name)
        called = calls(train)
        tell(f"gradient {model.module.weight.grad.item()}, {called}")


def fsdp() -> None:
    """Four layers of 100 × 100 weights, one training step with DDP and one with FSDP."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in ("DDP", "FSDP"):
        layers = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(4)))
        model: nn.Module = layers
        if name == "DDP":
            model = DistributedDataParallel(layers)
        else:
            for layer in layers:  # without a unit around them, so each is told to give back what it gathers
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)

        def train(model: nn.Module = model) -> None:
            model(torch.ones(8, 100)).mean().backward()

        title(name)
        called = calls(train)
        weights: Any = layers.parameters()
        own = [weight.to_local() if name == "FSDP" else weight for weight in weights]
        tell(f"keeps {sum(weight.numel() for weight in own):,} weights, a step calls {called}")


def barrier() -> None:
    """All ranks meet in a barrier; then rank 0 alone calls all_reduce, with a timeout of three seconds."""
    short: Any = dist.new_group(timeout=timedelta(seconds=3))
    dist.barrier(short)
    seen, begun = "through the barrier", time.monotonic()
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.ones(1), group=short)
        except RuntimeError as error:
            seen += f", then: {type(error).__name__} after {time.monotonic() - begun:.0f} s in all_reduce"
    tell(seen)


EXPERIMENTS = {
    function.__name__: function
    for function in (step, torchrun, seeds, ragged, batch_norm, accumulate, fsdp, barrier)
}


def run(rank: int, name: str, meeting: str) -> None:
    """One rank of an experiment; the ranks find each other by the file `meeting`."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    EXPERIMENTS[name]()
    gc.collect()  # models that still hold the group would keep gloo's threads until Python ends, or longer
    dist.destroy_process_group()


def main() -> None:
    names = sys.argv[1:]
    if len(names) != 1 or names[0] not in EXPERIMENTS:
        print(f"error: name one experiment: {', '.join(EXPERIMENTS)}", file=sys.stderr)
        sys.exit(2)
    if names == ["torchrun"]:
        torchrun()
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (names[0], f"{folder}/meeting"), nprocs=RANKS, join=True)


if __name__ == "__main__":
    main()
