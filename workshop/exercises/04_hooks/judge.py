"""What exercise 04 promises."""

import copy

import torch
import torch.nn.functional as F
from judging import Promise, calls
from torch import nn

PAGE = "02_multigpu_spawn/README.md, The process group"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def own(rank, step=0):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])


def backward(model, *batches):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def large(ranks, step=0):
    """The gradients of one large batch."""
    model = net()
    backward(model, *(own(rank, step) for rank in range(ranks)))
    return gradients(model)


def averaged(answer, rank, ranks):
    model = net()
    ddp = answer.Overlapped(model)
    backward(model, own(rank))
    ddp.finish()
    return large(ranks), gradients(model)


def second_step(answer, rank, ranks):
    model = net()
    ddp = answer.Overlapped(model)
    for step in (0, 1):
        backward(model, own(rank, step))
        ddp.finish()
    return large(ranks, 1), gradients(model)


def watched_backward(answer, rank):
    """The calls at the moment when the first layer's backward pass begins, and those after backward()."""
    model = net()
    before_first_layer = []
    with calls(answer) as called:
        ddp = answer.Overlapped(model)

        def remember(*_):
            before_first_layer.extend(copy.copy(call) for call in called)

        model[1].register_full_backward_hook(remember)
        backward(model, own(rank))
        after_backward = [copy.copy(call) for call in called]
        ddp.finish()
    return before_first_layer, after_backward


def under_way(answer, rank, ranks):
    """When the first layer's backward pass begins, the last layer's all-reduces have begun."""
    before_first_layer, after_backward = watched_backward(answer, rank)
    expected = {"begun before the first layer's gradient": 2, "begun when backward() is over": 4}
    counts = [
        sum(call.name == "all_reduce" for call in calls_so_far)
        for calls_so_far in (before_first_layer, after_backward)
    ]
    return expected, dict(zip(expected, counts, strict=True))


def no_wait(answer, rank, ranks):
    """A hook that waits for its all-reduce stops backward() until all ranks have come to it."""
    before_first_layer, _ = watched_backward(answer, rank)
    waits = sum(call.waits for call in before_first_layer)
    return {"waits before the first layer's gradient": 0}, {"waits before the first layer's gradient": waits}


def frozen(answer, rank, ranks):
    model = net()
    model[0].weight.requires_grad_(False)
    ddp = answer.Overlapped(model)
    backward(model, own(rank))
    ddp.finish()
    expected = large(ranks)["2.weight"]
    return [expected, "none"], [
        model[2].weight.grad,
        "none" if model[0].weight.grad is None else "a gradient",
    ]


PROMISES = [
    Promise("after finish() the gradients are those of one large batch", averaged, PAGE),
    Promise("so they are in the second step", second_step, PAGE),
    Promise("the all-reduces begin while backward() still computes", under_way, PAGE, (2, 3)),
    Promise("no all-reduce is waited for while backward() still computes", no_wait, PAGE, (2, 3)),
    Promise("a frozen parameter is passed over", frozen, PAGE),
]
