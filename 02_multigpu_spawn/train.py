"""Step 02: one process for each GPU or CPU worker, each with the whole model; DDP averages.

$ python 02_multigpu_spawn/train.py --world-size 2                        # MNIST, three epochs
$ python 02_multigpu_spawn/train.py --world-size 2 --num-samples 10240    # synthetic digits
"""

import math
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is
sys.path.insert(0, str(Path(__file__).resolve().parent))  # and this folder, where `parent` is

from common.buckets import fix_bucket_order
from common.device import count_gpus, setup_device
from common.loading import loader_options, to_device
from common.mnist import load_mnist
from common.models import build_model
from common.options import make_parser, whole_number
from common.process_group import backends, keep_alive, release_process_group, rendezvous
from common.reporting import Reporter
from common.run import Run, name_of
from common.sampler import ResumableSampler
from common.schedule import Schedule
from common.snapshot import SnapshotFolder, keep_kernels, restore_rng, rng_states
from common.stopping import GracefulStop
from parent import join


def worker(rank, port, args):
    device = setup_device(args.use_gpu, rank, args.world_size)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)  # from here on "cuda" is this rank's GPU
    with rendezvous():  # one line if some of the ranks do not come
        dist.init_process_group(
            backend=backends(device),  # NCCL for CUDA, and gloo for the CPU
            store=dist.TCPStore("127.0.0.1", port),  # a client of spawn's store
            rank=rank,
            world_size=args.world_size,
            timeout=timedelta(seconds=args.timeout),  # a rank that is silent for longer is lost
            device_id=device if device.type == "cuda" else None,  # NCCL connects now, not later
        )
    try:
        main(args, device)
    finally:
        release_process_group()  # frees the model, which holds the group; aborts after an error
        if dist.is_initialized():
            dist.destroy_process_group()


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data, snapshots, report):
        self.args = args
        self.device = device
        self.model = model
        # Sends rank 0's weights to all. The gradients are views of its buckets, not copies.
        self.ddp_model = DDP(model, gradient_as_bucket_view=True)
        self.optimizer = optimizer
        self.snapshots = snapshots
        self.report = report
        self.report.start(train_data, args.epochs, args.batch_size, vars(args))
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
        use_bf16 = args.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)
        self.schedule = Schedule(optimizer, args.schedule)
        self.epoch = 0
        self.samples_seen = 0  # in this epoch
        self.global_step = 0

    def train(self):
        # DDP's first backward pass decides in which order it adds: the same in a resumed run.
        fix_bucket_order(self.model, self.loss, self.autocast, self.train_loader, self.device)
        self.load_snapshot()
        # From here on, signals mean: save, then exit.
        self.stop = GracefulStop(self.args.timeout)
        if self.global_step > 0 and self.samples_seen == 0:
            self.evaluate()  # the run may have ended between an epoch's snapshot and its evaluation
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.save_snapshot()
            self.evaluate()
        self.report.end(self.global_step)

    def run_epoch(self):
        # Seed and epoch alone decide the order, so a resumed run continues where it stopped.
        self.sampler.set_epoch(self.epoch, start=self.samples_seen // self.world_size)
        losses = []
        self.model.train()
        batches = self.stop.batches(self.train_loader)
        for batch in self.report.progress(batches, self.epoch, self.samples_seen):
            losses.append(self.run_batch(batch))
            self.samples_seen += self.args.batch_size * self.world_size
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
                self.stop.exit(self.report, self.global_step)
        self.epoch += 1
        self.samples_seen = 0

    def run_batch(self, batch):
        # The ranks' gradients are averaged. Each rank divides by the mean number of targets, not by
        # its own: then the average is the gradient of the mean loss over all ranks' targets.
        count = self.count_targets(batch)
        num_targets = torch.full((), count, dtype=torch.float64, device=self.device)
        dist.all_reduce(num_targets)
        targets_per_rank = num_targets.clamp(min=1) / self.world_size
        batch = to_device(batch, self.device)
        seen = self.samples_seen / len(self.train_loader.dataset)
        self.schedule.set_progress((self.epoch + seen) / self.args.epochs)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(batch) / targets_per_rank
        loss.backward()  # in here, DDP averages the gradients of all ranks
        self.optimizer.step()
        return loss.detach()  # a tensor: .item() would make the CPU wait for the GPU in every step

    def count_targets(self, batch):
        """How many answers of the batch count in the loss."""
        _, labels = batch
        return labels.numel()

    def loss(self, batch):
        """The sum, not the mean, of the losses of these answers."""
        images, labels = batch
        logits = self.ddp_model(images)
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
            with self.autocast:
                metrics = self.per_sample_metrics(batch)
            totals += torch.stack([metric[:remaining].double().sum() for metric in metrics])
            remaining = max(0, remaining - self.args.eval_batch_size)
            if self.stop.requested():
                self.stop.exit(self.report, self.global_step)
        dist.all_reduce(totals)
        self.report.evaluation(self.epoch, self.global_step, *totals.tolist())

    def share_buffers(self):
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)  # batch norm's averages differ by rank: keep rank 0's

    def save_snapshot(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "global_step": self.global_step,
            "rng": rng_states(self.device),
        }
        with keep_alive():  # a save may take longer than a collective may
            if self.rank == 0:  # all ranks have the same weights
                self.snapshots.save(state)

    def load_snapshot(self):
        state = self.snapshots.load_newest()
        if state is None:
            return
        self.report.resumed(state)
        restore_rng(state, self.device, self.train_loader.generator, self.report)
        self.model.load_state_dict(state["model"])
        keep_kernels(state["optimizer"]["param_groups"], self.optimizer)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.reset()  # to the learning rates of this run's flags
        self.epoch = state["epoch"]
        # The number of ranks may have changed: round up to a multiple of it.
        self.samples_seen = math.ceil(state["samples_seen"] / self.world_size) * self.world_size
        self.global_step = state["global_step"]


def main(args, device):
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    model = build_model(args.model, args.precision, args.vit_width, args.vit_depth).to(device)
    if args.compile:
        model.compile()  # in place, so that the names of its parameters stay as they are
    torch.manual_seed(args.seed + dist.get_rank())  # weights must be alike, dropout must not
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=args.lr, fused=device.type != "cpu")
    run = Run(args.step, name_of(model), name_of(train_data), args.precision, args.seed, vars(args))
    snapshots = SnapshotFolder(args.snapshot_dir, run, args.verbose)
    report = Reporter(run, device, args.metrics, args.profile, args.verbose)
    Trainer(args, device, model, optimizer, train_data, test_data, snapshots, report).train()


def spawn(args):
    # The ranks find each other here. The parent outlives them all. Port 0: the system picks one.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    join(mp.spawn(worker, args=(store.port, args), nprocs=args.world_size, join=False))


def parse_args():
    parser = make_parser(__file__, __doc__, launcher="spawn")
    parser.add_argument("--world-size", type=whole_number, default=count_gpus() or 2, help="ranks")
    return parser.parse_args()


if __name__ == "__main__":
    spawn(parse_args())
