"""Snapshot files: a kill at any moment leaves a good one, and every one is checked before it is used.

A snapshot is `snapshot-<global step, 8 digits>.pt`: a dictionary, as `torch.save` writes it, then the
versions of Python and torch that wrote it, then the CRC-32 of everything before it.
Step 05's is a folder, see 05_fsdp/sharded.py.
"""

import contextlib
import fcntl
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from common.loading import seed_python_and_numpy
from common.options import fail, warn
from common.output import print_line
from common.process_group import gather_objects, keep_alive
from common.reporting import Reporter
from common.run import OFTEN_CHANGED, Run

FORMAT = 3
WRITER = f"Python {platform.python_version()}, torch {torch.__version__}".encode()[:64].ljust(64)
REMEDY = "make room, make it writable, or choose another --snapshot-dir"
CHUNK = 1 << 24  # bytes of a file that are in memory at a time
SECONDS_FOR_THE_LAST_RUN = 20.0  # for an earlier run to end after its launcher
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


def unfinished(path: Path) -> Path:
    """Where the snapshot `path` is written, until all of it is on the disk."""
    return path.parent / f".{path.name}.tmp"


class ChecksumFile:
    """A file for `torch.save` that computes the CRC-32 of all that is written to it.

    It keeps the first OSError and lets torch continue, because torch would raise an error of its own instead.
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
    """Write `state` to the file `path`, whole or not at all.

    Raises OSError, and TypeError if `read` would refuse the file. Tensors go from where they are to the
    disk: no second copy of the state is made in memory.
    """
    temporary = unfinished(path)
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
        with only_tensors():
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(temporary)
        if refused:
            raise TypeError(f"{max(refused)} cannot be in a snapshot, only tensors, numbers and strings")
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there only if something went wrong


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut, where that can be asked for: not on all disks."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(file: BinaryIO, size: int | None = None) -> int:
    """The CRC-32 of the next `size` bytes of `file`, or of all that are left."""
    crc = 0
    left = sys.maxsize if size is None else max(0, size)
    while chunk := file.read(min(left, CHUNK)):
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    return crc


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The state in the file `path`, and what is wrong with it (an empty string if nothing is)."""
    if path.exists() and not path.is_file():
        return {}, f"{path.name} is not a file"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            crc = checksum(file, size - 4)
            trailer = {"checksum": file.read(4)}
            if crc != int.from_bytes(trailer["checksum"], "big"):
                return {}, f"wrong checksum: altered, cut off at {size:,} bytes, or never a snapshot"
            file.seek(max(0, size - 4 - len(WRITER)))
            trailer["writer"] = file.read(len(WRITER))
            file.seek(0)
            with only_tensors():
                state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}; make it readable or choose another --snapshot-dir")
    except Exception as error:  # whoever made this file, the unpickler can raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return {}, f"{reason}; {written_by(trailer)}"
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        return {}, "not a snapshot of this project"
    return {**state, **trailer}, ""


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


