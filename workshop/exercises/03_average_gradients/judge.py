"""What exercise 03 promises."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from judging import Promise
from torch import nn

PAGE = "02_multigpu_spawn/README.md, The process group"


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()


def first(model):
    """The first weight of each parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.double().flatten()[0].item() for name, tensor in tensors}


def own(rank):
    """The images of a rank, and what is to come of them."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])


def beginnings(answer, rank, ranks):
    model, model_of_answer = net(seed=0), net(seed=rank)
    model.requires_grad_(True)
    answer.same_start(model_of_answer)
    return first(model), first(model_of_answer)


def averages(answer, rank, ranks):
    """Batch norm's: another state that no gradient makes alike."""
    model = net(seed=0)
    with torch.no_grad():
        model[1].running_mean += rank + 1
    answer.same_start(model)
    return [1.0] * 3, model[1].running_mean.tolist()


def linear(seed):
    torch.manual_seed(seed)
    return nn.Linear(4, 2).double()


def gradient(model, batches):
    """Of the mean loss over the batches together."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    return model.weight.grad.clone()


def one_large_batch(answer, rank, ranks):
    model = linear(seed=0)
    expected = gradient(model, [own(each) for each in range(ranks)])
    gradient(model, [own(rank)])
    answer.average_gradients(model)
    return expected, model.weight.grad


def weights_stay(answer, rank, ranks):
    """It is the optimizer that changes them."""
    model = linear(seed=rank)
    before = model.weight.detach().clone()
    gradient(model, [own(rank)])
    answer.average_gradients(model)
    return before, model.weight.detach()


def without(answer, rank, ranks):
    """A frozen parameter has no gradient, and gets none."""
    model = linear(seed=0)
    model.bias.requires_grad_(False)
    expected = gradient(model, [own(each) for each in range(ranks)])
    gradient(model, [own(rank)])
    answer.average_gradients(model)
    return [expected, "none"], [model.weight.grad, "none" if model.bias.grad is None else "a gradient"]


def every_parameter(answer, rank, ranks):
    model = linear(seed=0)
    gradient(model, [own(each) for each in range(ranks)])
    expected = model.bias.grad.clone()
    gradient(model, [own(rank)])
    answer.average_gradients(model)
    dist.barrier()
    return expected, model.bias.grad


PROMISES = [
    Promise("all ranks begin with rank 0's weights", beginnings, PAGE),
    Promise("all ranks begin with rank 0's buffers, too", averages, PAGE),
    Promise("gradients are those of one large batch: the mean", one_large_batch, PAGE),
    Promise("each parameter's gradient is averaged, the bias's too", every_parameter, PAGE),
    Promise("weights stay as they are: only gradients are averaged", weights_stay, PAGE),
    Promise("a frozen parameter, without a gradient, is passed over", without, PAGE),
]
