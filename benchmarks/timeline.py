"""Records what two ranks do in one step, from the traces of `--profile`, for the pictures in the pages.

    python benchmarks/timeline.py          # steps 02, 04 and 05: benchmarks/results/timeline-STEP.json

Times are in milliseconds since the first rank began the step. A rank is `waiting` while it does nothing
itself and one of its collectives is running.
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
RECORDED_STEP = "ProfilerStep#8"  # the middle one of three
MIN_WAIT = 0.05  # milliseconds: a shorter gap is not waiting

KINDS = ["forward", "backward", "optimizer", "collective", "vote", "waiting"]
Span = tuple[float, float]  # begin and end
Part = tuple[str, float, float]  # kind, begin and end


def run_with_profiler(step: str, flags: list[str]) -> list[list[dict[str, Any]]]:
    """Run a step: for each rank, its events. Their `ts` and `dur` are microseconds on a common clock."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, bench.script(step), f"--world-size={bench.RANKS}"]
        if step != "02":
            launch = [*bench.TORCHRUN, bench.script(step)]
        flags = [*flags, "--num-samples=8192", "--epochs=1", "--use-gpu=0"]
        flags += [f"--profile={folder}/p", f"--snapshot-dir={folder}/s"]
        bench.run([*launch, *flags], OMP_NUM_THREADS="1", KINETO_LOG_LEVEL="5")
        traces = [json.loads(path.read_text()) for path in sorted(Path(folder, "p").iterdir())]
    ranks = []
    for trace in traces:
        events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]  # with a duration
        for event in events:
            event["ts"] = event.get("ts", 0.0) + trace.get("baseTimeNanoseconds", 0) / 1e3
        ranks.append(events)
    return ranks


def merge_overlaps(spans: list[Span]) -> list[Span]:
    """The same spans in order, with overlapping ones merged into one."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            last_begin, last_end = merged[-1]
            merged[-1] = (last_begin, max(end, last_end))
        else:
            merged.append((begin, end))
    return merged


def parts_of_step(events: list[dict[str, Any]], zero: float) -> list[Part]:
    """What one rank does in the recorded step. `zero` is the time that becomes 0, in microseconds."""
    [step] = [event for event in events if event["name"] == RECORDED_STEP]
    step_end = step["ts"] + step["dur"]
    step_events = [event for event in events if step["ts"] <= event["ts"] < step_end]

    def spans(*names: str) -> list[Span]:
        """The events whose name starts with one of these, in order, in milliseconds."""
        found = []
        for event in step_events:
            if event["name"].startswith(names):
                end = event["ts"] + event["dur"]
                found.append(((event["ts"] - zero) / 1e3, (end - zero) / 1e3))
        return sorted(found)

    zero_grads = spans("Optimizer.zero_grad")
    [optimizer_step] = spans("Optimizer.step")
    update_begin, _ = optimizer_step
    parts: list[Part] = [("optimizer", *span) for span in [*zero_grads, optimizer_step]]
    # A forward pass ends with the loss. Then the backward pass begins with its first function.
    losses = spans("aten::cross_entropy_loss")
    functions = spans("autograd::engine::evaluate_function")
    next_begins = [begin for begin, _ in losses[1:]] + [update_begin]
    _, forward_begin = zero_grads[-1]
    for (_, loss_end), next_begin in zip(losses, next_begins, strict=True):
        of_this_pass = [(begin, end) for begin, end in functions if loss_end <= begin < next_begin]
        backward_begin, _ = of_this_pass[0]
        backward_end = max(end for _, end in of_this_pass)
        parts.append(("forward", forward_begin, backward_begin))
        parts.append(("backward", backward_begin, backward_end))
        forward_begin = backward_end
    # The all-reduces before the optimizer's step add up the targets, and then the gradients. The vote on
    # stopping begins after it, and may run in the next step.
    calls = spans("c10d::allreduce_", "c10d::_reduce_scatter")
    call_begins = [begin for begin, _ in calls if begin < update_begin]
    reduces = spans("gloo:all_reduce", "gloo:reduce")
    for begin, end in spans("gloo:"):
        kind = "collective"
        if (begin, end) in reduces:
            if call_begins and call_begins[0] <= begin:
                call_begins.pop(0)
            else:
                kind = "vote"
        parts.append((kind, begin, end))
    busy = merge_overlaps(spans("aten::", "Optimizer.", "fsdp::", "c10d::"))
    collectives = [(begin, end) for kind, begin, end in parts if kind == "collective"]
    for (_, gap_begin), (gap_end, _) in itertools.pairwise(busy):
        overlaps = any(begin < gap_end and gap_begin < end for begin, end in collectives)
        if overlaps and gap_end - gap_begin > MIN_WAIT:
            parts.append(("waiting", gap_begin, gap_end))
    return sorted(parts, key=lambda part: part[1])


def timeline(step: str) -> dict[str, Any]:
    """Record one step on two ranks: the content of its timeline-STEP.json."""
    events_of_ranks = run_with_profiler(step, STEPS[step])
    all_events = itertools.chain.from_iterable(events_of_ranks)
    zero = min(event["ts"] for event in all_events if event["name"] == RECORDED_STEP)
    ranks = []
    ends = []
    for events in events_of_ranks:
        parts = parts_of_step(events, zero)
        ranks.append([(kind, round(begin, 3), round(end, 3)) for kind, begin, end in parts])
        ends += [end for kind, _, end in ranks[-1] if kind != "vote"]  # a vote may end in the next step
    return {"machine": speedrun.machine(), "flags": STEPS[step], "milliseconds": max(ends), "ranks": ranks}


def main() -> None:
    for step in STEPS:
        path = ROOT / "benchmarks" / "results" / f"timeline-{step}.json"
        path.write_text(json.dumps(timeline(step)) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
