"""A malicious sharded snapshot from elsewhere: nothing in it is run, and one line says what is wrong.

An attacker who can make a folder can also make its checksums correct. So everything that is read here has
correct checksums, except for what is damaged at random. With HOSTILE=2000 in the environment, 2,000 snapshots
are made.

Promise: a malicious sharded snapshot cannot run code.
"""

import argparse
import contextlib
import copy
import functools
import io
import math
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
from common.run import Run

TIMES = int(os.environ.get("HOSTILE", "200"))
MARK = "attacked"  # a folder that exists if a pickle was allowed to do what it says
METADATA = ".metadata"  # torch's own file, a pickle that nothing here reads

RUN = Run("05_fsdp", "cnn", "mnist", "float32", 0)


class Method:
    """Its pickle is the call of `builtins.getattr` with which Python 3.11.2 pickles an enum."""

    def __call__(self):
        raise NotImplementedError  # pickle only asks whether it can be called

    def __reduce__(self):
        return getattr, (Path, "mkdir")


class Attack:
    """Unpickling it creates the folder MARK. Each `way` uses another function that a pickle may name."""

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
            "getattr": (Method(), (Path(MARK),)),
            "torch.load": (functools.partial(torch.load, "evil.pt", weights_only=False), ()),
        }[self.way]


def tensors(value=1.0):
    """The model and AdamW's state, as step 05 divides them among its shards."""
    model = build_model("cnn").state_dict()
    names = list(model)[:2]
    slots = {n: {"exp_avg": torch.full_like(model[n], value), "step": torch.tensor(1.0)} for n in names}
    return {"model": {n: torch.full_like(w, value) for n, w in model.items()}, "optimizer": slots}


def save(folder, step):
    writer = sharded.Writer(folder, step)
    dcp.save(tensors(), storage_writer=writer, no_dist=True)
    rest = {"param_groups": [{"lr": 0.1, "params": [0]}], "epoch": 0, "global_step": step, "samples_seen": 0}
    rest["rng"] = [{"cpu": torch.get_rng_state()}]
    state = {**rest, **snapshot.SnapshotFolder(folder, RUN).identity}
    return sharded.commit(folder, writer.layout(), writer.checksums, state)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Snapshots of steps 10 and 20; the newer will be attacked."""
    folder = tmp_path_factory.mktemp("original")
    for step in (10, 20):
        save(folder, step)
    return folder


def reseal(path, state=None, names=None):
    """Correct the checksums of all files in `path`, or only of those in `names`."""
    state = state or state_of(path)
    there = [file.name for file in path.iterdir() if file.name != sharded.STATE and file.is_file()]
    if isinstance(state, dict) and isinstance(state.get("checksums"), dict):
        state["checksums"] |= {name: sharded.checksum(path / name) for name in names or there}
    seal(path / sharded.STATE, state)


def seal(path, state):
    """Like snapshot.write, but without its check of what is in `state`."""
    torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "big"))


def state_of(path):
    return torch.load(path / sharded.STATE, weights_only=False)


# Each function below returns what it has done, in words. `rng` makes all choices.


def evil_file(path, rng):
    """A pickle that runs code, as one of the snapshot's files or as an additional file."""
    way = rng.choice(Attack.WAYS)
    names = [METADATA, sharded.STATE, "__0_0.distcp", "__0.metadata", "__1.metadata", ".metadata.tmp"]
    name = rng.choice([*names, "__0_1.distcp", "state.pt.tmp", ".state.pt.tmp", "data.pkl", "evil.pt"])
    with_torch = rng.random() < 0.5
    if name == sharded.STATE:
        state = torch.load(path / name, weights_only=False)
        state[rng.choice([*state, "more"])] = Attack(way)
        seal(path / name, state)
    else:
        (torch.save if with_torch else pickle.dump)(Attack(way), content := io.BytesIO())
        (path / name).write_bytes(content.getvalue())
        # torch's reader falls back to other names when `.metadata` holds nothing.
        if rng.random() < 0.3:
            (path / METADATA).write_bytes(pickle.dumps(rng.choice([None, 0, "", [], {}])))
        if rng.random() < 0.8:
            reseal(path)
    return f"{way} in {name}{' by torch.save' * with_torch}"


def evil_inside(path, rng):
    """The same, inside `.metadata` or the layout, or inside a shard that the layout names."""
    way, state = rng.choice(Attack.WAYS), state_of(path)
    where = rng.choice(["planner_data", "entry", "key", "place", "shard"])
    layout = state["layout"]
    name = rng.choice(list(layout))
    part = rng.choice(layout[name]["parts"])
    if where == "planner_data":
        metadata = pickle.loads((path / METADATA).read_bytes())
        metadata.planner_data = Attack(way)
        (path / METADATA).write_bytes(pickle.dumps(metadata))
    elif where == "entry":
        layout[name] = Attack(way)
    elif where == "key":
        layout[Attack(way)] = layout[name]
    elif where == "place":
        part["file"] = Attack(way)
    else:
        torch.save(Attack(way), path / "__9_0.distcp")
        part |= {"file": "__9_0.distcp", "start": 0, "bytes": (path / "__9_0.distcp").stat().st_size}
    reseal(path, state)
    return f"{way} in {where}"


