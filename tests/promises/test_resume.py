"""A run that is interrupted and started again ends where an uninterrupted one ends.

Promise: a run that is interrupted in the middle of an epoch and resumed is bit-identical to an uninterrupted
run (on CPUs, with the same number of threads), at 1, 2, 3 and 4 ranks, also after a SIGKILL under
`torchrun --max-restarts`. Resumed at another world size or with another step, it agrees within 1e-10.
"""

import shutil
import sys

import pytest
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    GROWN,
    ROOT,
    SHARDED,
    after_a_step,
    children,
    command,
    disagreements,
    errors,
    finish,
    kill,
    largest_difference,
    last_saved,
    newest,
    pause,
    planted,
    ranks_of,
    saved,
    start,
    train,
    wait_for_step,
    wait_until,
)

from common.snapshot import snapshots, step_of

# An epoch has 19 steps of 12 images. Snapshots are saved at 10, 19, 20, 30 … 80, 90, 95; the last three stay.
FLAGS = ["--num-samples=233", "--epochs=5", "--precision=float64", "--save-every=10"]
LAUNCHES = [(step, ranks_of(step)) for step in FOLDERS]


@pytest.fixture
def whole(once):
    """An uninterrupted run of each step."""

    class Runs:
        def __getitem__(self, step):
            return once(step, ranks_of(step), *FLAGS, f"--batch-size={GLOBAL_BATCH // ranks_of(step)}")

    return Runs()


def interrupted(whole, folder, step, last=80):
    """Make `folder` as an interruption in the middle of an epoch leaves it: snapshots up to step `last`."""
    shutil.copytree(whole[step].snapshot_dir, folder / "snapshots")
    sharded = step == SHARDED
    for path in snapshots(folder / "snapshots", sharded):
        if step_of(path) > last:
            shutil.rmtree(path) if sharded else path.unlink()
    assert step_of(snapshots(folder / "snapshots", sharded)[0]) == last


@pytest.mark.few(2)
@pytest.mark.parametrize(("step", "ranks"), LAUNCHES)
def test_resumed_in_the_middle_of_an_epoch_is_bit_identical(whole, tmp_path, step, ranks):
    interrupted(whole, tmp_path, step)
    run = train(step, ranks, tmp_path, *FLAGS, f"--batch-size={GLOBAL_BATCH // ranks}")
    difference = largest_difference(run.weights, whole[step].weights)
    print(f"{run.name}, resumed after step 80 of 95: {len(run.losses)} steps, weights {difference}")
    assert len(run.losses) == 15
    assert difference == 0.0
    assert run.test == whole[step].test


# Two numbers have only one sum; with three, the order matters. float32 shows this sooner.
MORE_RANKS = [(step, ranks, model) for step in GROWN for ranks in (3, 4) for model in ("cnn", "vit")]
QUICK = [("02", 3, "cnn"), ("03", 4, "vit"), ("04", 3, "vit"), (SHARDED, 3, "cnn")]


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "ranks", "model"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in MORE_RANKS],
)
def test_at_three_ranks_and_four_too(tmp_path, step, ranks, model):
    flags = ["--num-samples=233", "--epochs=2", "--save-every=10", f"--batch-size={GLOBAL_BATCH // ranks}"]
    flags += [f"--model={model}", "--vit-depth=2"]
    uninterrupted = train(step, ranks, tmp_path / "whole", *flags)
    interrupted({step: uninterrupted}, tmp_path, step, last=30)
    run = train(step, ranks, tmp_path, *flags)
    difference = largest_difference(run.weights, uninterrupted.weights)
    print(f"{run.name}, {model}, resumed after step 30 of 38: weights {difference}")
    assert len(run.losses) == 8
    assert difference == 0.0


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "before", "ranks"), [("03", "02", 3), (SHARDED, SHARDED, 3), (SHARDED, SHARDED, 1)]
)
def test_resumed_at_another_world_size(whole, tmp_path, step, before, ranks):
    interrupted(whole, tmp_path, before)
    run = train(step, ranks, tmp_path, *FLAGS, f"--batch-size={GLOBAL_BATCH // ranks}")
    difference = largest_difference(run.weights, whole["01"].weights)
    losses = (run.losses - whole["01"].losses[80:]).abs().max().item()
    print(
        f"2 ranks up to step 80, then {ranks}: weights {difference:.1e}, losses {losses:.1e} from step 01's"
    )
    assert losses <= 1e-10
    assert difference <= 1e-10  # as in disagreements()
    assert run.test["correct"] == whole["01"].test["correct"]


