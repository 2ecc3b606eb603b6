"""Step 05: FSDP: each rank keeps a shard of the weights, gradients and optimizer state, not a copy.

$ torchrun --standalone --nproc-per-node=2 05_fsdp/train.py                # on GPUs
$ torchrun --standalone --nproc-per-node=2 05_fsdp/train.py --use-gpu 0    # CPUs, for practice

A model big enough to see the bytes of each rank fall with every rank more:

$ torchrun --standalone --nproc-per-node=2 05_fsdp/train.py --use-gpu 0 --num-samples 64 \\
        --batch-size 8 --epochs 1 --model vit --vit-width 768 --vit-depth 12
"""

import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is
sys.path.insert(0, str(Path(__file__).resolve().parent))  # and this folder, where `sharded` is

import sharded
import switches
from common import snapshot
from common.mnist import fast, load_mnist
from common.models import build_model, model_name, set_learning_rate
from common.options import fail, make_parser, name_run, pick_device, positive_float, whole_number
from common.process_group import backends
from common.ranks import Control, check_same, disk_mates, let_go, meeting
from common.reporting import Reporter
from memory import MemoryReport


@record  # so that torchrun shows the error of a rank that fails
def worker(args):
    switches.check_gpus(args)  # no silent fallback: FSDP is for GPUs
    device = pick_device(args.use_gpu, int(os.environ["LOCAL_RANK"]))
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)  # from here on "cuda" is this rank's GPU
    with meeting():  # ends with one line if some of the ranks do not come
        dist.init_process_group(  # address, rank and world size: torchrun's variables say them
            backend=backends(device),  # NCCL for CUDA, and gloo for the CPU
            timeout=timedelta(seconds=args.timeout),  # a cut link is silent: only this ends it
            device_id=device if device.type == "cuda" else None,
        )
    try:
        main(args, device)
    finally:
        switches.forget_meshes()  # DTensor keeps them, and they keep the group
        let_go()  # frees what uses the group, the model too; after an error, ends it at once
        if dist.is_initialized():
            dist.destroy_process_group()


def units(args, model):
    """What is gathered at a time: not too little for the network, not too much for the memory."""
    if args.model == "vit":
        return list(model.net.encoder.layers)
    if args.model == "resnet18":
        return [model.net.layer1, model.net.layer2, model.net.layer3, model.net.layer4]
    return [layer for layer in model.net if list(layer.parameters())]


