"""`--profile` writes a trace of a few steps for each rank, and does not change what is learned."""

import collections
import json

import pytest
import torch
from helpers import FOLDERS, command, finish, largest_difference, ranks_of, start, train

FLAGS = ["--num-samples=240", "--epochs=2", "--precision=float64"]
# The collectives that a step surely runs: for the gradients, and in step 05 also for the weights.
COLLECTIVES = {"01": set(), "05": {"reduce_scatter", "all_gather"}}


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize("step", FOLDERS)
def test_each_rank_leaves_a_trace_of_three_steps(once, tmp_path, step):
    ranks = ranks_of(step)
    flags = [*FLAGS, f"--batch-size={24 // ranks}"]
    run = train(step, ranks, tmp_path, *flags, "--profile=traces/of/this")
    without = once(step, ranks, *flags)
    assert len(run.losses) == 20 and torch.equal(run.losses, without.losses)
    assert largest_difference(run.weights, without.weights) == 0.0
    folder = tmp_path / "traces" / "of" / "this"
    names = [f"{FOLDERS[step]}-rank-{rank}.json" for rank in range(ranks)]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        events = json.loads((folder / name).read_text())["traceEvents"]
        counts = collections.Counter(event["name"] for event in events if event.get("ph") == "X")
        # Steps 8 to 10, which the profiler counts from 0. Each one calls the optimizer once.
        steps = [f"ProfilerStep#{number}" for number in (7, 8, 9)]
        assert [counts[step] for step in steps] == [1, 1, 1] and counts["ProfilerStep#10"] == 0
        assert counts["Optimizer.step#AdamW.step"] == 3
        found = {name for name in counts if name.startswith(("c10d::", "gloo:"))}
        print(name, sorted(found))
        for collective in COLLECTIVES.get(step, {"allreduce"}):
            assert any(collective in name for name in found) and counts["aten::convolution_backward"] >= 3
        assert step != "01" or not found


def test_a_run_that_ends_too_soon_says_that_there_is_no_trace(tmp_path):
    for steps in (6, 7):
        own = [f"--num-samples={10 * steps}", f"--profile={steps}", f"--snapshot-dir=snapshots-{steps}"]
        flags = [*own, "--batch-size=10", "--epochs=1", "--use-gpu=0"]
        status, out, err = finish(start([*command("01", 1), *flags], tmp_path))
        assert status == 0 and f"{steps} steps" in out
        told = f"warning: no trace in {steps}: tracing begins 7 steps after the start" in err.splitlines()
        assert len(list((tmp_path / str(steps)).iterdir())) == steps - 6 and told == (steps == 6)
