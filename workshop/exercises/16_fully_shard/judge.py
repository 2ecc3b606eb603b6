"""What exercise 16 promises."""

from pathlib import Path

import torch
import torch._dynamo  # optimizers import it: once here, not in every rank
import torch.nn.functional as F
from judging import Promise, load
from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: F401  # imported once, not in every rank
from torch.distributed.tensor import DTensor

PAGE = "05_fsdp/README.md, Step 05: FSDP"
Net = load(Path(__file__).with_name("start.py")).Net


def net():
    torch.manual_seed(0)
    return Net().double()


def own(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 1])


def whole(model):
    """Some weights of each parameter, gathered."""
    found = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = tensor.detach().flatten()[:3].tolist()
    return found


def trained(answer, rank, steps):
    model = net()
    optimizer = answer.shard(model)
    for _ in range(steps):
        images, labels = own(rank)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def sharded(answer, rank, ranks):
    model = net()
    answer.shard(model)
    kinds = {name: isinstance(parameter, DTensor) for name, parameter in model.named_parameters()}
    return dict.fromkeys(kinds, True), kinds


def units(answer, rank, ranks):
    model = net()
    answer.shard(model)
    found = [name or "the model" for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return ["the model", "blocks.0", "blocks.1"], found


def gathered_alone(answer, rank, ranks):
    """In the first block's forward pass: which parameters are whole?"""
    model, seen = net(), []
    answer.shard(model)

    def note(*_):
        seen.append(
            [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        )

    model.blocks[0][0].register_forward_hook(note)
    model(own(rank)[0])
    mine = [name for name in seen[0] if name.startswith("blocks")]
    return ["blocks.0.0.weight", "blocks.0.0.bias"], mine


def optimized(answer, rank, ranks):
    model = net()
    optimizer = answer.shard(model)
    model_of_answer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in model_of_answer]
    return "all parameters", f"all but {', '.join(missing)}" if missing else "all parameters"


def learns(answer, rank, ranks):
    """Three steps, against the plain model on the ranks' batches together."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        images, labels = (torch.cat(parts) for parts in zip(*map(own, range(ranks)), strict=True))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return whole(model), whole(trained(answer, rank, 3))


PROMISES = [
    Promise("each parameter is sharded", sharded, PAGE),
    Promise("the units are the two blocks and the model", units, PAGE),
    Promise("a block is gathered alone, without the other one", gathered_alone, PAGE),
    Promise("the optimizer has the model's sharded parameters", optimized, PAGE),
    Promise("three steps end with the weights of the plain model", learns, PAGE),
]
