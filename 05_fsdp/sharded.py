"""Step 05's snapshots: folders, to which each rank writes its own shards, in the background.

`snapshot-<global step, 8 digits>` holds the shards, as torch.distributed.checkpoint writes them, and in
`state.pt` the rest of what common/snapshot.py's files hold. Until it is whole it has another name.

torch also writes `.metadata`, which says where each part of each tensor is. It is a pickle of torch's own
classes: its content depends on the versions of Python and torch, and loading it can run any code. So this
file is never loaded here. `state.pt` has the same information as numbers and strings, in its `layout`.
"""

import contextlib
import math
import os
import shutil
import sys
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from common import snapshot
from common.options import fail
from common.output import print_line
from common.process_group import gather_objects, keep_alive

STATE = "state.pt"  # all that is not a shard, the layout of the shards, and their checksums
METADATA = ".metadata"  # torch's

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

# What resuming relies on. Whoever makes a file can put anything there.
KINDS = dict.fromkeys(("seed", "epoch", "samples_seen", "global_step"), int)
KINDS |= {"run": str, "precision": str, "checksums": dict, "layout": dict}
KINDS |= {"rng": list, "param_groups": list}


def checksum(path):
    """The CRC-32 of a file."""
    with open(path, "rb") as file:
        return snapshot.checksum(file)


def read(path):
    """The state in the folder `path` and what is wrong with it, as snapshot.read gives it for a file.

    The shards are checked and not loaded: each rank checks some of the files, and all return the same. The
    state's `path` says where they are, its `metadata` which part of which tensor each of them holds: `reader`
    goes by it.
    """
    with keep_alive():
        state, problem = read_state(path)
        if not problem and state["format"] == snapshot.FORMAT:
            problem = check_shards(path, state["checksums"]) or add_metadata(path, state)
    if dist.is_initialized():
        problem = next(filter(None, gather_objects(problem)), "")
    return ({}, problem) if problem else (state, "")


def read_state(path):
    """What `read` returns, without a look into the shards."""
    if not (path / STATE).is_file():
        return {}, f"{STATE} is missing"
    state, problem = snapshot.read(path / STATE)
    if problem:
        return {}, problem
    if state["format"] != snapshot.FORMAT:
        return state, ""  # SnapshotFolder.load_newest and convert.py say so
    for name, kind in KINDS.items():
        if not isinstance(state.get(name), kind):
            return {}, f"{STATE} is not from a sharded snapshot: {name} is missing, or not a {kind.__name__}"
    if not all(isinstance(entry, dict) for entry in state["rng"] + state["param_groups"]):
        return {}, f"{STATE}: rng or param_groups holds something that is not a dict"
    expected = {STATE, *state["checksums"]}
    names = {entry.name for entry in path.iterdir()}
    # What file systems, editors and file managers leave is not read.
    unexpected = {name for name in names - expected if name.endswith(".distcp")}
    if unexpected:
        return {}, f"{min(unexpected)} does not belong here"
    missing = expected - {name for name in names if (path / name).is_file()}
    if missing:
        return {}, f"{min(missing)} is missing"
    return state, ""


