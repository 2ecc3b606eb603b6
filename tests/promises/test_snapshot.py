"""Snapshot files: written atomically, checked, the last three kept, and never another run's.

Promise: a damaged snapshot is never loaded silently, and a failed write never costs the last good snapshot.
A save refuses anything that could not be loaded again.
"""

import dataclasses
import errno
import fcntl
import os
import pickle
import platform
import random
import re
import resource
import shutil
import stat
import sys
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import ROOT, finish, start

import sharded as shards
from common import snapshot
from common.reporting import Reporter
from common.run import Run

RUN = Run("01_single_gpu", "cnn", "mnist", "float32", 0)


def folder_of(path, sharded=False, **changed):
    """The snapshots in `path`, for a run like RUN."""
    run = dataclasses.replace(RUN, **changed)
    return snapshot.SnapshotFolder(path, run, read_shards=shards.read if sharded else None)


def save(path, **state):
    folder_of(path).save(state)


def state(step):
    rest = {"optimizer": {"param_groups": []}, "epoch": 0, "samples_seen": 0, "global_step": step, "rng": []}
    return {"model": {"w": torch.full((10_000,), float(step))}, **rest}


def load_newest(folder, sharded=False):
    return folder_of(folder, sharded).load_newest()


@pytest.fixture
def folder(tmp_path):
    """Three snapshots, of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path, **state(step))
    return tmp_path


def save_sharded(folder, step):
    tensors = {"model": {"w": torch.full((10_000,), float(step))}, "optimizer": {}}
    writer = shards.Writer(folder, step)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    rest = {
        "param_groups": [{"lr": 0.1, "fused": True}],
        "epoch": 0,
        "samples_seen": 0,
        "global_step": step,
        "rng": [],
    }
    return shards.commit(folder, writer.layout(), writer.checksums, {**rest, **folder_of(folder).identity})


@pytest.fixture
def sharded_folder(tmp_path):
    """The same, as step 05 saves them."""
    for step in (10, 20, 30):
        save_sharded(tmp_path, step)
    return tmp_path


def failure(capsys, path, sharded=False, **changed):
    """The one line that is printed when loading fails."""
    with pytest.raises(SystemExit) as stopped:
        folder_of(path, sharded, **changed).load_newest()
    lines = capsys.readouterr().err.splitlines()
    print(lines)
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_the_newest_comes_back_and_three_are_kept(folder):
    for step in (99_999_999, 100_000_000):  # nine digits, and still the newest
        save(folder, **state(step))
    names = [path.name for path in snapshot.snapshots(folder)]
    assert names == ["snapshot-100000000.pt", "snapshot-99999999.pt", "snapshot-00000030.pt"]
    loaded = load_newest(folder)
    assert torch.equal(loaded["model"]["w"], state(100_000_000)["model"]["w"])


def test_verbose_it_says_what_it_has_saved(tmp_path, capsys):
    snapshot.SnapshotFolder(tmp_path, RUN, verbose=True).save(state(10))
    assert capsys.readouterr().out == f"[rank 0] saved {tmp_path / 'snapshot-00000010.pt'}\n"


def test_unless_asked_it_says_nothing(tmp_path, capsys):
    snapshot.SnapshotFolder(tmp_path, RUN).save(state(10))
    Reporter(RUN, torch.device("cpu")).detail("what only --verbose shows")
    assert capsys.readouterr().out == ""


FLAGS = {"epochs": 3, "lr": 0.1, "batch_size": 64, "accumulate": 1, "schedule": "constant", "my_flag": 0}


@pytest.mark.parametrize(
    ("flag", "value", "is_common"),
    [
        ("epochs", 9, True),
        ("lr", 0.5, True),
        ("batch_size", 8, True),
        ("accumulate", 2, True),
        ("schedule", "one-cycle", False),
        ("my_flag", 1, False),
    ],
)
def test_a_flag_that_differs_is_told_and_stops_a_run_if_it_is_seldom_meant(
    tmp_path, capsys, flag, value, is_common
):
    differs = f"--{flag.replace('_', '-')} is {value}, and was {FLAGS[flag]} in s"
    before = {"path": "s", "flags": FLAGS}
    now = folder_of(tmp_path, flags={**FLAGS, flag: value})
    if is_common:
        now.check_flags(before)
        assert capsys.readouterr().err == f"warning: {differs}\n"
    else:
        with pytest.raises(SystemExit):
            now.check_flags(before)
        remedy = "use the same, or --allow-changes, or another --snapshot-dir"
        assert capsys.readouterr().err == f"error: {differs}: {remedy}\n"
    folder_of(tmp_path, flags={**FLAGS, flag: value, "allow_changes": True}).check_flags(before)
    assert capsys.readouterr().err == f"warning: {differs}\n"


def test_a_snapshot_without_flags_is_taken_and_one_whose_flags_are_no_dict_is_not(tmp_path, capsys):
    """An older version, or your own script, has saved none."""
    now = folder_of(tmp_path, flags=FLAGS)
    now.check_flags({"path": "s"})
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        now.check_flags({"path": "s", "flags": [1]})
    assert capsys.readouterr().err == "error: s has flags that are not a dict: use another --snapshot-dir\n"


def test_a_group_of_an_optimizer_takes_all_but_its_parameters_and_its_kernels():
    weight = torch.zeros(1)
    kernels = {"fused": True, "foreach": None}
    group = {"params": [weight], "param_names": ["w"], "lr": 0.1, "betas": (0.9, 0.99), **kernels}
    saved = {"params": [0], "param_names": ["other"], "lr": 0.5, "betas": (0.8, 0.9)}
    shards.load_groups([group], [{**saved, "fused": False, "foreach": True}])
    assert group == {
        "params": [weight],
        "param_names": ["w"],
        "lr": 0.5,
        "betas": (0.8, 0.9),
        **kernels,
    }


def test_the_newest_of_the_other_kind_counts(folder, capsys):
    """Two, one older and one newer than ours: to continue without the newer would silently lose steps."""
    for step in (25, 35):
        (folder / f"snapshot-{step:08d}").mkdir()
    assert f"{folder / 'snapshot-00000035'} is a sharded snapshot" in failure(capsys, folder)
    (folder / "snapshot-00000035").rmdir()
    assert load_newest(folder)["global_step"] == 30


def test_an_empty_or_missing_folder_is_a_fresh_start(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing" / "folder") is None


def test_a_folder_that_cannot_be_written_is_seen_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for folder, problem in (("file", "File exists"), ("file/folder", "Not a directory")):
        line = failure(capsys, tmp_path / folder)
        assert f"cannot write to {tmp_path / folder}: {problem}; {snapshot.REMEDY}" in line


def test_a_disk_on_which_nothing_more_can_be_written_is_seen_before_training(tmp_path, capsys):
    """Even a full disk may take an empty file. Here, no file may have more than zero bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        line = failure(capsys, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write to {tmp_path}: File too large; {snapshot.REMEDY}" in line


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path, capsys):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(SystemExit) as ended:
        folder_of(tmp_path).lock(saves=True)
    line = f"error: cannot write {tmp_path / '.lock'}: Is a directory; {snapshot.REMEDY}\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, line)


