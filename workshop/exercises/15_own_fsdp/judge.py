"""What exercise 15 promises."""

import torch
from judging import Promise, calls

PAGE = "05_fsdp/README.md, The life of a unit"
OUT, IN, BATCH = 6, 4, 3


def weight():
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def own(rank):
    """The inputs of a rank, and the weights of its outputs in the loss."""
    generator = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(BATCH, size, generator=generator, dtype=torch.float64) for size in (IN, OUT)]


def rows(tensor, rank, ranks):
    return tensor.chunk(ranks)[rank]


def tried(answer, rank, ranks, passes=2):
    """Inputs, shard and outputs, after a forward and (2 `passes`) a backward pass."""
    inputs, factors = own(rank)
    inputs.requires_grad_(True)
    shard = rows(weight(), rank, ranks).clone().requires_grad_(True)
    outputs = answer.ShardedLinear.apply(inputs, shard)
    if passes == 2:
        (outputs * factors).sum().backward()
    return inputs, shard, outputs


def forward(answer, rank, ranks):
    *_, outputs = tried(answer, rank, ranks, passes=1)
    return own(rank)[0] @ weight().T, outputs.detach()


def of_inputs(answer, rank, ranks):
    inputs, *_ = tried(answer, rank, ranks)
    return own(rank)[1] @ weight(), inputs.grad


def of_shard(answer, rank, ranks):
    _, shard, _ = tried(answer, rank, ranks)
    mean = sum(factors.T @ inputs for inputs, factors in map(own, range(ranks))) / ranks
    return rows(mean, rank, ranks), shard.grad


def kept(answer, rank, ranks):
    """What autograd keeps of the forward pass, but for the inputs."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        *_, outputs = tried(answer, rank, ranks, passes=1)
    sizes += [value.numel() for value in vars(outputs.grad_fn).values() if isinstance(value, torch.Tensor)]
    large = max([0, *sizes]) >= OUT * IN and ranks > 1
    return "no whole weight", "a whole weight" if large else "no whole weight"


def moved(answer, rank, ranks):
    with calls(answer) as called:
        tried(answer, rank, ranks)
    return ["all_gather", "all_gather", "reduce_scatter"], sorted(kind(call.name) for call in called)


def kind(name):
    """The name of a collective, without the ending that says how it takes its tensors."""
    for ending in ("_into_tensor", "_tensor", "_single"):
        name = name.removesuffix(ending)
    return name


PROMISES = [
    Promise("the outputs are those of the whole layer", forward, PAGE),
    Promise("the gradient of the inputs is that of the whole layer", of_inputs, PAGE),
    Promise("the gradient of the shard is the mean over the ranks, in its rows", of_shard, PAGE),
    Promise("between forward and backward no rank keeps the whole weight", kept, PAGE),
    Promise("a step takes two all-gathers and one reduce-scatter", moved, PAGE),
]
