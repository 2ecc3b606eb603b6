"""What nodes with disks of their own need: a copy of the newest snapshot."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import snapshot
from common.options import fail
from common.process_group import others_wait


def send_snapshot(path: Path, source: int, receives: bool, timeout: float) -> None:
    """Copy a file from the disk of rank `source` to the same `path` on the disks of ranks with `receives`.

    All ranks call it. The file goes over gloo, in chunks, and no rank has all of it in memory. A chunk
    may take `timeout` seconds. `fail`s if the file cannot be read or written.
    """
    receivers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(receivers, receives)
    ranks = [rank for rank, needs_it in enumerate(receivers) if needs_it or rank == source]
    group: Any = dist.new_group(ranks, timedelta(seconds=timeout), backend="gloo")
    with others_wait():
        try:
            if dist.get_rank() == source:
                send_file(path, source, group)
            elif receives:
                receive_file(path, source, group)
        except OSError as error:
            fail(f"cannot copy {path} between the nodes: {error.strerror}; {snapshot.REMEDY}")
    if dist.get_rank() in ranks:
        dist.destroy_process_group(group)


def send_file(path: Path, source: int, group: Any) -> None:
    """Broadcast the size of a file to `group`, and then its bytes."""
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size
        dist.broadcast(torch.tensor(left), src=source, group=group)
        while left > 0:
            chunk = file.read(min(left, snapshot.CHUNK))
            dist.broadcast(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), src=source, group=group)
            left -= len(chunk)


def receive_file(path: Path, source: int, group: Any) -> None:
    """Write the file that `send_file` sends. It has its name when all of it is on the disk."""
    temporary = path.parent / f".{path.name}.tmp"
    size = torch.tensor(0)
    dist.broadcast(size, src=source, group=group)
    left = int(size)
    try:
        with open(temporary, "wb") as file:
            while left > 0:
                chunk = torch.empty(min(left, snapshot.CHUNK), dtype=torch.uint8)
                dist.broadcast(chunk, src=source, group=group)
                file.write(chunk.numpy().data)
                left -= len(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        snapshot.sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there only if something went wrong