@pytest.mark.slow
def test_one_epoch_with_each_step_is_as_many_epochs_of_step_01(whole, tmp_path):
    """The snapshot folder is passed on from step to step. Step 05 needs its snapshot converted."""
    ladder = [("01", 1), ("02", 2), ("03", 3), ("04", 2), (SHARDED, 3)]
    for epoch, (step, ranks) in enumerate(ladder, start=1):
        if step == SHARDED:
            plain = snapshots(tmp_path / "snapshots")[0]
            words = [sys.executable, str(ROOT / FOLDERS[SHARDED] / "convert.py"), str(plain)]
            status, out, err = finish(start(words, tmp_path))
            print(out, err)
            assert status == 0
        run = train(
            step, ranks, tmp_path, *FLAGS, f"--epochs={epoch}", f"--batch-size={GLOBAL_BATCH // ranks}"
        )
    run.name = "an epoch each of 01, 02, 03, 04 and 05"
    assert disagreements(run, whole["01"]) == []


def test_a_finished_run_says_so_and_changes_nothing(whole, tmp_path):
    shutil.copytree(whole["01"].snapshot_dir, tmp_path / "snapshots")
    before = {path: path.stat().st_mtime_ns for path in snapshots(tmp_path / "snapshots")}
    status, out, err = finish(start([*command("01", 1), *FLAGS, "--snapshot-dir=snapshots"], tmp_path))
    print(out, err)
    assert status == 0 and "nothing left to train: raise --epochs, or choose another --snapshot-dir" in out
    assert before == {path: path.stat().st_mtime_ns for path in snapshots(tmp_path / "snapshots")}


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize("step", FOLDERS)
def test_a_finished_run_of_one_step_is_evaluated_again(tmp_path, step):
    """It may have ended before its evaluation, even after a single step."""
    flags = ["--num-samples=12", f"--batch-size={12 // ranks_of(step)}", "--epochs=1"]
    for times in (1, 2):
        run = train(step, ranks_of(step), tmp_path, *flags)
        assert [event["global_step"] for event in run.events if event["event"] == "eval"] == times * [1]


@pytest.mark.few(1)
@pytest.mark.parametrize("step", FOLDERS)
def test_a_resumed_optimizer_computes_as_it_was_built(tmp_path, step):
    """A snapshot may come from a GPU, whose optimizer may compute in a way that a CPU does not have."""
    says = after_a_step("print('foreach', self.optimizer.param_groups[0]['foreach'])")
    flags = ["--num-samples=12", f"--batch-size={12 // ranks_of(step)}"]
    for epochs, foreach in ((1, False), (2, True)):
        built = ('fused=device.type != "cpu")', f"foreach={foreach})")
        root = planted(tmp_path / f"root {epochs}", step, built, says)
        run = train(step, ranks_of(step), tmp_path, *flags, f"--epochs={epochs}", root=root)
    assert "foreach True\n" in run.out and "foreach False\n" not in run.out


@pytest.mark.few(1)
@pytest.mark.parametrize("step", FOLDERS)
def test_the_learning_rate_on_the_command_line_wins(whole, tmp_path, step):
    ranks = ranks_of(step)
    interrupted(whole, tmp_path, step)
    run = train(step, ranks, tmp_path, *FLAGS, f"--batch-size={GLOBAL_BATCH // ranks}", "--lr=0.5")
    assert [group["lr"] for group in run.state["optimizer"]["param_groups"]] == [0.5]


