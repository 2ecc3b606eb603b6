"""The commonest mistakes in distributed training scripts: each must make the comparison fail.

Promise: the tests catch the nine commonest mistakes (no `set_epoch`, summed gradients, one rank's loss in
the log, padded evaluation, …).
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    GROWN,
    NORMED,
    PROOF,
    SHARDED,
    after_a_step,
    command,
    disagreements,
    finish,
    load,
    planted,
    ranks_of,
    start,
    train,
)

from common import snapshot
from common.mnist import load_mnist
from common.snapshot import snapshots

# name: (step, line of its train.py, what a wrong script has instead, what must be found to disagree).
# These lines are the same in all steps from 02 on: each bug is planted in one step.
BUGS = {
    "every epoch in the same order": (
        "02",
        "self.sampler.set_epoch(self.epoch, ",
        "self.sampler.set_epoch(0, ",
        "weights",
    ),
    "gradients summed, not averaged": (
        "03",
        "loss.backward()",
        "(loss * self.world_size).backward()",
        "weights",
    ),
    "gradients not averaged at all": (
        "04",
        "self.ddp_model(images)",
        "self.model(images)",
        "weights",
    ),
    "the logged loss is rank 0's": ("05", "dist.all_reduce(means)", "means *= self.world_size", "losses"),
    "evaluation is padded": (
        "02",
        "metric[:remaining]",
        "metric",
        "evaluation",
    ),
    "evaluation drops the tail": (
        "03",
        "args.eval_batch_size, sampler",
        "10, drop_last=True, sampler",
        "evaluation",
    ),
    "evaluation is rank 0's": ("04", "dist.all_reduce(totals)", "pass", "evaluation"),
    "no seed": ("03", "torch.manual_seed(args.seed)", "pass", "weights"),
    "every rank trains on all the data": (
        "02",
        "DistributedSampler(train_data,",
        "DistributedSampler(train_data, 1, 0,",
        "weights",
    ),
}


@pytest.mark.sample(6)
@pytest.mark.few(2)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(proof, tmp_path, bug):
    step, right, wrong, symptom = BUGS[bug]
    root = planted(tmp_path, step, (right, wrong))
    run = train(step, 3, tmp_path / "run", *PROOF, f"--batch-size={GLOBAL_BATCH // 3}", root=root)
    found = disagreements(run, proof("01"))
    print(f"step {step}, {bug}: {found}, must include {symptom}")
    assert symptom in found


@pytest.mark.sample(4)
@pytest.mark.few(2)
@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("step", GROWN)
def test_batch_norm_is_tested_with_what_rank_0_saves(tmp_path, step, bug):
    """Each rank has its own running statistics: all must evaluate with rank 0's, or the result fits no model.

    This is also true between two saves, where your own script may evaluate.
    """
    root = planted(tmp_path, "common/models.py", NORMED, steps=(step,))
    planted(root, step, after_a_step("if self.global_step == 14: self.evaluate(); self.model.train()"))
    if bug:
        planted(root, step, ("dist.broadcast(buffer, src=0)", "pass"))
    flags = ["--num-samples=64", "--epochs=4", "--batch-size=8", "--lr=0.01", "--precision=float64"]
    run = train(step, 2, tmp_path / "run", *flags, "--save-every=14", root=root)
    model = load(root / "common" / "models.py").build_model("cnn", "float64")
    tested = {event["global_step"]: event["loss"] for event in run.events if event["event"] == "eval"}
    _, test = load_mnist(Path("unused"), 64)
    for path in snapshots(run.snapshot_dir, step == SHARDED)[:2]:
        at = snapshot.step_of(path)
        if step == SHARDED:  # with the convert.py that knows this model
            words = [sys.executable, str(root / FOLDERS[step] / "convert.py"), str(path)]
            assert finish(start(words, tmp_path))[0] == 0
            path = path.with_suffix(".pt")
        model.load_state_dict(snapshot.read(path)[0]["model"])
        with torch.no_grad():
            loss = F.cross_entropy(model.eval()(test.images), test.labels).item()
        print(f"step {at}: test loss of the run {tested[at]}, of what it saved {loss}, with the bug: {bug}")
        difference = abs(loss - tested[at])
        assert (difference > 1e-6) if bug else (difference < 1e-10)
    assert tested.keys() == {4, 8, 12, 14, 16}


ARRANGES = "        fix_bucket_order(self.model, self.loss, self.autocast, self.train_loader, self.device)\n"
BEFORE_AND_AFTER = f"""
        import copy

        weights, numbers = copy.deepcopy(self.model.state_dict()), torch.get_rng_state()
{ARRANGES}
        assert [weight.grad for weight in self.model.parameters()] == [None] * 10
        assert all(torch.equal(tensor, weights[name]) for name, tensor in self.model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), numbers)
