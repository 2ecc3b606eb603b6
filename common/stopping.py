"""Graceful stopping: after a signal, all ranks save a snapshot after the same step, and exit."""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from common.options import fail

if TYPE_CHECKING:
    from common.reporting import Reporter

# The ranks vote as often as one of these allows, because a step can take milliseconds, or minutes.
SECONDS_BETWEEN_VOTES = 0.1
STEPS_BETWEEN_VOTES = 5

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROBLEM = 1000  # in the place of a signal's number, and greater than any
SECONDS_FOR_A_BATCH = 10.0  # after a signal; schedulers often give a process 30 s to end


class GracefulStop:
    """Lets all ranks stop after the same step when one of them has received a signal.

    A rank that stopped alone would leave the others waiting in their next collective. So the ranks vote: an
    `all_reduce` over gloo, which begins in one step and is read in the next, while training continues.
    """

    received = 0  # the number of the last signal that this process has had
    problem = ""  # why this process asks all to stop without a signal
    waiting_since: float | None = None  # since when this process has waited for a batch

    def __init__(self, timeout: float = 0.0):
        """From now on, SIGTERM, Ctrl-C and SIGHUP do not end this process at once.

        A second SIGTERM or Ctrl-C does, if it comes more than a second after the first signal.

        `timeout` is the process group's, in seconds. Without a process group it is not used.
        """
        self.step = 0
        self.clock = time.perf_counter()
        self.next_vote = 0
        self.vote: Any = None
        self.stopping = 0
        self.group: Any = None
        if dist.is_initialized():
            # When NCCL times out, it ends the process without a reason. The vote notices a lost rank earlier.
            earlier = timedelta(seconds=timeout - min(30, timeout / 2))
            self.group = dist.new_group(backend="gloo", timeout=earlier)
            # A rank that has nothing left to train must not end while others still connect to it.
            dist.barrier(group=self.group)
        watch_signals()

    def requested(self) -> bool:
        """Whether to stop now. All ranks call this after a step, or a batch of an evaluation.

        They get the same answer.
        """
        if self.group is None:
            self.stopping = own_reason()
            return self.stopping != 0
        now = time.perf_counter()
        seconds = now - self.clock  # that the last step has taken
        self.clock = now
        self.step += 1
        if self.vote is not None:
            self.count_votes()
        if not self.stopping and self.vote is None and self.step >= self.next_vote:
            self.begin_vote(seconds)
        return self.stopping != 0

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """The batches of `loader`. `fail`s if one of its worker processes has died.

        After a signal, a process waits at most ten seconds for a batch. Then it exits without saving, because
        the other ranks are already in the step, and wait for this one.
        """
        GracefulStop.waiting_since = time.monotonic()
        try:
            batches = start_workers(loader)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise in the middle of a step
            for batch in batches:
                GracefulStop.waiting_since = None
                yield batch
                GracefulStop.waiting_since = time.monotonic()
        except (RuntimeError, OSError, EOFError) as error:
            if not worker_has_died(loader, error):
                raise
            reason = f"it may have used too much memory, or /dev/shm is too small ({error})"
            fail(f"a worker of --num-workers has died: {reason}; run the same command again to resume")
        finally:
            GracefulStop.waiting_since = None

    def begin_vote(self, seconds: float) -> None:
        """Send this rank's reason to stop, if any, and how long its step has taken, to the others."""
        ballot = torch.tensor([own_reason(), int(seconds * 1e6)])
        counting = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.vote = (ballot, counting)

    def count_votes(self) -> None:
        """Read the vote that began one step ago, and decide when the next one begins."""
        ballot, counting = self.vote
        counting.wait()
        self.vote = None
        self.stopping, slowest = ballot.tolist()
        # All ranks have the same `slowest`, so the next vote begins in the same step on all of them.
        steps = int(SECONDS_BETWEEN_VOTES * 1e6 / max(1, slowest))
        began = self.step - 1
        self.next_vote = began + max(1, min(STEPS_BETWEEN_VOTES, steps))

    def exit(self, report: "Reporter", global_step: int) -> None:
        """Exit, once all ranks are here, with the status that shells give to a signal.

        If one of the ranks has a problem, all ranks `fail` with it.
        """
        problems = [GracefulStop.problem]
        if self.group is not None:
            # All leave together: torchrun ends the others 30 s after the first has ended.
            problems = [""] * dist.get_world_size()
            dist.all_gather_object(problems, GracefulStop.problem, group=self.group)
        for number in SIGNALS:
            # The launcher sends one when another rank has ended before this one.
            signal.signal(number, signal.SIG_IGN)
        if self.stopping == PROBLEM:
            fail(f"{max(problems)}; saved at step {global_step}: run the same command again to resume")
        name = signal.Signals(self.stopping).name
        report.say(f"{name}: saved at step {global_step}; run the same command again to resume")
        sys.exit(128 + self.stopping)


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """An iterator over `loader`, which starts its worker processes. `fail`s if the system starts no more."""
    try:
        return iter(loader)
    except OSError as error:
        fail(f"cannot start the processes of --num-workers {loader.num_workers}: {error.strerror}; use fewer")


