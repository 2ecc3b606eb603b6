"""The table of the bytes that each rank holds, and of those that it would hold under DDP."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class MemoryReport:
    """Prints the table, and again after the first step, when gradients and optimizer state are there."""

    def __init__(self, model, optimizer, device, report):
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.report = report
        self.gathered = 0
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.hooks = [unit.register_forward_pre_hook(self.count_gathered) for unit in units]

    def count_gathered(self, unit, inputs):
        whole = sum(p.nbytes for p in self.model.parameters() if not isinstance(p, DTensor))
        self.gathered = max(self.gathered, whole)

    def after_step(self):
        """Print the table after the first step; nothing after the others."""
        if self.hooks:
            self.table("after one step")
            while self.hooks:
                self.hooks.pop().remove()

    def table(self, moment):
        """Print the table; all ranks must call it."""
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        slots = [value for value in states if isinstance(value, torch.Tensor)]
        kinds = (parameters, gradients, slots)
        whole = [sum(t.nbytes for t in kind) for kind in kinds]
        local = [[t.to_local() if isinstance(t, DTensor) else t for t in kind] for kind in kinds]
        shards = [sum(t.nbytes for t in kind) for kind in local]
        row = [*shards, self.gathered, sum(shards) + self.gathered]
        names = ["parameters", "gradients", "optimizer", "gathered", "peak"]
        if self.device.type != "cpu":
            names.append("allocator")  # with activations, and buffers for the collectives
            row.append(torch.accelerator.max_memory_allocated())
        rows = [None] * dist.get_world_size()
        dist.all_gather_object(rows, row)
        self.report.say(f"{moment:<18}" + "".join(f"{name:>13}" for name in names))
        table = {f"rank {rank}": row for rank, row in enumerate(rows)}
        table["each under DDP"] = [*whole, 0, sum(whole)]
        for name, numbers in table.items():
            self.report.say(f"{name:<18}" + "".join(f"{number / 1e6:>10.2f} MB" for number in numbers))
        self.report.write("memory", moment=moment, ranks=rows, ddp=whole)
