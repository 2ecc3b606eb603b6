"""What step 05's less common flags do, each where train.py calls it."""

import functools
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from common.device import count_gpus
from common.options import fail


def check_gpus(use_gpu):
    """`fail` where there is no GPU, unless the user has asked for CPUs."""
    if use_gpu != 0 and count_gpus() == 0:
        fail("FSDP is for GPUs, and there are none here: practice on CPUs with --use-gpu 0")


def make_mesh(replicas, device, timeout):
    """The ranks that a model is sharded over: all, or `replicas` groups of ranks, each with a copy.

    That is hybrid sharding, HSDP. In a table with a row for each copy, the ranks of a column hold the same
    shard, and average its gradients. A collective may take `timeout` seconds.
    """
    world_size = dist.get_world_size()
    if world_size % replicas != 0:
        fail(f"--replicas {replicas} must divide the {world_size} ranks")
    if replicas == 1:
        return DeviceMesh.from_group(dist.group.WORLD, device.type)
    ranks = torch.arange(world_size).view(replicas, -1)  # best with a row for each node
    timeout = timedelta(seconds=timeout)  # init_device_mesh would leave it at 10 or 30 minutes
    rows, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout)
    columns, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout)
    names = ("replicate", "shard")
    return DeviceMesh.from_group([columns, rows], device.type, ranks, mesh_dim_names=names)


def keep_batch_norm(model, fsdp_kwargs):
    """With --precision bf16: batch norm stays in float32, like its statistics."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for module in model.modules():
        if isinstance(module, kinds):
            fully_shard(module, **fsdp_kwargs)


def checkpoint_activations(unit):
    """With --activation-checkpointing: keep what goes into a unit; backward computes the rest again."""
    # torch's checkpoint_wrapper would be a module around the unit, and change the names of its parameters.
    unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)


def initialize(model, build, device, resumes):
    """With --meta-init: give the sharded model, whose memory is not initialized, its first weights.

    `build` makes the whole model. A run that `resumes` gets its weights from the snapshot. It needs the whole
    model only if that has buffers which no snapshot contains.
    """
    buffers = dict(model.named_buffers())
    if not resumes or not buffers.keys() <= model.state_dict().keys():
        # A seed would fill every rank's shards with the same numbers: the first rank makes the whole instead.
        whole = build() if dist.get_rank() == 0 else None
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, {} if whole is None else whole.state_dict(), options=options)
        for name, buffer in buffers.items():  # a state_dict does not have all of them
            if whole is not None:
                buffer.copy_(whole.get_buffer(name))
            dist.broadcast(buffer, src=0)
    for buffer in buffers.values():  # last: set_model_state_dict wants all tensors on one device
        buffer.data = buffer.to(device)  # no buffer is offloaded


def check_sharded(optimizer):
    """TypeError for an optimizer that was built before `fully_shard`: it would train nothing, silently."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        raise TypeError("the optimizer was built before fully_shard, and would train nothing")


def reshard(model):
    """Free what is still gathered after a forward pass that no backward pass follows.

    That is the root, or with --no-reshard everything.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
