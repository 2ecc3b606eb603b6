"""A schedule of the learning rate: the curve that is promised, alike in all steps, and after a resume."""

import argparse
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import FOLDERS, GROWN, SHARDED, disagreements, largest_difference, ranks_of, train

from common.models import build_model, set_learning_rate
from common.snapshot import snapshots
from common.synthetic import synthetic_digits

# 19 steps of 12 images an epoch.
FLAGS = ["--num-samples=233", "--precision=float64", "--schedule=one-cycle", "--lr=0.01"]


def rates(schedule, steps, count):
    """The learning rate of the first `count` steps, and the betas."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=7.0, betas=(0.1, 0.2))
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.zeros(1))})
    args, found = argparse.Namespace(schedule=schedule, lr=0.01), []
    for step in range(count):
        set_learning_rate(optimizer, args, step, steps)
        first, second = optimizer.param_groups
        assert (first["lr"], first["betas"]) == (second["lr"], second["betas"])
        found.append(first["lr"])
    return found, first["betas"]


def test_one_cycle_is_torchs():
    """But for where a step stands: of 1,000 the last is not quite at the end."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=1000, pct_start=0.3)
    theirs = []
    for _ in range(1000):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cycle.step() if len(theirs) < 1000 else None
    ours, betas = rates("one-cycle", 1000, 1000)
    assert betas == (0.7, 0.9)
    assert ours[0] == pytest.approx(0.0004) and max(ours) == ours[300] == 0.01 and ours[-1] < 1e-6
    # At the steepest, half a cosine falls by 1.6 of its height in its length, and the rise has 300 steps.
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.01 * 1.6 / 300


def test_without_a_schedule_the_rate_is_the_flags_and_the_betas_are_torchs():
    ours, betas = rates("constant", 10, 20)
    assert ours == [0.01] * 20
    assert betas == torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["betas"]


def test_behind_its_end_it_stays_there():
    """As when a resumed run has fewer steps to go than the one before."""
    assert rates("one-cycle", 10, 20)[0][10:] == [0.0] * 10


CASES = [(step, ranks) for step in GROWN for ranks in (2, 4)] + [("03", 3)]
QUICK = [("02", 2), ("03", 3), (SHARDED, 4)]


@pytest.mark.sample(4)
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "ranks"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_every_step_follows_it_alike(once, step, ranks):
    flags = [*FLAGS, "--epochs=5"]
    run = once(step, ranks, *flags, f"--batch-size={12 // ranks}")
    reference = once("01", 1, *flags, "--batch-size=12")
    assert len(run.losses) == 95 and disagreements(run, reference) == []
    constant = once("01", 1, *flags, "--batch-size=12", "--schedule=constant")
    assert disagreements(reference, constant) != []


@pytest.mark.few(2)
@pytest.mark.parametrize("step", FOLDERS)
def test_label_smoothing_is_of_the_training_alone(once, step):
    """The first loss is that of torch's smoothed target; a test is without it."""
    ranks = ranks_of(step)
    flags = ["--num-samples=24", "--precision=float64", "--epochs=1", f"--batch-size={24 // ranks}"]
    smoothed = once(step, ranks, *flags, "--smoothing=0.5", "--lr=1e-9")
    model = build_model(argparse.Namespace(model="cnn", precision="float64", compile=False))
    model.load_state_dict(smoothed.weights)  # at so small a rate, nearly those of the start
    train_set, test_set = (synthetic_digits(count, seed) for count, seed in ((24, 0), (4, 1)))
    with torch.no_grad():
        trained = F.cross_entropy(model(train_set[0]), train_set[1], label_smoothing=0.5).item()
        tested = F.cross_entropy(model(test_set[0]), test_set[1]).item()
        without = F.cross_entropy(model(train_set[0]), train_set[1]).item()
    assert abs(trained - without) > 1e-4
    # A step of 1e-9 in each of 206,922 weights.
    assert smoothed.losses.item() == pytest.approx(trained, abs=1e-5)
    assert smoothed.test["loss"] == pytest.approx(tested, abs=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=[] if step in ("01", SHARDED) else pytest.mark.slow) for step in FOLDERS],
)
def test_resumed_it_goes_on_where_it_was(once, tmp_path, step):
    ranks = ranks_of(step)
    flags = [*FLAGS, "--epochs=2", f"--batch-size={12 // ranks}", "--save-every=10"]
    whole = once(step, ranks, *flags)
    shutil.copytree(whole.snapshot_dir, tmp_path / "snapshots")
    sharded = step == SHARDED
    for path in snapshots(tmp_path / "snapshots", sharded)[:-1]:
        shutil.rmtree(path) if sharded else path.unlink()
    run = train(step, ranks, tmp_path, *flags)
    print(f"{run.name}: {len(run.losses)} steps of 38")
    assert 0 < len(run.losses) < 38
    assert largest_difference(run.weights, whole.weights) == 0.0


def test_a_resume_may_leave_it(once, tmp_path):
    """Flags count, and nothing of the snapshot's schedule stays."""
    first = once("01", 1, *FLAGS, "--epochs=1", "--batch-size=12")
    [group] = first.state["optimizer"]["param_groups"]
    assert 0 < group["lr"] < 1e-3 and group["betas"] == (0.7, 0.9)
    shutil.copytree(first.snapshot_dir, tmp_path / "snapshots")
    run = train("01", 1, tmp_path, *FLAGS, "--epochs=2", "--batch-size=12", "--schedule=constant")
    [group] = run.state["optimizer"]["param_groups"]
    assert len(run.losses) == 19
    assert group["lr"] == 0.01 and group["betas"] == (0.9, 0.999)
