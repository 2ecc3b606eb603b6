"""What a run reports: lines, a progress bar on a terminal, and the metrics file."""

import atexit
import errno
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import profile, schedule
from tqdm import tqdm

from common.options import fail, warn
from common.output import may_go_away, print_line
from common.run import Run
from common.stopping import GracefulStop, ask_to_stop

LOG_EVERY = 100  # steps between two reports; the CPU waits for the GPU at a report, and only there

# Steps of --profile: the first ones are slower than the rest.
WAIT = 5
WARM_UP = 2
TRACED = 3


class Reporter:
    """Rank 0 reports progress and writes `--metrics`; with `--verbose` every rank says what it does."""

    def __init__(
        self,
        run: Run,
        device: torch.device,
        metrics: Path | None = None,
        trace_dir: Path | None = None,
        verbose: bool = False,
    ):
        """Open the file `metrics`, and make the folder `trace_dir` for traces. `fail`s if it cannot."""
        self.run = run
        self.device = device
        self.verbose = verbose
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.samples = 0  # trained on since the start
        self.seconds = 0.0  # that they have taken
        self.metrics: Any = None
        self.trace_dir = trace_dir
        self.profiler: Any = None
        self.open_files(metrics)

    def start(
        self,
        data: Any,
        epochs: int,
        batch_size: int,
        flags: dict[str, Any],
        accumulate: int = 1,
        data_parallel_size: int | None = None,
    ) -> None:
        """Announce a run of `epochs` over the dataset `data`, whose `fallback`, if any, is said at the end.

        A step takes `accumulate` batches of `batch_size` on each rank. Where several ranks have the same
        batch, `data_parallel_size` is the number of different batches. `flags` go to the metrics file.
        `fail`s when there are fewer samples than a step takes.
        """
        data_parallel_size = data_parallel_size or self.world_size
        self.epochs = epochs
        self.caveat = getattr(data, "fallback", "")
        self.has_snapshots = "snapshot_dir" in flags
        self.save_every = flags.get("save_every")
        self.samples_per_step = batch_size * accumulate * data_parallel_size
        self.samples_per_epoch = len(data)
        self.steps_per_epoch = self.samples_per_epoch // self.samples_per_step
        if self.steps_per_epoch == 0:
            fail(
                f"a step takes {self.samples_per_step} samples, {self.run.data} has {len(data)}: "
                "lower --batch-size"
            )
        batches = f"batch {batch_size}" if accumulate == 1 else f"{accumulate} × batch {batch_size}"
        run = self.run
        self.say(
            f"{run.step}: {run.model} on {run.data}, {self.device.type}, {run.precision}, "
            f"{data_parallel_size} × {batches} = {self.samples_per_step} samples a step, "
            f"{epochs} epochs of {self.steps_per_epoch} steps"
        )
        local_rank = os.environ.get("LOCAL_RANK", 0)
        node = os.environ.get("GROUP_RANK", 0)
        self.detail(
            f"local rank {local_rank}, world size {self.world_size}, device {self.device}, "
            f"{torch.get_num_threads()} threads, pid {os.getpid()}, on {socket.gethostname()}, node {node}"
        )
        values: dict[str, Any] = {"run": run.name, "dataset": run.data, "device": self.device.type}
        values |= {"world_size": self.world_size, "train_samples": len(data)}
        self.write("start", **flags | values)

    def resumed(self, state: dict[str, Any]) -> None:
        """Say from which snapshot this run resumes."""
        position = f"epoch {state['epoch']}, step {state['global_step']}"
        self.say(f"resumed from {state['path'].parent}: {position}")

    def open_files(self, metrics: Path | None) -> None:
        """Open the metrics file, and make the profiler, if they are asked for."""
        try:
            if metrics and self.rank == 0:
                metrics.parent.mkdir(parents=True, exist_ok=True)
                # A resumed run continues in the same file. Without a buffer, each event is there at once.
                self.metrics = metrics.open("ab", buffering=0)
                if ends_within_a_line(metrics):
                    self.metrics.write(b"\n")
            if self.trace_dir:
                self.trace_dir.mkdir(parents=True, exist_ok=True)
                self.trace = self.trace_dir / f"{self.run.step}-rank-{self.rank}.json"  # for ui.perfetto.dev
                self.trace.unlink(missing_ok=True)  # write_trace looks whether this run has written one
        except OSError as error:
            fail(f"cannot write {error.filename}: {error.strerror}; choose another --metrics or --profile")
        if self.trace_dir:
            self.profiler = profile(
                schedule=schedule(wait=WAIT, warmup=WARM_UP, active=TRACED, repeat=1),
                on_trace_ready=self.write_trace,
            )
            # It is kept until the end: freed beside a process group, it may crash (torch 2.11 to 2.14).
            atexit.register(self.profiler.stop)

    def say(self, line: str, rank: int = 0) -> None:
        """Print a line, on rank 0."""
        if self.rank == rank:
            with may_go_away(sys.stdout):
                # The end of the line is in the same write: ranks share the terminal.
                tqdm.write(f"{line}\n", end="")

    def detail(self, line: str) -> None:
        """Print a line with this rank's number in front, on every rank, with `--verbose`."""
        if self.verbose:
            self.say(f"[rank {self.rank}] {line}", self.rank)

    def write(self, event: str, **values: Any) -> None:
        """Append one JSON object to the metrics file, if there is one. If that fails, the run stops."""
        if self.metrics is None:
            return
        line = json.dumps({"event": event, **values}, default=str) + "\n"
        try:
            if self.metrics.write(line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            ask_to_stop(f"cannot write {self.metrics.name}: {error.strerror}")
            self.metrics = None

    def progress(self, batches: Iterable[Any], epoch: int, done: int) -> Iterator[Any]:
        """What `batches` gives, one item a step, with a progress bar when rank 0's output is a terminal.

        `done` is the number of samples of this epoch that the ranks have seen already.
        """
        self.steps_left = (self.samples_per_epoch - done) // self.samples_per_step
        self.detail(f"epoch {epoch + 1}: {self.steps_left:,} steps")
        self.last_report = time.perf_counter()
        bar = tqdm(
            desc=f"epoch {epoch + 1}/{self.epochs}",
            total=self.steps_left,
            unit=" steps",
            leave=False,
            file=sys.stdout,
            disable=self.rank != 0 or not sys.stdout.isatty(),
        )
        for step, batch in enumerate(batches, start=1):
            self.step = step
            yield batch
            with may_go_away(sys.stdout):
                bar.update()
            if self.profiler:
                if self.profiler.step_num == WAIT + WARM_UP + TRACED - 1:
                    time.sleep(0.1)  # it may crash if it ends while gloo's threads write down what they did
                self.profiler.step()
        with may_go_away(sys.stdout):
            bar.close()

    def write_trace(self, profiler: Any) -> None:
        """Write this rank's trace. If that fails, the run continues without."""
        profiler.export_chrome_trace(str(self.trace))
        if not self.trace.exists():  # torch has printed why, and raises nothing
            warning = f"warning: rank {self.rank} cannot write {self.trace}: this rank has no trace"
            print_line(warning, sys.stderr)
            self.trace.with_name(f"{self.trace.name}.tmp").unlink(missing_ok=True)

    def is_due(self, global_step: int) -> bool:
        """Whether to report the step of the batch that `progress` has just given: one in LOG_EVERY, the last
        of an epoch, and one that is saved, because a loss that is not finite must not be.
        """
        if self.step % LOG_EVERY == 0 or self.step == self.steps_left:
            return True
        return self.save_is_due(global_step)

    def save_is_due(self, global_step: int) -> bool:
        """Whether to save after this step: one in --save-every, but not an epoch's last, saved anyway."""
        if self.save_every is None or self.step == self.steps_left:
            return False
        return global_step % self.save_every == 0

    def train(self, epoch: int, global_step: int, losses: list[float]) -> None:
        """Report the steps since the last call. `losses` are theirs, each a mean over all ranks' targets."""
        now = time.perf_counter()
        seconds = now - self.last_report
        self.last_report = now
        samples = len(losses) * self.samples_per_step
        self.samples += samples
        self.seconds += seconds
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss):
            remedy = "try a smaller --lr"
            if self.has_snapshots:
                remedy += ", and another --snapshot-dir if it happens again"
            fail(f"the loss is {loss} by step {global_step}: nothing more is saved; {remedy}")
        rate = round(samples / seconds)
        self.say(f"epoch {epoch + 1}/{self.epochs}  step {global_step}  loss {loss:.4f}  {rate:,} samples/s")
        self.detail(f"step {global_step}: {len(losses)} steps in {seconds:.2f} s")
        values = {"loss": loss, "samples_per_s": rate, "losses": losses}
        self.write("train", epoch=epoch, global_step=global_step, **values)

    def evaluation(
        self, epochs: int, global_step: int, loss_sum: float, correct: float, total: float
    ) -> None:
        """Report a test after so many epochs, from sums over the `total` targets of the test set."""
        if total == 0:
            self.say(f"epoch {epochs}/{self.epochs}  no test: the test set has no targets")
            return
        loss = loss_sum / total
        accuracy = correct / total
        if not math.isfinite(loss):
            remedy = "try a smaller --lr"
            if self.has_snapshots:
                remedy += ", and another --snapshot-dir: the newest snapshot has these weights"
            fail(f"the test loss is {loss} after step {global_step}; {remedy}")
        self.say(
            f"epoch {epochs}/{self.epochs}  test loss {loss:.4f}, "
            f"accuracy {accuracy:.2%} ({correct:,.0f} of {total:,.0f})"
        )
        values = {"loss": loss, "accuracy": accuracy, "correct": int(correct), "total": int(total)}
        self.write("eval", epoch=epochs - 1, global_step=global_step, **values)

    def end(self, global_step: int) -> None:
        """Report the speed of the training steps, without evaluations, and say the caveat again."""
        if self.samples == 0:
            rate = 0.0
            self.say("nothing left to train: raise --epochs, or choose another --snapshot-dir to start again")
        else:
            rate = self.samples / self.seconds
            self.say(
                f"done: {self.samples:,} samples in {self.seconds:.1f} s of training, {rate:,.0f} samples/s"
            )
        self.write("end", global_step=global_step, samples_per_s=round(rate), seconds=round(self.seconds, 3))
        if self.profiler and self.profiler.step_num < WAIT + WARM_UP:
            warn(f"no trace in {self.trace_dir}: tracing begins {WAIT + WARM_UP} steps after the start")
        if self.caveat:
            warn(self.caveat)
        if GracefulStop.problem:
            fail(GracefulStop.problem)


def ends_within_a_line(path: Path) -> bool:
    """Whether a file ends in the middle of a line, as it may after the disk was full."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
