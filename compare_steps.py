"""Train the steps one after another with the same seed and global batch, and compare what they learned.

    python compare_steps.py                                              # MNIST, three epochs, 2 ranks
    python compare_steps.py --precision float64 --ranks 1,2,3 --num-samples 20480 --epochs 1    # the proof

Prints one table, writes comparison.json and comparison.png, and exits with 1 when the steps disagree.
The flags of the steps that are not listed here (--epochs, --model, --num-samples, --data-dir, --lr,
--seed …) are passed on to every one of them.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where `common` is

from common.cores import count_cores
from common.options import OneLineParser, fail, whole_number

ROOT = Path(__file__).resolve().parent
STEPS = {path.parent.name[:2]: path for path in sorted(ROOT.glob("0[1-9]_*/train.py"))}

# How far from step 01 a weight or the loss of a step may be. In float64 the same sums in another
# order stay this close for a thousand steps; with less precision rounding alone drives correct runs
# apart, so there the weights are not judged.
TOLERANCE = {"float64": 1e-10, "float32": math.inf, "bf16": math.inf}


def accuracy_tolerance(precision: str, correct: int, total: int) -> float:
    """How far from step 01's accuracy, `correct / total`, that of another step may be.

    In float64 not at all. Otherwise three standard errors of the difference of two models with that
    accuracy, each tested on its own `total` samples: sqrt(2 p (1 - p) / n).
    """
    p = correct / total
    return 0.0 if precision == "float64" else 3 * math.sqrt(2 * p * (1 - p) / total)


def rank_list(text: str) -> list[int]:
    """`1,2,3` as [1, 2, 3], for argparse."""
    return [whole_number(part) for part in text.split(",")]


def step_list(text: str) -> list[str]:
    """`02,03` as ["01", "02", "03"], for argparse: step 01 is what the others are compared with."""
    if unknown := set(text.split(",")) - set(STEPS):
        raise argparse.ArgumentTypeError(f"there is no step {unknown.pop()}, only {', '.join(STEPS)}")
    return sorted({"01", *text.split(",")})


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """This script's flags, and the rest of the command line for the steps."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--steps", type=step_list, default=list(STEPS), metavar="02,03", help="which steps (all)")
    add("--ranks", type=rank_list, default=[2], metavar="2,3", help="numbers of ranks for steps 02 to 05 (2)")
    add("--batch-size", type=whole_number, default=192, metavar="N", help="of all ranks together (192)")
    add("--precision", choices=["float32", "float64", "bf16"], default="float32", help="float64 is the proof")
    add("--use-gpu", type=int, choices=[0, 1], help="1: GPUs, 0: CPU; by default, GPUs if there are enough")
    add("--output", type=Path, default=Path("comparison"), metavar="NAME", help="NAME.json and NAME.png")
    args, rest = parser.parse_known_args()
    if not os.access(args.output.parent, os.W_OK):
        fail(f"cannot write to {args.output.parent}: choose another --output")
    for ranks in args.ranks:
        if args.batch_size % ranks:
            fail(f"--batch-size {args.batch_size} cannot be divided among {ranks} ranks: make it a multiple")
    return args, rest


