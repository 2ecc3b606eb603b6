"""A sharded snapshot from elsewhere, made to do harm: nothing in it is run, and one line tells what is wrong.

Whoever makes a folder can make its checksums right as well. So all that is read here has right checksums, but
for what is damaged at random. HOSTILE=2000 in the environment makes as many folders as a release needs.

Promise: a sharded snapshot from elsewhere, made to do harm, runs nothing.
"""

import argparse
import builtins
import contextlib
import copy
import functools
import io
import os
import pickle
import random
import shutil
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import FOLDERS, ROOT, load

import sharded
from common import snapshot
from common.models import build_model
from common.reporting import Reporter

TIMES = int(os.environ.get("HOSTILE", "200"))
MARK = "attacked"  # a folder that is there when a pickle has been let do what it says

FLAGS = {"model": "cnn", "precision": "float32", "compile": False, "vit_width": 64, "vit_depth": 1}
ARGS = argparse.Namespace(
    **FLAGS,
    run="cnn-mnist",
    seed=0,
    lr=0.001,
    verbose=False,
    metrics=None,
    profile=None,
    batch_size=1,
    accumulate=1,
)
ARGS.step, ARGS.dataset, ARGS.epochs = "05_fsdp", "mnist", 1


class Attack:
    """Unpickled, it makes the folder MARK; each `way` by another function that a pickle may name."""

    WAYS = ("os.mkdir", "eval", "exec", "os.system", "getattr", "torch.load")

    def __init__(self, way):
        self.way = way

    def __reduce__(self):
        code = f"__import__('os').mkdir({MARK!r})"
        return {
            "os.mkdir": (os.mkdir, (MARK,)),
            "eval": (eval, (code,)),
            "exec": (exec, (code,)),
            "os.system": (os.system, (f"mkdir {MARK}",)),
            "getattr": (getattr(builtins, "eval"), (code,)),  # noqa: B009
            "torch.load": (functools.partial(torch.load, "evil.pt", weights_only=False), ()),
        }[self.way]


def tensors(value=1.0):
    """The model and AdamW's state, as step 05 shares them out among its shards."""
    model = build_model(ARGS).state_dict()
    names = list(model)[:2]
    slots = {n: {"exp_avg": torch.full_like(model[n], value), "step": torch.tensor(1.0)} for n in names}
    return {"model": {n: torch.full_like(w, value) for n, w in model.items()}, "optimizer": slots}


