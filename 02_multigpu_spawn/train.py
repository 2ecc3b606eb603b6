"""Step 02: one process per GPU (or CPU worker), each with its own copy of the model; mp.spawn starts them.

    python 02_multigpu_spawn/train.py --world-size 2                        # MNIST, three epochs
    python 02_multigpu_spawn/train.py --world-size 2 --num-samples 10240    # synthetic digits, no download

Each process sees its own part of every batch; DDP averages the gradients, so all copies take the same step.
"""

import gc
import math
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, so that `common` is found

from common.options import fail, make_parser, pick_device, whole_number


def parse_args():
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--world-size", type=whole_number, metavar="N", help="processes (GPUs, else 2)")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before torch, which takes seconds to import: --help and typos are answered at once

import torch
import torch.distributed as dist
import torch.distributed.nn  # DDP imports it: before there is a group, or it would keep that alive for ever
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler

from common import snapshot
from common.mnist import keep_batch, load_mnist
from common.models import build_model
from common.reporting import LOG_EVERY, Reporter


def setup(rank, port, args):
    """Make this process one of `--world-size` ranks; returns its device."""
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun will; `common` prints errors on local rank 0 only
    device = pick_device(args.use_gpu, rank, args.world_size)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=args.world_size,
        timeout=timedelta(minutes=2),  # by default, ranks wait 10 or 30 minutes for one that is stuck
        device_id=device if device.type == "cuda" else None,
    )
    return device


def cleanup():
    """Leave the process group. DDP must be gone by then: gloo's threads live on in it, and abort the exit."""
    error = sys.exception()
    if error:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if error and dist.get_backend() == "nccl":
        dist.group.WORLD.abort()  # destroying would wait for the other ranks, and they wait for this one
    else:
        dist.destroy_process_group()


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
        self.ddp_model = DDP(model, device_ids=[device] if device.type == "cuda" else None)
        self.optimizer = optimizer
        self.train_data = train_data
        self.test_data = test_data
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=timedelta(minutes=2))  # on CPUs
        self.launcher = os.getppid()
        self.global_batch = args.batch_size * self.world_size
        self.sampler = DistributedSampler(train_data, seed=args.seed, drop_last=True)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        self.report = Reporter(args, train_data, device, self.rank, self.world_size)
        self.epoch = self.samples_seen = self.global_step = 0

    def train(self):
        self.load_snapshot()
        places = [None] * self.world_size  # exchanging them also keeps rank 0 from saving while others load
        place = (self.train_data.name, self.epoch, self.samples_seen)
        dist.all_gather_object(places, place, group=self.control)
        if len(set(places)) > 1:
            fail(f"the ranks do not start from the same place (data, epoch, images): {places}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note_signal)
        while self.epoch < self.args.epochs:
            self.run_epoch()
            self.evaluate()
            self.save_snapshot()
        self.report.end(self.global_step)

    def run_epoch(self):
        # The order follows from seed and epoch alone, so a resumed run goes on where the other one stopped.
        self.sampler.set_epoch(self.epoch)
        order = list(self.sampler)[self.samples_seen // self.world_size :]
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
            # Has any rank been told to stop, or lost its launcher? Asked beside the step, that costs no time.
            vote = torch.tensor([stop_signal if os.getppid() == self.launcher else signal.SIGTERM])
            asked = dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.control, async_op=True)
            losses.append(self.run_batch(images, labels))
            self.samples_seen += self.global_batch
            self.global_step += 1
            asked.wait()
            stop = vote.item()
            if batch % LOG_EVERY == 0 or batch == len(loader) or stop:
                losses = torch.stack(losses) / self.world_size
                dist.all_reduce(losses)  # each rank has seen only its own part of the batches
                self.report.train(self.epoch, self.global_step, losses.tolist())
                losses = []
            if stop or (self.args.save_every and self.global_step % self.args.save_every == 0):
                self.save_snapshot()
            if stop:  # on all ranks after the same step
                dist.barrier(group=self.control)  # the launcher kills the rest 30 s after the first to leave
                name = signal.Signals(stop).name
                self.report.say(f"{name}: saved at step {self.global_step}; run the same again to go on")
                sys.exit(128 + stop)
        self.epoch, self.samples_seen = self.epoch + 1, 0

    def run_batch(self, images, labels):
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        with self.autocast:
            loss = F.cross_entropy(self.ddp_model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()  # in here DDP averages the gradients over the ranks
        self.optimizer.step()
        return loss.detach()  # still a tensor: .item() would make the CPU wait for the GPU at every step

    @torch.no_grad()
    def evaluate(self):
        part = range(self.rank, len(self.test_data), self.world_size)  # DistributedSampler would pad it
        loader = DataLoader(
            self.test_data, batch_size=1000, sampler=part, collate_fn=keep_batch, generator=torch.Generator()
        )
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, images
        self.model.eval()
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)  # batch norm's statistics differ by rank: test what rank 0 saves
        for images, labels in loader:
            images, labels = images.to(self.device), labels.to(self.device)
            with self.autocast:
                outputs = self.model(images)
                totals[0] += F.cross_entropy(outputs, labels, reduction="sum")
            totals[1] += (outputs.argmax(dim=1) == labels).sum()
            totals[2] += len(labels)
        dist.all_reduce(totals)
        loss, correct, total = totals.tolist()
        self.report.evaluation(self.epoch, self.global_step, loss / total, int(correct), int(total))

    def save_snapshot(self):
        if self.rank != 0:
            return  # all ranks hold the same weights
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "samples_seen": self.samples_seen,
            "global_step": self.global_step,
            "world_size": self.world_size,
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
        # A multiple of the world size: after a change of it, fewer than that many images are left out.
        self.samples_seen = math.ceil(state["samples_seen"] / self.world_size) * self.world_size
        self.global_step = state["global_step"]
        self.report.say(f"resumed from {self.args.snapshot_dir}: epoch {self.epoch}, step {self.global_step}")


def main(args, device):
    torch.manual_seed(args.seed)
    train_data, test_data = load_mnist(args.data_dir, args.num_samples)
    model = build_model(args).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    Trainer(args, device, model, optimizer, train_data, test_data).train()


def worker(rank, port, args):
    device = setup(rank, port, args)
    try:
        main(args, device)
    except RuntimeError as error:
        seen_by = f"rank {dist.get_rank()}"
        error.add_note(f"Seen by {seen_by}. After a time-out or a lost connection look at the others first.")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stop_signal and "by peer" in str(error):  # the launcher was faster: it ends this one already
            sys.exit(128 + stop_signal)
        time.sleep(5)  # if another rank's end is the cause, the launcher now shows that one and ends this one
        raise
    finally:
        cleanup()


def spawn(args):
    gpus = 0 if args.use_gpu == 0 else torch.cuda.device_count()
    args.world_size = args.world_size or gpus or 2
    # Threads per rank, read when a worker imports torch: more than its share would fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.world_size)))
    # The ranks meet in this store. Port 0 lets the OS choose a free one.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.spawn(worker, args=(store.port, args), nprocs=args.world_size, join=False)

    def forward_signal(number, frame):
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward_signal)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:  # it was killed
            raise
        sys.exit(error.exit_code)  # the worker has said why


if __name__ == "__main__":
    spawn(args)
