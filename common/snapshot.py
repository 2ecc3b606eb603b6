"""Snapshot files: a kill at any moment leaves a good one, and none is believed unchecked.

A snapshot is `snapshot-<global step, 8 digits>.pt`: a dictionary, as `torch.save` writes it, then the
versions of Python and torch that wrote it, then the CRC-32 of everything before it.
Step 05's is a folder, see 05_fsdp/sharded.py.
"""

import argparse
import contextlib
import os
import platform
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from common.options import fail, warn
from common.process_group import others_wait
from common.reporting import Reporter

FORMAT = 3
WRITER = f"Python {platform.python_version()}, torch {torch.__version__}".encode()[:64].ljust(64)
REMEDY = "make room, make it writable, or choose another --snapshot-dir"
CHUNK = 1 << 24  # bytes of a file that are in memory at a time
KEEP = 3  # the newest can be damaged by a disk, and the one before it by the same fault


def step_of(path: Path) -> int:
    """The global step in a snapshot's name."""
    return int(path.stem.removeprefix("snapshot-"))


def path_of(folder: Path, global_step: int) -> Path:
    """Where the snapshot of a step is, in `folder`."""
    return folder / f"snapshot-{global_step:08d}.pt"


def snapshots(folder: Path, sharded: bool = False) -> list[Path]:
    """The snapshots in `folder`, newest first: steps 01 to 04's files, or step 05's folders."""
    name = r"snapshot-\d{8,}" if sharded else r"snapshot-\d{8,}\.pt"
    found = [path for path in folder.glob("snapshot-*") if re.fullmatch(name, path.name)]
    return sorted(found, key=step_of, reverse=True)


def complete(args: argparse.Namespace, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with what a run must have in common with the one that goes on from it, and its flags."""
    flags = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    same = {"format": FORMAT, "run": args.run, "precision": args.precision, "seed": args.seed}
    return {**state, **same, "flags": flags}


class ChecksumFile:
    """A file for `torch.save` that computes the CRC-32 of all that is written to it.

    It keeps the first OSError and lets torch go on, because torch would put an error of its own in its place.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.crc = 0
        self.error: OSError | None = None

    def write(self, chunk: Any) -> int:
        """Write bytes, or a memoryview of a tensor's bytes."""
        self.crc = zlib.crc32(chunk, self.crc)
        if self.error is None:
            try:
                self.file.write(chunk)
            except OSError as error:
                self.error = error
        return len(chunk)

    def flush(self) -> None:
        """`torch.save` calls it. `write` below flushes the file itself, where an error can be raised."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to the file `path` in one go, or raise OSError; TypeError if `read` would refuse it.

    Tensors go from where they are to the disk: no second copy of the state is made in memory.
    """
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with open(temporary, "wb") as file:
            checked = ChecksumFile(file)
            torch.save(state, checked)  # type: ignore[arg-type] # it calls `write` and `flush` only
            checked.write(WRITER)
            # Of the whole file: zip's own checksums leave out the names and places of what is in it.
            checked.write(checked.crc.to_bytes(4, "big"))
            if checked.error:
                raise checked.error
            file.flush()
            os.fsync(file.fileno())
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(temporary)
        if refused:
            raise TypeError(f"{max(refused)} cannot be in a snapshot, only tensors, numbers and strings")
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there only if something went wrong


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut, where that can be asked for: not on all disks."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as end:
        descriptor = os.open(folder, os.O_RDONLY)
        end.callback(os.close, descriptor)
        os.fsync(descriptor)


def save(args: argparse.Namespace, **state: Any) -> None:
    """Write `state`, of tensors, numbers and strings, to a new file; keep the newest three. May `fail`."""
    path = path_of(args.snapshot_dir, state["global_step"])
    try:
        write(path, complete(args, state))
        for old in [*snapshots(path.parent)[KEEP:], *path.parent.glob(".snapshot-*.tmp")]:
            old.unlink()
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; {REMEDY}")
    except TypeError as error:
        fail(f"cannot write {path}: {error}")
    if args.verbose:
        print(f"[rank {dist.get_rank() if dist.is_initialized() else 0}] saved {path}", flush=True)


def checksum(file: BinaryIO, size: int = 1 << 62) -> int:
    """The CRC-32 of the next `size` bytes of `file`, or of all that are left."""
    crc = 0
    while chunk := file.read(max(0, min(size, CHUNK))):
        crc = zlib.crc32(chunk, crc)
        size -= len(chunk)
    return crc


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The state in the file `path`, and what is wrong with it (an empty string if nothing is)."""
    if path.exists() and not path.is_file():
        return {}, f"{path.name} is no file"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            crc = checksum(file, size - 4)
            end = {"checksum": file.read(4)}
            if crc != int.from_bytes(end["checksum"], "big"):
                return {}, f"wrong checksum: altered, cut off at {size:,} bytes, or never a snapshot"
            file.seek(max(0, size - 4 - len(WRITER)))
            end["writer"] = file.read(len(WRITER))
            file.seek(0)
            with only_tensors():
                state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}; make it readable or choose another --snapshot-dir")
    except Exception as error:  # whoever made this file, the unpickler can raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return {}, f"{reason}; {written_by(end)}"
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        return {}, "not a snapshot of this project"
    return {**state, **end}, ""


@contextlib.contextmanager
def only_tensors() -> Iterator[None]:
    """Inside, `torch.load(…, weights_only=True)` makes tensors, numbers and strings, and nothing else.

    torch.distributed allows more when it is imported, such as DeviceMesh and traceback.FrameSummary. A file
    that is made to do harm could start a process group with them, or read another file.
    """
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(allowed)


def written_by(state: dict[str, Any]) -> str:
    """Which Python and torch wrote the snapshot `state`, for messages: other versions may not read it."""
    found = re.match(rb"Python [\w.+-]+, torch [\w.+-]+", state["writer"])  # or whatever is in a hostile file
    return f"written by {found[0].decode() if found else 'unknown versions of Python and torch'}"


def check_folder(folder: Path) -> None:
    """Make the folder of the snapshots; `fail` if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}; {REMEDY}")