def odd_layout(path, rng):
    """The layout has impossible places, sizes or kinds."""
    state = state_of(path)
    layout = state["layout"]
    name = rng.choice(list(layout))
    entry = layout[name]
    part = rng.choice(entry["parts"])
    outside = path.parent / "outside"
    outside.write_bytes(b"outside")
    lies = {
        "file": ["../outside", str(outside), "/dev/zero", sharded.STATE, METADATA, "", 7],
        "start": [-1, 10**15, 1, None, "0"],
        "bytes": [-1, 0, 10**15, 3, None],
        "offsets": [[-1], [10**9], [], None, ["0"], 5],
        "sizes": [[-1], [10**9], [0], None, ["0"], 5],
        "size": [[10**12], [], [3], None, 5, [2**62, 2**62], [2**70], [-(2**40)]],
        "dtype": ["torch.bool", "torch.complex64", "torch.float64", "torch.load", "os", None, 5],
        "parts": [[], None, entry["parts"] * 2, {}, "text"],
        "layout": [{}, {name: None}, {name: entry}, {7: entry}, {name: {}}, {name: [entry]}],
    }
    what = rng.choice(list(lies))
    lie = copy.deepcopy(rng.choice(lies[what]))
    if what == "layout":
        state["layout"] = lie
    elif what in part:
        part[what] = lie
    else:
        entry[what] = lie
    reseal(path, state)
    return f"{what} = {lie!r:.60}"


def odd_state(path, rng):
    """`state.pt` lacks a value, or has one of another kind."""
    state = state_of(path)
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
    """A pipe, a link, a folder or nothing in the place of a file; or an additional file."""
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
    """Random damage in one of the files, so that its checksum is wrong."""
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    cut = rng.random() < 0.3
    content[at : None if cut else at + 8] = b"" if cut else rng.randbytes(8)
    file.write_bytes(content)
    return f"{'cut' if cut else 'noise'} at {at} in {file.name}"


HARMS = {evil_file: 3, evil_inside: 2, odd_layout: 3, odd_state: 2, odd_files: 1, noise: 1}


def go_on_from(folder):
    """Load the snapshots in `folder` as step 05 does, in one process; return the step that is loaded."""
    state = snapshot.SnapshotFolder(folder, RUN, read_shards=sharded.read).load_newest()
    shards = tensors(0.0)
    with sharded.reader(state) as reader:
        dcp.load(shards, storage_reader=reader, no_dist=True)
    device = torch.device("cpu")
    snapshot.restore_rng(state, device, torch.Generator(), Reporter(RUN, device))
    return state["global_step"]


def run(do, capsys):
    """Call `do`; return how it ended, in words. AssertionError for more than a warning and an error."""
    capsys.readouterr()
    try:
        ended = f"went on from {do()}"
    except SystemExit as end:
        ended = f"exit {end.code}"
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "UserWarning" not in line and not line.startswith("  ")]
    assert len(lines) <= 2, err  # one is damaged; there is none to resume from
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
    assert ends["went on from 10"] > TIMES / 2  # the one before: otherwise, nothing was refused