def test_where_files_cannot_be_locked_a_run_says_so_and_starts(tmp_path, capsys, monkeypatch):
    """As on a network file system without locks."""

    asked = []

    def refuse(*arguments):
        assert not asked, "it asked again"
        asked.append(arguments)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    folder_of(tmp_path).lock(saves=True)
    advice = "do not start a second run in this folder"
    assert capsys.readouterr().err == f"warning: cannot lock {tmp_path}/.lock: No locks available; {advice}\n"


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
def test_how_the_optimizer_computes_is_this_runs(sharded, tmp_path):
    if sharded:
        save_sharded(tmp_path, 10)
    else:
        groups = [{"lr": 0.1, "fused": True}]  # as on a GPU
        save(tmp_path, **{**state(10), "optimizer": {"param_groups": groups}})
    loaded = load_newest(tmp_path, sharded)
    groups = loaded["param_groups"] if sharded else loaded["optimizer"]["param_groups"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], foreach=True)
    built = [{"fused": False, "foreach": True, "lr": 1.0, "params": [0]}]
    if sharded:
        shards.load_groups(built, groups)
    else:
        snapshot.keep_kernels(groups, optimizer)
        built = groups
    assert [group["foreach"] for group in built] == [True]
    assert not any(group["fused"] for group in built) and [group["lr"] for group in built] == [0.1]