def load_newest(args: argparse.Namespace, read_shards: Any = None, alike: bool = True) -> Any:
    """The state in the newest snapshot that is whole, tensors on the CPU; None if there is none.

    A damaged one is reported by name and the one before it is taken. `fail`s when none is whole, when it is
    of another run, precision, seed or format, when the folder can't be written, or when ranks must start
    `alike` and do not. With `read_shards`, in place of `read`, snapshots are folders.
    """
    folder, sharded = args.snapshot_dir, read_shards is not None
    check_folder(folder)
    paths, others = snapshots(folder, sharded), snapshots(folder, not sharded)
    if others and (not paths or step_of(others[0]) > step_of(paths[0])):
        kind = f"is {'no' if sharded else 'a'} sharded snapshot"
        fail(f"{others[0]} {kind}; to go on from it: python 05_fsdp/convert.py {others[0]}")
    if sharded and dist.is_initialized():  # all ranks have to read the same ones
        found = gathered((args.run, [path.name for path in paths]))
        newest = [(run, step_of(Path(names[0])) if names else None) for run, names in found]
        check_alike(newest)
        paths = [folder / name for name in found[0][1]]
    state: Any = None
    damaged: list[str] = []
    # Reading may take one rank longer than another. Step 05's waits for the others by itself.
    with contextlib.nullcontext() if sharded else others_wait():
        for path in paths:
            state, problem = (read_shards or read)(path)
            if not problem:
                break
            damaged.append(f"{path} is damaged ({problem})")
    if damaged and len(damaged) == len(paths):
        fail(f"{'; '.join(damaged)}; no snapshot is left, delete {folder} to start afresh")
    for report in damaged:
        warn(f"{report}; using {path} instead")
    for name, ours in complete(args, {}).items():
        if state and name != "flags" and state.get(name) != ours:
            both = f"was made with {name} {state.get(name)}, this run has {name} {ours}"
            by = f" ({written_by(state)})" if name == "format" else ""
            fail(f"{path} {both}{by}: use the same, or another --snapshot-dir")
    if alike and dist.is_initialized():
        check_alike(gathered((args.run, state["global_step"] if state else None)))
    return state


def gathered(mine: Any) -> list[Any]:
    """What each rank has given."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def check_alike(starts: list[tuple[str, int | None]]) -> None:
    """`fail` unless all ranks start from the same run and global step."""
    if len(set(starts)) > 1:
        fail(f"the ranks do not start from the same place (run, step): {starts}; use one disk for all")


def rng_states(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The state of every rank's random numbers, on the CPU and on its `device`; all ranks must call it."""
    mine = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        mine["gpu"] = torch.get_device_module(device).get_rng_state()
    states = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(states, mine)
    return states


def resume(state: dict[str, Any], report: Reporter) -> tuple[int, int, int]:
    """Go on from a snapshot, with this rank's random numbers: returns epoch, samples seen in it, global step.

    With other ranks or devices random numbers begin anew, and samples are rounded up to a multiple of ranks.
    """
    ranks, epoch, step = report.world_size, state["epoch"], state["global_step"]
    on_gpu = report.device.type != "cpu"
    if len(state["rng"]) == ranks and all(("gpu" in each) == on_gpu for each in state["rng"]):
        mine = state["rng"][report.rank]
        torch.set_rng_state(mine["cpu"])
        if on_gpu:
            torch.get_device_module(report.device).set_rng_state(mine["gpu"])
    else:
        torch.manual_seed(zlib.crc32(f"{state['seed']} {step} {report.rank}".encode()))
        report.detail(f"random numbers begin anew: the snapshot is of {len(state['rng'])} ranks")
    for group in state.get("optimizer", state)["param_groups"]:
        group.update(fused=on_gpu)  # as this run's are, before an optimizer loads them
    report.say(f"resumed from {report.args.snapshot_dir}: epoch {epoch}, step {step}")
    return epoch, -(-state["samples_seen"] // ranks) * ranks, step