def save(folder, step):
    dcp.save(tensors(), checkpoint_id=sharded.unfinished(folder, step), no_dist=True)
    rest = {"param_groups": [{"lr": 0.1, "params": [0]}], "epoch": 0, "global_step": step, "samples_seen": 0}
    ARGS.snapshot_dir = folder
    return sharded.finish(folder, snapshot.complete(ARGS, {**rest, "rng": [{"cpu": torch.get_rng_state()}]}))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Snapshots of steps 10 and 20; the newer will be attacked."""
    folder = tmp_path_factory.mktemp("original")
    for step in (10, 20):
        save(folder, step)
    return folder


def reseal(path, state=None, names=None):
    """Make the checksums right again, of all files in `path` or of those that are named."""
    state = state or torch.load(path / sharded.STATE, weights_only=False)
    there = [file.name for file in path.iterdir() if file.name != sharded.STATE and file.is_file()]
    if isinstance(state, dict) and isinstance(state.get("checksums"), dict):
        state["checksums"] |= {name: sharded.checksum(path / name) for name in names or there}
    seal(path / sharded.STATE, state)


def seal(path, state):
    """As snapshot.write, without its check of what is in `state`."""
    torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "big"))


def metadata_of(path):
    return pickle.loads((path / sharded.METADATA).read_bytes())


# Each returns what it has done, in words. `rng` decides the rest.


def evil_file(path, rng):
    """A pickle that runs code, as a file of the snapshot or as one more."""
    way = rng.choice(Attack.WAYS)
    names = [sharded.METADATA, sharded.STATE, "__0_0.distcp", "__0.metadata", "__1.metadata", ".metadata.tmp"]
    name = rng.choice([*names, "__0_1.distcp", "state.pt.tmp", ".state.pt.tmp", "data.pkl", "evil.pt"])
    with_torch = rng.random() < 0.5
    if name == sharded.STATE:
        state = torch.load(path / name, weights_only=False)
        state[rng.choice([*state, "more"])] = Attack(way)
        seal(path / name, state)
    else:
        (torch.save if with_torch else pickle.dump)(Attack(way), content := io.BytesIO())
        (path / name).write_bytes(content.getvalue())
        # The reader falls back to other names when `.metadata` says nothing.
        if rng.random() < 0.3:
            (path / sharded.METADATA).write_bytes(pickle.dumps(rng.choice([None, 0, "", [], {}])))
        if rng.random() < 0.8:
            reseal(path)
    return f"{way} in {name}{' by torch.save' * with_torch}"


def evil_inside(path, rng):
    """The same, inside of what `.metadata` holds, or inside of a shard to which it leads."""
    way, metadata = rng.choice(Attack.WAYS), metadata_of(path)
    where = rng.choice(["planner_data", "version", "storage_meta", "entry", "key", "place", "shard", "bytes"])
    name, index = rng.choice(list(metadata.state_dict_metadata)), rng.choice(list(metadata.storage_data))
    if where in ("planner_data", "version", "storage_meta"):
        setattr(metadata, where, Attack(way))
    elif where == "entry":
        metadata.state_dict_metadata[name] = Attack(way)
    elif where == "key":
        metadata.state_dict_metadata[Attack(way)] = metadata.state_dict_metadata[name]
    elif where == "place":
        metadata.storage_data[index].relative_path = Attack(way)
    else:
        torch.save(Attack(way), path / "__9_0.distcp")
        place = metadata.storage_data[index]
        place.relative_path, place.offset = "__9_0.distcp", 0
        place.length = (path / "__9_0.distcp").stat().st_size
        if where == "bytes":
            metadata.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
    (path / sharded.METADATA).write_bytes(pickle.dumps(metadata))
    reseal(path)
    return f"{way} in {where}"


def odd_metadata(path, rng):
    """`.metadata` says what cannot be: places, sizes, kinds."""
    metadata = metadata_of(path)
    name, index = rng.choice(list(metadata.state_dict_metadata)), rng.choice(list(metadata.storage_data))
    entry, place = metadata.state_dict_metadata[name], metadata.storage_data[index]
    outside = path.parent / "outside"
    outside.write_bytes(b"outside")
    lies = {
        "relative_path": ["../outside", str(outside), "/dev/zero", sharded.STATE, sharded.METADATA, "", 7],
        "offset": [-1, 10**15, 1, None, "0"],
        "length": [-1, 0, 10**15, 3, None],
        "transform_descriptors": [["stream.zstd"], ["none"], [7], "x"],
        "size": [torch.Size([10**12]), torch.Size([]), torch.Size([3]), None, 5, torch.Size([2**62, 2**62])],
        "dtype": [torch.bool, torch.complex64, torch.float64, None],
        "chunks": [[], None, entry.chunks * 2],
        "state_dict_metadata": [None, {}, [], {name: None}, {name: entry}, {7: entry}],
        "storage_data": [None, {}, [], {index: None}],
        "whole": [None, 5, [], {}, "text", entry],
    }
    what = rng.choice(list(lies))
    lie = copy.deepcopy(rng.choice(lies[what]))
    if what in ("relative_path", "offset", "length", "transform_descriptors"):
        setattr(place, what, lie)
    elif what in ("size", "chunks"):
        setattr(entry, what, lie)
    elif what == "dtype":
        entry.properties.dtype = lie
    elif what == "whole":
        metadata = lie
    else:
        setattr(metadata, what, lie)
    (path / sharded.METADATA).write_bytes(pickle.dumps(metadata))
    reseal(path)
    return f"{what} = {lie!r:.60}"


def odd_state(path, rng):
    """`state.pt` lacks something, or has something of another kind."""
    state = torch.load(path / sharded.STATE, weights_only=False)
    key = rng.choice(list(state))
    value = rng.choice([None, 5, -1, "text", [], {}, [None], {"x": 1}, torch.zeros(2), 1.5])
    if gone := rng.random() < 0.3:
        del state[key]
    else:
        state[key] = value
    if rng.random() < 0.3 and isinstance(state.get("checksums"), dict):
        state["checksums"][rng.choice(["../outside", "/etc/passwd", "/dev/zero", 7, None, ""])] = 0
    (path.parent / "outside").write_bytes(b"")
    seal(path / sharded.STATE, state)
    return f"{key} gone" if gone else f"{key} = {value!r:.40}"


def odd_files(path, rng):
    """A pipe, a link, a folder or nothing where a file should be; or a file more."""
    name = rng.choice([file.name for file in path.iterdir()])
    kind = rng.choice(["pipe", "loop", "folder", "nothing", "one more", "a link to all zeros"])
    if kind == "one more":
        name = rng.choice(["__1_0.distcp", "__0.metadata", "évil", "x" * 200, ".x"])
        (path / name).write_bytes(rng.randbytes(rng.randrange(9)))
        return f"{kind}: {name:.20}"
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "loop":
        os.symlink(name, path / name)
    elif kind == "folder":
        (path / name).mkdir()
    elif kind == "a link to all zeros":
        os.symlink("/dev/zero", path / name)
    return f"{kind} for {name}"


def noise(path, rng):
    """Damage at random, in one of the files, its checksum wrong."""
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    cut = rng.random() < 0.3
    content[at : None if cut else at + 8] = b"" if cut else rng.randbytes(8)
    file.write_bytes(content)
    return f"{'cut' if cut else 'noise'} at {at} in {file.name}"


HARMS = {evil_file: 3, evil_inside: 2, odd_metadata: 3, odd_state: 2, odd_files: 1, noise: 1}


def go_on_from(folder):
    """What step 05 does with the snapshots in `folder`, in one process; the step that it has gone on from."""
    args = argparse.Namespace(**{**vars(ARGS), "snapshot_dir": folder})
    state = snapshot.load_newest(args, sharded.read)
    shards = tensors(0.0)
    with sharded.reader(state) as reader:
        dcp.load(shards, storage_reader=reader, no_dist=True)
    report = Reporter(args, torch.device("cpu"), 10)
    return snapshot.resume(state, report)[2]


def run(do, capsys):
    """`do`, and how it ended, in words; AssertionError unless it did with at most one line for the user."""
    capsys.readouterr()
    try:
        ended = f"went on from {do()}"
    except SystemExit as end:
        ended = f"exit {end.code}"
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "UserWarning" not in line and not line.startswith("  ")]
    assert len(lines) <= 2, err  # that one is damaged; that none can be gone on from
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), err
    assert (ended == "exit 2") == any(line.startswith("error: ") for line in lines), (ended, err)
    return ended


def test_nothing_in_a_hostile_folder_is_run(original, tmp_path, capsys, monkeypatch):
    convert = load(ROOT / FOLDERS["05"] / "convert.py")
    monkeypatch.chdir(tmp_path)
    torch.save(Attack("os.mkdir"), "evil.pt")
    seed = int.from_bytes(os.urandom(4))
    rng, ends, kinds = random.Random(seed), Counter(), Counter()
    for number in range(TIMES):
        folder = Path(shutil.copytree(original, tmp_path / "snapshots"))
        path = snapshot.snapshots(folder, sharded=True)[0]
        harm = rng.choices(list(HARMS), list(HARMS.values()))[0]
        what = harm(path, rng)
        story = f"seed {seed}, number {number}, {harm.__name__}: {what}"
        kinds[harm.__name__] += 1
        try:
            ends[run(lambda: go_on_from(folder), capsys)] += 1  # noqa: B023
            with contextlib.suppress(FileNotFoundError):
                ends[run(lambda: convert.main(argparse.Namespace(snapshot=path)), capsys)] += 1  # noqa: B023
        except BaseException as error:
            raise AssertionError(f"{story}: {type(error).__name__}: {error}") from error
        assert not Path(MARK).exists(), story
        shutil.rmtree(folder)
    print(f"{dict(kinds)}; {dict(ends)}")
    assert ends["went on from 10"] > TIMES / 2  # the one before: else nothing was refused


def test_no_other_file_is_read_in_the_place_of_metadata(original, tmp_path, capsys, monkeypatch):
    """Where `.metadata` says nothing, torch's own reader unpickles `__0.metadata`."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(original, tmp_path / "snapshots"))
    path = snapshot.snapshots(folder, sharded=True)[0]
    (path / sharded.METADATA).write_bytes(pickle.dumps(None))
    (path / "__0.metadata").write_bytes(pickle.dumps(Attack("os.mkdir")))
    reseal(path)
    ended = run(lambda: go_on_from(folder), capsys)
    print(ended)
    assert not Path(MARK).exists()
    assert ended == "went on from 10"


