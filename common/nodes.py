"""For several machines: compare code and data, find out who shares a disk, and copy a snapshot."""

import contextlib
import os
import socket
import time
import uuid
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import snapshot
from common.options import fail
from common.process_group import gather_objects, keep_alive

FLAGS_THAT_MAY_DIFFER = {"num_workers", "verbose"}  # between nodes: they change nothing that is trained


def check_ranks_agree(script: str, flags: dict[str, Any], data: str) -> None:
    """`fail`, and name who has what, if a rank has other flags, code, data or another torch.

    `script` is a train.py: its folder is compared, and this one. `flags` are its flags by name; those that
    are paths may differ. `data` is `loading.fingerprint` of the dataset.
    """
    values: dict[str, Any] = {
        f"--{name.replace('_', '-')}": value
        for name, value in flags.items()
        if name not in FLAGS_THAT_MAY_DIFFER and not isinstance(value, Path)
    }
    values["code"] = checksum_of_code([Path(script).parent, Path(__file__).parent])
    values["data"] = data
    values["torch"] = torch.__version__
    ranks = gather_objects((socket.gethostname(), values))
    first_host, first_values = ranks[0]
    differences = []
    for rank, (host, rank_values) in enumerate(ranks):
        for name, value in first_values.items():
            if rank_values.get(name) != value:
                found = f"rank {rank} on {host} has {name} {rank_values.get(name)}"
                differences.append(f"{found}, rank 0 on {first_host} has {value}")
    if differences:
        fail(f"{'; '.join(differences[:6])}: make the nodes the same")


def checksum_of_code(folders: list[Path]) -> str:
    """The CRC-32 of all Python files in `folders`, as hexadecimal digits."""
    crc = 0
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            crc = zlib.crc32(path.read_bytes(), crc)
    return f"{crc:08x}"


def ranks_sharing(folder: Path) -> list[int]:
    """The ranks for which `folder` is the same directory as for this rank. All ranks call it.

    The folder is made if it is not there. `fail`s if it cannot be written to.
    """
    snapshot.check_folder(folder)
    for mark in folder.glob(".mark-*"):
        with contextlib.suppress(FileNotFoundError):  # another rank has deleted it
            if time.time() - mark.stat().st_mtime > 3600:  # left by a run that was killed in this function
                mark.unlink()
    mark = folder / f".mark-{uuid.uuid4()}"
    mark.touch()
    marks = gather_objects(mark.name)
    ranks = [rank for rank, name in enumerate(marks) if (folder / name).exists()]
    dist.barrier()  # the marks stay until all ranks have looked
    mark.unlink()
    return ranks


def check_shared(folder: Path) -> None:
    """`fail` unless all ranks see the same `folder`. All ranks call it."""
    if len(ranks_sharing(folder)) < dist.get_world_size():
        fail(f"{folder} is not on a disk that all nodes share: use one")


def load_newest_of_all(snapshots: snapshot.SnapshotFolder, is_saver: bool, timeout: float) -> Any:
    """The state in the newest snapshot that any rank has, None if there is none. All ranks call it.

    Ranks with `is_saver`, one for each disk, first write a copy of it where it is missing.
    """
    snapshots.lock(is_saver)
    state = snapshots.load_newest(same_on_all_ranks=False)
    version = (state["global_step"], state["checksum"]) if state else (-1, b"")
    versions = gather_objects(version)
    newest = max(versions)
    if len(set(versions)) == 1:
        if state:
            snapshots.check_flags(state)
        return state
    state = None  # free its memory before another one is loaded
    path = snapshot.path_of(snapshots.path, newest[0])
    must_receive = is_saver and version != newest
    send_snapshot(path, versions.index(newest), must_receive, timeout)
    return snapshots.load_newest()


def send_snapshot(path: Path, source: int, receives: bool, timeout: float) -> None:
    """Copy a file from the disk of rank `source` to the same `path` on the disks of ranks with `receives`.

    All ranks call it. The file goes over gloo, in chunks, and no rank has all of it in memory. A chunk
    may take `timeout` seconds. `fail`s if the file cannot be read or written.
    """
    needed = gather_objects(receives)
    ranks = [rank for rank, needs_it in enumerate(needed) if needs_it or rank == source]
    group: Any = dist.new_group(ranks, timedelta(seconds=timeout), backend="gloo")
    with keep_alive():
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
    """Write the file that `send_file` sends. It has its name when all of it is on the disk.

    Raises OSError, but not before the whole file has come: the sender does not know, and keeps sending.
    """
    size = torch.tensor(0)
    dist.broadcast(size, src=source, group=group)
    chunks = receive_chunks(int(size), source, group)
    temporary = snapshot.unfinished(path)
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        snapshot.sync_folder(path.parent)
    finally:
        for _ in chunks:
            pass  # if the disk is full, what is left must still be received
        temporary.unlink(missing_ok=True)  # it is still there only if something went wrong


def receive_chunks(size: int, source: int, group: Any) -> Iterator[torch.Tensor]:
    """The `size` bytes that rank `source` sends, as tensors of uint8."""
    while size > 0:
        chunk = torch.empty(min(size, snapshot.CHUNK), dtype=torch.uint8)
        dist.broadcast(chunk, src=source, group=group)
        size -= len(chunk)
        yield chunk
