"""What the steps cost, each beside what it could be: one table of ratios, with the goal of each.

    python benchmarks/bench.py --data-dir data            # with no other work on the machine
    python benchmarks/bench.py --data-dir data --quick    # few samples, no textbook: does it run?

Both sides of a row take turns (A B A B …), because other programs disturb single timings. A ratio is the
median of the turns, followed by their range. The last line says where all of it is written, as JSON and as a
table: benchmarks/results/MACHINE.json and .md.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import transforms  # noqa: E402

from benchmarks import speedrun, textbook  # noqa: E402
from common.device import count_gpus  # noqa: E402
from common.loading import loader_options  # noqa: E402
from common.mnist import load_mnist  # noqa: E402
from common.models import MEAN, STD  # noqa: E402
from common.options import fail  # noqa: E402

GPUS = count_gpus()
RANKS = min(2, GPUS) or 2
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
BIG = ["--vit-width=768", "--vit-depth=12"]  # a vit of 57 million parameters
SAMPLES = {"cnn": 4096, "resnet18": 256, "vit": 2048}  # of a rank in an epoch: about a second on one core
CELLS = [*itertools.product(SAMPLES, (64, 512))]
STEPS_ON_GPU = {64: 100, 512: 15}  # in an epoch, by batch


@dataclass
class Row:
    """One comparison; `ratios` are those of its turns, and `goal` is what their median should reach."""

    name: str
    goal: float | None
    ratios: list[float]
    figure: str  # what was measured, in units
    at_most: bool = False
    why: str = ""  # told where the goal is missed

    def cells(self) -> list[str]:
        """The row of the table."""
        middle = statistics.median(self.ratios)
        spread = f" ({min(self.ratios):.2f} to {max(self.ratios):.2f})" if len(self.ratios) > 1 else ""
        goal, verdict = "", ""
        if self.goal is not None:
            goal = f"{'≤' if self.at_most else '≥'} {self.goal:g}"
            reached = [ratio <= self.goal if self.at_most else ratio >= self.goal for ratio in self.ratios]
            holds = middle <= self.goal if self.at_most else middle >= self.goal
            missed = "missed, not in each turn" if any(reached) else "missed"
            verdict = "holds" if holds else f"{missed}{': ' * bool(self.why)}{self.why}"
        return [self.name, goal, f"{middle:.2f}{spread}", self.figure, verdict]


def script(step: str) -> str:
    [path] = ROOT.glob(f"{step}_*/train.py")
    return str(path)


def run(words: list[str], **variables: str) -> str:
    """What a command prints; `fail`s if it does."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
    if done.returncode != 0:
        fail(f"{' '.join(words)} ended with status {done.returncode}: see its output above")
    return done.stdout