class SnapshotFolder:
    """The snapshots of a `run` in the folder `path`, of which the newest three are kept.

    Without a `path` it is `checkpoints/<step>/<run>`. A snapshot of another run is refused. With
    `read_shards`, which is sharded.read, snapshots are folders.
    """

    def __init__(self, path: Path | None, run: Run, verbose: bool = False, read_shards: Any = None):
        self.path = path or Path("checkpoints", run.step, run.name)
        self.run = run
        self.identity = {"format": FORMAT, **run.identity()}
        self.lock_file: Any = None
        self.verbose = verbose
        self.read_shards = read_shards

    def save(self, state: dict[str, Any]) -> None:
        """Write `state`, of tensors, numbers and strings, to a new file; delete old ones. May `fail`."""
        path = path_of(self.path, state["global_step"])
        try:
            delete_unfinished(self.path, but=unfinished(path))
            write(path, {**state, **self.identity, "flags": self.run.settings()})
            delete_old(self.path)
        except OSError as error:
            remedy = REMEDY
            if isinstance(error, FileNotFoundError) and self.path.is_dir():
                remedy = "another rank writes this file, too: only one rank may save"
            fail(f"cannot write {path}: {error.strerror}; {remedy}")
        except TypeError as error:
            fail(f"cannot write {path}: {error}")
        if self.verbose:
            rank = dist.get_rank() if dist.is_initialized() else 0
            print_line(f"[rank {rank}] saved {path}", sys.stdout)

    def load_newest(self, same_on_all_ranks: bool = True) -> Any:
        """The state in the newest snapshot that is whole, tensors on the CPU; None if there is none.

        A damaged one is reported by name and the one before it is taken. `fail`s when none is whole, when the
        newest belongs to another run, when the folder cannot be written to, or when the ranks must load the
        same one and do not.
        """
        if same_on_all_ranks:
            self.lock(not dist.is_initialized() or dist.get_rank() == 0)
        paths = self.candidates()
        state: Any = None
        problems: list[str] = []
        read_one = self.read_shards or read
        # Reading may take one rank longer than another.
        beating = contextlib.nullcontext() if self.read_shards else keep_alive()  # sharded.read has its own
        with beating:
            for path in paths:
                state, problem = read_one(path)
                if not problem:
                    break
                problems.append(f"{path} is damaged ({problem})")
        if problems and len(problems) == len(paths):
            fail(f"{'; '.join(problems)}; no good snapshot is left; to start again, move {self.path} away")
        if state:
            loaded = path
            for problem in problems:
                warn(f"{problem}; using {loaded} instead")
            self.check_identity(loaded, state)
            state["path"] = loaded
            if same_on_all_ranks:
                self.check_flags(state)
        if same_on_all_ranks and dist.is_initialized():
            check_same_start(self.identity, state["global_step"] if state else None)
        return state

    def lock(self, saves: bool) -> None:
        """Make the folder, and reserve it for this run until this process ends. All ranks call it.

        A rank that `saves` reserves it. It waits for a run that is ending, and `fail`s if another run has the
        folder. Any rank `fail`s if it cannot write there. On NFS, the server has the lock (man 2 fcntl).
        """
        check_folder(self.path)
        with keep_alive():  # the others wait for it
            if saves and self.lock_file is None:  # to open and close it once more would unlock it
                self.wait_for_lock(self.path / ".lock")

    def wait_for_lock(self, path: Path) -> None:
        """Lock the file `path`, or `fail` if another process does not unlock it soon."""
        try:
            self.lock_file = path.open("a")
        except OSError as error:
            fail(f"cannot write {path}: {error.strerror}; {REMEDY}")
        deadline = time.monotonic() + SECONDS_FOR_THE_LAST_RUN
        while True:
            try:
                fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):  # another process has it
                if time.monotonic() > deadline:
                    fail(f"another run is using {self.path}: wait for it, or choose another --snapshot-dir")
                time.sleep(0.2)
            except OSError as error:
                warn(f"cannot lock {path}: {error.strerror}; do not start a second run in this folder")
                return

    def candidates(self) -> list[Path]:
        """The snapshots to try, newest first. `fail`s if a newer one is of the other kind."""
        sharded = self.read_shards is not None
        paths = snapshots(self.path, sharded)
        others = snapshots(self.path, not sharded)
        if others and (not paths or step_of(others[0]) > step_of(paths[0])):
            kind = "is not a sharded snapshot" if sharded else "is a sharded snapshot"
            fail(f"{others[0]} {kind}; to resume from it: python 05_fsdp/convert.py {others[0]}")
        if sharded and dist.is_initialized():  # all ranks have to read the same ones
            check_same_start(self.identity, step_of(paths[0]) if paths else None)
            names = gather_objects([path.name for path in paths])[0]
            paths = [self.path / name for name in names]
        return paths

    def check_identity(self, path: Path, state: dict[str, Any]) -> None:
        """`fail` if `state`, from the snapshot `path`, belongs to another run."""
        for name, value in self.identity.items():
            if state.get(name) != value:
                difference = f"was made with {name} {state.get(name)}, this run has {name} {value}"
                writer = f" ({written_by(state)})" if name == "format" else ""
                fail(f"{path} {difference}{writer}: use the same, or another --snapshot-dir")

    def check_flags(self, state: dict[str, Any]) -> None:
        """Warn about flags that differ from those in `state`; `fail` if one of them is not OFTEN_CHANGED."""
        before = state.get("flags", {})
        if not isinstance(before, dict):
            fail(f"{state['path']} has flags that are not a dict: use another --snapshot-dir")
        now = self.run.settings()
        changed = [
            name for name in sorted(now.keys() & before.keys()) if repr(now[name]) != repr(before[name])
        ]
        changes = [f"--{name.replace('_', '-')} is {now[name]}, and was {before[name]}" for name in changed]
        if OFTEN_CHANGED.issuperset(changed) or self.run.flags.get("allow_changes"):
            for change in changes:
                warn(f"{change} in {state['path']}")
        else:
            remedy = "use the same, or --allow-changes, or another --snapshot-dir"
            fail(f"{'; '.join(changes)} in {state['path']}: {remedy}")


