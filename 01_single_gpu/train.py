"""Step 01: one process, one device. The training loop that the next four steps grow from.

$ python 01_single_gpu/train.py                        # MNIST, three epochs
$ python 01_single_gpu/train.py --num-samples 10240    # synthetic digits, no download
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is

from common import snapshot
from common.mnist import fast, load_mnist
from common.models import build_model, model_name, set_learning_rate
from common.options import make_parser, name_run, pick_device
from common.ranks import Control
from common.reporting import Reporter


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data):
        self.args, self.device = args, device
        self.model, self.optimizer = model, optimizer
        self.train_data, self.test_data = train_data, test_data
        self.rest, self.fast = [], fast(args, device)
        self.loader = DataLoader(  # of the list `rest`, which each epoch fills anew, in place
            train_data, args.batch_size, sampler=self.rest, drop_last=True, **self.fast
        )
        self.autocast = torch.autocast(device.type, torch.bfloat16, args.precision == "bf16")
        self.report = Reporter(args, device, len(train_data))
        self.epoch = self.samples_seen = self.global_step = 0

    def train(self):
        self.load_snapshot()
        self.control = Control()  # from here on, SIGTERM and Ctrl-C mean: save, then leave
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.evaluate()
            self.save_snapshot()
        self.report.end(self.global_step)

    def run_epoch(self):
        # Seed and epoch alone make the order: a resumed run goes on with the rest of it.
        generator = torch.Generator().manual_seed(self.args.seed + self.epoch)
        self.rest[:] = [*RandomSampler(self.train_data, generator=generator)][self.samples_seen :]
        losses = []
        self.model.train()
        for batch in self.report.progress(self.loader, self.epoch):
            losses.append(self.run_batch(batch))
            self.samples_seen += self.args.batch_size
            self.global_step += 1
            stop = self.control.asked_to_stop()
            if stop or self.report.is_due():
                self.report.train(self.epoch, self.global_step, torch.stack(losses).tolist())
                losses = []
            if stop or self.report.save_is_due(self.global_step):
                self.save_snapshot()
            if stop:
                self.control.leave(stop, self.report, self.global_step)
        self.epoch, self.samples_seen = self.epoch + 1, 0

    def run_batch(self, batch):
        set_learning_rate(self.optimizer, self.args, self.global_step, self.report.steps)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
        loss.backward()
        self.optimizer.step()
        return loss.detach()  # a tensor: .item() would make the CPU wait for the GPU in every step

    def loss(self, images, labels):
        return F.cross_entropy(self.model(images), labels, label_smoothing=self.args.smoothing)

    def score(self, images, labels):  # of each image: its loss, and whether the answer is right
        outputs = self.model(images)
        return F.cross_entropy(outputs, labels, reduction="none"), outputs.argmax(dim=1) == labels

    @torch.no_grad()
    def evaluate(self):
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right, images
        self.model.eval()
        for batch in DataLoader(self.test_data, batch_size=1000, **self.fast):
            with self.autocast:
                losses, right = self.score(*(tensor.to(self.device) for tensor in batch))
            totals[0] += losses.sum()
            totals[1] += right.sum()
            totals[2] += right.numel()
        self.report.evaluation(self.epoch, self.global_step, *totals.tolist())

    def save_snapshot(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "global_step": self.global_step,
            "rng": snapshot.rng_states(self.device),
        }
        snapshot.save(self.args, **state)

    def load_snapshot(self):
        state = snapshot.load_newest(self.args)
        if state is None:
            return
        self.epoch, self.samples_seen, self.global_step = snapshot.resume(state, self.report)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def main(args):
    device = pick_device(args.use_gpu)
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    name_run(args, model_name(args), train_data.name, train_data.fallback)
    model = build_model(args).to(device)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=args.lr, fused=device.type != "cpu")
    Trainer(args, device, model, optimizer, train_data, test_data).train()


def parse_args():
    return make_parser(__file__, __doc__).parse_args()


if __name__ == "__main__":
    main(parse_args())