def in_ranks(step: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What in_rank.py finds in a step's ranks, each with one thread."""
    started = [sys.executable] if step == "01" else TORCHRUN
    words = [*started, str(ROOT / "benchmarks" / "in_rank.py"), step, json.dumps(cells)]
    lines = run(words, OMP_NUM_THREADS="1").splitlines()
    return [json.loads(line.removeprefix("cell: ")) for line in lines if line.startswith("cell: ")]


def cells_of(quick: bool) -> list[tuple[str, int]]:
    """Model, with flags behind its name, and batch size of each loop that is timed."""
    if quick:
        return CELLS[:2]
    if not GPUS:
        return CELLS
    return [*CELLS, (" ".join(["vit", *BIG]), 512)]  # which keeps a GPU busy


def loops(args: argparse.Namespace) -> Iterator[Row]:
    """An epoch of each step beside the bare work on batches that lie ready; and the vote in it."""
    votes, cells = [], cells_of(args.quick)
    for step in ("01", "02", "03", "04", "05"):
        asked: list[dict[str, Any]] = []
        for model, size in cells:
            samples = STEPS_ON_GPU[size] * size if GPUS else max(size, SAMPLES[model])
            flags = [f"--batch-size={size}", "--model", *model.split()]
            cell: dict[str, Any] = {"measure": "loop", "rounds": 9, "samples": samples, "flags": flags}
            asked.append(cell | {"rounds": 1, "samples": size} if args.quick else cell)
        for (model, size), cell in zip(cells, in_ranks(step, asked), strict=True):
            epoch = statistics.median(ours for ours, _ in cell["pairs"])
            ratios = [bare / ours for ours, bare in cell["pairs"]]
            bare = "one CUDA graph" if GPUS else "bare loop"
            name = f"step {step}, {model}, batch {size}: its speed beside the {bare}'s"
            steps = cell["samples"] / size / (1 if step == "01" else RANKS)
            yield Row(name, 0.97, ratios, f"{cell['samples'] / epoch:,.0f} samples/s", why=spent(cell, steps))
            if step != "01" and (model, size) == CELLS[0]:  # the shortest steps
                share = cell["vote"] * steps / epoch
                name = f"step {step}, {model}, batch {size}: the vote on stopping, beside the step"
                votes.append(Row(name, None, [share], f"{1e6 * cell['vote']:,.0f} µs"))
    yield from votes


def spent(cell: dict[str, Any], steps: float) -> str:
    """Where the time of a step goes, of which an epoch has so many."""
    if "kernels" not in cell:
        left_out = "loading, the count of the targets, the vote, the report"
        more = 1e3 * statistics.median(ours - bare for ours, bare in cell["pairs"]) / steps
        return f"{more:.1f} ms a step more for what the bare loop leaves out: {left_out}"
    whole = 1e3 * statistics.median(ours for ours, _ in cell["pairs"]) / steps
    busy = f"computes for {1e3 * cell['busy']:.2f} of {whole:.2f} ms a step"
    return f"the GPU {busy}; the CPU starts {cell['kernels']:.0f} kernels one by one"


def data_path(args: argparse.Namespace) -> Iterator[Row]:
    """Batches of our loader beside those of torchvision's usual one."""
    digits, _ = load_mnist(Path(args.data_dir), 640 if args.quick else None)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    options = loader_options(0, torch.device("cpu"))
    ours: DataLoader[Any] = DataLoader(digits, 64, shuffle=True, **options)
    usual: DataLoader[Any] = DataLoader(textbook.Pictures(digits, transform), 64, shuffle=True)

    def drain(loader: DataLoader[Any]) -> float:
        begun = time.perf_counter()
        for _ in loader:
            pass
        return len(digits) / (time.perf_counter() - begun)

    pairs = [(drain(ours), drain(usual)) for _ in range(args.rounds)]
    fastest, slower = (statistics.median(side) for side in zip(*pairs, strict=True))
    name = "loading, batch 64: ours beside a picture and two transforms for each image"
    yield Row(name, 40, [a / b for a, b in pairs], f"{fastest:,.0f} and {slower:,.0f} samples/s")


def rate(starts: list[list[str]], samples: int, size: int) -> float:
    """Samples/s of these commands together, all started at once, in their training steps."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, words in enumerate(starts):
            flags = [f"--snapshot-dir={folder}/{number}", f"--metrics={folder}/{number}.jsonl", "--use-gpu=0"]
            flags += [f"--num-samples={samples // len(starts)}", "--epochs=2", f"--batch-size={size}"]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen([*words, *flags], stdout=subprocess.DEVNULL, env=env))
        if any([process.wait() for process in running]):
            fail("a run ended with an error: see its output above")
        files = [Path(folder, f"{number}.jsonl") for number in range(len(starts))]
        ends = [json.loads(file.read_text().splitlines()[-1]) for file in files]
    return float(sum(end["samples_per_s"] for end in ends))


def side_by_side(args: argparse.Namespace) -> Iterator[Row]:
    """Two ranks beside two processes that know nothing of each other; step 05 beside step 03. On CPUs."""
    if GPUS:
        return
    apart = [[sys.executable, script("01")]] * RANKS
    step_03, step_05 = ([[*TORCHRUN, script(step)]] for step in ("03", "05"))
    for size, goal in ((64, 0.75), (512, 0.93)):
        samples = RANKS * (size if args.quick else 4096)
        turns = []
        for _ in range(args.rounds):
            turns.append([rate(starts, samples, size) for starts in (apart, step_03, step_05)])
        alone, ddp, fsdp = map(statistics.median, zip(*turns, strict=True))
        name = f"cnn, batch {size}: two ranks of step 03 beside two processes apart"
        why = "the all-reduce of 0.83 MB, on the same two cores"
        figure = f"{ddp:,.0f} and {alone:,.0f} samples/s"
        yield Row(name, goal, [b / a for a, b, _ in turns], figure, why=why)
        name = f"cnn, batch {size}: two ranks of step 05 beside two of step 03"
        yield Row(name, None, [c / b for _, b, c in turns], f"{fsdp:,.0f} and {ddp:,.0f} samples/s")


def first_step(words: list[str]) -> float:
    """Seconds from the start of a command to the report of its first step, which is its last, too."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--snapshot-dir={folder}", f"--num-samples={64 * RANKS}", "--epochs=1"]
        flags.append(f"--use-gpu={min(1, GPUS)}")
        begun = time.perf_counter()
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # or torchrun says that it sets this
        process = subprocess.Popen([*words, *flags], stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout is not None
        took = next((time.perf_counter() - begun for line in process.stdout if "loss" in line), 0.0)
        process.stdout.read()
        if process.wait():
            fail("a run ended with an error: see its output above")
    return took


def start_up(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds from the start of a command to its first step, over those of `import torch`."""

    def imports() -> float:
        begun = time.perf_counter()
        run([sys.executable, "-c", "import torch"])
        return time.perf_counter() - begun

    words = {
        "01": [sys.executable, script("01"), f"--batch-size={64 * RANKS}"],
        "02": [sys.executable, script("02"), f"--world-size={RANKS}"],
        "03": [*TORCHRUN, script("03")],
    }
    turns = [[imports(), *map(first_step, words.values())] for _ in range(args.rounds)]
    for place, (step, goal) in enumerate({"01": 1.0, "02": 2.5, "03": 2.5}.items(), start=1):
        importing, took = (statistics.median(turn[at] for turn in turns) for at in (0, place))
        name = f"step {step}: seconds from its start to its first step, less those of `import torch`"
        over = [turn[place] - turn[0] for turn in turns]
        why = "torch is imported by the launcher, too, and again by each rank"
        if step == "01":
            why = "torchvision and the rest are imported, too, and the first step is a slow one"
        if GPUS:
            why = "besides, CUDA is set up, and each kernel loaded when it is first used"
        yield Row(name, goal, over, f"{took:.2f} and {importing:.2f} s", at_most=True, why=why)


def snapshots(args: argparse.Namespace) -> Iterator[Row]:
    """For how long a save stops the training, beside writing as many bytes."""
    whys = {
        "01": "a checksum of the file, too, and a look at whether it can be read again",
        "05": "the shards are copied in memory, and this disk is hardly slower than the memory",
    }
    for step, goal in (("01", 2.0), ("05", 0.5)):
        flags = ["--batch-size=8", *([] if args.quick else ["--model=vit", *BIG])]
        rounds = 1 if args.quick else 7  # a disk is slow now and then
        [cell] = in_ranks(step, [{"measure": "save", "rounds": rounds, "samples": 8, "flags": flags}])
        pause, copy = map(statistics.median, zip(*cell["pairs"], strict=True))
        what = "of a rank" if step == "05" else "of all"
        name = f"step {step}: pause for a snapshot, beside writing the {cell['bytes'] / 1e6:,.0f} MB {what}"
        ratios = [a / b for a, b in cell["pairs"]]
        figure = f"{pause:.2f} and {copy:.2f} s"
        yield Row(name, goal, ratios, figure, at_most=True, why=whys[step])


def time_to(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds from the start of the process to 98.5 and 99 %, a textbook's script beside the speed-run."""
    words = [sys.executable, str(ROOT / "benchmarks" / "textbook.py"), f"--data-dir={args.data_dir}"]
    begun, theirs = time.perf_counter(), []
    process = subprocess.Popen([*words, "--epochs=8", "--until=99"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:  # after each epoch, the accuracy
        theirs.append((time.perf_counter() - begun, float(line)))
    if process.wait():
        fail("the textbook's script ended with an error: see its output above")
    words = [sys.executable, str(ROOT / "benchmarks" / "speedrun.py"), f"--data-dir={args.data_dir}"]
    ours = json.loads(run([*words, "--seeds=3"]).splitlines()[-1])
    for percent, goal in ((98.5, 5), (99.0, 15)):
        reached = [second for second, accuracy in theirs if accuracy >= percent]
        took, more = (reached[0], "") if reached else (theirs[-1][0], "more than ")
        name = f"from start to {percent:g} %: a textbook's script beside the speed-run"
        figure = f"{more}{took:.0f} s, and {ours['wall_seconds']:.1f} s for {ours['mean']:.2f} %"
        why = "a lucky seed of the textbook's script, which has one run"
        yield Row(name, goal, [took / ours["wall_seconds"]], figure, why=why)


PARTS: list[Callable[[argparse.Namespace], Iterator[Row]]] = [
    *(loops, data_path, side_by_side, start_up, snapshots, time_to)
]


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    where, minutes = f"{record['machine']}, torch {record['torch']}", record["minutes"]
    lines = [f"`make bench` on {where}, {minutes:.0f} minutes. A ratio is the median, and the range.", ""]
    lines += ["| what | goal | ratio | in figures | |", "|---|---:|---:|---|---|"]
    lines += [f"| {' | '.join(Row(**row).cells())} |" for row in record["rows"]]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)  # as whoever starts the scripts would have it
    args.rounds = 1 if args.quick or GPUS else 3
    record: dict[str, Any] = {"machine": speedrun.machine(), "torch": importlib.metadata.version("torch")}
    name = re.sub(r"\W+", "-", record["machine"]).strip("-").lower()
    out = args.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    begun, rows = time.perf_counter(), []
    for part in PARTS[:-1] if args.quick else PARTS:
        for row in part(args):
            rows.append(asdict(row))
            minutes = round((time.perf_counter() - begun) / 60, 1)
            print(f"{minutes} minutes: {' | '.join(row.cells())}", file=sys.stderr, flush=True)
            record |= {"minutes": minutes, "rows": rows}  # written each time: it may be ended early
            out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    out.with_suffix(".md").write_text(table(record))
    print(f"written: {out}, and the same as .md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where MNIST is (data)")
    parser.add_argument("--quick", action="store_true", help="few samples and one round: does it run?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes (benchmarks/results/…)")
    main(parser.parse_args())
