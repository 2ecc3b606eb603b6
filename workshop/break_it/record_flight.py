"""What each rank has called so far, and where it stands: written each second, to be read when it hangs.

    from record_flight import record_flight     # in a script, with this file beside it
    record_flight()                             # behind init_process_group

    python -m torch.distributed.flight_recorder.fr_trace flight    # which rank does what the others do not
    cat stack-1                                                    # where rank 1 stands

torch's flight recorder keeps the last collectives of a process, with the lines that called them. With NCCL it
writes them to files when one times out (TORCH_FR_DUMP_TEMP_FILE). With gloo somebody has to ask for it.
"""

import pickle
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def record_flight():
    """Begin: a thread does it, since a rank that hangs would not come to it."""
    Path("flight").mkdir(exist_ok=True)
    threading.Thread(target=record, args=[dist.get_rank(), dist.get_world_size()], daemon=True).start()


def record(rank, ranks):
    """Write the files `flight/rank-N` and `stack-N` until the process group is no more."""
    while dist.is_initialized():
        flight = pickle.loads(torch._C._distributed_c10d._dump_fr_trace())
        # gloo leaves out the names of its groups, by which the reader looks them up. All ranks are in all.
        for name, about in {entry["process_group"] for entry in flight["entries"]}:
            flight["pg_config"][name] = {"name": name, "desc": about, "ranks": str([*range(ranks)])}
        replace(Path("flight", f"rank-{rank}"), pickle.dumps(flight))
        stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
        replace(Path(f"stack-{rank}"), "".join(stack).encode())
        time.sleep(1)


def replace(path, content):
    """Write a file in one go: a rank may be killed while it writes."""
    new = Path(f"new-{path.name}")
    new.write_bytes(content)
    new.rename(path)