def build_sharded_model(args, device, mesh):
    """The model: this rank holds a shard of each weight, and gathers one unit at a time."""
    with torch.device("meta" if args.meta_init else "cpu"):
        model = build_model(args)
    how = {"mesh": mesh}
    unit_policy = root_policy = MixedPrecisionPolicy()
    if args.no_reshard:
        how["reshard_after_forward"] = False  # gathered once for forward and backward, not twice
    if args.cpu_offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    if args.precision == "bf16":
        switches.keep_batch_norm(model, how)  # in float32
        # Gathered and computed in bfloat16, reduced and updated in float32: updates are small.
        types = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        unit_policy = MixedPrecisionPolicy(**types)
        root_policy = MixedPrecisionPolicy(**types, output_dtype=torch.float32)
    for unit in units(args, model):
        if args.activation_checkpointing:
            switches.checkpoint_activations(unit)  # computed again in backward, not kept
        fully_shard(unit, **how, mp_policy=unit_policy)
    fully_shard(model, **how, mp_policy=root_policy)  # last: it takes what is in no unit
    if args.meta_init:
        switches.fill(model, args, device)  # there were only shapes until now
    return model


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data, saver):
        self.args, self.device = args, device
        self.model, self.optimizer, self.saver = model, optimizer, saver
        self.train_data, self.test_data = train_data, test_data
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.rank_batch = args.batch_size * args.accumulate  # images of this rank in a step
        self.sampler = DistributedSampler(train_data, seed=args.seed, drop_last=True)
        self.rest, self.fast = [], fast(args, device)
        self.loader = DataLoader(  # of the list `rest`, which each epoch fills anew, in place
            train_data, self.rank_batch, sampler=self.rest, drop_last=True, **self.fast
        )
        self.report = Reporter(args, device, len(train_data))
        self.memory = MemoryReport(model, optimizer, device, self.report)
        self.epoch = self.samples_seen = self.global_step = 0

    def train(self):
        if len(disk_mates(self.args.snapshot_dir)) < self.world_size:
            fail(f"{self.args.snapshot_dir} is not on a disk that all nodes share: use one")
        self.load_snapshot()
        # From here on, SIGTERM and Ctrl-C mean: save, then leave.
        self.control = Control(self.args.timeout)
        self.memory.table("at the start")
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.evaluate()
            self.save_snapshot()
        self.saver.wait()
        self.report.end(self.global_step)

    def run_epoch(self):
        # Seed and epoch alone make the order: a resumed run goes on with the rest of it.
        self.sampler.set_epoch(self.epoch)
        self.rest[:] = [*self.sampler][self.samples_seen // self.world_size :]
        losses = []
        self.model.train()
        for batch in self.report.progress(self.loader, self.epoch):
            losses.append(self.run_batch(batch))
            self.memory.after_step()
            self.samples_seen += self.rank_batch * self.world_size
            self.global_step += 1
            stop = self.control.asked_to_stop()
            if stop or self.report.is_due():
                means = torch.stack(losses) / self.world_size
                dist.all_reduce(means)  # each rank has seen its own part of the batches only
                self.report.train(self.epoch, self.global_step, means.tolist())
                losses = []
            if stop or self.report.save_is_due(self.global_step):
                self.save_snapshot()
            if stop:
                self.saver.wait()
                self.control.leave(stop, self.report, self.global_step)
        self.epoch, self.samples_seen = self.epoch + 1, 0

    def run_batch(self, batch):
        batch = [tensor.to(self.device, non_blocking=True) for tensor in batch]
        parts = list(zip(*(tensor.split(self.args.batch_size) for tensor in batch), strict=True))
        total = 0
        set_learning_rate(self.optimizer, self.args, self.global_step, self.report.steps)
        self.optimizer.zero_grad()
        for i, part in enumerate(parts, start=1):
            self.model.set_requires_gradient_sync(i == len(parts))
            loss = self.loss(*part) / len(parts)
            loss.backward()  # in the last, each rank gets its shard of the averaged gradients
            total += loss.detach()
        if self.args.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_norm)
        self.optimizer.step()
        return total  # a tensor: .item() would make the CPU wait for the GPU in every step

    def loss(self, images, labels):
        return F.cross_entropy(self.model(images), labels, label_smoothing=self.args.smoothing)

    def score(self, images, labels):  # of each image: its loss, and whether the answer is right
        outputs = self.model(images)
        return F.cross_entropy(outputs, labels, reduction="none"), outputs.argmax(dim=1) == labels

    @torch.no_grad()
    def evaluate(self):
        part = range(self.rank, len(self.test_data), self.world_size)  # DistributedSampler pads
        # As many batches on all ranks, because a forward pass gathers the weights from all of them.
        count = math.ceil(len(self.test_data) / self.world_size / 1000)
        batches = [part[i::count] for i in range(count)]
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right, images
        self.model.eval()
        self.share_buffers()
        for batch in DataLoader(self.test_data, batch_sampler=batches, **self.fast):
            losses, right = self.score(*(tensor.to(self.device) for tensor in batch))
            totals[0] += losses.sum()
            totals[1] += right.sum()
            totals[2] += right.numel()
        switches.reshard(self.model)  # what backward would have freed, and evaluation did not
        dist.all_reduce(totals)
        self.report.evaluation(self.epoch, self.global_step, *totals.tolist())

    def share_buffers(self):
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)  # batch norm's averages differ by rank: keep rank 0's

    def save_snapshot(self):
        if self.global_step == self.saver.newest:
            return  # it was saved when the run was stopped after an epoch's last step
        self.saver.wait()  # for the one before
        self.share_buffers()
        model, optimizer = get_state_dict(self.model, self.optimizer)  # shards of tensors
        state = {
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "global_step": self.global_step,
            "rng": snapshot.rng_states(self.device),
        }
        writer = sharded.Writer(self.args.snapshot_dir, self.global_step, self.saver.group)
        # Copied now, and written by each rank while training goes on.
        writing = dcp.async_save(
            {"model": model, "optimizer": optimizer["state"]},
            storage_writer=writer,
            process_group=self.saver.group,
        )
        self.saver.finish(writing, writer, state)

    def load_snapshot(self):
        state = snapshot.load_newest(self.args, sharded.read)
        if state is None:
            return
        self.epoch, self.samples_seen, self.global_step = snapshot.resume(state, self.report)
        self.saver.newest = self.global_step
        model, optimizer = get_state_dict(self.model, self.optimizer)
        shards = {"model": model, "optimizer": optimizer["state"]}
        with sharded.reader(state) as reader:
            dcp.load(shards, storage_reader=reader)  # cut anew when the world size has changed
        optimizer["state"] = shards["optimizer"]
        loaded = {"model_state_dict": model, "optim_state_dict": optimizer}
        set_state_dict(self.model, self.optimizer, **loaded)


def main(args, device):
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    name_run(args, model_name(args), train_data.name, train_data.fallback)
    check_same(args, __file__, train_data.checksum())  # or the nodes would hang, or train nonsense
    model = build_sharded_model(args, device, switches.make_mesh(args, device))
    torch.manual_seed(args.seed + dist.get_rank())  # weights must be alike, dropout must not
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=args.lr, fused=device.type != "cpu")
    switches.check_sharded(optimizer)  # built before the model is sharded, it would train nothing
    with sharded.Saver(args) as saver:  # its end waits for a save, after an error too
        Trainer(args, device, model, optimizer, train_data, test_data, saver).train()


def parse_args():
    parser = make_parser(__file__, __doc__, torchrun=True)
    add = parser.add_argument
    add("--accumulate", type=whole_number, default=1, metavar="N", help="batches in a step (1)")
    add("--clip-norm", type=positive_float, metavar="X", help="shrink gradients to this norm")
    add("--timeout", type=whole_number, default=120, help="seconds until a rank is lost (120)")
    add("--replicas", type=whole_number, default=1, metavar="N", help="of the sharded model (1)")
    add("--no-reshard", action="store_true", help="gather weights once for forward and backward")
    add("--activation-checkpointing", action="store_true", help="compute activations twice")
    add("--cpu-offload", action="store_true", help="shards and optimizer in the CPU's memory")
    add("--meta-init", action="store_true", help="no rank but the first ever holds the whole model")
    return parser.parse_args()


if __name__ == "__main__":
    worker(parse_args())
