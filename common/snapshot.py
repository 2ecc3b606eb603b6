"""Snapshot files: a kill at any moment leaves a good one, and none is believed unchecked.

A snapshot is `snapshot-<global step, 8 digits>.pt`, a dictionary in `torch.save`'s format, the same
for every step of the ladder: begin with one script, go on with another.
"""

import argparse
import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from common.options import fail, warn

FORMAT = 1
KEEP = 3  # the newest can be damaged by a disk, and the one before it by the same fault


def snapshots(folder: Path) -> list[Path]:
    """The snapshots in `folder`, newest first."""
    found = [path for path in folder.glob("snapshot-*.pt") if re.fullmatch(r"snapshot-\d{8,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("snapshot-")), reverse=True)


def identity(args: argparse.Namespace, dataset: str) -> dict[str, Any]:
    """What a run and the snapshot that it resumes from must have in common."""
    return {
        "format": FORMAT,
        "model_name": args.model,
        "dataset": dataset,
        "precision": args.precision,
        "seed": args.seed,
    }


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
    state = {**state, **identity(args, dataset), "batch_size": args.batch_size, "rng": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    # Through memory, so that whatever the disk objects to arrives as an OSError.
    content = io.BytesIO()
    torch.save(state, content)
    temporary = folder / f".{path.name}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        # The name changes hands in one go, and only when the bytes are on the disk; the folder's
        # own fsync makes the new name survive a power cut.
        os.replace(temporary, path)
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        for old in [*snapshots(folder)[KEEP:], *folder.glob(".snapshot-*.tmp")]:
            old.unlink(missing_ok=True)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error.strerror}; make room or choose another --snapshot-dir")
    return path


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The state in a file, and what is wrong with it (an empty string if nothing is)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}; make it readable or choose another --snapshot-dir")
    try:
        # torch.load does not look at the checksums of its own zip format.
        if corrupt := zipfile.ZipFile(io.BytesIO(content)).testzip():
            return {}, f"wrong checksum in {corrupt}"
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make zipfile and the unpickler raise nearly anything
        return {}, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not isinstance(state, dict) or "format" not in state:
        return {}, "not a snapshot of this project"
    return state, ""


def load_newest(args: argparse.Namespace, dataset: str) -> dict[str, Any] | None:
    """The state in the newest snapshot that is whole, or None if `args.snapshot_dir` holds none.

    Tensors are on the CPU. The random number generators are set to where they were.

    A damaged file is reported by name and the one before it is taken. `fail`s when none is whole
    (rather than start afresh over them), and when the snapshot is of another model, data set,
    precision, seed or format than this run. Makes the folder, and `fail`s when it cannot be written.
    """
    # Now rather than after an hour of training: can snapshots be written here?
    try:
        args.snapshot_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {args.snapshot_dir}: {error.strerror}; choose another --snapshot-dir")
    if not os.access(args.snapshot_dir, os.W_OK):
        fail(f"cannot write to {args.snapshot_dir}: make it writable or choose another --snapshot-dir")
    paths = snapshots(args.snapshot_dir)
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
