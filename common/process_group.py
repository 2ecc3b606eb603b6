"""The process group: its backends, its start and end, and work in it that may take any amount of time."""

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its functions keep one that exists (DDP imports it)
from torch.distributed.device_mesh import DeviceMesh

from common.options import fail
from common.stopping import GracefulStop, end_with_launcher

SECONDS_BETWEEN_BEATS = 1.0  # of a rank that is still at work


def backends(device: torch.device) -> str:
    """For `init_process_group`: gloo for what is in the CPU's memory, and for a GPU its own, such as NCCL.

    Objects then go from CPU to CPU, and not through the memory of the GPUs.
    """
    if device.type == "cpu":
        return "cpu:gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


@contextlib.contextmanager
def rendezvous() -> Iterator[None]:
    """Around `init_process_group`: one line when the ranks do not find each other, or have no connection.

    From here on, this rank ends when its launcher was killed, whatever it waits for.
    """
    end_with_launcher()
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        fail(f"the ranks did not find each other: {reason}; is the port free, and has every rank started?")
    except RuntimeError as error:
        if is_lost_connection(error):  # a rank that was faster has found a mistake in a flag
            fail("another rank ended while this one connected to it: the first error says why")
        # The old NCCL backend raises DistBackendError, and `nccl2`, the default from torch 2.15 on, a plain
        # RuntimeError. The last line has the cause, and the others NCCL's own places.
        if not isinstance(error, dist.DistBackendError) and "NCCL" not in str(error):
            raise
        reason = str(error).splitlines()[-1]
        fail(f"the ranks found each other, but cannot communicate: {reason}; NCCL_DEBUG=INFO shows more")


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def keep_alive(group: Any = None) -> Iterator[None]:
    """Around work that may take longer than `--timeout` on some of the ranks, such as a save.

    All ranks of `group` enter it, and leave it together, also after an error. The group must not be used
    inside. If the others waited in a collective, they would call a slow rank lost. In here, every rank says
    each second that it is still at work, and only a rank that falls silent is lost.

    Raises RuntimeError if a rank falls silent, or ends.
    """
    if not dist.is_initialized():
        yield
        return
    done = threading.Event()
    problems: list[RuntimeError] = []

    def beat() -> None:
        ranks_at_work = torch.ones(1)
        try:
            while ranks_at_work.item() > 0:
                is_at_work = not done.wait(SECONDS_BETWEEN_BEATS)
                ranks_at_work.fill_(is_at_work)
                dist.all_reduce(ranks_at_work, group=group)
        except RuntimeError as error:  # a lost connection, or a timeout
            problems.append(error)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if problems:
        raise problems[0]


def release_process_group() -> None:
    """In the `finally` before `destroy_process_group`: free what uses the group, and show the first error.

    A RuntimeError waits for five seconds, because it may be the result of another rank's end. Then the
    launcher shows the error of that rank, and ends this one. While DDP or the frames of a traceback hold a
    group, the threads of gloo keep running, and may abort Python as it ends.
    """
    error = sys.exception()
    cause = error
    if isinstance(error, RuntimeError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if GracefulStop.received and is_lost_connection(error):
            os._exit(128 + GracefulStop.received)  # the others have had the same signal, and ended earlier
        rank = f"rank {dist.get_rank()} on {socket.gethostname()}"
        error.add_note(f"Seen by {rank}. After a timeout or a lost connection look at the others first.")
        time.sleep(5)
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
    release_meshes()
    gc.collect()
    if error is not None:
        abort_process_group()


def release_meshes() -> None:
    """Release the process groups that device meshes hold, such as step 05's.

    DTensor's caches keep meshes forever, and torch has no public way to empty a mesh (2.11 to 2.14;
    test_real_start.py fails without this, and where torch has renamed the attribute).
    """
    for thing in gc.get_objects():
        if type(thing) is DeviceMesh:
            getattr(thing, "_pg_registry", {}).clear()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether `error` says that another rank has closed its connection.

    gloo raises a plain RuntimeError, so only the text tells: "Connection closed by peer", or "reset by peer"
    (torch 2.11 to 2.14). test_interruptions.py shows it when another torch says something else.
    """
    return "by peer" in str(error)


def abort_process_group() -> None:
    """End all process groups at once. `destroy_process_group` may wait for ranks that wait for this one.

    torch has no public function for it (2.11 to 2.14; the tests of exits turn red where it is gone).
    """
    dist.distributed_c10d._abort_process_group()