def delete_old(folder: Path) -> None:
    """Delete the files of all snapshots except the newest three. Raises OSError."""
    for path in snapshots(folder)[KEEP:]:
        path.unlink()


def delete_unfinished(folder: Path, but: Path | None = None) -> None:
    """Delete what killed saves have left behind, except `but`: it may fill the disk. Raises OSError."""
    for path in folder.glob(".snapshot-*.tmp"):
        if path == but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_same_start(identity: dict[str, Any], global_step: int | None) -> None:
    """`fail` unless all ranks start from the same run and global step. All ranks call it."""
    starts = gather_objects((identity["run"], global_step))
    if len(set(starts)) > 1:
        fail(f"the ranks do not start from the same place (run, step): {starts}; use one disk for all")


def rng_states(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The state of torch's random numbers on every rank, for CPU and `device`. All ranks call it."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["gpu"] = torch.get_device_module(device).get_rng_state()
    return gather_objects(state) if dist.is_initialized() else [state]


def restore_rng(
    state: dict[str, Any], device: torch.device, workers: torch.Generator | None, report: Reporter
) -> None:
    """Continue with the random numbers of this rank in the snapshot `state`, as `rng_states` gave them.

    With another number of ranks, or another kind of device, they start from a new seed. `workers` is the
    generator from which the DataLoader takes its workers' seeds, if it has one of its own. It continues from
    another place, as Python's and numpy's numbers do, so that a dataset that augments does not repeat what it
    drew before the interruption.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    states = state["rng"]
    on_gpu = device.type != "cpu"
    same_devices = all(("gpu" in rank_state) == on_gpu for rank_state in states)
    if len(states) == world_size and same_devices:
        torch.set_rng_state(states[rank]["cpu"])
        if on_gpu:
            torch.get_device_module(device).set_rng_state(states[rank]["gpu"])
    else:
        torch.manual_seed(zlib.crc32(f"{state['seed']} {state['global_step']} {rank}".encode()))
        saved_by = f"{len(states)} ranks" if len(states) != world_size else "other devices"
        report.detail(f"random numbers start from a new seed: the snapshot was saved by {saved_by}")
    another_place = torch.initial_seed() + state["global_step"]
    seed_python_and_numpy(another_place)
    if workers is not None:
        workers.manual_seed(another_place)


def keep_kernels(saved_groups: list[dict[str, Any]], optimizer: Optimizer) -> None:
    """Before `optimizer` loads `saved_groups`: keep the kernels that it was built with, for this device."""
    # If the numbers of groups differ, load_state_dict says so.
    for saved, built in zip(saved_groups, optimizer.param_groups, strict=False):
        for name in ("fused", "foreach"):
            if name in built:
                saved[name] = built[name]