def launcher(step: str, ranks: int) -> tuple[str, list[str]]:
    """How a step is launched, in a word, and as a command without the training flags."""
    script = str(STEPS[step])
    if step == "01":
        return "python", [sys.executable, script]
    if step == "02":
        return "mp.spawn", [sys.executable, script, f"--world-size={ranks}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    here = "--local-addr=127.0.0.1"  # the ranks meet there, whatever this machine's name leads to
    return "torchrun", [*torchrun, here, script]


def train(step: str, ranks: int, flags: list[str], folder: Path) -> dict[str, Any]:
    """Run a step with its snapshots and metrics in `folder`; its results and final weights.

    Exits with the step's status when it fails: it has said why.
    """
    from common.snapshot import read, snapshots

    launched, command = launcher(step, ranks)
    print(f"\n--- {STEPS[step].parent.name}, {ranks} {'rank' if ranks == 1 else 'ranks'}", flush=True)
    outputs = ["--snapshot-dir", str(folder / "snapshots"), "--metrics", str(folder / "metrics.jsonl")]
    # torchrun would give each rank one thread, step 02 gives it an equal share of the cores.
    threads = str(max(1, count_cores() // ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    status = subprocess.run([*command, *flags, *outputs], env=environment).returncode
    if status != 0:
        print(f"{STEPS[step].parent.name} exited with status {status}", file=sys.stderr)
        sys.exit(2 if status == 2 else 1)
    if sharded := snapshots(folder / "snapshots", sharded=True):
        convert = [sys.executable, str(ROOT / "05_fsdp" / "convert.py"), str(sharded[0])]
        subprocess.run(convert, stdout=subprocess.DEVNULL, check=True)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    test = [event for event in events if event["event"] == "eval"][-1]
    losses = [loss for event in events if event["event"] == "train" for loss in event["losses"]]
    newest = snapshots(folder / "snapshots")[0]
    return {
        "step": STEPS[step].parent.name,
        "launched": launched,
        "ranks": ranks,
        "dataset": events[0]["dataset"],
        "device": events[0]["device"],
        "samples_per_s": events[-1]["samples_per_s"],
        "final_loss": test["loss"],
        "correct": test["correct"],
        "total": test["total"],
        "losses": losses,
        "weights": read(newest)[0]["model"],
    }


def compare(run: dict[str, Any], first: dict[str, Any], precision: str) -> list[str]:
    """Add to `run` how far it is from step 01's run, `first`; returns what is beyond the tolerance."""
    run["weight_difference"] = max(
        (tensor.double() - first["weights"][name].double()).abs().max().item()
        for name, tensor in run["weights"].items()
    )
    run["loss_difference"] = max(abs(a - b) for a, b in zip(run["losses"], first["losses"], strict=False))
    problems = []
    name = f"{run['step']} at {run['ranks']} ranks"
    if (run["dataset"], run["total"]) != (first["dataset"], first["total"]):
        problems.append(f"{name} has different data from step 01")
    if len(run["losses"]) != len(first["losses"]):
        problems.append(f"{name}: {len(run['losses'])} steps, but step 01 has {len(first['losses'])}")
    # Written so that what is not a number is beyond every tolerance.
    if not run["weight_difference"] <= TOLERANCE[precision]:
        problems.append(f"{name}: weights differ by {run['weight_difference']:.1e}")
    if not run["loss_difference"] <= TOLERANCE[precision]:
        problems.append(f"{name}: the loss of a step differs by {run['loss_difference']:.1e}")
    tolerance = accuracy_tolerance(precision, first["correct"], first["total"])
    if abs(run["correct"] - first["correct"]) > tolerance * first["total"]:
        problems.append(f"{name}: {run['correct']} correct answers, but step 01 has {first['correct']}")
    return problems


def table(runs: list[dict[str, Any]], precision: str) -> str:
    """One line per run; how far the weights are from step 01's only where that says something."""
    head = ["step", "launched", "ranks", "data set", "samples/s", "final loss", "accuracy", "weights off by"]
    rows = [head]
    for run in runs:
        row = [run["step"], run["launched"], str(run["ranks"]), run["dataset"]]
        row += [f"{run['samples_per_s']:,}", f"{run['final_loss']:.4f}"]
        row.append(f"{run['correct'] / run['total']:.2%}")
        row.append(f"{run['weight_difference']:.1e}" if run is not runs[0] else "–")
        rows.append(row)
    if precision != "float64":
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {0, 1, 3}
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """The loss curves on one another, and the speeds beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, speeds) = plt.subplots(
        1, 2, figsize=(12, 4.5), width_ratios=[2, 1], layout="constrained"
    )
    colors = plt.get_cmap("viridis")([i / max(1, len(runs)) for i in range(len(runs))])
    labels = [f"{run['step'][:2]} {run['launched']}, {run['ranks']}×" for run in runs]
    window = max(1, len(runs[0]["losses"]) // 80)  # single steps are too noisy to look at
    for number, (run, color, label) in enumerate(zip(runs, colors, labels, strict=True)):
        # From wide to narrow: a curve that lies on another leaves the rim of the one below in sight.
        width = 1.5 + 7 * (1 - number / max(1, len(runs) - 1))
        losses = run["losses"]
        means = [statistics.mean(losses[i : i + window]) for i in range(0, len(losses), window)]
        steps = [window * (i + 0.5) for i in range(len(means))]
        curves.plot(steps, means, color=color, linewidth=width, label=label, solid_joinstyle="round")
    ylabel = "training loss" if window == 1 else f"training loss, mean of {window} steps"
    curves.set(yscale="log", xlabel="step", ylabel=ylabel)
    curves.set_title("The loss curves, on one another", loc="left")
    curves.legend(frameon=False)
    bars = speeds.barh(labels, [run["samples_per_s"] for run in runs], color=colors)
    speeds.bar_label(bars, fmt="{:,.0f}", padding=3)
    speeds.invert_yaxis()
    speeds.margins(x=0.2)
    speeds.set_title(f"Samples/s, {runs[0]['device'].upper()}", loc="left")
    for axes in (curves, speeds):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    args, rest = parse_args()
    import torch  # takes a second, and a bad flag is told before

    from common.device import count_gpus

    use_gpu = args.use_gpu
    if use_gpu is None:
        use_gpu = int(count_gpus() >= max(args.ranks))
    shared = [*rest, f"--precision={args.precision}", f"--use-gpu={use_gpu}"]
    plan = [(step, ranks) for step in args.steps for ranks in ([1] if step == "01" else args.ranks)]
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for step, ranks in plan:
            flags = [*shared, f"--batch-size={args.batch_size // ranks}"]
            runs.append(train(step, ranks, flags, Path(scratch, f"{step}-{ranks}")))
    problems = [problem for run in runs for problem in compare(run, runs[0], args.precision)]
    points = 100 * accuracy_tolerance(args.precision, runs[0]["correct"], runs[0]["total"])
    bound = f"accuracy within {points:.2f} points"
    if math.isfinite(TOLERANCE[args.precision]):
        bound = f"weights and losses within {TOLERANCE[args.precision]}, the same number of correct answers"
    print(f"\n{table(runs, args.precision)}\n")
    for run in runs:
        del run["weights"]
    result = {
        "precision": args.precision,
        "global_batch": args.batch_size,
        "flags": rest,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {count_cores()} cores",
        "tolerance": bound,
        "problems": problems,
        "runs": runs,
    }
    picture, record = Path(f"{args.output}.png"), Path(f"{args.output}.json")
    record.write_text(json.dumps(result, indent=1))
    draw(runs, picture)
    if problems:
        print(f"The steps disagree (tolerance: {bound}):\n  " + "\n  ".join(problems))
        sys.exit(1)
    print(f"The steps agree ({bound}). Written: {picture}, {record}")
    if args.precision != "float64":
        print("With --precision float64 each loss and each weight is compared too.")


if __name__ == "__main__":
    main()
