"""Step 01: one process, one device. The training loop that the next four steps grow from.

$ python 01_single_gpu/train.py                        # MNIST, three epochs
$ python 01_single_gpu/train.py --num-samples 10240    # synthetic digits, no download
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is

from common.device import setup_device
from common.loading import loader_options, to_device
from common.mnist import load_mnist
from common.models import build_model
from common.options import make_parser
from common.reporting import Reporter
from common.run import Run, name_of
from common.sampler import ResumableSampler, ShuffledSampler
from common.schedule import Schedule
from common.snapshot import SnapshotFolder, keep_kernels, restore_rng, rng_states
from common.stopping import GracefulStop


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data, snapshots, report):
        self.args = args
        self.device = device
        self.model = model
        self.optimizer = optimizer
        self.snapshots = snapshots
        self.report = report
        self.report.start(train_data, args.epochs, args.batch_size, vars(args))
        options = loader_options(args.num_workers, device)
        self.sampler = ResumableSampler(ShuffledSampler(train_data, seed=args.seed))
        self.train_loader = DataLoader(
            train_data, args.batch_size, sampler=self.sampler, drop_last=True, **options
        )
        self.test_loader = DataLoader(test_data, args.eval_batch_size, **options)
        use_bf16 = args.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)
        self.schedule = Schedule(optimizer, args.schedule)
        self.epoch = 0
        self.samples_seen = 0  # in this epoch
        self.global_step = 0

    def train(self):
        self.load_snapshot()
        self.stop = GracefulStop()  # from here on, signals mean: save, then exit
        if self.global_step > 0 and self.samples_seen == 0:
            self.evaluate()  # the run may have ended between an epoch's snapshot and its evaluation
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.save_snapshot()
            self.evaluate()
        self.report.end(self.global_step)

    def run_epoch(self):
        # Seed and epoch alone decide the order, so a resumed run continues where it stopped.
        self.sampler.set_epoch(self.epoch, start=self.samples_seen)
        losses = []
        self.model.train()
        batches = self.stop.batches(self.train_loader)
        for batch in self.report.progress(batches, self.epoch, self.samples_seen):
            losses.append(self.run_batch(batch))
            self.samples_seen += self.args.batch_size
            self.global_step += 1
            stopping = self.stop.requested()
            if stopping or self.report.is_due(self.global_step):
                self.report.train(self.epoch, self.global_step, torch.stack(losses).tolist())
                losses = []
            if stopping or self.report.save_is_due(self.global_step):
                self.save_snapshot()
            if stopping:
                self.stop.exit(self.report, self.global_step)
        self.epoch += 1
        self.samples_seen = 0

    def run_batch(self, batch):
        num_targets = max(1, self.count_targets(batch))
        batch = to_device(batch, self.device)
        seen = self.samples_seen / len(self.train_loader.dataset)
        self.schedule.set_progress((self.epoch + seen) / self.args.epochs)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(batch) / num_targets
        loss.backward()
        self.optimizer.step()
        return loss.detach()  # a tensor: .item() would make the CPU wait for the GPU in every step

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
        self.model.eval()
        for batch in self.stop.batches(self.test_loader):
            batch = to_device(batch, self.device)
            with self.autocast:
                metrics = self.per_sample_metrics(batch)
            totals += torch.stack([metric.double().sum() for metric in metrics])
            if self.stop.requested():
                self.stop.exit(self.report, self.global_step)
        self.report.evaluation(self.epoch, self.global_step, *totals.tolist())

    def save_snapshot(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "global_step": self.global_step,
            "rng": rng_states(self.device),
        }
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
        self.samples_seen = state["samples_seen"]
        self.global_step = state["global_step"]


def main(args):
    device = setup_device(args.use_gpu)
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    model = build_model(args.model, args.precision, args.vit_width, args.vit_depth).to(device)
    if args.compile:
        model.compile()  # in place, so that the names of its parameters stay as they are
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=args.lr, fused=device.type != "cpu")
    run = Run(args.step, name_of(model), name_of(train_data), args.precision, args.seed, vars(args))
    snapshots = SnapshotFolder(args.snapshot_dir, run, args.verbose)
    report = Reporter(run, device, args.metrics, args.profile, args.verbose)
    Trainer(args, device, model, optimizer, train_data, test_data, snapshots, report).train()


def parse_args():
    return make_parser(__file__, __doc__).parse_args()


if __name__ == "__main__":
    main(parse_args())
