"""Step 05: FSDP: each rank keeps a shard of parameters, gradients and optimizer state, not a copy.

On one machine with GPUs; then on CPU workers, for practice:

    torchrun --standalone --nproc-per-node=2 05_fsdp/train.py
    torchrun --standalone --nproc-per-node=2 05_fsdp/train.py --use-gpu 0 --num-samples 10240 --batch-size 32

A bigger model, to see the bytes per rank fall with every rank more:

    torchrun --standalone --nproc-per-node=2 05_fsdp/train.py --use-gpu 0 --model vit --vit-width 768 \\
        --vit-depth 12 --num-samples 64 --batch-size 8 --epochs 1
"""

import functools
import gc
import math
import os
import shutil
import signal
import socket
import sys
import time
import traceback
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that `common` is found

from common.options import check_torchrun, fail, make_parser, pick_device, positive_float, whole_number


def parse_args():
    parser = make_parser(__file__, __doc__)
    add = parser.add_argument
    add("--accumulate", type=whole_number, default=1, metavar="N", help="batches per step, averaged once (1)")
    add("--clip-norm", type=positive_float, metavar="X", help="shrink gradients whose norm is above X")
    add("--timeout", type=whole_number, default=120, metavar="S", help="seconds until a rank is lost (120)")
    add("--replicas", type=whole_number, default=1, metavar="N", help="copies of the sharded model (1)")
    add("--no-reshard", action="store_true", help="keep parameters gathered between forward and backward")
    add("--activation-checkpointing", action="store_true", help="compute activations again in backward")
    add("--cpu-offload", action="store_true", help="shards, and the optimizer's step, in the CPU's memory")
    add("--meta-init", action="store_true", help="no rank but the first ever holds the whole model")
    args = parser.parse_args()
    check_torchrun()
    if int(os.environ["WORLD_SIZE"]) % args.replicas:
        fail(f"--replicas {args.replicas} must divide the {os.environ['WORLD_SIZE']} ranks")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch, which takes seconds to import: --help and typos are answered at once

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

from common import snapshot
from common.mnist import keep_batch, load_mnist
from common.models import build_model
from common.reporting import LOG_EVERY, Reporter


def setup(args):
    """Make this process one of the ranks that torchrun has started; returns its device."""
    if args.use_gpu != 0 and not torch.cuda.is_available():
        fail("FSDP is for GPUs, and CUDA is not available: --use-gpu 0 practises on CPU workers with gloo")
    device = pick_device(args.use_gpu, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group(  # where to meet, rank and world size: from torchrun's environment
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # offloaded tensors are on CPUs
        timeout=timedelta(seconds=args.timeout),  # a link that is cut is silent: nothing else ends the wait
        device_id=device if device.type == "cuda" else None,
    )
    return device


def cleanup():
    """Leave the process group. FSDP must be gone by then: gloo's threads live on in it and abort the exit."""
    error = sys.exception()
    if error:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if error and "nccl" in dist.get_backend_config():
        dist.group.WORLD.abort()  # destroying would wait for the other ranks, and they wait for this one
    else:
        dist.destroy_process_group()


def check_that_nodes_agree(args, data):
    """Stop if a rank's flags, data or code are not rank 0's: together they would hang, or train nonsense."""
    own = ["data_dir", "snapshot_dir", "metrics", "verbose"]  # of each node
    mine = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in own}
    scripts = [Path(__file__), *sorted(Path(snapshot.__file__).parent.glob("*.py"))]
    mine["code"] = f"{zlib.crc32(b''.join(script.read_bytes() for script in scripts)):08x}"
    mine["data"] = f"{data.name} {zlib.crc32(data.labels.numpy(), zlib.crc32(data.images.numpy())):08x}"
    mine["torch"] = torch.__version__
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), mine))
    first_host, first = ranks[0]
    differences = [
        f"rank {rank} on {host} has {name} {theirs.get(name)}, rank 0 on {first_host} has {first[name]}"
        for rank, (host, theirs) in enumerate(ranks)
        for name in first
        if theirs.get(name) != first[name]
    ]
    if differences:
        fail(f"{'; '.join(differences[:6])}: make the nodes the same")


def units(args, model):
    """The parts that are gathered one at a time: few enough for the network, small enough for the memory."""
    if args.model == "vit":
        return list(model.net.encoder.layers)
    if args.model == "resnet18":
        return [model.net.layer1, model.net.layer2, model.net.layer3, model.net.layer4]
    return [layer for layer in model.net if list(layer.parameters())]


