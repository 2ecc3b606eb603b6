"""A run continues from a converted snapshot as from the original, even with your own optimizer.

Promise: a run can be converted between step 05 and the other steps, in both directions, with any parameter
groups.
"""

import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import FOLDERS, ROOT, SHARDED, finish, largest_difference, load, planted, start, train

import sharded
from common import snapshot

OPTIMIZER = 'torch.optim.AdamW(model.named_parameters(), lr=args.lr, fused=device.type != "cpu")'
# Weight decay only for matrices, as in most recipes, and parameters in another order than the model's.
GROUPS = """torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in model.named_parameters() if p.ndim < 2], "weight_decay": 0.0},
            {"params": [(n, p) for n, p in reversed([*model.named_parameters()]) if p.ndim > 1], "lr": 0.003},
        ],
        lr=args.lr,
        weight_decay=0.1,
    )"""
FLAGS = ["--num-samples=144", "--batch-size=12", "--precision=float64", "--use-gpu=0", "--lr=0.002"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A copy of steps 04 and 05 with two groups of parameters."""
    folder = tmp_path_factory.mktemp("root")
    for step in ("04", SHARDED):
        planted(folder, step, (OPTIMIZER, GROUPS))
    return folder


def convert(root, path):
    words = [sys.executable, str(root / FOLDERS[SHARDED] / "convert.py"), str(path)]
    status, out, err = finish(start(words, path.parent))
    print(out, err)
    return status, err


@pytest.mark.few(1)
@pytest.mark.parametrize(("first", "then", "ranks"), [("04", SHARDED, 3), (SHARDED, "04", 2)])
def test_with_two_groups_of_parameters_training_goes_on_as_it_would_have(root, tmp_path, first, then, ranks):
    whole = train(then, ranks, tmp_path / "whole", *FLAGS, "--epochs=2", root=root)
    train(first, ranks, tmp_path / "half", *FLAGS, "--epochs=1", root=root)
    [path] = snapshot.snapshots(tmp_path / "half" / "snapshots", sharded=first == SHARDED)
    assert convert(root, path) == (0, "")
    run = train(then, ranks, tmp_path / "half", *FLAGS, "--epochs=2", root=root)
    assert f"resumed from snapshots: epoch 1, step {snapshot.step_of(path)}\n" in run.out
    difference = largest_difference(run.weights, whole.weights)
    print(f"the weights differ by {difference:.2g}")
    assert difference < 1e-12  # DDP and FSDP add gradients in different orders


def test_an_optimizer_without_names_is_not_guessed_at(tmp_path):
    root = planted(
        tmp_path / "root", "04", ("model.named_parameters()", "model.parameters()"), steps=(SHARDED,)
    )
    train("04", 2, tmp_path, *FLAGS, "--epochs=1", root=root)
    [path] = snapshot.snapshots(tmp_path / "snapshots")
    status, err = convert(root, path)
    said = (
        "cannot be converted: ValueError: its optimizer has no names: build it from model.named_parameters()"
    )
    assert status == 2 and said in err
    assert not path.with_suffix("").exists()


GROUP = {"lr": 0.1, "params": [0], "param_names": ["w"]}
IDENTITY = {"format": snapshot.FORMAT, "run": "cnn-mnist", "precision": "float32", "seed": 0}
REST = {"epoch": 0, "samples_seen": 0, "global_step": 7, "rng": [], **IDENTITY}


def test_what_a_script_of_ones_own_saves_besides_is_converted_too(tmp_path):
    """A moving average of the weights: it is as large as they are, so it is in shards, too."""
    convert = load(ROOT / FOLDERS[SHARDED] / "convert.py")
    slots = {0: {"exp_avg": torch.full((3,), 0.5)}}
    plain = {"model": {"w": torch.ones(3)}, "ema": {"w": torch.zeros(3)}, **REST}
    plain["optimizer"] = {"state": slots, "param_groups": [GROUP]}
    convert.scatter(tmp_path, plain)
    state, problem = sharded.read(tmp_path / "snapshot-00000007")
    assert problem == "" and "ema" not in state
    assert state["metadata"].state_dict_metadata.keys() == {"model.w", "ema.w", "optimizer.w.exp_avg"}
    back = convert.gather(state)
    assert back.keys() == plain.keys() and back["optimizer"]["param_groups"] == [GROUP]
    for tensors, before in (
        (back["model"], plain["model"]),
        (back["ema"], plain["ema"]),
        (back["optimizer"]["state"][0], slots[0]),
    ):
        assert largest_difference(tensors, before) == 0.0


def test_a_tensor_in_no_dictionary_is_refused(tmp_path):
    convert = load(ROOT / FOLDERS[SHARDED] / "convert.py")
    writer = sharded.Writer(tmp_path, 7)
    dcp.save({"model": {"w": torch.ones(3)}, "scale": torch.ones(1)}, storage_writer=writer, no_dist=True)
    sharded.commit(tmp_path, writer.layout(), writer.checksums, {**REST, "param_groups": [GROUP]})
    state, _ = sharded.read(tmp_path / "snapshot-00000007")
    with pytest.raises(ValueError, match="scale is a tensor, not a dictionary of tensors"):
        convert.gather(state)