@pytest.mark.few(1)
@pytest.mark.parametrize(("step", "ranks"), [("01", 1), ("03", 3), (SHARDED, 2)])
def test_a_resume_may_have_another_batch_size(tmp_path, step, ranks):
    """In the middle of an epoch: the rest of it is trained, and reported."""
    flags = ["--num-samples=640", "--epochs=1", "--precision=float64"]
    first = train(step, ranks, tmp_path, *flags, f"--batch-size={60 // ranks}", "--save-every=7")
    for path in snapshots(first.snapshot_dir, step == SHARDED)[:-1]:  # as if it had been killed after step 7
        shutil.rmtree(path) if step == SHARDED else path.unlink()
    run = train(step, ranks, tmp_path, *flags, f"--batch-size={90 // ranks}")
    assert len(run.losses) - len(first.losses) == (640 - 7 * 60) // 90 == 2
    assert "done: 180 samples" in run.out and run.state["global_step"] == 9


# A resume must fail to reproduce the run when something is missing from the snapshot.
FORGOTTEN = {
    "the optimizer": ('self.optimizer.load_state_dict(state["optimizer"])', "pass"),
    "the place in the epoch": ('self.samples_seen = state["samples_seen"]', "pass"),
    "the epoch": ('self.epoch = state["epoch"]', "pass"),
    "the weights": ('self.model.load_state_dict(state["model"])', "pass"),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_a_resume_that_forgets_something_is_seen(whole, tmp_path, forgotten):
    planted(tmp_path, "01", FORGOTTEN[forgotten])
    interrupted(whole, tmp_path, "01")
    run = train("01", 1, tmp_path, *FLAGS, f"--batch-size={GLOBAL_BATCH}", root=tmp_path)
    difference = largest_difference(run.weights, whole["01"].weights)
    print(f"without {forgotten}: {len(run.losses)} steps, weights {difference:.1e}")
    assert difference > 1e-10 or len(run.losses) != 15


@pytest.mark.parametrize("step", ["02", SHARDED])
def test_ranks_that_start_from_different_places_are_told(whole, tmp_path, step):
    """For example, when one of them reads a folder that is out of date."""
    finds = "        paths = snapshots(self.path, sharded)\n"
    root = planted(tmp_path / "root", step)
    planted(
        root,
        "common/snapshot.py",
        (finds, finds + "        paths = paths * (dist.get_rank() == 0)\n"),
    )
    interrupted(whole, tmp_path, step)
    flags = [*FLAGS, f"--batch-size={GLOBAL_BATCH // 2}", "--snapshot-dir=snapshots", "--use-gpu=0"]
    status, _, err = finish(start([*command(step, 2, root), *flags], tmp_path))
    print(errors(err))
    assert status != 0
    assert errors(err) == [
        "error: the ranks do not start from the same place (run, step): "
        "[('cnn-synthetic-233', 80), ('cnn-synthetic-233', None)]; use one disk for all"
    ]


# A model with dropout, which our models do not have. Each process writes down the masks that it draws.
DROPOUT = [
    ("nn.Flatten(),", "nn.Sequential(nn.Flatten(), Told()),"),
    (
        "\ndef cnn(",
        """
class Told(nn.Dropout):
    def forward(self, x):
        mask = super().forward(torch.ones_like(x))
        if self.training:
            import os
            print((mask == 0).nonzero().sum().item(), file=open(f"masks-{os.getpid()}", "a"))
        return x * mask


def cnn(""",
    ),
]
GUARDS = {
    "nothing": (),
    "a stream for each rank": ("02", ("torch.manual_seed(args.seed + dist.get_rank())", "")),
    "each rank's own state": (
        "common/snapshot.py",
        ('states[rank]["cpu"]', 'states[0]["cpu"]'),
    ),
    "any state": ("common/snapshot.py", ("torch.set_rng_state(", "(")),
    "a generator of the loader's own": (
        "common/loading.py",
        ('"generator": torch.Generator().manual_seed(torch.initial_seed()),', ""),
    ),
}


def masks(folder):
    """The masks that each process has drawn in a run in `folder`."""
    return [file.read_text().split() for file in folder.glob("masks-*")]


CASES = [*((step, "nothing") for step in FOLDERS), *(("02", guard) for guard in list(GUARDS)[1:])]
CASES = [pytest.param(*case, marks=pytest.mark.slow if case[0] in ("03", "04") else []) for case in CASES]


@pytest.mark.sample(4)
@pytest.mark.few(1)
@pytest.mark.parametrize(("step", "without"), CASES)
def test_random_numbers_go_on_where_they_were(tmp_path, step, without):
    """Each rank has its own random numbers. Without one of the guards, the test sees a difference."""
    ranks, batch = ranks_of(step), f"--batch-size={GLOBAL_BATCH // ranks_of(step)}"
    root = planted(tmp_path, "common/models.py", *DROPOUT, steps=(step,))
    if GUARDS[without]:
        planted(tmp_path, GUARDS[without][0], *GUARDS[without][1:])
    uninterrupted = train(step, ranks, tmp_path / "whole", *FLAGS, batch, root=root)
    drawn = masks(tmp_path / "whole")
    assert [len(one) for one in drawn] == [95] * ranks
    interrupted({step: uninterrupted}, tmp_path / "resumed", step)
    run = train(step, ranks, tmp_path / "resumed", *FLAGS, batch, root=root)
    again = masks(tmp_path / "resumed")
    difference = largest_difference(run.weights, uninterrupted.weights)
    print(f"with dropout, without {without}: resumed after step 80, weights {difference}")
    assert len(run.losses) == 15
    right = [
        ranks == 1 or not set(drawn[0]) & set(drawn[1]),  # masks have thousands of places: no two are alike
        sorted(one[80:] for one in drawn) == sorted(again),
        difference == 0.0,
    ]
    assert all(right) == (without == "nothing"), right
    if step == "01":  # also from a later snapshot
        interrupted({step: uninterrupted}, tmp_path / "later", step)
        last = "snapshot-00000090.pt"
        shutil.copy(uninterrupted.snapshot_dir / last, tmp_path / "later" / "snapshots")
        run = train(step, ranks, tmp_path / "later", *FLAGS, batch, root=root)
        assert len(run.losses) == 5
        assert largest_difference(run.weights, uninterrupted.weights) == 0.0


@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["02", SHARDED])
def test_at_another_world_size_random_numbers_begin_anew(whole, tmp_path, step):
    """They are not those of a fresh run, and no two ranks have the same."""
    root = planted(tmp_path / "root", "common/models.py", *DROPOUT, steps=(step,))
    flags = [*FLAGS, f"--batch-size={GLOBAL_BATCH // 3}", "--verbose"]
    train(step, 3, tmp_path / "fresh", *flags, "--epochs=1", root=root)
    interrupted(whole, tmp_path, step)
    run = train(step, 3, tmp_path, *flags, root=root)
    drawn = [set(one[:15]) for one in (*masks(tmp_path / "fresh"), *masks(tmp_path))]
    assert len(drawn) == 6 and len(set().union(*drawn)) > 0.95 * sum(map(len, drawn))  # few are equal
    said = [line for line in run.out.splitlines() if "random numbers start from a new seed" in line]
    print(said)
    assert sorted(said) == [
        f"[rank {rank}] random numbers start from a new seed: the snapshot was saved by 2 ranks"
        for rank in range(3)
    ]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("victim", "real"),
    [(1, False), pytest.param(0, True, marks=pytest.mark.slow)],
    ids=["rank 1", "rank 0, real torchrun"],
)
def test_torchrun_restarts_after_a_killed_rank(whole, tmp_path, victim, real):
    """SIGKILL one rank after step 32 of 95, while it waits: torchrun starts both again, from step 30."""
    go = tmp_path / "go"
    root = planted(tmp_path / "root", "03", pause(32, go))
    words = command("03", 2, root)
    words.insert(words.index("--standalone"), "--max-restarts=3")
    flags = [
        *FLAGS,
        f"--batch-size={GLOBAL_BATCH // 2}",
        "--snapshot-dir=snapshots",
        "--verbose",
        "--use-gpu=0",
    ]
    process = start([*words, *flags], tmp_path, real, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    try:
        pid = int(process.wait_for(rf"\[rank {victim}\].* pid (\d+)")[1])
        wait_for_step(process, tmp_path / "snapshots", 30)
        kill([pid])
        go.touch()
    finally:
        status, out, err = finish(process)
    print(f"rank {victim} killed; torchrun ended with {status}\n{out}")
    assert status == 0, err
    assert out.count("samples a step") == 2, "both ranks are started again, once"
    assert "resumed from snapshots: epoch 1, step 30\n" in out
    weights = newest(tmp_path / "snapshots")["model"]
    assert largest_difference(weights, whole["03"].weights) == 0.0


@pytest.mark.sample(3)
@pytest.mark.few(2)
@pytest.mark.parametrize("step", ["01", "02", "03", "04", "05"])
def test_a_second_run_in_the_same_folder_is_refused(tmp_path, step):
    """While the first one runs. A run that was killed leaves nothing locked."""
    ranks = 1 if step == "01" else 3
    shared = ["--num-samples=96", "--batch-size=4", "--use-gpu=0", "--snapshot-dir=s"]
    shared += (
        ["--timeout=5"] if step > "01" else []
    )  # in this time, the ranks must not give up on the one that waits
    endless = start([*command(step, ranks), *shared, "--epochs=9999", "--save-every=1"], tmp_path)
    try:
        wait_until(lambda: len(saved(tmp_path / "s")) > 1, "a snapshot")
        root = planted(
            tmp_path / "root", "common/snapshot.py", ("FOR_THE_LAST_RUN = 20.0", "FOR_THE_LAST_RUN = 6.0"),
            steps=(step,),
        )  # fmt: skip
        status, _, err = finish(start([*command(step, ranks, root), *shared, "--epochs=1"], tmp_path))
        print(status, err)
        assert errors(err) == ["error: another run is using s: wait for it, or choose another --snapshot-dir"]
        assert status == (1 if step > "02" else 2) and endless.poll() is None
    finally:
        kill([endless.pid, *children(endless.pid)])
        finish(endless)
    last = last_saved(tmp_path / "s")
    flags = [*shared, f"--epochs={last // (96 // 4 // ranks) + 1}"]
    status, out, err = finish(start([*command(step, ranks), *flags], tmp_path))
    print(status, out, err)
    assert status == 0 and "resumed from s" in out


@pytest.mark.sample(2)
@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["01", "03", "04", "05"])
def test_flags_that_differ_from_the_snapshots_are_told(tmp_path, step):
    """Another learning rate and more epochs may be intended; another schedule is more likely a mistake."""
    flags = ["--num-samples=96", "--batch-size=4"]
    ranks = 1 if step == "01" else 3
    train(step, ranks, tmp_path, *flags, "--epochs=1")
    run = train(step, ranks, tmp_path, *flags, "--epochs=2", "--lr=0.01")
    steps = 96 // 4 // ranks
    path = f"snapshots/snapshot-{steps:08d}{'' if step == '05' else '.pt'}"
    told = [line for line in run.err.splitlines() if line.startswith("warning: --")]
    assert told == [
        f"warning: --epochs is 2, and was 1 in {path}",
        f"warning: --lr is 0.01, and was 0.001 in {path}",
    ]
    words = [*command(step, ranks), *flags, "--use-gpu=0", "--snapshot-dir=snapshots", "--epochs=3"]
    words += ["--lr=0.01", "--schedule=one-cycle"]
    status, _, err = finish(start(words, tmp_path))
    print(status, err)
    path = path.replace(f"{steps:08d}", f"{2 * steps:08d}")
    changed = f"--epochs is 3, and was 2; --schedule is one-cycle, and was constant in {path}"
    assert errors(err) == [f"error: {changed}: use the same, or --allow-changes, or another --snapshot-dir"]
    status, out, err = finish(start([*words, "--allow-changes"], tmp_path))
    assert status == 0 and f"warning: --schedule is one-cycle, and was constant in {path}" in err, out + err