def damage(kind, path):
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "empty":
        content = bytearray()
    elif kind == "a flipped bit":
        # In the middle of the largest entry, the weights: torch.load would not notice.
        with zipfile.ZipFile(path) as archive:
            entry = max(archive.infolist(), key=lambda info: info.file_size)
        content[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    elif kind == "not a zip":
        content = bytearray(b"not a snapshot")
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "empty", "a flipped bit", "not a zip"])
def test_a_damaged_snapshot_is_named_and_the_one_before_is_used(folder, capsys, kind):
    newest, before, _ = snapshot.snapshots(folder)
    damage(kind, newest)
    loaded = load_newest(folder)
    err = capsys.readouterr().err
    print(err)
    assert loaded["global_step"] == 20
    assert err.startswith(f"warning: {newest} is damaged (") and err.endswith(f"using {before} instead\n")


def spoil(file, rng):
    """Damage a file at a random place; return what was done, or "" if nothing changed."""
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    kind = rng.choice(["bit", "bit", "bit", "cut", "cut", "zeros", "noise", "longer", "empty", "twice"])
    if kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zeros":  # a block that never reached the disk
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif kind == "noise":
        content[at : at + 64] = rng.randbytes(len(content[at : at + 64]))
    elif kind == "longer":
        content += rng.randbytes(1 + rng.randrange(100))
    elif kind == "empty":
        content.clear()
    elif kind == "twice":
        content += bytes(content)
    changed = bytes(content) != file.read_bytes()
    file.write_bytes(content)
    return f"{kind} at {at}" if changed else ""


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
def test_no_damage_goes_unseen(sharded, times, capsys, request):
    """The damaged snapshot is named, and the one before it is loaded."""
    folder = request.getfixturevalue("sharded_folder" if sharded else "folder")
    rng = random.Random(times)
    newest, before, _ = snapshot.snapshots(folder, sharded)
    files = sorted(newest.iterdir()) if sharded else [newest]
    whole = {file: file.read_bytes() for file in files}
    seen = 0
    for _ in range(2 * times):
        if seen == times:
            break
        file = rng.choice(files)
        what = spoil(file, rng)
        if not what:
            continue  # zeros were replaced with zeros
        state = load_newest(folder, sharded)
        err = capsys.readouterr().err
        assert state["global_step"] == 20, f"{file.name}, {what}: {err}"
        assert err.startswith(f"warning: {newest} is damaged ("), f"{file.name}, {what}: {err}"
        assert err.endswith(f"using {before} instead\n") and err.count("\n") == 1, (
            f"{file.name}, {what}: {err}"
        )
        file.write_bytes(whole[file])
        seen += 1
    assert load_newest(folder, sharded)["global_step"] == 30
    print(f"{seen} of {times} seen; the last: {err}")
    assert seen == times


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
def test_when_no_good_one_is_left_they_are_kept(sharded, capsys, request):
    folder = request.getfixturevalue("sharded_folder" if sharded else "folder")
    rng = random.Random(1)
    for path in snapshot.snapshots(folder, sharded):
        assert spoil(path / shards.STATE if sharded else path, rng)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    line = failure(capsys, folder, sharded=sharded)
    assert line.count(" is damaged (") == 3 and "no good snapshot is left; to start again, move" in line
    (folder / ".lock").unlink()
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_zips_own_checksums_would_miss_some(folder):
    """They cover a zip's content, not the places where it says that it is. So ours covers the whole file."""
    newest = snapshot.snapshots(folder)[0]
    content, rng = newest.read_bytes(), random.Random(2)
    directory = content.rindex(b"PK\x01\x02")
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(directory, len(content) - 4)] ^= 1 << rng.randrange(8)
        newest.write_bytes(damaged)
        try:
            if zipfile.ZipFile(newest).testzip() is None and torch.load(newest, weights_only=True):
                break
        except Exception as error:  # most of the bits lead to one
            print(f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        raise AssertionError("zip's own checksums saw 200 of 200: ours is no longer needed")
    assert snapshot.read(newest)[1].startswith("wrong checksum")


def test_torch_load_alone_would_not_have_noticed_the_flipped_bit(folder):
    newest = snapshot.snapshots(folder)[0]
    damage("a flipped bit", newest)
    weights = torch.load(newest, weights_only=True)["model"]["w"]
    assert not torch.equal(weights, state(30)["model"]["w"])


def test_when_all_are_damaged_it_stops_and_keeps_them(folder, capsys):
    paths = snapshot.snapshots(folder)
    for path in paths:
        damage("truncated", path)
    assert "no good snapshot is left" in failure(capsys, folder)
    assert snapshot.snapshots(folder) == paths


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "attacked",)

    path = tmp_path / "snapshot-00000001.pt"
    with pytest.raises(TypeError, match="Path cannot be in a snapshot"):
        snapshot.write(path, {"format": 1, "model": Attack()})
    torch.save({"format": 1, "model": Attack()}, path)
    path.write_bytes((content := path.read_bytes()) + zlib.crc32(content).to_bytes(4, "big"))
    assert "Weights only load failed" in failure(capsys, tmp_path)
    assert not (tmp_path / "attacked").exists()
    # If it is allowed to, the file does what it threatens, so the test above can fail.
    torch.load(tmp_path / "snapshot-00000001.pt", weights_only=False)
    assert (tmp_path / "attacked").exists()