def check_shards(path, checksums):
    """What is wrong with this rank's part of the files in the folder `path`, or an empty string."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for name in sorted(checksums)[rank::world_size]:
        try:
            if checksum(path / name) != checksums[name]:
                return f"wrong checksum in {name}"
        except OSError as error:
            return f"cannot read {name}: {error.strerror}"
    return ""


def add_metadata(path, state):
    """What is wrong with the layout in `state`, or an empty string: then `path` and `metadata` are in it."""
    try:
        files = {name: (path / name).stat().st_size for name in state["checksums"]}
        state["metadata"] = metadata_of(state["layout"], files)
    except Exception as error:  # whoever made this file can put anything there
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{STATE}: its layout is not valid ({reason}); {snapshot.written_by(state)}"
    state["path"] = path
    return ""


def metadata_of(layout, files):
    """What `dcp.load` goes by, from the `layout` of a snapshot whose `files` have so many bytes.

    Raises ValueError, or nearly any other error, if it is not a layout of these files.
    """
    tensors = {}
    places = {}
    bytes_for_tensors = sum(files.values())
    bytes_for_parts = sum(files.values())
    for name, entry in layout.items():
        if not isinstance(name, str) or not isinstance(entry["dtype"], str):
            raise ValueError("a name or a dtype is not a string")
        dtype = DTYPES[entry["dtype"]]
        size = torch.Size(entry["size"])
        if min(size, default=0) < 0:
            raise ValueError(f"{name} is not a tensor")
        bytes_for_tensors -= math.prod(size) * dtype.itemsize
        chunks = []
        for number, part in enumerate(entry["parts"]):
            if [type(part[key]) for key in ("file", "start", "bytes")] != [str, int, int]:
                raise ValueError(f"a part of {name} needs a file and two numbers")
            if part["file"] not in files:
                raise ValueError(f"{part['file']} is not one of the files")
            if not 0 <= part["start"] < part["start"] + part["bytes"] <= files[part["file"]]:
                raise ValueError(f"{name} is not entirely in {part['file']}")
            bytes_for_parts -= part["bytes"]
            if bytes_for_parts < 0:  # one part, many times: a small file would fill the memory
                raise ValueError("its parts are larger than the files")
            chunks.append(ChunkStorageMetadata(torch.Size(part["offsets"]), torch.Size(part["sizes"])))
            places[MetadataIndex(name, part["offsets"], number)] = SimpleNamespace(
                relative_path=part["file"],
                offset=part["start"],
                length=part["bytes"],
                transform_descriptors=None,
            )
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
    if bytes_for_tensors < 0:
        raise ValueError("its tensors are larger than the files")
    return Metadata(tensors, storage_data=places)


class Reader(dcp.FileSystemReader):
    """Reads shards by the layout that `read` has checked. Torch's own would unpickle `.metadata`."""

    def __init__(self, state):
        super().__init__(state["path"])
        self.metadata = state["metadata"]

    def read_data(self, plan, planner):
        with keep_alive():  # a rank may have more to read than another, or a slower way to the disk
            return super().read_data(plan, planner)

    def read_metadata(self):  # no arguments: dcp.load then looks for no other file, `__0.metadata`
        return self.metadata


@contextlib.contextmanager
def reader(state):
    """For `dcp.load`, from the snapshot `state`, as `read` has returned it: `fail`s if it does not fit."""
    try:
        with snapshot.only_tensors():
            yield Reader(state)
        del state["layout"], state["metadata"]  # of a big model they are big
    except dcp.CheckpointException as error:  # the same on all ranks
        problem = f"cannot be loaded ({snapshot.written_by(state)}): {reason_of(error)}"
        fail(f"{state['path']} {problem}; to resume from the one before, move it away")


def saved_slots(slots, state):
    """Of an optimizer's state by parameter, `slots`, that of the parameters which have some in `state`.

    A parameter that has had no gradient before the snapshot, such as one that is not used, has none.
    """
    saved = {name.rpartition(".")[0] for name in state["metadata"].state_dict_metadata}
    return {name: slot for name, slot in slots.items() if f"optimizer.{name}" in saved}


def load_groups(groups, saved_groups):
    """Give the optimizer's `groups` what a snapshot has of them, as `load_state_dict` does elsewhere.

    What a group computes with, `fused` and `foreach`, stays as the optimizer was built.
    """
    for group, saved in zip(groups, saved_groups, strict=True):
        kept = {"params", "param_names", "fused", "foreach"}
        group.update({name: value for name, value in saved.items() if name not in kept})


def reason_of(error):
    """The first rank's reason for a CheckpointException, in one line."""
    (reason, _), *_ = error.failures.values()
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]


class Writer(dcp.FileSystemWriter):
    """For `dcp.async_save`: it writes a snapshot's shards, until `commit` gives that its name."""

    def __init__(self, folder, global_step, group=None):
        super().__init__(unfinished(folder, global_step))
        self.group = group  # that torch uses, in its thread
        self.checksums = {}  # of this rank's files, by name

    def write_data(self, plan, planner):  # torch calls it on every rank
        with keep_alive(self.group):
            written = super().write_data(plan, planner)
            for name in {result.storage_data.relative_path for result in written.value()}:
                self.checksums[name] = checksum(self.path / name)
        return written

    def finish(self, metadata, results):  # torch calls it on rank 0, when all shards are written
        self.tensors = metadata.state_dict_metadata
        self.places = {result.index: result.storage_data for written in results for result in written}
        super().finish(metadata, results)
        self.checksums[METADATA] = checksum(self.path / METADATA)

    def layout(self):
        """On rank 0: where each part of each tensor is, in numbers and strings.

        Raises TypeError if anything other than tensors was saved.
        """
        layout = {}
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, TensorStorageMetadata):
                raise TypeError(f"only tensors can be in shards, and {name} is not one")
            parts = []
            for chunk in tensor.chunks:
                storage = self.places[MetadataIndex(name, chunk.offsets)]
                part = {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": storage.relative_path,
                    "start": storage.offset,
                    "bytes": storage.length,
                }
                parts.append(part)
            dtype = str(tensor.properties.dtype)
            layout[name] = {"dtype": dtype, "size": list(tensor.size), "parts": parts}
        return layout


