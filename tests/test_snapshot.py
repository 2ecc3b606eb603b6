"""Snapshot files: atomic, checked, three kept, and never of another run."""

import argparse
import errno
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from common import snapshot


def flags(folder, **changed):
    args = {"snapshot_dir": folder, "model": "cnn", "precision": "float32", "seed": 0, "batch_size": 64}
    args |= {"vit_width": 64, "vit_depth": 4}
    return argparse.Namespace(**{**args, **changed})


def state(step):
    return {"model": {"w": torch.full((10_000,), float(step))}, "epoch": 0, "global_step": step}


@pytest.fixture
def folder(tmp_path):
    """Three snapshots, of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        snapshot.save(flags(tmp_path), "mnist", state(step))
    return tmp_path


def failure(capsys, args, dataset="mnist"):
    """The one line with which loading fails."""
    with pytest.raises(SystemExit) as stopped:
        snapshot.load_newest(args, dataset)
    lines = capsys.readouterr().err.splitlines()
    print(lines)
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_the_newest_comes_back_and_three_are_kept(folder):
    snapshot.save(flags(folder), "mnist", state(100_000_000))  # nine digits, and still the newest
    names = [path.name for path in snapshot.snapshots(folder)]
    assert names == ["snapshot-100000000.pt", "snapshot-00000030.pt", "snapshot-00000020.pt"]
    loaded = snapshot.load_newest(flags(folder), "mnist")
    assert torch.equal(loaded["model"]["w"], state(100_000_000)["model"]["w"])


def test_an_empty_or_missing_folder_is_a_fresh_start(tmp_path):
    assert snapshot.load_newest(flags(tmp_path), "mnist") is None
    assert snapshot.load_newest(flags(tmp_path / "missing" / "folder"), "mnist") is None


def test_a_folder_that_cannot_be_written_is_seen_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot make the folder" in failure(capsys, flags(tmp_path / "file"))
    assert "cannot make the folder" in failure(capsys, flags(tmp_path / "file" / "folder"))


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.manual_seed(3)
    torch.rand(5)
    snapshot.save(flags(tmp_path), "mnist", state(1))
    expected = torch.rand(5)
    snapshot.load_newest(flags(tmp_path), "mnist")
    assert torch.equal(torch.rand(5), expected)


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
    loaded = snapshot.load_newest(flags(folder), "mnist")
    err = capsys.readouterr().err
    print(err)
    assert loaded["global_step"] == 20
    assert err.startswith(f"warning: {newest} is damaged (") and err.endswith(f"using {before} instead\n")


def test_torch_load_alone_would_not_have_noticed_the_flipped_bit(folder):
    newest = snapshot.snapshots(folder)[0]
    damage("a flipped bit", newest)
    weights = torch.load(newest, weights_only=True)["model"]["w"]
    assert not torch.equal(weights, state(30)["model"]["w"])


def test_when_all_are_damaged_it_stops_and_keeps_them(folder, capsys):
    paths = snapshot.snapshots(folder)
    for path in paths:
        damage("truncated", path)
    assert "no snapshot is left" in failure(capsys, flags(folder))
    assert snapshot.snapshots(folder) == paths


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "attacked",)

    torch.save({"format": 1, "model": Attack()}, tmp_path / "snapshot-00000001.pt")
    failure(capsys, flags(tmp_path))
    assert not (tmp_path / "attacked").exists()
    # The file does what it threatens to, if it is let: the test above can fail.
    torch.load(tmp_path / "snapshot-00000001.pt", weights_only=False)
    assert (tmp_path / "attacked").exists()


def test_a_file_of_another_program_is_refused(tmp_path, capsys):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "snapshot-00000001.pt")
    assert "not a snapshot of this project" in failure(capsys, flags(tmp_path))
    (tmp_path / "snapshot-00000001.pt").write_bytes(pickle.dumps({"format": 1}))
    failure(capsys, flags(tmp_path))


@pytest.mark.parametrize(
    ("changed", "dataset", "said"),
    [
        ({"model": "vit"}, "mnist", "--model cnn, this run has --model vit"),
        ({"precision": "float64"}, "mnist", "precision float32, this run has precision float64"),
        ({"seed": 1}, "mnist", "seed 0, this run has seed 1"),
        ({}, "synthetic-512", "dataset mnist, this run has dataset synthetic-512"),
    ],
)
def test_another_runs_snapshot_stops_with_both_values(folder, capsys, changed, dataset, said):
    assert said in failure(capsys, flags(folder, **changed), dataset)


def test_another_format_stops_with_both_values(folder, capsys, monkeypatch):
    monkeypatch.setattr(snapshot, "FORMAT", 2)
    assert "format 1, this run has format 2" in failure(capsys, flags(folder))


def test_a_full_disk_leaves_the_snapshots_before_it(folder, capsys, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stopped:
        snapshot.save(flags(folder), "mnist", state(40))
    err = capsys.readouterr().err
    print(err)
    assert stopped.value.code == 2
    assert err.startswith("error: cannot write") and "No space left on device" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_a_killed_write_left_is_swept_up(folder):
    (folder / ".snapshot-00000035.pt.tmp").write_bytes(b"half")
    snapshot.save(flags(folder), "mnist", state(40))
    assert not list(folder.glob(".*"))
