"""What ranks owe each other besides gradients: to stop after the same step, to start alike, to end well."""

import argparse
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # DDP imports it: before there is a group, or it would keep that for ever
from torch.utils.data import DataLoader

from common import snapshot
from common.options import fail
from common.reporting import Reporter

SECONDS, STEPS = 0.1, 5  # between two votes, whichever comes first: steps may become longer


class Control:
    """Lets all ranks stop after the same step when one of them is told to.

    A rank that left alone would let the others wait in their next collective. So the ranks vote, over gloo,
    beside the training: a vote begun in one step is read in the next. A rank without launcher votes SIGTERM.
    """

    signal = 0  # the last that this process has had
    watching = False

    def __init__(self, seconds: int = 120):
        """From now on SIGTERM and Ctrl-C only leave a note. `seconds`: until a rank counts as lost."""
        # When NCCL times out it kills the process, and no reason is printed: the vote gives up earlier.
        earlier = timedelta(seconds=seconds - min(30, seconds / 2))
        self.group: Any = dist.new_group(backend="gloo", timeout=earlier) if dist.is_initialized() else None
        if self.group:  # or one that has nothing left to do could leave while others still connect to it
            dist.barrier(group=self.group)  # type: ignore[arg-type]
        self.launcher, self.clock, self.step, self.next = os.getppid(), time.perf_counter(), 0, 0
        self.vote: Any = None
        watch_signals()

    def asked_to_stop(self) -> int:
        """0, or the number of the signal to stop for: the same on all ranks, which call this in each step."""
        if self.group is None:
            return self.signal
        stop, now = 0, time.perf_counter()
        took, self.clock, self.step = now - self.clock, now, self.step + 1
        if self.vote:  # it has begun in the step before
            ballot, counting = self.vote
            counting.wait()
            stop, slowest = ballot.tolist()
            # From a number that all ranks have: they begin the next vote in the same step, too.
            self.vote, steps = None, int(SECONDS * 1e6 / max(1, slowest))
            self.next = self.step - 1 + max(1, min(STEPS, steps))
        if not stop and self.step >= self.next:
            gone = os.getppid() != self.launcher
            ballot = torch.tensor([signal.SIGTERM if gone else self.signal, int(took * 1e6)])
            self.vote = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return stop

    def leave(self, number: int, report: Reporter, global_step: int) -> None:
        """End with the status that shells give to a signal, when all ranks have come here."""
        if self.group:  # the launcher kills the rest 30 s after the first has left
            dist.barrier(group=self.group)
        report.say(f"{signal.Signals(number).name}: saved at step {global_step}; run the same again to go on")
        sys.exit(128 + number)


def watch_signals() -> None:
    """From now on SIGTERM and Ctrl-C leave a note for `Control`; a second one, later, ends the process.

    A thread waits for the second: Python runs no handler while the main thread waits in a collective.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # No method of an object, which the handler would keep for ever, and with it the group.
        signal.signal(number, lambda number, frame: setattr(Control, "signal", number))
    if not Control.watching:
        Control.watching = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # from here on, each signal writes its number
        threading.Thread(target=end_at_the_second_signal, args=(reader,), daemon=True).start()


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
        if not first:
            first = now
        elif now - first > 1:
            rank = f"rank {dist.get_rank()} has " if dist.is_initialized() else ""
            name = signal.Signals(number).name
            lost = "ends at once, and what was trained after the last snapshot is lost"
            os.write(2, f"error: {rank}{name} for the second time: {lost}\n".encode())
            os._exit(128 + number)


def arrange_buckets(trainer: Any) -> None:
    """A backward pass that trains nothing: after the first one DDP arranges its buckets, for good.

    They decide in which order ranks add: a resumed run, whose first step is another, would differ by a bit.
    """
    batch = next(iter(DataLoader(trainer.train_data, 2, collate_fn=tuple, generator=torch.Generator())))
    trainer.model.eval()
    with torch.compiler.set_stance("force_eager"), trainer.autocast:
        trainer.loss(*(tensor.to(trainer.device) for tensor in batch)).backward()
    trainer.optimizer.zero_grad()


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Around `init_process_group`: one line when the ranks do not find each other, or have no connection."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        fail(f"the ranks do not meet: {str(error).splitlines()[0]}; is the port free, is every rank started?")
    except dist.DistBackendError as error:  # its last line has the cause, the others NCCL's own places
        fail(f"the ranks meet, and cannot talk: {str(error).splitlines()[-1]}; NCCL_DEBUG=INFO tells more")


def check_same(args: argparse.Namespace, script: str, data: str) -> None:
    """`fail`, naming who has what, if a rank has other flags, code (where `script` is), data or torch."""
    own = ["num_workers", "verbose", "run", "dataset", "caveat"]
    flags = snapshot.complete(args, {})["flags"]  # without the places of its files
    mine = {f"--{name.replace('_', '-')}": value for name, value in flags.items() if name not in own}
    folders = (Path(script).parent, Path(__file__).parent)
    code = b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
    mine |= {"code": f"{zlib.crc32(code):08x}", "data": data, "torch": torch.__version__}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), mine))
    differences = [
        f"rank {rank} on {host} has {name} {theirs.get(name)}, rank 0 on {ranks[0][0]} has {value}"
        for rank, (host, theirs) in enumerate(ranks)
        for name, value in ranks[0][1].items()
        if theirs.get(name) != value
    ]
    if differences:
        fail(f"{'; '.join(differences[:6])}: make the nodes the same")


def disk_mates(folder: Path) -> list[int]:
    """The ranks, all of which call this, that share this rank's `folder`. `fail`s if it can't be made."""
    snapshot.check_folder(folder)
    mark = folder / f".snapshot-{uuid.uuid4()}.tmp"  # the next save would clear it away
    mark.touch()
    marks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(marks, mark.name)
    mates = [rank for rank, name in enumerate(marks) if (folder / name).exists()]
    dist.barrier()  # marks stay, and nobody saves, until all have looked
    mark.unlink()
    return mates


def let_go() -> None:
    """In the `finally` before `destroy_process_group`: lets that work, and keeps the first error in sight.

    An error that comes of another rank's end waits: the launcher shows the first rank's and ends this rank.
    While DDP or a traceback's frames hold a group, gloo's threads go on, and may abort Python as it ends.
    """
    error = cause = sys.exception()
    if isinstance(error, RuntimeError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if Control.signal and "by peer" in str(error):
            os._exit(128 + Control.signal)  # the launcher's came before the lost connection was seen
        me = f"rank {dist.get_rank()} on {socket.gethostname()}"
        error.add_note(f"Seen by {me}. After a time-out or a lost connection look at the others first.")
        time.sleep(5)
    while cause:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
    gc.collect()
    if error:  # destroying the groups would wait for the other ranks, and they wait for this one
        dist.distributed_c10d._abort_process_group()
