"""Stopping gracefully: SIGTERM and Ctrl-C end all ranks after the same step, when a snapshot is saved."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.reporting import Reporter

# The ranks vote as often as one of these allows, because a step can take milliseconds, or minutes.
SECONDS_BETWEEN_VOTES = 0.1
STEPS_BETWEEN_VOTES = 5


class GracefulStop:
    """Lets all ranks stop after the same step when one of them has had a signal.

    A rank that stopped alone would leave the others waiting in their next collective. So the ranks vote: an
    `all_reduce` over gloo, which begins in one step and is read in the next, while training continues. A rank
    whose launcher is gone votes for SIGTERM.
    """

    received = 0  # the number of the last signal that this process has had
    watching = False

    def __init__(self, timeout: float = 0.0):
        """From now on, SIGTERM and Ctrl-C do not end this process, unless they come twice.

        `timeout` is the process group's, in seconds. Without a process group it is not used.
        """
        self.launcher = os.getppid()
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
            self.stopping = GracefulStop.received
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

    def begin_vote(self, seconds: float) -> None:
        """Send this rank's signal, and how long its step has taken, to the others."""
        launcher_is_gone = os.getppid() != self.launcher
        number = signal.SIGTERM if launcher_is_gone else GracefulStop.received
        ballot = torch.tensor([number, int(seconds * 1e6)])
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

    def exit(self, report: Reporter, global_step: int) -> None:
        """End this process with the status that shells give to a signal, when all ranks are here."""
        if self.group is not None:  # torchrun ends the others 30 s after the first has ended
            dist.barrier(group=self.group)
        for number in (signal.SIGINT, signal.SIGTERM):
            # The launcher sends one when another rank has ended before this one.
            signal.signal(number, signal.SIG_IGN)
        name = signal.Signals(self.stopping).name
        report.say(f"{name}: saved at step {global_step}; run the same command again to resume")
        sys.exit(128 + self.stopping)


def watch_signals() -> None:
    """From now on SIGTERM and Ctrl-C are noted in `GracefulStop.received`; a second one ends the process.

    A thread waits for the second: Python runs no handler while the main thread waits in a collective.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)
    if not GracefulStop.watching:
        GracefulStop.watching = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # from here on, each signal writes its number
        threading.Thread(target=end_at_the_second_signal, args=(reader,), daemon=True).start()


def note_signal(number: int, frame: Any) -> None:
    """A signal handler. It is not a method, because the signal module would keep the object and its group."""
    GracefulStop.received = number


def end_at_the_second_signal(reader: int) -> None:
    """End this process when `reader` gives the number of a second SIGTERM or Ctrl-C.

    Those in the second after the first one are the same: a terminal and the launcher both send it.
    """
    first = 0.0
    while True:
        [number] = os.read(reader, 1)
        if number not in (signal.SIGINT, signal.SIGTERM):
            continue
        now = time.monotonic()
        if first == 0:
            first = now
        elif now - first > 1:
            rank = f"rank {dist.get_rank()} has " if dist.is_initialized() else ""
            name = signal.Signals(number).name
            lost = "ends at once, and what was trained after the last snapshot is lost"
            os.write(2, f"error: {rank}{name} for the second time: {lost}\n".encode())
            os._exit(128 + number)
