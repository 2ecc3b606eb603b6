"""A divided model: what each rank holds of it, the norm of its gradient, and its weights in one file.

Some parameters are sharded, by hand as in parallel_layers.py, or by torch's DTensor. The others are whole on
every rank.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common import snapshot
from common.options import fail
from common.process_group import gather_objects, keep_alive


def is_sharded(parameter):
    """Whether this rank holds only a part of `parameter`."""
    if isinstance(parameter, DTensor):
        return parameter.placements[0].is_shard()
    return hasattr(parameter, "sharded_dim")


def local(tensor):
    """What this rank holds of `tensor`. It is not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(parameter):
    """The whole `parameter`. All ranks call it."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if not is_sharded(parameter):
        return parameter.detach()
    part = parameter.detach()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts, parameter.sharded_dim)


def save_weights(model, path):
    """Rank 0 writes the weights of the whole model to the file `path`, if there is one, for `torch.load`.

    All ranks call it. They gather one parameter at a time, and rank 0 keeps it, on the CPU.
    """
    if path is None:
        return
    weights = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        whole = gather(parameter)
        if dist.get_rank() == 0:
            weights[name] = whole.cpu()
    with keep_alive():  # the others wait for the disk
        if dist.get_rank() == 0:
            try:
                snapshot.write(path, weights)
            except OSError as error:
                fail(f"cannot write {path}: {error.strerror}; choose another --output")


def check_output(path):
    """`fail` now, and not after the training, if rank 0 cannot write to the folder of the file `path`."""
    if path is None or dist.get_rank() != 0:
        return
    if path.is_dir():
        fail(f"{path} is a folder: --output is the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        snapshot.unfinished(path).touch()
        snapshot.unfinished(path).unlink()
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; choose another --output")


@torch.no_grad()
def clip_grad_norm(model, max_norm):
    """Shrink the gradients to the norm `max_norm`, if theirs is larger. All ranks call it.

    The norm is that of the whole gradient. Each rank has other shards, so their squares are summed over the
    ranks. What is whole on every rank counts once. torch's `clip_grad_norm_` knows neither.
    """
    gradient = next(model.parameters()).grad
    of_shards = torch.zeros((), dtype=torch.float64, device=gradient.device)
    of_the_rest = torch.zeros_like(of_shards)
    for parameter in model.parameters():
        square = local(parameter.grad).double().square().sum()
        if is_sharded(parameter):
            of_shards += square
        else:
            of_the_rest += square
    dist.all_reduce(of_shards)
    norm = (of_shards + of_the_rest).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)  # as in torch's
    for parameter in model.parameters():
        local(parameter.grad).mul_(scale)


def report_memory(model, optimizer, report):
    """Print how many bytes each rank holds. All ranks call it after a step, when there are gradients.

    The optimizer's state is AdamW's two averages of each parameter. Its count of the steps is left out: one
    number for each parameter.
    """
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    averages = [optimizer.state[parameter]["exp_avg"] for parameter in parameters]
    averages += [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
    row = [sum(local(tensor).nbytes for tensor in kind) for kind in (parameters, gradients, averages)]
    rows = gather_objects(row)
    whole = sum(nbytes_of_whole(parameter) for parameter in parameters)
    table = {f"rank {rank}": row for rank, row in enumerate(rows)}
    table["one process"] = [whole, whole, 2 * whole]
    report.say(f"{'':<12}" + "".join(f"{name:>13}" for name in ("parameters", "gradients", "optimizer")))
    for name, row in table.items():
        report.say(f"{name:<12}" + "".join(f"{number / 1e6:>10.2f} MB" for number in row))
    report.write("memory", ranks=rows, whole=table["one process"])


def nbytes_of_whole(parameter):
    """The bytes of the whole `parameter`."""
    if is_sharded(parameter) and not isinstance(parameter, DTensor):
        return parameter.nbytes * dist.get_world_size()
    return parameter.nbytes
