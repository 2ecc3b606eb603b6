"""A schedule of the learning rate: the promised curve, the same in all steps, and after a resume.

Promise: with any optimizer, a schedule scales the learning rate that each parameter group was built with, and
changes nothing else. `constant` changes nothing at all.
"""

import shutil

import pytest
import torch
from helpers import (
    FOLDERS,
    GROWN,
    SHARDED,
    after_a_step,
    disagreements,
    largest_difference,
    newest,
    planted,
    ranks_of,
    train,
)

from common.schedule import Schedule, one_cycle
from common.snapshot import snapshots

# An epoch has 19 steps of 12 images.
FLAGS = ["--num-samples=233", "--precision=float64", "--schedule=one-cycle", "--lr=0.01"]


def weight():
    return torch.nn.Parameter(torch.zeros(1))


def two_groups(kind=torch.optim.AdamW, **own):
    """An optimizer as in many recipes: some of the parameters have another learning rate."""
    groups = [{"params": [weight()], "lr": 0.01}, {"params": [weight()], "lr": 0.0001}]
    return kind(groups, **own)


def rates(name, total_steps, count):
    """The learning rate of the first group in the first `count` steps; the second has a hundredth of it."""
    optimizer = two_groups()
    schedule = Schedule(optimizer, name)
    found = []
    for step in range(count):
        schedule.set_progress(step / total_steps)
        first, second = optimizer.param_groups
        assert second["lr"] == pytest.approx(first["lr"] / 100)
        found.append(first["lr"])
    return found


def test_one_cycle_is_torchs():
    """Except for the place of a step on the curve: the last of 1,000 steps is not quite at the end."""
    optimizer = torch.optim.AdamW([weight()])
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=1000, pct_start=0.3)
    theirs = []
    for _ in range(1000):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cycle.step() if len(theirs) < 1000 else None
    ours = rates("one-cycle", 1000, 1000)
    assert ours[0] == pytest.approx(0.0004) and max(ours) == ours[300] == 0.01 and ours[-1] < 1e-6
    # The steepest slope of half a cosine is 1.6 times its height over its length; the rise has 300 steps.
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.01 * 1.6 / 300


OPTIMIZERS = [
    (torch.optim.AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize(("kind", "own"), OPTIMIZERS)
def test_it_touches_nothing_but_learning_rates(kind, own):
    optimizer = two_groups(kind, **own)
    built = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    for name in ("constant", "one-cycle"):
        schedule = Schedule(optimizer, name)
        for step in range(10):
            schedule.set_progress(step / 10)
        for group, before in zip(optimizer.param_groups, built, strict=True):
            assert {key: group[key] for key in group if key not in ("params", "lr")} == {
                key: before[key] for key in before if key != "lr"
            }
            assert (group["lr"] == before["lr"]) == (name == "constant")
        schedule.reset()
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0001]


def test_a_schedule_of_ones_own_is_left_alone():
    """With `constant`, one of torch's schedulers may set the learning rate."""
    optimizer = two_groups()
    ours = Schedule(optimizer, "constant")
    theirs = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        ours.set_progress(step / 10)
        optimizer.step()
        theirs.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.00125, 0.0000125]


def test_after_its_end_it_stays_there():
    """A resumed run may have fewer steps than the run before it."""
    assert rates("one-cycle", 10, 20)[10:] == [0.0] * 10


BUILT = (
    '    optimizer = torch.optim.AdamW(model.named_parameters(), lr=args.lr, fused=device.type != "cpu")\n'
)
OWN = """    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() > 1 else others).append((name, parameter))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 1e-4, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("step", FOLDERS)
def test_an_optimizer_of_ones_own_stays_as_it_was_built(tmp_path, step):
    """Two groups, with weight decay for some parameters. A resumed run ends the same, to the last bit."""
    ranks = ranks_of(step)
    flags = ["--num-samples=48", f"--batch-size={12 // ranks}", "--precision=float64"]
    root = planted(tmp_path / "root", step, (BUILT, OWN))
    whole = train(step, ranks, tmp_path / "whole", *flags, "--epochs=2", root=root)
    train(step, ranks, tmp_path / "resumed", *flags, "--epochs=1", root=root)
    resumed = train(step, ranks, tmp_path / "resumed", *flags, "--epochs=2", root=root)
    assert largest_difference(resumed.weights, whole.weights) == 0.0
    for run in (whole, resumed):
        first, second = newest(run.snapshot_dir)["optimizer"]["param_groups"]
        assert (first["lr"], first["betas"], first["weight_decay"]) == (1e-2, (0.9, 0.95), 0.1)
        assert (second["lr"], second["betas"], second["weight_decay"]) == (1e-4, (0.9, 0.95), 0.0)


SCHEDULERS = {
    "StepLR": "torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)",
    "LambdaLR": "torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))",
}


def with_scheduler(root, step, scheduler):
    """A step with two groups, in which one of torch's schedulers replaces ours, as the page says."""
    edits = [
        ("Schedule(optimizer, args.schedule)", scheduler),
        ("        self.schedule.set_progress((self.epoch + seen) / self.args.epochs)\n", ""),
        ("        self.optimizer.step()\n", "        self.optimizer.step()\n        self.schedule.step()\n"),
        (
            '            "epoch": self.epoch,\n',
            '            "epoch": self.epoch,\n            "schedule": self.schedule.state_dict(),\n',
        ),
        (
            "        self.schedule.reset()  # to the learning rates of this run's flags\n",
            '        self.schedule.load_state_dict(state["schedule"])\n',
        ),
        (BUILT, OWN.replace('"lr": 1e-4', '"lr": 1e-6')),
        after_a_step("self.report.say(f'rates {[group[\"lr\"] for group in self.optimizer.param_groups]}')"),
    ]
    return planted(root, step, *edits)