def worker_has_died(loader: DataLoader[Any], error: Exception) -> bool:
    """Whether `error` means that `loader` has lost a worker process, and does not come from the dataset."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error) or "Pin memory thread exited" in str(error)
    # Or a lost connection, if a batch was on its way. What a dataset raises in a worker begins with "Caught".
    is_connection = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    return loader.num_workers > 0 and is_connection and not str(error).startswith("Caught ")


def end_with_launcher() -> None:
    """From now on, send this process SIGTERM when its parent has ended.

    Before training, the signal ends this process, whatever it is waiting for. During training, all ranks save
    first.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        if GracefulStop.received == 0:  # mp.spawn's ranks have SIGINT then, and two signals are too many
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def ask_to_stop(problem: str) -> None:
    """Let all ranks save after the current step, and then `fail` with this `problem`."""
    GracefulStop.problem = GracefulStop.problem or problem


def own_reason() -> int:
    """Why this process wants to stop: a signal's number, PROBLEM, or 0 if it does not."""
    return PROBLEM if GracefulStop.problem else GracefulStop.received


def watch_signals() -> None:
    """From now on signals are noted in `GracefulStop.received`; a second SIGTERM or Ctrl-C ends the process.

    A thread waits for it, because Python runs no handler while the main thread waits in a collective.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or not survives_hangup():
            signal.signal(number, note_signal)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # from here on, each signal writes its number
    threading.Thread(target=watch_for_the_end, args=(reader,), daemon=True).start()


def survives_hangup() -> bool:
    """Whether the user wants training to continue when the terminal or the connection is closed.

    `nohup` lets a program ignore SIGHUP. Under torchrun, which handles this signal itself, ranks do not
    ignore it, unless `--signals-to-handle` leaves it out.
    """
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def note_signal(number: int, frame: Any) -> None:
    """A signal handler. It is not a method, because the signal module would keep the object and its group."""
    GracefulStop.received = number


def watch_for_the_end(reader: int) -> None:
    """End this process when `reader` gives the number of a second SIGTERM or Ctrl-C.

    Signals within a second after the first one do not count, because a terminal and the launcher both send
    one. Also end the process if, after a signal, no batch has come for SECONDS_FOR_A_BATCH.
    """
    first, first_at = 0, 0.0
    while True:
        readable, _, _ = select.select([reader], [], [], 0.5 if first else None)
        now = time.monotonic()
        if readable:
            [number] = os.read(reader, 1)
            if not first and number in SIGNALS:
                first, first_at = number, now
            elif number in (signal.SIGINT, signal.SIGTERM) and now - first_at > 1:
                end_now(number, " for the second time")
        since = GracefulStop.waiting_since
        if first and since is not None and now - max(first_at, since) > SECONDS_FOR_A_BATCH:
            end_now(first, f", and no batch has come for {SECONDS_FOR_A_BATCH:.0f} s")


def end_now(number: int, why: str) -> None:
    """End this process, whatever it is doing, with the status that shells give to a signal."""
    rank = f"rank {dist.get_rank()} received " if dist.is_initialized() else ""
    lost = "ending at once, and what was trained after the last snapshot is lost"
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"error: {rank}{signal.Signals(number).name}{why}: {lost}\n".encode())
    for child in multiprocessing.active_children():
        if child.daemon:  # a loader's worker: it would wait for the same
            child.kill()
    os._exit(128 + number)