def test_what_others_allow_torch_load_to_call_is_refused(tmp_path, capsys):
    """torch.distributed allows classes that open files; a program around these scripts can allow anything."""

    class Attack:
        def __reduce__(self):
            return shutil.copyfile, ("/dev/null", str(tmp_path / "attacked"))

    path = tmp_path / "snapshot-00000001.pt"
    torch.save({"format": snapshot.FORMAT, "model": Attack()}, path)
    path.write_bytes((content := path.read_bytes()) + zlib.crc32(content).to_bytes(4, "big"))
    with torch.serialization.safe_globals([shutil.copyfile]):
        assert "Weights only load failed" in failure(capsys, tmp_path)
        assert not (tmp_path / "attacked").exists()
        assert shutil.copyfile in torch.serialization.get_safe_globals()  # allowed again
        torch.load(path, weights_only=True)
    assert (tmp_path / "attacked").exists()  # as it threatens, so the test above can fail


def test_a_file_of_another_program_is_refused(tmp_path, capsys):
    path = tmp_path / "snapshot-00000001.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    assert "wrong checksum: altered, cut off at" in failure(capsys, tmp_path)
    path.write_bytes(pickle.dumps({"format": 1}))
    failure(capsys, tmp_path)
    snapshot.write(path, {"weights": torch.zeros(3)})
    assert "not a snapshot of this project" in failure(capsys, tmp_path)
    content = pickle.dumps({"format": 1})
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "big"))
    failure(capsys, tmp_path)