@pytest.mark.parametrize("way", Attack.WAYS)
@pytest.mark.parametrize("name", [METADATA, "__0.metadata"])
def test_torchs_metadata_is_not_loaded(original, tmp_path, capsys, monkeypatch, name, way):
    """Nor is `__0.metadata`, which torch's own reader unpickles if `.metadata` holds nothing."""
    monkeypatch.chdir(tmp_path)
    torch.save(Attack("os.mkdir"), "evil.pt")
    folder = Path(shutil.copytree(original, tmp_path / "snapshots"))
    path = snapshot.snapshots(folder, sharded=True)[0]
    (path / METADATA).write_bytes(pickle.dumps(None))
    (path / name).write_bytes(pickle.dumps(Attack(way)))
    reseal(path)
    ended = run(lambda: go_on_from(folder), capsys)
    print(ended)
    assert not Path(MARK).exists()
    assert ended == "went on from 20"
    # torch's own reader does what the pickle says, so the test above can fail.
    with contextlib.suppress(dcp.CheckpointException):
        dcp.load(tensors(), storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert Path(MARK).exists()


@pytest.mark.parametrize("way", Attack.WAYS)
def test_the_attacks_do_what_they_threaten_if_they_are_let(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    torch.save(Attack("os.mkdir"), "evil.pt")
    pickle.loads(pickle.dumps(Attack(way)))
    assert Path(MARK).exists()


STATE, SHARD = "state.pt", "__0_0.distcp"
KINDS = {"seed": "int", "epoch": "int", "samples_seen": "int", "global_step": "int", "run": "str"}
KINDS |= {"precision": "str", "checksums": "dict", "layout": "dict", "rng": "list"}
KINDS |= {"param_groups": "list"}


def damage(path, what):
    """Do to the snapshot `path` what one of the LIES says; its checksums are correct, or are the lie."""
    state = state_of(path)
    if what in KINDS or what in ("a group", "a rank"):
        changed = {what: b"of another kind"}
        if what in ("a group", "a rank"):
            changed = {"param_groups" if what == "a group" else "rng": [{}, None]}
        seal(path / STATE, {**state, **changed})
        return
    if what.startswith("no "):
        (path / what.removeprefix("no ")).unlink()
    elif what.startswith("a folder for "):
        (path / what.removeprefix("a folder for ")).unlink()
        (path / what.removeprefix("a folder for ")).mkdir()
    elif what == "a shard more":
        (path / "__9_0.distcp").write_bytes(b"")
    elif what == "a byte more":
        (path / SHARD).write_bytes((path / SHARD).read_bytes() + b"x")
    elif what == "a file of which no byte can be read":  # not even by root
        (path / SHARD).unlink()
        (path / SHARD).symlink_to("/proc/self/mem")
    else:
        layout = state["layout"]
        names = list(layout)
        last = layout[names[-1]]
        if what == "a name that is none":
            layout[7] = last
        elif what == "an unknown dtype":
            last["dtype"] = "torch.float3"
        elif what == "a negative size":
            last["size"] = [-1]
        elif what == "a tensor too large":
            room = sum(file.stat().st_size for file in path.iterdir() if file.name != STATE)
            others = (layout[name] for name in names[:-1])
            room -= sum(
                math.prod(entry["size"]) * sharded.DTYPES[entry["dtype"]].itemsize for entry in others
            )
            last["size"] = [room // 4 + 1]
        elif what == "a shard elsewhere":
            last["parts"][0]["file"] = "../outside"
        elif what == "a place that is a float":
            last["parts"][0]["start"] = 0.0
        elif what == "a part a million times":
            last["parts"] *= 10**6  # one object, a million times: a few bytes each
        elif what == "a part after the end":
            last["parts"][0]["start"] = (path / SHARD).stat().st_size - last["parts"][0]["bytes"] + 1
        elif what == "a part before the beginning":
            last["parts"][0]["start"] = -1
        elif what == "a part of less than nothing":
            last["parts"][0]["bytes"] = -1
        reseal(path, state)


LIES = {
    name: f"{STATE} is not from a sharded snapshot: {name} is missing, or not a {kind}"
    for name, kind in KINDS.items()
}
LIES |= {
    "no state.pt": "state.pt is missing",
    "a folder for state.pt": "state.pt is missing",
    "a group": "state.pt: rng or param_groups holds something that is not a dict",
    "a rank": "state.pt: rng or param_groups holds something that is not a dict",
    "a shard more": "__9_0.distcp does not belong here",
    "no __0_0.distcp": "__0_0.distcp is missing",
    "a folder for __0_0.distcp": "__0_0.distcp is missing",
    "a byte more": "wrong checksum in __0_0.distcp",
    "a file of which no byte can be read": "cannot read __0_0.distcp: Input/output error",
}
LAYOUT_LIES = {
    "a name that is none": "ValueError: a name or a dtype is not a string",
    "a place that is a float": "ValueError: a part of optimizer.net.0.bias.step needs a file and two numbers",
    "a part a million times": "ValueError: its parts are larger than the files",
    "an unknown dtype": "KeyError: 'torch.float3'",
    "a negative size": "ValueError: optimizer.net.0.bias.step is not a tensor",
    "a tensor too large": "ValueError: its tensors are larger than the files",
    "a shard elsewhere": "ValueError: ../outside is not one of the files",
    "a part after the end": "ValueError: optimizer.net.0.bias.step is not entirely in __0_0.distcp",
    "a part before the beginning": "ValueError: optimizer.net.0.bias.step is not entirely in __0_0.distcp",
    "a part of less than nothing": "ValueError: optimizer.net.0.bias.step is not entirely in __0_0.distcp",
}
LIES |= {
    name: f"state.pt: its layout is not valid ({why}); written by unknown versions of Python and torch"
    for name, why in LAYOUT_LIES.items()
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
    torchs = pickle.loads((path / METADATA).read_bytes())
    assert state["metadata"].state_dict_metadata.keys() == torchs.state_dict_metadata.keys()
    for name, tensor in torchs.state_dict_metadata.items():
        ours = state["metadata"].state_dict_metadata[name]
        assert (ours.size, ours.chunks) == (tensor.size, tensor.chunks)
        assert ours.properties.dtype == tensor.properties.dtype
    for index, place in torchs.storage_data.items():
        ours = state["metadata"].storage_data[index]
        assert (ours.relative_path, ours.offset) == (place.relative_path, place.offset)
        assert ours.length == place.length


def test_what_other_programs_leave_among_the_shards_does_no_harm(original, tmp_path):
    """From NFS (for a file that was deleted while it was read), an editor, file managers; and a folder."""
    path = Path(shutil.copytree(original, tmp_path / "copy")) / "snapshot-00000020"
    for name in (".nfs0000000001", ".state.pt.swp", "state.pt~", ".DS_Store", "Thumbs.db"):
        (path / name).write_bytes(b"left")
    (path / "@eaDir").mkdir()
    state, problem = sharded.read(path)
    assert problem == "" and state["global_step"] == 20