"""


@pytest.mark.parametrize("step", ["02", "03", "04"])
def test_the_pass_that_arranges_buckets_changes_nothing(tmp_path, step):
    """Gradients, batch norm's averages and random numbers stay as if there had been no such pass."""
    root = planted(tmp_path, "common/models.py", NORMED, steps=(step,))
    planted(root, step, (ARRANGES, BEFORE_AND_AFTER))
    train(step, 2, tmp_path / "run", "--num-samples=64", "--epochs=1", "--batch-size=16", root=root)


@pytest.mark.few(2)
@pytest.mark.parametrize("step", GROWN)
def test_batch_norm_goes_on_from_what_rank_0_had(tmp_path, step):
    """In the middle of an epoch, when the ranks' averages differ. A snapshot has one set for all ranks."""
    root = planted(tmp_path, "common/models.py", NORMED, steps=(step,))
    flags = ["--num-samples=64", "--epochs=1", "--batch-size=8", "--save-every=2", "--precision=float64"]
    whole = train(step, 2, tmp_path / "whole", *flags, root=root)
    first = snapshots(whole.snapshot_dir, step == SHARDED)[-1]
    assert first.stem == "snapshot-00000002"
    (tmp_path / "resumed" / "snapshots").mkdir(parents=True)
    shutil.move(first, tmp_path / "resumed" / "snapshots" / first.name)
    resumed = train(step, 2, tmp_path / "resumed", *flags, root=root)
    assert len(resumed.losses) == 2 and resumed.test["loss"] == whole.test["loss"]


@pytest.mark.few(1)
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("step", FOLDERS)
def test_a_step_in_which_nothing_counts_leaves_the_weights_whole(tmp_path, step, count):
    """For example, if a whole batch is padding: 0 / 0 would get into all weights, and the next snapshot.

    Or if only rank 0 has a target, a single one: the loss is the loss of this target.
    """
    mine = "1" if step == "01" else "int(self.rank == 0)"
    root = planted(
        tmp_path / "root",
        step,
        ("return labels.numel()", f"return {count} * {mine}"),
        ('reduction="sum")', f'reduction="none")[: {count} * {mine}].sum()'),
    )
    run = train(step, ranks_of(step), tmp_path, "--num-samples=24", "--batch-size=6", "--epochs=1", root=root)
    assert all(weights.isfinite().all() for weights in run.weights.values())
    assert run.losses[0] == pytest.approx(2.3 * count, abs=0.5)  # log 10, for ten classes


LEAVES = """        try:
            with keep_alive():
                if self.rank == 1:
                    os._exit(3)
                time.sleep(1)
        except RuntimeError:
            print('rank 0 is told', flush=True)
            os._exit(4)
"""


def test_a_rank_that_ends_while_another_saves_is_noticed(tmp_path):
    """It is noticed before the next collective, which may have no timeout."""
    saves = "        with keep_alive():  # a save may take longer than a collective may\n"
    root = planted(
        tmp_path / "root", "03", (saves, LEAVES + saves), ("import sys\n", "import sys\nimport time\n")
    )
    words = [*command("03", 2, root), "--num-samples=24", "--batch-size=6", "--epochs=1", "--use-gpu=0"]
    status, out, err = finish(start(words, tmp_path))
    print(status, out, err)
    assert status == 1 and "rank 0 is told\n" in out