def test_a_plain_one_in_the_place_of_state_is_refused(sharded_folder, capsys):
    newest = snapshot.snapshots(sharded_folder, sharded=True)[0]
    snapshot.write(newest / shards.STATE, {**state(30), **folder_of(sharded_folder).identity})
    assert load_newest(sharded_folder, sharded=True)["global_step"] == 20
    assert "state.pt is not from a sharded snapshot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "vit-64x4"}, "run cnn-mnist, this run has run vit-64x4-mnist"),
        ({"data": "synthetic-512"}, "run cnn-mnist, this run has run cnn-synthetic-512"),
        ({"precision": "float64"}, "precision float32, this run has precision float64"),
        ({"seed": 1}, "seed 0, this run has seed 1"),
    ],
)
def test_another_runs_snapshot_stops_with_both_values(folder, capsys, changed, said):
    assert said in failure(capsys, folder, **changed)


HERE = f"written by Python {platform.python_version()}, torch {torch.__version__}"


def test_another_format_stops_with_both_values(folder, capsys, monkeypatch):
    monkeypatch.setattr(snapshot, "FORMAT", snapshot.FORMAT + 1)
    both = f"format {snapshot.FORMAT - 1}, this run has format {snapshot.FORMAT} ({HERE}): use the same"
    assert both in failure(capsys, folder)


def test_a_sharded_one_of_another_format_is_told_by_that_and_not_by_what_it_lacks(tmp_path, capsys):
    (tmp_path / "snapshot-00000010").mkdir()
    snapshot.write(tmp_path / "snapshot-00000010" / "state.pt", {"format": 99, "run": "cnn-mnist"})
    both = f"was made with format 99, this run has format {snapshot.FORMAT} ({HERE}): use the same"
    assert both in failure(capsys, tmp_path, sharded=True)


def test_one_that_only_a_later_torch_can_read_says_who_wrote_it(tmp_path, capsys):
    """Its checksum is correct, but something in it has no name here, or is not allowed here."""
    path = tmp_path / "snapshot-00000010.pt"
    torch.save({"format": snapshot.FORMAT, "model": Path()}, path)
    for writer, said in {
        b"Python 3.19.0rc1+, torch 9.0.0a0+cpu".ljust(64): "written by Python 3.19.0rc1+, torch 9.0.0a0+cpu)",
        b"\nerror: \x1b[31mPython 3, torch 2".ljust(64): "written by unknown versions of Python and torch)",
    }.items():
        content = path.read_bytes() + writer
        path.write_bytes(content + zlib.crc32(content).to_bytes(4, "big"))
        line = failure(capsys, tmp_path)
        assert "is damaged (Weights only load failed." in line and said in line


def test_shards_that_do_not_fit_say_who_wrote_them(sharded_folder, capsys):
    tensors = {"model": {"w": torch.zeros(10_000), "v": torch.zeros(3)}, "optimizer": {}}
    state = load_newest(sharded_folder, sharded=True)
    with pytest.raises(SystemExit), shards.reader(state) as reader:
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    (line,) = capsys.readouterr().err.splitlines()
    print(line)
    assert line.startswith(f"error: {state['path']} cannot be loaded ({HERE}): ")


