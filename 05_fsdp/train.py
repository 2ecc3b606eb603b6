"""Step 05: FSDP: each rank keeps a shard of the weights, gradients and optimizer state, not a copy.

$ torchrun --standalone --nproc-per-node=2 05_fsdp/train.py                # on GPUs
$ torchrun --standalone --nproc-per-node=2 05_fsdp/train.py --use-gpu 0    # CPUs, for practice

A model so big that each rank holds visibly less when there are more ranks:

$ torchrun --standalone --nproc-per-node=2 05_fsdp/train.py --use-gpu 0 --num-samples 64 \\
        --batch-size 8 --epochs 1 --model vit --vit-width 768 --vit-depth 12
"""

import math
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is
sys.path.insert(0, str(Path(__file__).resolve().parent))  # and this folder, where `sharded` is

import fsdp_options
import sharded
from common.device import setup_device
from common.loading import fingerprint, group_batches, loader_options, to_device
from common.mnist import load_mnist
from common.models import build_model
from common.nodes import check_ranks_agree, check_shared
from common.options import make_parser, positive_float, whole_number
from common.process_group import backends, release_process_group, rendezvous
from common.reporting import Reporter
from common.run import Run, name_of
from common.sampler import ResumableSampler
from common.schedule import Schedule
from common.snapshot import SnapshotFolder, restore_rng, rng_states
from common.stopping import GracefulStop
from memory import MemoryReport


@record  # so that torchrun shows the error of a rank that fails
def worker(args):
    fsdp_options.check_gpus(args.use_gpu)  # no silent fallback: FSDP is for GPUs
    device = setup_device(args.use_gpu, int(os.environ["LOCAL_RANK"]))
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)  # from here on "cuda" is this rank's GPU
    with rendezvous():  # one line if some of the ranks do not come
        dist.init_process_group(  # torchrun's environment variables have address and rank
            backend=backends(device),  # NCCL for CUDA, and gloo for the CPU
            timeout=timedelta(seconds=args.timeout),  # a rank that is silent for longer is lost
            device_id=device if device.type == "cuda" else None,  # NCCL connects now, not later
        )
    try:
        main(args, device)
    finally:
        release_process_group()  # frees the model, which holds the group; aborts after an error
        if dist.is_initialized():
            dist.destroy_process_group()


def units(args, model):
    """What FSDP gathers at a time: big enough for the network, small enough for the memory."""
    if args.model == "vit":
        return list(model.net.encoder.layers)
    if args.model == "resnet18":
        return [model.net.layer1, model.net.layer2, model.net.layer3, model.net.layer4]
    return [layer for layer in model.net if list(layer.parameters())]