@pytest.mark.parametrize("way", Attack.WAYS)
def test_the_attacks_do_what_they_threaten_if_they_are_let(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    torch.save(Attack("os.mkdir"), "evil.pt")
    pickle.loads(pickle.dumps(Attack(way)))
    assert Path(MARK).exists()


STATE, SHARD = "state.pt", "__0_0.distcp"
KINDS = {"seed": "int", "epoch": "int", "samples_seen": "int", "global_step": "int", "run": "str"}
KINDS |= {"precision": "str", "flags": "dict", "checksums": "dict", "rng": "list", "param_groups": "list"}


def damage(path, what):
    """Do to the snapshot `path` what one of the LIES says; its checksums are right, or the lie."""
    state, metadata = torch.load(path / STATE), metadata_of(path)
    names, places = list(metadata.state_dict_metadata), list(metadata.storage_data.values())
    if what in KINDS or what in ("no metadata", "a group", "a rank"):
        changed = {what: b"of another kind"}
        if what == "no metadata":
            changed = {"checksums": {SHARD: state["checksums"][SHARD]}}
        elif what in ("a group", "a rank"):
            changed = {"param_groups" if what == "a group" else "rng": [{}, None]}
        seal(path / STATE, {**state, **changed})
        return
    if what.startswith("no "):
        (path / what.removeprefix("no ")).unlink()
    elif what.startswith("a folder for "):
        (path / what.removeprefix("a folder for ")).unlink()
        (path / what.removeprefix("a folder for ")).mkdir()
    elif what == "a file more":
        (path / "more").write_bytes(b"")
    elif what == "a folder more":
        (path / "more").mkdir()
    elif what == "a byte more":
        (path / SHARD).write_bytes((path / SHARD).read_bytes() + b"x")
    elif what == "a file of which no byte can be read":  # by root neither
        (path / SHARD).unlink()
        (path / SHARD).symlink_to("/proc/self/mem")
    else:
        if what == "a size for a tensor":
            metadata.state_dict_metadata[names[1]] = torch.Size([3])
        elif what == "a tensor too large":
            room = sum(file.stat().st_size for file in path.iterdir() if file.name != STATE)
            others = (metadata.state_dict_metadata[name] for name in names[:-1])
            room -= sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in others)
            metadata.state_dict_metadata[names[-1]].size = torch.Size([room // 4 + 50])
        elif what == "a shard elsewhere":
            places[-1].relative_path = "../outside"
        (path / sharded.METADATA).write_bytes(pickle.dumps(metadata))
        reseal(path)


LIES = {
    name: f"{STATE} is of no sharded snapshot: {name} is missing, or no {kind}"
    for name, kind in KINDS.items()
}
LIES |= {
    "no state.pt": "state.pt is missing",
    "a folder for state.pt": "state.pt is missing",
    "no metadata": "state.pt is of no sharded snapshot",
    "a group": "state.pt: in rng and param_groups stands what is no dict",
    "a rank": "state.pt: in rng and param_groups stands what is no dict",
    "a file more": "more does not belong here",
    "a folder more": "more does not belong here",
    "no __0_0.distcp": "__0_0.distcp is missing",
    "a folder for __0_0.distcp": "__0_0.distcp is missing",
    "a byte more": "wrong checksum in __0_0.distcp",
    "a file of which no byte can be read": "cannot read __0_0.distcp: Input/output error",
    "a size for a tensor": ".metadata: model.net.0.bias is no tensor",
    "a tensor too large": ".metadata: its tensors are larger than the files",
    "a shard elsewhere": ".metadata: ../outside is none of the files",
}


def test_each_lie_is_told_in_its_own_words(original, tmp_path):
    found = {}
    for what in LIES:
        path = Path(shutil.copytree(original, tmp_path / what)) / "snapshot-00000020"
        damage(path, what)
        state, found[what] = sharded.read(path)
        assert state == {}, what
    assert found == LIES
    path = snapshot.snapshots(original, sharded=True)[0]
    state, problem = sharded.read(path)
    assert problem == "" and state["path"] == path and state["epoch"] == 0
    assert state["metadata"].state_dict_metadata == metadata_of(path).state_dict_metadata
