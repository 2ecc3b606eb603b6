"""Snapshot files: a kill at any moment leaves a good one, and none is believed unchecked.

A snapshot is `snapshot-<global step, 8 digits>.pt`, a dictionary in `torch.save`'s format, the same
for steps 01 to 04: begin with one script, go on with another. Behind the last byte that `torch.load`
reads stands the CRC-32 of all before it. Step 05's is a folder of that name without `.pt`: the ranks'
shards, as torch.distributed.checkpoint writes them, and the rest of the dictionary in `state.pt`.
05_fsdp/convert.py makes one of the other.
"""

import argparse
import io
import os
import pickle
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch

from common.options import fail, warn

FORMAT = 1
REMEDY = "make room, make it writable, or choose another --snapshot-dir"
KEEP = 3  # the newest can be damaged by a disk, and the one before it by the same fault
STATE = "state.pt"  # in a sharded snapshot: all that is not a shard, and the shards' checksums
METADATA = ".metadata"  # in a sharded snapshot: which shard holds which part of which tensor, a pickle

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

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in HARMLESS:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in {METADATA}")
        return super().find_class(module, name)


def step_of(path: Path) -> int:
    """The global step in a snapshot's name."""
    return int(path.stem.removeprefix("snapshot-"))


def snapshots(folder: Path, sharded: bool = False) -> list[Path]:
    """The snapshots in `folder`, newest first: steps 01 to 04's files, or step 05's folders."""
    name = r"snapshot-\d{8,}" if sharded else r"snapshot-\d{8,}\.pt"
    found = [path for path in folder.glob("snapshot-*") if re.fullmatch(name, path.name)]
    return sorted(found, key=step_of, reverse=True)


def identity(args: argparse.Namespace, dataset: str) -> dict[str, Any]:
    """What a run and the snapshot that it resumes from must have in common."""
    size = {"vit_width": args.vit_width, "vit_depth": args.vit_depth} if args.model == "vit" else {}
    return {
        "format": FORMAT,
        "model_name": args.model,
        **size,
        "dataset": dataset,
        "precision": args.precision,
        "seed": args.seed,
    }