def shard_model(args, model, device, mesh):
    """Leave a shard of each weight on this rank; the ranks gather one unit at a time."""
    fsdp_kwargs = {"mesh": mesh}
    unit_policy = root_policy = MixedPrecisionPolicy()
    if args.no_reshard:
        fsdp_kwargs["reshard_after_forward"] = False  # gathered once for forward and backward
    if args.cpu_offload:
        fsdp_kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    if args.precision == "bf16":
        fsdp_options.keep_batch_norm(model, fsdp_kwargs)  # in float32
        # Gathered and computed in bfloat16, reduced and updated in float32: updates are small.
        dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        unit_policy = MixedPrecisionPolicy(**dtypes)
        root_policy = MixedPrecisionPolicy(**dtypes, output_dtype=torch.float32)
    for unit in units(args, model):
        if isinstance(unit, FSDPModule):
            continue  # a batch norm that is a unit of its own
        if args.activation_checkpointing:
            fsdp_options.checkpoint_activations(unit)  # computed again in backward, not kept
        fully_shard(unit, **fsdp_kwargs, mp_policy=unit_policy)
    fully_shard(model, **fsdp_kwargs, mp_policy=root_policy)  # last: what is in no unit


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data, saver, report):
        self.args = args
        self.device = device
        self.model = model
        self.optimizer = optimizer
        self.saver = saver
        self.report = report
        self.report.start(train_data, args.epochs, args.batch_size, vars(args), args.accumulate)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        options = loader_options(args.num_workers, device)
        train_sampler = DistributedSampler(train_data, seed=args.seed, drop_last=True)
        self.sampler = ResumableSampler(train_sampler)
        self.train_loader = DataLoader(
            train_data, args.batch_size, sampler=self.sampler, drop_last=True, **options
        )
        sampler = DistributedSampler(test_data, shuffle=False)
        self.test_loader = DataLoader(test_data, args.eval_batch_size, sampler=sampler, **options)
        self.memory = MemoryReport(model, optimizer, device, report)
        self.schedule = Schedule(optimizer, args.schedule)
        self.epoch = 0
        self.samples_seen = 0  # in this epoch
        self.global_step = 0

    def train(self, state):
        self.load_snapshot(state)
        # From here on, signals mean: save, then exit.
        self.stop = GracefulStop(self.args.timeout)
        self.memory.table("at the start")
        if self.global_step > 0 and self.samples_seen == 0:
            self.evaluate()  # the run may have ended between an epoch's snapshot and its evaluation
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.save_snapshot()
            self.evaluate()
        self.saver.wait()
        self.report.end(self.global_step)

    def run_epoch(self):
        # Seed and epoch alone decide the order, so a resumed run continues where it stopped.
        self.sampler.set_epoch(self.epoch, start=self.samples_seen // self.world_size)
        losses = []
        self.model.train()
        steps = group_batches(self.stop.batches(self.train_loader), self.args.accumulate)
        for micro_batches in self.report.progress(steps, self.epoch, self.samples_seen):
            losses.append(self.run_batch(micro_batches))
            self.memory.after_step()
            self.samples_seen += self.args.batch_size * self.args.accumulate * self.world_size
            self.global_step += 1
            stopping = self.stop.requested()
            if stopping or self.report.is_due(self.global_step):
                means = torch.stack(losses) / self.world_size
                dist.all_reduce(means)  # each rank has seen its own part of the batches only
                self.report.train(self.epoch, self.global_step, means.tolist())
                losses = []
            if stopping or self.report.save_is_due(self.global_step):
                self.save_snapshot()
            if stopping:
                self.saver.wait()
                self.stop.exit(self.report, self.global_step)
        self.epoch += 1
        self.samples_seen = 0

    def run_batch(self, micro_batches):
        # The ranks' gradients are averaged. Each rank divides by the mean number of targets, not by
        # its own: then the average is the gradient of the mean loss over all ranks' targets.
        count = sum(self.count_targets(batch) for batch in micro_batches)
        num_targets = torch.full((), count, dtype=torch.float64, device=self.device)
        dist.all_reduce(num_targets)
        targets_per_rank = num_targets.clamp(min=1) / self.world_size
        seen = self.samples_seen / len(self.train_loader.dataset)
        self.schedule.set_progress((self.epoch + seen) / self.args.epochs)
        self.optimizer.zero_grad()
        step_loss = 0
        for number, batch in enumerate(micro_batches, start=1):
            batch = to_device(batch, self.device)
            # Until the last backward(), each rank keeps whole gradients, not a shard of them.
            is_last = number == len(micro_batches)
            self.model.set_requires_gradient_sync(is_last)
            loss = self.loss(batch) / targets_per_rank
            loss.backward()  # in the last, each rank gets its shard of the averaged gradients
            step_loss += loss.detach()
        if self.args.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_norm)
        self.optimizer.step()
        return step_loss  # a tensor: .item() would make the CPU wait for the GPU in every step

    def count_targets(self, batch):
        """How many answers of the batch count in the loss."""
        _, labels = batch
        return labels.numel()

    def loss(self, batch):
        """The sum, not the mean, of the losses of these answers."""
        images, labels = batch
        logits = self.model(images)
        return F.cross_entropy(logits, labels, reduction="sum")

    def per_sample_metrics(self, batch):
        """Loss, correct answers and counted answers: three tensors whose first dimension is B."""
        images, labels = batch
        logits = self.model(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        correct = logits.argmax(dim=1) == labels
        return losses, correct, torch.ones_like(labels)

    @torch.no_grad()
    def evaluate(self):
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, targets
        # DistributedSampler repeats samples, to give all ranks the same number: they do not count.
        remaining = len(range(self.rank, len(self.test_loader.dataset), self.world_size))
        self.model.eval()
        self.share_buffers()
        for batch in self.stop.batches(self.test_loader):
            batch = to_device(batch, self.device)
            metrics = self.per_sample_metrics(batch)
            totals += torch.stack([metric[:remaining].double().sum() for metric in metrics])
            remaining = max(0, remaining - self.args.eval_batch_size)
            if self.stop.requested():
                self.saver.wait()
                self.stop.exit(self.report, self.global_step)
        fsdp_options.reshard(self.model)  # no backward pass has freed what is gathered
        dist.all_reduce(totals)
        self.report.evaluation(self.epoch, self.global_step, *totals.tolist())

    def share_buffers(self):
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)  # batch norm's averages differ by rank: keep rank 0's

    def save_snapshot(self):
        if self.global_step == self.saver.loaded:
            return  # it was saved when the run was stopped after an epoch's last step
        self.saver.wait()  # for the previous snapshot
        self.share_buffers()
        model, optimizer = get_state_dict(self.model, self.optimizer)  # this rank's shards
        state = {
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "global_step": self.global_step,
            "rng": rng_states(self.device),
        }
        writer = self.saver.writer(self.global_step)
        # Copied now, and written by each rank while training continues.
        writing = dcp.async_save(
            {"model": model, "optimizer": optimizer["state"]},
            storage_writer=writer,
            process_group=self.saver.group,
        )
        self.saver.commit(writing, writer, state)

    def load_snapshot(self, state):
        if state is None:
            return
        self.report.resumed(state)
        restore_rng(state, self.device, self.train_loader.generator, self.report)
        # A new optimizer has no state yet: this makes it, with a step at learning rate 0.
        model, optimizer = get_state_dict(self.model, self.optimizer)
        optimizer["state"] = sharded.saved_slots(optimizer["state"], state)
        shards = {"model": model, "optimizer": optimizer["state"]}
        with sharded.reader(state) as reader:
            dcp.load(shards, storage_reader=reader)  # reshards if the world size has changed
        sharded.load_groups(optimizer["param_groups"], state["param_groups"])
        loaded = {"model_state_dict": model, "optim_state_dict": optimizer}
        options = StateDictOptions(strict=False)  # a parameter without gradients has no state
        set_state_dict(self.model, self.optimizer, **loaded, options=options)
        self.schedule.reset()  # to the learning rates of this run's flags
        self.epoch = state["epoch"]
        # The number of ranks may have changed: round up to a multiple of it.
        self.samples_seen = math.ceil(state["samples_seen"] / self.world_size) * self.world_size
        self.global_step = state["global_step"]
        self.saver.loaded = self.global_step