def said_rates(run):
    """The learning rates of both groups after each step."""
    return [
        tuple(map(float, line[7:-1].split(", ")))
        for line in run.out.splitlines()
        if line.startswith("rates ")
    ]


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("step", ["01", "03", SHARDED])
def test_a_scheduler_of_torchs_takes_the_place_of_ours(tmp_path, step, name):
    """With two groups, one starting at 1e-6. A resumed run ends the same, to the last bit."""
    ranks = ranks_of(step)
    flags = ["--num-samples=48", f"--batch-size={12 // ranks}", "--precision=float64"]
    root = with_scheduler(tmp_path / "root", step, SCHEDULERS[name])
    whole = train(step, ranks, tmp_path / "whole", *flags, "--epochs=4", root=root)
    train(step, ranks, tmp_path / "resumed", *flags, "--epochs=2", root=root)
    resumed = train(step, ranks, tmp_path / "resumed", *flags, "--epochs=4", root=root)
    factor = {"StepLR": lambda step: 0.5 ** (step // 3), "LambdaLR": lambda step: 1 / (1 + step)}[name]
    steps = len(said_rates(whole))
    expected = [pytest.approx((1e-2 * factor(step), 1e-6 * factor(step))) for step in range(1, steps + 1)]
    assert steps >= 12 and said_rates(whole) == expected
    assert said_rates(resumed) == said_rates(whole)[-len(said_rates(resumed)) :]
    assert largest_difference(resumed.weights, whole.weights) == 0.0


CASES = [(step, ranks) for step in GROWN for ranks in (2, 4)] + [("03", 3)]
QUICK = [("02", 2), ("03", 3), (SHARDED, 4)]


@pytest.mark.sample(4)
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.few(1)
@pytest.mark.parametrize(("step", "before", "after"), [("03", 2, 3), (SHARDED, 3, 2)])
def test_resumed_at_another_world_size_it_goes_on_from_the_same_place(tmp_path, step, before, after):
    """A rank's batch stays the same, so an epoch has more steps, or fewer. The rate must not jump."""
    flags = ["--num-samples=240", "--batch-size=8", "--schedule=one-cycle", "--lr=0.01"]
    train(step, before, tmp_path, *flags, "--epochs=2", "--save-every=1000")
    says = after_a_step("self.report.say(f'rate {self.optimizer.param_groups[0][\"lr\"]!r}')")
    root = planted(tmp_path / "root", step, says)
    run = train(step, after, tmp_path, *flags, "--epochs=3", root=root)
    found = [float(line.split()[1]) for line in run.out.splitlines() if line.startswith("rate ")]
    steps = 240 // (8 * after)
    expected = [0.01 * one_cycle((2 + number / steps) / 3) for number in range(steps)]
    assert found == pytest.approx(expected)


def test_a_resume_may_leave_it(once, tmp_path):
    """The flags decide, and nothing of the snapshot's schedule stays."""
    first = once("01", 1, *FLAGS, "--epochs=1", "--batch-size=12")
    [group] = first.state["optimizer"]["param_groups"]
    assert 0 < group["lr"] < 1e-3
    shutil.copytree(first.snapshot_dir, tmp_path / "snapshots")
    run = train(
        "01", 1, tmp_path, *FLAGS, "--epochs=2", "--batch-size=12", "--schedule=constant", "--allow-changes"
    )
    [group] = run.state["optimizer"]["param_groups"]
    assert len(run.losses) == 19
    assert group["lr"] == 0.01