def unfinished(folder, global_step):
    """Where the shards of a snapshot are written, until `commit` gives it its name."""
    return folder / f".snapshot-{global_step:08d}.tmp"


def commit(folder, layout, checksums, state):
    """Make a snapshot of the shards that are all in `unfinished(folder, …)`.

    Args:
        folder: the snapshots' folder.
        layout: what the writer's `layout()` returned.
        checksums: of all files that the writers have written, by name.
        state: all that is not in the shards.

    Returns the snapshot's path. Raises OSError, and TypeError if it could not be read again; the snapshots
    before it are untouched then.
    """
    shards = unfinished(folder, state["global_step"])
    path = folder / f"snapshot-{state['global_step']:08d}"
    for file in shards.iterdir():
        if file.name not in checksums:
            file.unlink()  # a kill in an earlier `commit` has left it
    snapshot.write(shards / STATE, {**state, "layout": layout, "checksums": checksums})
    if path.exists():  # damaged: a folder cannot be replaced in one go
        os.rename(path, shards.with_suffix(".old.tmp"))
    os.rename(shards, path)
    snapshot.sync_folder(folder)
    return path


def delete_old(folder):
    """Delete all sharded snapshots but the newest three, and unfinished ones. Raises OSError."""
    for old in snapshot.snapshots(folder, sharded=True)[snapshot.KEEP :]:
        shutil.rmtree(old)
    snapshot.delete_unfinished(folder)


def free_on(folder):
    """For an error's line: the reason that it gives is not always the disk's."""
    with contextlib.suppress(OSError):  # the disk may be gone
        return f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free)"
    return ""


class Saver:
    """Commits snapshots in a thread while training continues; the end of its `with` waits for the last.

    `snapshots` is the folder for them. A collective of the thread may take `timeout` seconds.
    """

    def __init__(self, snapshots, timeout):
        self.snapshots = snapshots
        self.saving = None
        self.loaded = None  # the global step of the snapshot that this run has resumed from
        # A group of its own: two threads must not talk over one.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def __enter__(self):
        self.executor = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *error):
        self.executor.shutdown()

    def writer(self, global_step):
        """For `dcp.async_save`: it writes the shards of the snapshot of a step. May `fail`."""
        folder = self.snapshots.path
        if dist.get_rank() == 0:
            try:
                snapshot.delete_unfinished(folder, but=unfinished(folder, global_step))
            except OSError as error:
                fail(f"cannot delete {error.filename}: {error.strerror}; {snapshot.REMEDY}")
        return Writer(folder, global_step, self.group)

    def commit(self, writing, writer, state):
        """When all ranks' shards are written (`writing` is dcp.async_save's), add `state` and the name."""
        state = {**state, **self.snapshots.identity, "flags": self.snapshots.run.settings()}
        self.saving = self.executor.submit(self.commit_now, writing, writer, state)

    def commit_now(self, writing, writer, state):
        """What the thread does. Returns what went wrong, the same on all ranks, or None."""
        folder = self.snapshots.path
        problem = None
        try:
            writing.result()
            checksums = [None] * dist.get_world_size()
            dist.all_gather_object(checksums, writer.checksums, group=self.group)
            with keep_alive(self.group):
                if dist.get_rank() == 0:
                    path = commit(folder, writer.layout(), dict(ChainMap(*checksums)), state)
                    delete_old(folder)
                    if self.snapshots.verbose:
                        print_line(f"[rank 0] saved {path}", sys.stdout)
        except dcp.CheckpointException as error:  # the same on all ranks
            reason = f"rank {min(error.failures)} cannot write its shards: {reason_of(error)}"
            problem = f"{reason}{free_on(folder)}; {snapshot.REMEDY}"
        except OSError as error:
            problem = f"cannot write to {folder}: {error.strerror}; {snapshot.REMEDY}"
        except Exception as error:  # or the other ranks would wait for an answer until they time out
            problem = f"cannot write to {folder}: {error}"
        answer = [problem]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        return answer[0]

    def wait(self):
        """Wait for the snapshot that is being written; `fail`, on all ranks, if that did not succeed."""
        if self.saving is None:
            return
        problem = self.saving.result()
        if problem:
            fail(problem)