def make_mesh(args, device):
    """The ranks that a model is sharded over: all, or each row of a table. A column holds the same shard."""
    if args.replicas == 1:
        return DeviceMesh.from_group(dist.group.WORLD, device.type)
    ranks = torch.arange(dist.get_world_size()).view(args.replicas, -1)  # best with a row for each node
    timeout = timedelta(seconds=args.timeout)  # init_device_mesh would leave it at 10 or 30 minutes
    rows, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout)
    columns, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout)
    return DeviceMesh.from_group([columns, rows], device.type, ranks, mesh_dim_names=("replicate", "shard"))


def build_sharded_model(args, device, mesh):
    """The model, of which this rank holds its shards, and whole only the unit that is being computed."""
    with torch.device("meta" if args.meta_init else "cpu"):
        model = build_model(args)
    fsdp = {
        "mesh": mesh,
        "reshard_after_forward": False if args.no_reshard else None,  # None: all are freed but the root
    }
    if args.cpu_offload:
        fsdp["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    unit_policy = root_policy = MixedPrecisionPolicy()
    if args.precision == "bf16":
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                fully_shard(module, **fsdp)  # stays in float32, like its statistics
        # The rest is gathered and computed in bfloat16, but reduced and kept in float32: updates are small.
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        unit_policy = MixedPrecisionPolicy(**dtypes)
        root_policy = MixedPrecisionPolicy(**dtypes, output_dtype=torch.float32)  # for the loss
    for unit in units(args, model):
        if args.activation_checkpointing:
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
        fully_shard(unit, **fsdp, mp_policy=unit_policy)
    fully_shard(model, **fsdp, mp_policy=root_policy)  # last: the root takes the parameters that are left
    if args.meta_init:
        model.to_empty(device="cpu" if args.cpu_offload else device)
        # A seed would fill every rank's shards with the same numbers: the first rank makes the whole instead.
        whole = build_model(args).state_dict() if dist.get_rank() == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole, options=options)
        for buffer in model.buffers():
            buffer.data = buffer.to(device)  # which are not offloaded
    return model


stop_signal = 0


