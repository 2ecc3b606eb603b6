"""Step 03: torchrun starts the ranks, tells each who it is, and starts them again when one dies.

$ torchrun --standalone --nproc-per-node=2 03_multigpu_torchrun/train.py    # MNIST, three epochs
$ torchrun --standalone --nproc-per-node=2 03_multigpu_torchrun/train.py --num-samples 10240
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is

from common import snapshot
from common.mnist import fast, load_mnist
from common.models import build_model, model_name, set_learning_rate
from common.options import make_parser, name_run, pick_device
from common.process_group import backends, others_wait
from common.ranks import Control, arrange_buckets, let_go, meeting
from common.reporting import Reporter


@record  # so that torchrun shows the error of a rank that fails
def worker(args):
    device = pick_device(args.use_gpu, int(os.environ["LOCAL_RANK"]))
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)  # from here on "cuda" is this rank's GPU
    with meeting():  # ends with one line if some of the ranks do not come
        dist.init_process_group(  # address, rank and world size: torchrun's variables say them
            backend=backends(device),  # NCCL for CUDA, and gloo for the CPU
            timeout=timedelta(minutes=2),  # until a rank counts as lost; the default is 10 or 30
            device_id=device if device.type == "cuda" else None,
        )
    try:
        main(args, device)
    finally:
        let_go()  # frees what uses the group, the model too; after an error, ends it at once
        if dist.is_initialized():
            dist.destroy_process_group()


class Trainer:
    def __init__(self, args, device, model, optimizer, train_data, test_data):
        self.args, self.device = args, device
        self.model, self.optimizer = model, optimizer
        self.ddp_model = DDP(model)  # sends rank 0's weights to all
        self.train_data, self.test_data = train_data, test_data
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.sampler = DistributedSampler(train_data, seed=args.seed, drop_last=True)
        self.rest, self.fast = [], fast(args, device)
        self.loader = DataLoader(  # of the list `rest`, which each epoch fills anew, in place
            train_data, args.batch_size, sampler=self.rest, drop_last=True, **self.fast
        )
        self.autocast = torch.autocast(device.type, torch.bfloat16, args.precision == "bf16")
        self.report = Reporter(args, device, len(train_data))
        self.epoch = self.samples_seen = self.global_step = 0

    def train(self):
        self.load_snapshot()
        arrange_buckets(self)  # now, or a resumed run would add gradients in another order
        self.control = Control()  # from here on, SIGTERM and Ctrl-C mean: save, then leave
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.evaluate()
            self.save_snapshot()
        self.report.end(self.global_step)

    def run_epoch(self):
        # Seed and epoch alone make the order: a resumed run goes on with the rest of it.
        self.sampler.set_epoch(self.epoch)
        self.rest[:] = [*self.sampler][self.samples_seen // self.world_size :]
        losses = []
        self.model.train()
        for batch in self.report.progress(self.loader, self.epoch):
            losses.append(self.run_batch(batch))
            self.samples_seen += self.args.batch_size * self.world_size
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
                self.control.leave(stop, self.report, self.global_step)
        self.epoch, self.samples_seen = self.epoch + 1, 0

    def run_batch(self, batch):
        set_learning_rate(self.optimizer, self.args, self.global_step, self.report.steps)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.loss(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
        loss.backward()  # in here, DDP averages the gradients of all ranks
        self.optimizer.step()
        return loss.detach()  # a tensor: .item() would make the CPU wait for the GPU in every step

    def loss(self, images, labels):
        return F.cross_entropy(self.ddp_model(images), labels, label_smoothing=self.args.smoothing)

    def score(self, images, labels):  # of each image: its loss, and whether the answer is right
        outputs = self.model(images)
        return F.cross_entropy(outputs, labels, reduction="none"), outputs.argmax(dim=1) == labels

    @torch.no_grad()
    def evaluate(self):
        part = range(self.rank, len(self.test_data), self.world_size)  # DistributedSampler pads
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, right, images
        self.model.eval()
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)  # batch norm's averages differ by rank: test rank 0's
        for batch in DataLoader(self.test_data, batch_size=1000, sampler=part, **self.fast):
            with self.autocast:
                losses, right = self.score(*(tensor.to(self.device) for tensor in batch))
            totals[0] += losses.sum()
            totals[1] += right.sum()
            totals[2] += right.numel()
        dist.all_reduce(totals)
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
        with others_wait():  # a save may take longer than a collective may
            if self.rank == 0:  # all ranks hold the same weights
                snapshot.save(self.args, **state)

    def load_snapshot(self):
        state = snapshot.load_newest(self.args)
        if state is None:
            return
        self.epoch, self.samples_seen, self.global_step = snapshot.resume(state, self.report)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def main(args, device):
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    name_run(args, model_name(args), train_data.name, train_data.fallback)
    model = build_model(args).to(device)
    torch.manual_seed(args.seed + dist.get_rank())  # weights must be alike, dropout must not
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=args.lr, fused=device.type != "cpu")
    Trainer(args, device, model, optimizer, train_data, test_data).train()


def parse_args():
    return make_parser(__file__, __doc__, torchrun=True).parse_args()


if __name__ == "__main__":
    worker(parse_args())
