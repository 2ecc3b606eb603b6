"""What two ranks do in one step, from the traces of `--profile`: for the pictures of the pages.

    python benchmarks/timeline.py          # steps 02, 04 and 05: benchmarks/results/timeline-STEP.json

Times are in milliseconds from where the first rank begins the step. A rank is `waiting` where it does nothing
itself while one of its collectives is under way.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import bench, speedrun  # noqa: E402

STEPS = {
    "02": ["--batch-size=64"],
    "04": ["--batch-size=64", "--accumulate=4"],
    "05": ["--batch-size=64"],
}
RECORDED = "ProfilerStep#8"  # the middle one of three
GAP = 0.05  # milliseconds: what is shorter is no waiting

KINDS = ["forward", "backward", "optimizer", "collective", "vote", "waiting"]
Span = tuple[float, float]  # from, until
Part = tuple[str, float, float]  # what, from, until


def trace(step: str, flags: list[str]) -> list[list[dict[str, Any]]]:
    """The events of each rank, whose `ts` and `dur` are microseconds on one clock."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, bench.script(step), f"--world-size={bench.RANKS}"]
        if step != "02":
            launch = [*bench.TORCHRUN, bench.script(step)]
        flags = [*flags, "--num-samples=8192", "--epochs=1", "--use-gpu=0"]
        flags += [f"--profile={folder}/p", f"--snapshot-dir={folder}/s"]
        bench.run([*launch, *flags], OMP_NUM_THREADS="1", KINETO_LOG_LEVEL="5")
        files = [json.loads(path.read_text()) for path in sorted(Path(folder, "p").iterdir())]
    for file in files:
        for event in file["traceEvents"]:
            event["ts"] = event.get("ts", 0.0) + file.get("baseTimeNanoseconds", 0) / 1e3
    return [[event for event in file["traceEvents"] if event.get("ph") == "X"] for file in files]


def joined(spans: list[Span]) -> list[Span]:
    """Spans, in order, without overlaps."""
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def parts(events: list[dict[str, Any]], zero: float) -> list[Part]:
    """What one rank does in the recorded step."""
    [whole] = [event for event in events if event["name"] == RECORDED]
    inside = [event for event in events if whole["ts"] <= event["ts"] < whole["ts"] + whole["dur"]]

    def spans(*names: str) -> list[Span]:
        found = [event for event in inside if event["name"].startswith(names)]
        return sorted(
            ((event["ts"] - zero) / 1e3, (event["ts"] + event["dur"] - zero) / 1e3) for event in found
        )

    [(update, updated)], zeroed = spans("Optimizer.step"), spans("Optimizer.zero_grad")
    found: list[Part] = [("optimizer", *span) for span in [*zeroed, (update, updated)]]
    # A forward pass ends with the loss, and the first function of the backward pass comes behind it.
    losses, backward = spans("aten::cross_entropy_loss"), spans("autograd::engine::evaluate_function")
    before = zeroed[-1][1]
    for (_, loss), (after, _) in zip(losses, [*losses[1:], (update, 0.0)], strict=True):
        functions = [span for span in backward if loss <= span[0] < after]
        begin = functions[0][0]
        found += [("forward", before, begin), ("backward", begin, max(end for _, end in functions))]
        before = found[-1][2]
    # The all-reduces before the optimizer's step add up the targets, and then the gradients. The vote on
    # stopping begins after it, and may run in the next step.
    issued = [begin for begin, _ in spans("c10d::allreduce_", "c10d::_reduce_scatter") if begin < update]
    talks = spans("gloo:")
    for begin, end in talks:
        reduces = (begin, end) in spans("gloo:all_reduce", "gloo:reduce")
        is_vote = reduces and not any(issue <= begin for issue in issued)
        if reduces and not is_vote:
            issued.pop(0)
        found.append(("vote" if is_vote else "collective", begin, end))
    busy = joined(spans("aten::", "Optimizer.", "fsdp::", "c10d::"))
    gaps = [(end, begin) for (_, end), (begin, _) in itertools.pairwise(busy) if begin - end > GAP]
    ours = [part[1:] for part in found if part[0] == "collective"]
    waits = [gap for gap in gaps if any(begin < gap[1] and gap[0] < end for begin, end in ours)]
    return sorted([*found, *(("waiting", *gap) for gap in waits)], key=lambda part: part[1])


def timeline(step: str) -> dict[str, Any]:
    """One step on two ranks."""
    ranks = trace(step, STEPS[step])
    zero = min(event["ts"] for events in ranks for event in events if event["name"] == RECORDED)
    found = [[(kind, round(a, 3), round(b, 3)) for kind, a, b in parts(events, zero)] for events in ranks]
    # A vote may end in the next step.
    whole = max(end for rank in found for kind, _, end in rank if kind != "vote")
    return {"machine": speedrun.machine(), "flags": STEPS[step], "milliseconds": whole, "ranks": found}


def main() -> None:
    for step in STEPS:
        path = ROOT / "benchmarks" / "results" / f"timeline-{step}.json"
        path.write_text(json.dumps(timeline(step)) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