def main(args, device):
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    # Nodes that differ would wait for each other until the timeout, or train on different data.
    check_ranks_agree(__file__, flags=vars(args), data=fingerprint(train_data))
    build = partial(build_model, args.model, args.precision, args.vit_width, args.vit_depth)
    with torch.device("meta" if args.meta_init else "cpu"):
        model = build()
    if args.compile:
        model.compile()  # in place, so that the names of its parameters stay as they are
    run = Run(args.step, name_of(model), name_of(train_data), args.precision, args.seed, vars(args))
    snapshots = SnapshotFolder(args.snapshot_dir, run, args.verbose, sharded.read)
    check_shared(snapshots.path)
    state = snapshots.load_newest()  # first: a run that resumes needs no initial weights
    mesh = fsdp_options.make_mesh(args.replicas, device, args.timeout)
    shard_model(args, model, device, mesh)
    if args.meta_init:  # there were only shapes until now, and a snapshot has the weights
        model.to_empty(device="cpu" if args.cpu_offload else device)
        fsdp_options.initialize(model, build, device, resumes=state is not None)
    torch.manual_seed(args.seed + dist.get_rank())  # weights must be alike, dropout must not
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=args.lr, fused=device.type != "cpu")
    fsdp_options.check_sharded(optimizer)  # built before the model is sharded, it trains nothing
    report = Reporter(run, device, args.metrics, args.profile, args.verbose)
    with sharded.Saver(snapshots, args.timeout) as saver:  # its end waits for a save
        trainer = Trainer(args, device, model, optimizer, train_data, test_data, saver, report)
        trainer.train(state)


def parse_args():
    parser = make_parser(__file__, __doc__, launcher="torchrun")
    add = parser.add_argument
    add("--accumulate", type=whole_number, default=1, metavar="N", help="batches in a step (1)")
    add("--clip-norm", type=positive_float, metavar="X", help="shrink gradients to this norm")
    add("--replicas", type=whole_number, default=1, metavar="N", help="copies, HSDP (1)")
    add("--no-reshard", action="store_true", help="gather weights once for forward and backward")
    add("--activation-checkpointing", action="store_true", help="compute activations twice")
    add("--cpu-offload", action="store_true", help="shards and optimizer in the CPU's memory")
    add("--meta-init", action="store_true", help="no rank but the first ever holds the whole model")
    return parser.parse_args()


if __name__ == "__main__":
    worker(parse_args())