def note_signal(number, frame):
    """SIGTERM from a scheduler, or Ctrl-C: let the step that is under way end, and save before leaving."""
    global stop_signal
    stop_signal = number


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data):
        self.args = args
        self.device = device
        self.model = model
        self.optimizer = optimizer
        self.train_data = train_data
        self.test_data = test_data
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.timeout))  # on CPUs
        self.launcher = os.getppid()
        self.storage = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.timeout))  # for a thread
        self.global_batch = args.batch_size * args.accumulate * self.world_size
        self.sampler = DistributedSampler(train_data, seed=args.seed, drop_last=True)
        self.report = Reporter(args, train_data, device, self.rank, self.world_size)
        self.report.detail(f"on {socket.gethostname()}, node {os.environ['GROUP_RANK']}")
        self.epoch = self.samples_seen = self.global_step = self.gathered = 0
        self.saving = None
        self.parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.hooks = [part.register_forward_pre_hook(self.count_gathered) for part in self.parts]

    def train(self):
        self.load_snapshot()
        self.check_that_the_disk_is_shared()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note_signal)
        self.report_memory("at the start")
        with ThreadPoolExecutor(1) as self.background:  # its end waits for a save, also after an error
            while self.epoch < self.args.epochs:
                self.run_epoch()
                self.evaluate()
                self.save_snapshot()
            self.wait_for_snapshot()
        self.report.end(self.global_step)

    def run_epoch(self):
        # The order follows from seed and epoch alone, so a resumed run goes on where the other one stopped.
        self.sampler.set_epoch(self.epoch)
        order = list(self.sampler)[self.samples_seen // self.world_size :]
        loader = DataLoader(
            self.train_data,
            batch_size=self.args.batch_size * self.args.accumulate,
            sampler=order,
            drop_last=True,
            collate_fn=keep_batch,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed: not from the state that snapshots keep
        )
        losses = []
        self.model.train()
        for batch, (images, labels) in enumerate(self.report.progress(loader, self.epoch), start=1):
            # Has any rank been told to stop, or lost its launcher? Asked beside the step, that costs no time.
            vote = torch.tensor([stop_signal if os.getppid() == self.launcher else signal.SIGTERM])
            asked = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.control, async_op=True)
            losses.append(self.run_batch(images, labels))
            if self.hooks:
                self.report_memory("after one step")
                while self.hooks:
                    self.hooks.pop().remove()
            self.samples_seen += self.global_batch
            self.global_step += 1
            asked.wait()
            stop = vote.item()
            if batch % LOG_EVERY == 0 or batch == len(loader) or stop:
                losses = torch.stack(losses) / self.world_size
                dist.all_reduce(losses)  # each rank has seen only its own part of the batches
                self.report.train(self.epoch, self.global_step, losses.tolist())
                losses = []
            due = self.args.save_every and self.global_step % self.args.save_every == 0
            if stop or (due and batch < len(loader)):  # at the epoch's end it is saved anyway
                self.save_snapshot()
            if stop:  # on all ranks after the same step
                self.wait_for_snapshot()
                dist.barrier(group=self.control)  # the launcher kills the rest 30 s after the first to leave
                name = signal.Signals(stop).name
                self.report.say(f"{name}: saved at step {self.global_step}; run the same again to go on")
                sys.exit(128 + stop)
        self.epoch, self.samples_seen = self.epoch + 1, 0

    def run_batch(self, images, labels):
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        batches = zip(images.split(self.args.batch_size), labels.split(self.args.batch_size), strict=True)
        losses = []
        self.optimizer.zero_grad()
        for images, labels in batches:
            last = len(losses) == self.args.accumulate - 1
            self.model.set_requires_gradient_sync(last)
            loss = F.cross_entropy(self.model(images), labels) / self.args.accumulate
            loss.backward()  # in the last of these each rank gets its shard of the gradients' averages
            losses.append(loss.detach())  # tensors: .item() would make the CPU wait for the GPU at every step
        if self.args.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_norm)
        self.optimizer.step()
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self):
        part = range(self.rank, len(self.test_data), self.world_size)  # DistributedSampler would pad it
        # Parts differ by an image; batches must be as many on all ranks, which gather in each forward pass.
        count = math.ceil(len(self.test_data) / self.world_size / 1000)
        batches = [part[i::count] for i in range(count)]
        loader = DataLoader(
            self.test_data, batch_sampler=batches, collate_fn=keep_batch, generator=torch.Generator()
        )
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, images
        self.model.eval()
        self.share_buffers()
        for images, labels in loader:
            images, labels = images.to(self.device), labels.to(self.device)
            outputs = self.model(images)
            totals[0] += F.cross_entropy(outputs, labels, reduction="sum")
            totals[1] += (outputs.argmax(dim=1) == labels).sum()
            totals[2] += len(labels)
        for part in self.parts:
            part.reshard()  # the root stays gathered until there is a backward pass, or all with --no-reshard
        dist.all_reduce(totals)
        loss, correct, total = totals.tolist()
        self.report.evaluation(self.epoch, self.global_step, loss / total, int(correct), int(total))

    def share_buffers(self):
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)  # batch norm's statistics differ by rank: test and save rank 0's

    def check_that_the_disk_is_shared(self):
        """Stop if a node has a disk of its own: a snapshot is one folder, into which all ranks write."""
        mark = self.args.snapshot_dir / f".snapshot-{uuid.uuid4()}.tmp"  # the next save would clear it away
        mark.touch()
        marks = [None] * self.world_size
        dist.all_gather_object(marks, mark.name, group=self.control)
        hidden = [rank for rank, name in enumerate(marks) if not (self.args.snapshot_dir / name).exists()]
        dist.barrier(group=self.control)  # marks stay, and nobody saves, until all have looked
        mark.unlink(missing_ok=True)
        if hidden:
            fail(f"{self.args.snapshot_dir} here is not rank {hidden[0]}'s: use one disk for all nodes")

    def save_snapshot(self):
        self.wait_for_snapshot()
        self.share_buffers()
        state = {
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "global_step": self.global_step,
            "world_size": self.world_size,
        }
        state = snapshot.complete(self.args, self.train_data.name, state)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        folder = snapshot.unfinished(self.args.snapshot_dir, self.global_step)
        # Copies the shards now; writes them, each rank its own, while training goes on.
        shards = {"model": model, "optimizer": optimizer["state"]}
        writing = dcp.async_save(shards, checkpoint_id=folder, process_group=self.storage)
        self.saving = self.background.submit(self.finish_snapshot, writing, state)

    def finish_snapshot(self, writing, state):
        problem = [None]
        try:
            writing.result()
            if self.rank == 0:
                path = snapshot.finish(self.args.snapshot_dir, state)
                snapshot.sweep(self.args.snapshot_dir)
                self.report.detail(f"saved {path}")
        except dcp.CheckpointException as error:  # the same on all ranks
            rank, (reason, _) = next(iter(error.failures.items()))
            reason = str(reason).splitlines()[0]  # not always the one that the disk gave
            free = shutil.disk_usage(self.args.snapshot_dir).free / 1e6
            problem = [f"rank {rank} cannot write its shards: {reason} ({free:.1f} MB are free)"]
        except OSError as error:
            problem = [f"cannot write to {self.args.snapshot_dir}: {error.strerror}"]
        dist.broadcast_object_list(problem, src=0, group=self.storage)
        return problem[0]

    def wait_for_snapshot(self):
        problem = self.saving.result() if self.saving else None
        self.saving = None
        if problem and self.rank != 0:
            sys.exit(2)  # all ranks know, and one says it
        if problem:
            fail(f"{problem}; {snapshot.REMEDY}")

    def load_snapshot(self):
        state = snapshot.load_newest(self.args, self.train_data.name, sharded=True)
        found = [None] * self.world_size
        dist.all_gather_object(found, state["global_step"] if state else None, group=self.control)
        if len(set(found)) > 1:
            fail(f"the ranks find snapshots of different steps: {found}; use one disk for all nodes")
        if state is None:
            return
        model, optimizer = get_state_dict(self.model, self.optimizer)
        shards = {"model": model, "optimizer": optimizer["state"]}
        folder = self.args.snapshot_dir / f"snapshot-{state['global_step']:08d}"
        dcp.load(shards, checkpoint_id=folder, process_group=self.storage)  # cut anew for this world size
        optimizer["state"] = shards["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.epoch = state["epoch"]
        # A multiple of the world size: after a change of it, fewer than that many images are left out.
        self.samples_seen = math.ceil(state["samples_seen"] / self.world_size) * self.world_size
        self.global_step = state["global_step"]
        self.report.say(f"resumed from {self.args.snapshot_dir}: epoch {self.epoch}, step {self.global_step}")

    def count_gathered(self, unit, inputs):
        gathered = sum(p.nbytes for p in self.model.parameters() if not isinstance(p, DTensor))
        self.gathered = max(self.gathered, gathered)

    def report_memory(self, moment):
        """Print a table of the bytes that each rank holds, and of those that it would hold under DDP."""
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        state = [tensor for slots in self.optimizer.state.values() for tensor in slots.values()]
        kinds = (parameters, gradients, state)
        whole = [sum(t.nbytes for t in kind) for kind in kinds]
        local = [[t.to_local() if isinstance(t, DTensor) else t for t in kind] for kind in kinds]
        shards = [sum(t.nbytes for t in kind) for kind in local]
        row = [*shards, self.gathered, sum(shards) + self.gathered]
        names = ["parameters", "gradients", "optimizer", "gathered", "peak"]
        if self.device.type == "cuda":
            names.append("allocator")  # with activations, and buffers for the collectives
            row.append(torch.cuda.max_memory_allocated())
        rows = [None] * self.world_size
        dist.all_gather_object(rows, row, group=self.control)
        self.report.say(f"{moment:<18}" + "".join(f"{name:>13}" for name in names))
        table = {f"rank {rank}": row for rank, row in enumerate(rows)}
        table["each under DDP"] = [*whole, 0, sum(whole)]
        for name, row in table.items():
            self.report.say(f"{name:<18}" + "".join(f"{number / 1e6:>10.2f} MB" for number in row))
        self.report.write("memory", moment=moment, ranks=rows, ddp=whole)


def main(args, device):
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    check_that_nodes_agree(args, train_data)
    mesh = make_mesh(args, device)
    try:
        model = build_sharded_model(args, device, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        if not all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]):
            raise TypeError("the optimizer was built before fully_shard, and would train nothing")
        Trainer(args, device, model, optimizer, train_data, test_data).train()
    finally:
        mesh._pg_registry.clear()  # DTensor's caches keep the mesh for ever, and with it the groups


@record  # hands the traceback of a rank that fails to torchrun
def worker(args):
    try:
        device = setup(args)
    except dist.DistError as error:
        fail(f"the ranks do not meet: {str(error).splitlines()[0]}; is the port free, is every rank started?")
    try:
        main(args, device)
    except RuntimeError as error:
        seen_by = f"rank {dist.get_rank()} on {socket.gethostname()}"
        error.add_note(f"Seen by {seen_by}. After a time-out or a lost connection look at the others first.")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stop_signal and "by peer" in str(error):  # the launcher was faster: it ends this one already
            sys.exit(128 + stop_signal)
        time.sleep(5)  # if another rank's end is the cause, the launcher now shows that one and ends this one
        raise
    finally:
        cleanup()


if __name__ == "__main__":
    worker(args)