def test_a_full_disk_leaves_the_snapshots_before_it(folder, capsys, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stopped:
        save(folder, **state(40))
    err = capsys.readouterr().err
    print(err)
    assert stopped.value.code == 2
    assert err.startswith("error: cannot write") and "No space left on device" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


WITHIN_LIMITS = """
import re
import resource
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
import torch
from common import snapshot


def allow(more):
    '''Let this process allocate `more` bytes than it has now (getrlimit(2): RLIMIT_DATA).'''
    [kilobytes] = re.findall(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    limit = 1024 * int(kilobytes) + int(more)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


weights = {{name: torch.full((16, 1024, 1024), 1.0) for name in "abcd"}}
size = sum(tensor.nbytes for tensor in weights.values())
path = Path("snapshot-00000010.pt")
allow(size / 10)
snapshot.write(path, {{"format": snapshot.FORMAT, "model": weights}})
allow(1.1 * size)  # the state that is read
state, problem = snapshot.read(path)
print(problem or "read")
assert torch.equal(state["model"]["d"], weights["d"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc for the memory: Linux only")
def test_no_second_copy_of_the_state_is_made_to_write_or_read_it(tmp_path):
    """The system would refuse memory for a copy. (Resident memory also counts pages of files.)"""
    (tmp_path / "within.py").write_text(WITHIN_LIMITS.format(root=str(ROOT)))
    status, out, err = finish(start([sys.executable, "within.py"], tmp_path))
    assert (status, out) == (0, "read\n"), err


def test_what_is_no_file_is_no_snapshot_and_what_is_gone_cannot_be_read(tmp_path, capsys):
    (tmp_path / "snapshot-00000010.pt").mkdir()
    assert snapshot.read(tmp_path / "snapshot-00000010.pt") == ({}, "snapshot-00000010.pt is not a file")
    with pytest.raises(SystemExit):
        snapshot.read(tmp_path / "gone.pt")
    assert capsys.readouterr().err.startswith(f"error: cannot read {tmp_path / 'gone.pt'}: No such file or")


def test_a_file_that_could_not_be_opened_is_told_by_its_own_reason(folder, capsys):
    """Not by the reason why the half file cannot be deleted: it does not exist."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # open files stay open
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            snapshot.write(folder / "snapshot-00000040.pt", state(40))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shards_checksum_is_the_crc_32_of_its_bytes(tmp_path):
    content = random.Random(0).randbytes(2**24 + 1)  # more than is read at once
    (tmp_path / "shard").write_bytes(content)
    assert shards.checksum(tmp_path / "shard") == zlib.crc32(content)


def test_the_room_on_a_disk_that_is_gone_is_not_told(tmp_path):
    assert re.fullmatch(r" \([\d.]+ MB are free\)", shards.free_on(tmp_path))
    assert shards.free_on(tmp_path / "gone") == ""


def test_what_a_killed_write_left_is_deleted_before_the_next(folder, monkeypatch):
    """What is left may fill the disk."""
    (folder / ".snapshot-00000035.pt.tmp").write_bytes(b"half")
    (folder / "deep").mkdir()
    write, there = snapshot.write, []

    def looks(path, content):
        there.append((folder / ".snapshot-00000035.pt.tmp").exists())
        write(path, content)

    monkeypatch.setattr(snapshot, "write", looks)
    save(folder, **state(40))
    assert there == [False]
    assert {path.name for path in folder.iterdir()} == {
        "deep",
        *(f"snapshot-000000{n}.pt" for n in (20, 30, 40)),
    }


def test_sweeping_leaves_three_sharded_ones_and_nothing_unfinished(sharded_folder):
    (sharded_folder / ".snapshot-00000035.tmp").mkdir()
    (sharded_folder / ".snapshot-00000035.tmp" / "__0_0.distcp").write_bytes(b"half")
    (sharded_folder / ".snapshot-a-rank's-mark.tmp").touch()
    (sharded_folder / "snapshot-00000050.pt").touch()  # of the other kind
    save_sharded(sharded_folder, 40)
    shards.delete_old(sharded_folder)
    names = {path.name for path in sharded_folder.iterdir()}
    assert names == {"snapshot-00000050.pt", *(f"snapshot-000000{n}" for n in (20, 30, 40))}


@pytest.mark.parametrize("values", [{}, {"model": torch.zeros(10**5)}], ids=["few bytes", "many"])
def test_the_bytes_reach_the_disk_before_the_name_does(folder, monkeypatch, values):
    """Otherwise, a power cut could replace the previous snapshot with a name that has no content.

    Python holds back a few bytes until it is told to write them, but writes many bytes immediately.
    """
    done, sync, rename = [], os.fsync, os.replace

    def note_sync(descriptor):
        state = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(state.st_mode) else f"{state.st_size} bytes")
        sync(descriptor)

    def note_rename(old, new):
        done.append("name")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    before = os.listdir("/dev/fd")
    save(folder, global_step=40, **values)
    assert os.listdir("/dev/fd") == before  # or a long training would run out of them
    size = (folder / "snapshot-00000040.pt").stat().st_size
    assert done == [f"{size} bytes", "name", "folder"]


