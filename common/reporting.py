"""What a run tells its reader: lines, on a terminal a progress bar, and the metrics file."""

import argparse
import atexit
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import profile, schedule
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.options import fail, warn

LOG_EVERY = 100  # steps between two reports; the CPU waits for the GPU at a report, and only there


class Reporter:
    """Rank 0 reports progress and writes `--metrics`; with `--verbose` every rank says what it does."""

    def __init__(self, args: argparse.Namespace, device: torch.device, samples: int):
        """Announce a run on `samples` training samples. `fail`s when they are fewer than a global batch."""
        self.args, self.device = args, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank_batch = args.batch_size * args.accumulate
        self.global_batch = self.rank_batch * self.world_size
        if self.global_batch > samples:
            fail(f"a step takes {self.global_batch} images, {args.dataset} has {samples}: lower --batch-size")
        self.steps = args.epochs * (samples // self.global_batch)  # of the run
        self.images, self.seconds = 0, 0.0
        self.metrics = self.profiler = None
        try:
            if self.rank == 0 and args.metrics:
                args.metrics.parent.mkdir(parents=True, exist_ok=True)
                self.metrics = args.metrics.open("a")  # a resumed run goes on in the same file
            if args.profile:
                args.profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot write {error.filename}: {error.strerror}; choose another --metrics or --profile")
        if args.profile:
            trace = str(args.profile / f"{args.step}-rank-{self.rank}.json")  # for ui.perfetto.dev
            plan = schedule(wait=5, warmup=2, active=3, repeat=1)  # the first steps are slower than the rest
            self.profiler = profile(schedule=plan, on_trace_ready=lambda it: it.export_chrome_trace(trace))
            atexit.register(self.profiler.stop)  # and is kept: freed beside a process group, it may crash
        micro = f"{args.accumulate} × " if args.accumulate > 1 else ""
        self.say(
            f"{args.step}: {args.model} on {args.dataset}, {device.type}, {args.precision}, "
            f"{self.world_size} × {micro}batch {args.batch_size} = {self.global_batch} images a step, "
            f"{args.epochs} epochs of {samples // self.global_batch} steps"
        )
        local, node = (os.environ.get(name, 0) for name in ("LOCAL_RANK", "GROUP_RANK"))
        at = f"{torch.get_num_threads()} threads, pid {os.getpid()}, on {socket.gethostname()}, node {node}"
        self.detail(f"local rank {local}, world size {self.world_size}, device {device}, {at}")
        run = {"world_size": self.world_size, "device": device.type, "train_samples": samples}
        self.write("start", **{**vars(args), **run})

    def say(self, line: str, rank: int = 0) -> None:
        """Print a line, on rank 0."""
        if self.rank == rank:
            # Line end included in one write: ranks share the terminal, and print into each other's lines.
            tqdm.write(f"{line}\n", end="")
            sys.stdout.flush()

    def detail(self, line: str) -> None:
        """Print a line with this rank's number in front, on every rank, with `--verbose`."""
        if self.args.verbose:
            self.say(f"[rank {self.rank}] {line}", self.rank)

    def write(self, event: str, **values: Any) -> None:
        """Append one JSON object to the metrics file, if there is one."""
        if self.metrics:
            print(json.dumps({"event": event, **values}, default=str), file=self.metrics, flush=True)

    def progress(self, loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
        """The batches of `loader`, with a progress bar when rank 0's output is a terminal."""
        shard = len(loader.sampler)  # type: ignore[arg-type]
        self.detail(f"epoch {epoch + 1}: {shard:,} images in this rank's shard, {len(loader):,} batches")
        self.mark, self.batches = time.perf_counter(), len(loader)
        title, hidden = f"epoch {epoch + 1}/{self.args.epochs}", self.rank != 0 or not sys.stdout.isatty()
        bar = tqdm(loader, title, leave=False, file=sys.stdout, disable=hidden, unit=" steps")
        for self.batch, batch in enumerate(bar, start=1):
            yield batch
            if self.profiler:  # which may crash if it ends while gloo's threads write down what they did
                time.sleep(0.1 * (self.profiler.step_num == 9))
                self.profiler.step()

    def is_due(self) -> bool:
        """Whether the batch that `progress` has just handed out is to be reported, or is the last."""
        return self.batch % LOG_EVERY == 0 or self.batch == self.batches

    def save_is_due(self, global_step: int) -> bool:
        """Whether `--save-every` asks for a snapshot now; the last step of an epoch is saved anyway."""
        every = self.args.save_every
        return bool(every) and global_step % every == 0 and self.batch < self.batches

    def train(self, epoch: int, global_step: int, losses: list[float]) -> None:
        """Report the steps since the last call: `losses` are theirs, each the mean over the global batch."""
        now = time.perf_counter()
        images, seconds, self.mark = len(losses) * self.global_batch, now - self.mark, now
        self.images, self.seconds = self.images + images, self.seconds + seconds
        loss, rate = sum(losses) / len(losses), round(images / seconds)
        place = f"epoch {epoch + 1}/{self.args.epochs}  step {global_step}"
        self.say(f"{place}  loss {loss:.4f}  {rate:,} images/s")
        self.detail(f"step {global_step}: {len(losses)} batches of {self.rank_batch} in {seconds:.2f} s")
        self.write("train", epoch=epoch, global_step=global_step, loss=loss, images_per_s=rate, losses=losses)

    def evaluation(self, epochs: int, global_step: int, losses: float, right: float, count: float) -> None:
        """Report a test after so many epochs: the sum of `count` losses, how many answers were `right`."""
        loss, correct, total = losses / count, int(right), int(count)
        result = f"accuracy {correct / total:.2%} ({correct:,} of {total:,})"
        self.say(f"epoch {epochs}/{self.args.epochs}  test loss {loss:.4f}, {result}")
        numbers = {"loss": loss, "accuracy": correct / total, "correct": correct, "total": total}
        self.write("eval", epoch=epochs - 1, global_step=global_step, **numbers)

    def end(self, global_step: int) -> None:
        """Report the speed of the training steps, evaluation left out, and a fallback of the data."""
        rate = self.images / self.seconds if self.images else 0.0
        left = f"nothing left to train: raise --epochs, or delete {self.args.snapshot_dir} to start afresh"
        done = f"done: {self.images:,} images in {self.seconds:.1f} s of training, {rate:,.0f} images/s"
        self.say(done if self.images else left)
        self.write("end", global_step=global_step, images_per_s=round(rate), seconds=round(self.seconds, 3))
        if self.profiler and self.profiler.step_num < 7:
            warn(f"no trace in {self.args.profile}: it begins 7 steps after the start")
        if self.args.caveat:
            warn(self.args.caveat)
