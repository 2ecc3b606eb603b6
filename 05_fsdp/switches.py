"""What step 05's less common switches do, each where train.py calls it."""

import functools
import gc
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from common.models import build_model
from common.options import count_gpus, fail


def check_gpus(args):
    """`fail` where there is no GPU, unless the user has asked for CPUs."""
    if args.use_gpu != 0 and not count_gpus():
        fail("FSDP is for GPUs, and there is none here: practise on CPUs with --use-gpu 0")


def make_mesh(args, device):
    """The ranks that a model is sharded over: all, or with --replicas each row of a table.

    A column of the table holds the same shard, and averages its gradients over the rows.
    """
    if dist.get_world_size() % args.replicas:
        fail(f"--replicas {args.replicas} must divide the {dist.get_world_size()} ranks")
    if args.replicas == 1:
        return DeviceMesh.from_group(dist.group.WORLD, device.type)
    ranks = torch.arange(dist.get_world_size()).view(args.replicas, -1)  # best with a row for each node
    timeout = timedelta(seconds=args.timeout)  # init_device_mesh would leave it at 10 or 30 minutes
    rows, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout)
    columns, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout)
    names = ("replicate", "shard")
    return DeviceMesh.from_group([columns, rows], device.type, ranks, mesh_dim_names=names)


def forget_meshes():
    """At a rank's end: DTensor's caches keep meshes for ever, and with them the process groups."""
    for mesh in gc.get_objects():
        if type(mesh) is DeviceMesh:
            getattr(mesh, "_pg_registry", {}).clear()


def keep_batch_norm(model, fsdp):
    """With --precision bf16: batch norm stays in float32, like its statistics."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            fully_shard(module, **fsdp)


def checkpoint_activations(unit):
    """With --activation-checkpointing: keep what goes into a unit; backward computes the rest again."""
    unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)


def fill(model, args, device):
    """With --meta-init: give the sharded model, which has shapes only, memory and its first weights."""
    model.to_empty(device="cpu" if args.cpu_offload else device)
    # A seed would fill every rank's shards with the same numbers: the first rank makes the whole instead.
    whole = build_model(args) if dist.get_rank() == 0 else None
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole else {}, options=options)
    for name, buffer in model.named_buffers():  # no state_dict has all of them, and none is offloaded
        buffer.data = (whole.get_buffer(name) if whole else buffer).to(device)
        dist.broadcast(buffer, src=0)


def check_sharded(optimizer):
    """TypeError for an optimizer that was built before `fully_shard`: it would train nothing, silently."""
    if not all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
        raise TypeError("the optimizer was built before fully_shard, and would train nothing")


def reshard(model):
    """Free what is still gathered after a forward pass that no backward pass follows.

    That is the root, or with --no-reshard everything.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
