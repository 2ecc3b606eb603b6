"""What exercise 12 promises."""

import torch
import torch._dynamo  # optimizers import it: once here, not in every rank
import torch.nn.functional as F
from judging import Promise
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

PAGE = "04_multinode/README.md, A slow network: several batches in one step"


def batch(rank, number):
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0])


def net():
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def trained(answer, rank, count=4, steps=1):
    """The weights after some steps, and how often DDP has averaged in each."""
    averaged = []

    def hook(state, bucket):
        averaged.append(bucket.index())
        return allreduce_hook(None, bucket)

    model = DDP(net())
    model.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        answer.train_step(model, optimizer, [batch(rank, count * step + number) for number in range(count)])
    return model.module.weight.detach().clone(), len(averaged) / steps


def large(ranks, count=4, steps=1):
    """The weights after as many steps on one large batch each."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        parts = [batch(rank, count * step + number) for rank in range(ranks) for number in range(count)]
        images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.weight.detach()


def named(weights):
    return {"weights after the steps": weights}


def one(answer, rank, ranks):
    return named(large(ranks, count=1)), named(trained(answer, rank, count=1)[0])


def four(answer, rank, ranks):
    return named(large(ranks)), named(trained(answer, rank)[0])


def twice(answer, rank, ranks):
    return named(large(ranks, steps=2)), named(trained(answer, rank, steps=2)[0])


def once(answer, rank, ranks):
    return {"all-reduces in a step": 1.0}, {"all-reduces in a step": trained(answer, rank)[1]}


PROMISES = [
    Promise("one batch: the step that one large batch over all ranks would make", one, PAGE),
    Promise("four batches: the step of one large batch of them all", four, PAGE),
    Promise("the second step begins with no gradients from the first", twice, PAGE),
    Promise("DDP averages once in a step", once, PAGE),
]
