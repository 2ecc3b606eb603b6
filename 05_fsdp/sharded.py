"""Step 05's snapshots: folders, to which each rank writes its own shards, in the background.

`snapshot-<global step, 8 digits>` holds the shards, as torch.distributed.checkpoint writes them, and in
`state.pt` the rest of what common/snapshot.py's files hold. Until it is whole it has another name.
"""

import io
import os
import pickle
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from common import snapshot
from common.options import fail

STATE = "state.pt"  # all that is not a shard, and the shards' checksums
METADATA = ".metadata"  # which shard holds which part of which tensor, a pickle

# All that stands in METADATA. A pickle can name any function there is, to be called when it is loaded.
HARMLESS = {
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # Python 3.13's name for it
    "torch.Size",
    "torch.bfloat16",
    "torch.float32",
    "torch.float64",
    "torch.int64",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
}


class HarmlessUnpickler(pickle.Unpickler):
    """Refuses, with an UnpicklingError, a pickle that names anything but the HARMLESS."""

    def find_class(self, module, name):
        if f"{module}.{name}" not in HARMLESS:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in {METADATA}")
        return super().find_class(module, name)


def checksum(path):
    """The CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def read(path):
    """The state in the folder `path` and what is wrong with it, as snapshot.read gives it for a file.

    The shards are checked and not loaded; the state's `path` says where they are.
    """
    if not (path / STATE).exists():
        return {}, f"{STATE} is missing"
    state, problem = snapshot.read(path / STATE)
    if problem:
        return {}, problem
    if METADATA not in state.get("checksums", {}):
        return {}, f"{STATE} is of no sharded snapshot"
    for name, crc in state["checksums"].items():
        try:
            if checksum(path / name) != crc:
                return {}, f"wrong checksum in {name}"
        except OSError as error:
            return {}, f"cannot read {name}: {error.strerror}"
    try:
        HarmlessUnpickler(io.BytesIO((path / METADATA).read_bytes())).load()
    except Exception as error:  # whoever made this file, the unpickler can raise nearly anything
        return {}, f"{METADATA}: {error}".splitlines()[0]
    return {**state, "path": path}, ""


def unfinished(folder, global_step):
    """Where the shards of a snapshot are written, until `finish` gives it its name."""
    return folder / f".snapshot-{global_step:08d}.tmp"


def finish(folder, state):
    """Make a snapshot of the shards that are all in `unfinished(folder, …)`.

    Args:
        folder: the snapshots' folder.
        state: what snapshot.complete returned when the shards were copied.

    Returns the snapshot's path. Raises OSError; the snapshots before it are untouched then.
    """
    shards = unfinished(folder, state["global_step"])
    path = folder / f"snapshot-{state['global_step']:08d}"
    # Without what a kill in `write` has left here, which is about to be replaced.
    files = [file for file in sorted(shards.iterdir()) if STATE not in file.name]
    checksums = {file.name: checksum(file) for file in files}
    snapshot.write(shards / STATE, {**state, "checksums": checksums})
    if path.exists():  # of the same step, or damaged: a folder cannot be replaced in one go
        os.rename(path, shards.with_suffix(".old.tmp"))
    os.rename(shards, path)
    snapshot.sync_folder(folder)
    return path


def sweep(folder):
    """Delete all sharded snapshots but the newest three, and unfinished ones. Raises OSError."""
    for old in [*snapshot.snapshots(folder, True)[snapshot.KEEP :], *folder.glob(".snapshot-*.tmp")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


class Saver:
    """Finishes snapshots in a thread while training goes on; the end of its `with` waits for the last."""

    def __init__(self, args):
        self.args, self.folder, self.saving = args, args.snapshot_dir, None
        # A group of its own: two threads must not talk over one.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.timeout))

    def __enter__(self):
        self.thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *error):
        self.thread.shutdown()

    def finish(self, writing, **state):
        """When all ranks' shards are written (`writing` is dcp.async_save's), add `state` and the name."""
        self.saving = self.thread.submit(self.finish_now, writing, snapshot.complete(self.args, state))

    def finish_now(self, writing, state):
        problem = [None]
        try:
            writing.result()
            if dist.get_rank() == 0:
                path = finish(self.folder, state)
                sweep(self.folder)
                if self.args.verbose:
                    print(f"[rank 0] saved {path}", flush=True)
        except dcp.CheckpointException as error:  # the same on all ranks
            rank, (reason, _) = next(iter(error.failures.items()))
            reason = str(reason).splitlines()[0]  # not always the one that the disk gave
            free = shutil.disk_usage(self.folder).free / 1e6
            problem = [f"rank {rank} cannot write its shards: {reason} ({free:.1f} MB are free)"]
        except OSError as error:
            problem = [f"cannot write to {self.folder}: {error.strerror}"]
        dist.broadcast_object_list(problem, src=0, group=self.group)
        return problem[0]

    def wait(self):
        """For the snapshot that is being written; `fail`s, on one rank, if that did not succeed."""
        problem = self.saving.result() if self.saving else None
        self.saving = None
        if problem and dist.get_rank() != 0:
            sys.exit(2)  # all ranks know, and one says it
        if problem:
            fail(f"{problem}; {snapshot.REMEDY}")