def write(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to the file `path` in one go: it is there whole, or as it was. Raises OSError."""
    # Through memory, so that whatever the disk objects to arrives as an OSError.
    content = io.BytesIO()
    torch.save(state, content)
    # Of the whole file: zip's own leave out the names and places of what is in it.
    content.write(zlib.crc32(content.getbuffer()).to_bytes(4, "big"))
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        # The name changes hands in one go, and only when the bytes are on the disk.
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(args: argparse.Namespace, dataset: str, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with what every snapshot has: the run's identity, batch size, and random numbers' state."""
    state = {**state, **identity(args, dataset), "batch_size": args.batch_size, "rng": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def save(args: argparse.Namespace, dataset: str, state: dict[str, Any]) -> Path:
    """Write `state` to a new file in `args.snapshot_dir` and delete all but the newest three.

    Args:
        args: the run's flags.
        dataset: the name of the training data.
        state: tensors, numbers and strings only, `global_step` among them; this adds the run's
            identity, its batch size and the state of the random number generators.

    Returns the file's path. `fail`s if it cannot be written; the snapshots before it are untouched.
    """
    folder = args.snapshot_dir
    path = folder / f"snapshot-{state['global_step']:08d}.pt"
    try:
        write(path, complete(args, dataset, state))
        for old in [*snapshots(folder)[KEEP:], *folder.glob(".snapshot-*.tmp")]:
            old.unlink(missing_ok=True)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; {REMEDY}")
    return path


def unfinished(folder: Path, global_step: int) -> Path:
    """Where the shards of a snapshot are written, until `finish` gives it its name."""
    return folder / f".snapshot-{global_step:08d}.tmp"


def finish(folder: Path, state: dict[str, Any]) -> Path:
    """Make a snapshot of the shards that are all in `unfinished(folder, …)`.

    Args:
        folder: the snapshots' folder.
        state: what `complete` returned when the shards were copied.

    Returns the snapshot's path. Raises OSError; the snapshots before it are untouched then.
    """
    shards = unfinished(folder, state["global_step"])
    path = folder / f"snapshot-{state['global_step']:08d}"
    # Without what a kill in `write` has left here, which is about to be replaced.
    files = [file for file in sorted(shards.iterdir()) if STATE not in file.name]
    write(shards / STATE, {**state, "checksums": {file.name: checksum(file) for file in files}})
    if path.exists():  # damaged, or there would not be another: a folder cannot be replaced in one go
        os.rename(path, shards.with_suffix(".old.tmp"))
    os.rename(shards, path)
    sync_folder(folder)
    return path


def sweep(folder: Path) -> None:
    """Delete all sharded snapshots but the newest three, and unfinished ones. Raises OSError."""
    for old in [*snapshots(folder, sharded=True)[KEEP:], *folder.glob(".snapshot-*.tmp")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The state in a snapshot, without its shards, and what is wrong with it (an empty string if nothing)."""
    sharded = path.is_dir()
    if sharded and not (path / STATE).exists():
        return {}, f"{STATE} is missing"
    try:
        content = (path / STATE if sharded else path).read_bytes()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}; make it readable or choose another --snapshot-dir")
    if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "big"):
        return {}, f"wrong checksum: altered, cut off at {len(content):,} bytes, or never a snapshot"
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whoever made this file, the unpickler can raise nearly anything
        return {}, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not isinstance(state, dict) or "format" not in state:
        return {}, "not a snapshot of this project"
    if sharded and METADATA not in state.get("checksums", {}):
        return {}, f"{STATE} is of no sharded snapshot"
    for name, crc in state.get("checksums", {}).items():
        try:
            if checksum(path / name) != crc:
                return {}, f"wrong checksum in {name}"
        except OSError as error:
            return {}, f"cannot read {name}: {error.strerror}"
    if sharded:
        try:
            HarmlessUnpickler(io.BytesIO((path / METADATA).read_bytes())).load()
        except Exception as error:  # as above
            return {}, f"{METADATA}: {error}".splitlines()[0]
    return state, ""


def load_newest(args: argparse.Namespace, dataset: str, sharded: bool = False) -> dict[str, Any] | None:
    """The state in the newest snapshot that is whole, or None if `args.snapshot_dir` holds none.

    Tensors are on the CPU; of a `sharded` one, the shards have been checked and not loaded. The random
    number generators are set to where they were.

    A damaged file is reported by name and the one before it is taken. `fail`s when none is whole
    (rather than start afresh over them), and when the snapshot is of another model, data set,
    precision, seed or format than this run, or the newest is of the other kind (a file, or sharded).
    Makes the folder, and `fail`s when it cannot be written.
    """
    # Now rather than after an hour of training: can snapshots be written here?
    try:
        args.snapshot_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {args.snapshot_dir}: {error.strerror}; choose another --snapshot-dir")
    try:
        with tempfile.TemporaryFile(dir=args.snapshot_dir) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        fail(f"cannot write to {args.snapshot_dir}: {error.strerror}; {REMEDY}")
    paths, others = snapshots(args.snapshot_dir, sharded), snapshots(args.snapshot_dir, not sharded)
    if others and (not paths or step_of(others[0]) > step_of(paths[0])):
        kind = "is no sharded snapshot" if sharded else "is a sharded snapshot"
        fail(f"{others[0]} {kind}; to go on from it: python 05_fsdp/convert.py {others[0]}")
    if not paths:
        return None
    damaged = []
    for path in paths:
        state, problem = read(path)
        if not problem:
            break
        damaged.append(f"{path} is damaged ({problem})")
    else:
        fail(f"{'; '.join(damaged)}; no snapshot is left, delete {args.snapshot_dir} to start afresh")
    for report in damaged:
        warn(f"{report}; using {path} instead")
    for key, ours in identity(args, dataset).items():
        if state.get(key) != ours:
            name = "--model" if key == "model_name" else key
            fail(
                f"{path} was made with {name} {state.get(key)}, this run has {name} {ours}: "
                "use the same, or another --snapshot-dir"
            )
    restore_rng(state)
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set the random number generators to where they were when `state` was saved."""
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda_rng"])