def test_the_name_of_a_sharded_one_reaches_the_disk(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), sync(descriptor))
    )
    save_sharded(tmp_path, 10)
    assert synced[-1] == tmp_path.stat().st_ino


def test_a_folder_that_cannot_be_synced_stops_nothing(folder, monkeypatch):
    """As on Windows and some network disks. By then, the file is in its place."""
    sync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    save(folder, **state(40))
    assert load_newest(folder)["global_step"] == 40


class Config:
    """Something that torch.save takes and weights_only refuses."""


# The last is one of the classes that torch.distributed, once imported, lets torch.load create.
REFUSED = [numpy.float64(1), Config(), Path("x"), traceback.FrameSummary("file", 1, "name")]


@pytest.mark.parametrize("what", REFUSED, ids=lambda what: type(what).__name__)
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(folder, capsys, what):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        save(folder, **state(40), more={"deep": [what]})
    err = capsys.readouterr().err
    print(err)
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert "cannot be in a snapshot, only tensors, numbers and strings" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


DTYPES = ["bool", "float16", "bfloat16", "float32", "float64", "complex64", "float8_e4m3fn", "float8_e5m2"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("name", DTYPES)
def test_shards_of_every_kind_of_number_come_back(tmp_path, name):
    tensor = (torch.arange(48) % 2).to(getattr(torch, name))
    saved = {"model": {"w": tensor}, "optimizer": {}}
    writer = shards.Writer(tmp_path, 10)
    dcp.save(saved, storage_writer=writer, no_dist=True)
    rest = {"param_groups": [], "epoch": 0, "samples_seen": 0, "global_step": 10, "rng": []}
    shards.commit(tmp_path, writer.layout(), writer.checksums, {**rest, **folder_of(tmp_path).identity})
    loaded = {"model": {"w": torch.zeros_like(tensor)}, "optimizer": {}}
    with shards.reader(load_newest(tmp_path, sharded=True)) as reader:
        dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert torch.equal(loaded["model"]["w"].view(torch.uint8), tensor.view(torch.uint8))


def test_a_number_among_the_shards_is_refused_when_it_is_saved(sharded_folder):
    """When it is loaded, dcp would unpickle it without an allow-list."""
    saved = {"model": {"w": torch.ones(3)}, "optimizer": {"w": {"step": 3}}}
    writer = shards.Writer(sharded_folder, 40)
    dcp.save(saved, storage_writer=writer, no_dist=True)
    with pytest.raises(TypeError, match=r"only tensors can be in shards, and optimizer\.w\.step is not one"):
        writer.layout()
    assert load_newest(sharded_folder, sharded=True)["global_step"] == 30


def test_a_damaged_snapshot_is_replaced(sharded_folder):
    path = snapshot.snapshots(sharded_folder, sharded=True)[0]
    before = path.stat().st_ino
    (path / shards.STATE).write_bytes(b"half")
    save_sharded(sharded_folder, 30)
    assert path.stat().st_ino != before
    assert load_newest(sharded_folder, sharded=True)["global_step"] == 30


def test_weights_of_a_gpu_are_read_on_the_cpu(tmp_path):
    """Otherwise, comparing runs of several GPUs would open a context on each, and subtract across devices."""
    torch.serialization.register_package(0, lambda storage: "cuda:1", lambda storage, location: None)
    try:
        save(tmp_path, **state(10))
    finally:
        torch.serialization._package_registry.pop(0)
    path = snapshot.snapshots(tmp_path)[0]
    with pytest.raises(RuntimeError, match="cuda"):  # the file says where its tensors were
        torch.load(path, weights_only=True)
    assert snapshot.read(path)[0]["model"]["w"].device == torch.device("cpu")
