"""Step 01: one process, one device. The loop that the next four steps grow from.

    python 01_single_gpu/train.py                        # MNIST, three epochs
    python 01_single_gpu/train.py --num-samples 10240    # synthetic digits, no download

Run the same command again and it goes on from the newest snapshot; delete the folder to start afresh.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that `common` is found

from common.options import make_parser, pick_device


def parse_args():
    parser = make_parser(__file__, __doc__)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before torch, which takes seconds to import: --help and typos are answered at once

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler

from common import snapshot
from common.mnist import keep_batch, load_mnist
from common.models import build_model
from common.reporting import LOG_EVERY, Reporter

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
        self.global_batch = args.batch_size
        self.sampler = RandomSampler(train_data, generator=torch.Generator())
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        self.report = Reporter(args, train_data, device)
        self.epoch = self.samples_seen = self.global_step = 0

    def train(self):
        self.load_snapshot()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note_signal)
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.evaluate()
            self.save_snapshot()
        self.report.end(self.global_step)

    def run_epoch(self):
        # The order follows from seed and epoch alone, so a resumed run goes on where the other one stopped.
        self.sampler.generator.manual_seed(self.args.seed + self.epoch)
        order = list(self.sampler)[self.samples_seen :]
        loader = DataLoader(
            self.train_data,
            batch_size=self.args.batch_size,
            sampler=order,
            drop_last=True,
            collate_fn=keep_batch,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed: not from the state that snapshots keep
        )
        losses = []
        self.model.train()
        for batch, (images, labels) in enumerate(self.report.progress(loader, self.epoch), start=1):
            losses.append(self.run_batch(images, labels))
            self.samples_seen += self.global_batch
            self.global_step += 1
            stop = stop_signal  # looked at once: it may come between two lines
            if batch % LOG_EVERY == 0 or batch == len(loader) or stop:
                self.report.train(self.epoch, self.global_step, torch.stack(losses).tolist())
                losses = []
            if stop or (self.args.save_every and self.global_step % self.args.save_every == 0):
                self.save_snapshot()
            if stop:
                name = signal.Signals(stop).name
                self.report.say(f"{name}: saved at step {self.global_step}; run the same again to go on")
                sys.exit(128 + stop)
        self.epoch, self.samples_seen = self.epoch + 1, 0

    def run_batch(self, images, labels):
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        with self.autocast:
            loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()  # still a tensor: .item() would make the CPU wait for the GPU at every step

    @torch.no_grad()
    def evaluate(self):
        loader = DataLoader(
            self.test_data, batch_size=1000, collate_fn=keep_batch, generator=torch.Generator()
        )
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, images
        self.model.eval()
        for images, labels in loader:
            images, labels = images.to(self.device), labels.to(self.device)
            with self.autocast:
                outputs = self.model(images)
                totals[0] += F.cross_entropy(outputs, labels, reduction="sum")
            totals[1] += (outputs.argmax(dim=1) == labels).sum()
            totals[2] += len(labels)
        loss, correct, total = totals.tolist()
        self.report.evaluation(self.epoch, self.global_step, loss / total, int(correct), int(total))

    def save_snapshot(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "global_step": self.global_step,
            "world_size": 1,
        }
        snapshot.save(self.args, self.train_data.name, state)

    def load_snapshot(self):
        state = snapshot.load_newest(self.args, self.train_data.name)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr  # the flag wins over the snapshot
        self.epoch = state["epoch"]
        self.samples_seen = state["samples_seen"]
        self.global_step = state["global_step"]
        self.report.say(f"resumed from {self.args.snapshot_dir}: epoch {self.epoch}, step {self.global_step}")


def main(args):
    device = pick_device(args.use_gpu)
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    model = build_model(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    Trainer(args, device, model, optimizer, train_data, test_data).train()


if __name__ == "__main__":
    main(args)
