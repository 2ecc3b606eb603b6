"""Compares what the five steps cost with the best possible: a table of ratios, each with its goal.

    python benchmarks/bench.py --data-dir data            # while nothing else runs on the machine
    python benchmarks/bench.py --data-dir data --quick --out FILE    # few samples, no textbook: does it run?

The two sides of a comparison take turns (A B A B …), because other programs disturb single measurements. A
ratio is the median of all turns, followed by their range. The last line of the output names the files with
the results: benchmarks/results/MACHINE.json, and the table in MACHINE.md.
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
from collections.abc import Callable, Iterator, Sequence
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
RANKS = 1 if GPUS == 1 else 2
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
BIG = ["--vit-width=768", "--vit-depth=12"]  # a vit of 57 million parameters
SAMPLES = {"cnn": 4096, "resnet18": 256, "vit": 2048}  # of a rank in an epoch: about a second on one core
STEPS_ON_GPU = {64: 100, 512: 15}  # steps in an epoch, for each batch size
LOOPS = list(itertools.product(SAMPLES, (64, 512)))  # model and batch size; the first has the shortest steps


@dataclass
class Row:
    """A row of the table: one comparison."""

    name: str
    goal: float | None  # for the median of the ratios
    ratios: list[float]  # one for each turn; for the startup, differences in seconds
    figure: str  # what was measured, with units
    at_most: bool = False  # whether the ratio should be at most the goal, not at least
    why: str = ""  # the reason, for a goal that is missed

    def cells(self) -> list[str]:
        """The cells of the table's row: name, goal, ratio, figures, verdict."""
        ratio = f"{statistics.median(self.ratios):.2f}"
        if len(self.ratios) > 1:
            ratio += f" ({min(self.ratios):.2f} to {max(self.ratios):.2f})"
        if self.goal is None:
            return [self.name, "", ratio, self.figure, ""]
        sign = "≤" if self.at_most else "≥"
        return [self.name, f"{sign} {self.goal:g}", ratio, self.figure, self.verdict(self.goal)]

    def verdict(self, goal: float) -> str:
        """Whether the median reaches the goal; if not, whether some of the turns do, and the reason."""

        def reaches_goal(ratio: float) -> bool:
            return ratio <= goal if self.at_most else ratio >= goal

        if reaches_goal(statistics.median(self.ratios)):
            return "reached"
        some_reach_it = any(reaches_goal(ratio) for ratio in self.ratios)
        missed = "missed, but not in every turn" if some_reach_it else "missed"
        return f"{missed}: {self.why}" if self.why else missed


def medians(turns: Sequence[Sequence[float]]) -> list[float]:
    """The median of each column. A turn is a row of measurements, one for each side of the comparison."""
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def script(step: str) -> str:
    """The path of a step's train.py."""
    [path] = ROOT.glob(f"{step}_*/train.py")
    return str(path)


def run(words: list[str], **variables: str) -> str:
    """Run a command with extra environment variables: what it prints to stdout. `fail`s if it fails."""
    process = subprocess.run(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
    if process.returncode != 0:
        fail(f"{' '.join(words)} exited with status {process.returncode}: see its output above")
    return process.stdout


def measure_in_ranks(step: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let in_rank.py measure these cells in a step's ranks, each with one thread; return the results."""
    launcher = [sys.executable] if step == "01" else TORCHRUN
    words = [*launcher, str(ROOT / "benchmarks" / "in_rank.py"), step, json.dumps(cells)]
    lines = run(words, OMP_NUM_THREADS="1").splitlines()
    return [json.loads(line.removeprefix("cell: ")) for line in lines if line.startswith("cell: ")]


def loop_cell(model: str, batch_size: int, quick: bool) -> dict[str, Any]:
    """What in_rank.py should measure for one training loop. `model` may have flags after its name."""
    flags = [f"--batch-size={batch_size}", "--model", *model.split()]
    if quick:
        return {"measure": "loop", "rounds": 1, "samples": batch_size, "flags": flags}
    samples = STEPS_ON_GPU[batch_size] * batch_size if GPUS else max(batch_size, SAMPLES[model])
    return {"measure": "loop", "rounds": 9, "samples": samples, "flags": flags}


def loops(args: argparse.Namespace) -> Iterator[Row]:
    """The speed of each step compared with in_rank.py's bare loop; and the share of the vote in a step."""
    cases = LOOPS[:2] if args.quick else [*LOOPS]
    if GPUS and not args.quick:
        cases.append((" ".join(["vit", *BIG]), 512))  # a model that keeps a GPU busy
    bare_loop = "one CUDA graph" if GPUS else "the bare loop"
    vote_rows = []
    for step in ("01", "02", "03", "04", "05"):
        cells = [loop_cell(model, batch_size, args.quick) for model, batch_size in cases]
        results = measure_in_ranks(step, cells)
        ranks = 1 if step == "01" else RANKS
        for (model, batch_size), result in zip(cases, results, strict=True):
            epoch_seconds, _ = medians(result["pairs"])
            steps = result["samples"] / batch_size / ranks
            name = f"step {step}, {model}, batch {batch_size}: speed compared with {bare_loop}"
            ratios = [bare / epoch for epoch, bare in result["pairs"]]
            figure = f"{result['samples'] / epoch_seconds:,.0f} samples/s"
            yield Row(name, 0.97, ratios, figure, why=why_slower(result, steps))
            if step != "01" and (model, batch_size) == LOOPS[0]:
                name = f"step {step}, {model}, batch {batch_size}: the vote on stopping, as a share of a step"
                share = result["vote"] * steps / epoch_seconds
                vote_rows.append(Row(name, None, [share], f"{1e6 * result['vote']:,.0f} µs"))
    yield from vote_rows


def why_slower(result: dict[str, Any], steps: float) -> str:
    """Why a loop is slower than the bare loop. `steps` is the number of steps in an epoch."""
    if "kernels" not in result:
        more = 1e3 * statistics.median(epoch - bare for epoch, bare in result["pairs"]) / steps
        left_out = "loading, counting targets, voting, reporting"
        return f"{more:.1f} ms more per step for what the bare loop leaves out: {left_out}"
    epoch_seconds, _ = medians(result["pairs"])
    busy = f"{1e3 * result['busy']:.2f} of {1e3 * epoch_seconds / steps:.2f} ms per step"
    return f"the GPU computes for {busy}; the CPU starts {result['kernels']:.0f} kernels one by one"


def data_path(args: argparse.Namespace) -> Iterator[Row]:
    """The speed of our loader compared with the usual one of torchvision."""
    digits, _ = load_mnist(Path(args.data_dir), 640 if args.quick else None)
    our_options = loader_options(0, torch.device("cpu"))
    our_loader: DataLoader[Any] = DataLoader(digits, 64, shuffle=True, **our_options)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    usual_loader: DataLoader[Any] = DataLoader(textbook.Pictures(digits, transform), 64, shuffle=True)

    def loading_rate(loader: DataLoader[Any]) -> float:
        start = time.perf_counter()
        for _ in loader:
            pass
        return len(digits) / (time.perf_counter() - start)

    turns = [(loading_rate(our_loader), loading_rate(usual_loader)) for _ in range(args.rounds)]
    our_rate, usual_rate = medians(turns)
    name = "loading, batch 64: our loader compared with a PIL image and two transforms for each sample"
    figure = f"{our_rate:,.0f} and {usual_rate:,.0f} samples/s"
    yield Row(name, 40, [ours / usual for ours, usual in turns], figure)


def training_rate(commands: list[list[str]], samples: int, batch_size: int) -> float:
    """Run these commands at the same time, each with its part of the samples: the sum of their samples/s."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for number, words in enumerate(commands):
            flags = [f"--snapshot-dir={folder}/{number}", f"--metrics={folder}/{number}.jsonl", "--use-gpu=0"]
            flags += [f"--num-samples={samples // len(commands)}", "--epochs=2", f"--batch-size={batch_size}"]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen([*words, *flags], stdout=subprocess.DEVNULL, env=env))
        statuses = [process.wait() for process in processes]
        if any(statuses):
            fail("a run ended with an error: see its output above")
        rate = 0.0
        for number in range(len(commands)):
            last_line = Path(folder, f"{number}.jsonl").read_text().splitlines()[-1]
            rate += json.loads(last_line)["samples_per_s"]
    return rate


def side_by_side(args: argparse.Namespace) -> Iterator[Row]:
    """Two ranks compared with two independent processes; step 05 compared with step 03. On CPUs only."""
    if GPUS:
        return
    independent = [[sys.executable, script("01")]] * RANKS
    step_03 = [[*TORCHRUN, script("03")]]
    step_05 = [[*TORCHRUN, script("05")]]
    sides = (independent, step_03, step_05)
    for batch_size, goal in ((64, 0.75), (512, 0.93)):
        samples = RANKS * (batch_size if args.quick else 4096)
        turns = []
        for _ in range(args.rounds):
            turns.append([training_rate(commands, samples, batch_size) for commands in sides])
        independent_rate, ddp_rate, fsdp_rate = medians(turns)
        name = f"cnn, batch {batch_size}: two ranks of step 03 compared with two independent processes"
        figure = f"{ddp_rate:,.0f} and {independent_rate:,.0f} samples/s"
        why = "the all-reduce of 0.83 MB, on the same two cores"
        yield Row(name, goal, [ddp / alone for alone, ddp, _ in turns], figure, why=why)
        name = f"cnn, batch {batch_size}: two ranks of step 05 compared with two of step 03"
        figure = f"{fsdp_rate:,.0f} and {ddp_rate:,.0f} samples/s"
        yield Row(name, None, [fsdp / ddp for _, ddp, fsdp in turns], figure)


def seconds_to_first_step(words: list[str]) -> float:
    """Seconds from the start of a command until it reports its first training step, which is its only one."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--snapshot-dir={folder}", f"--num-samples={64 * RANKS}", "--epochs=1"]
        flags.append(f"--use-gpu={min(1, GPUS)}")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # or torchrun prints that it sets this
        seconds = 0.0
        start = time.perf_counter()
        process = subprocess.Popen([*words, *flags], stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout is not None
        for line in process.stdout:
            if "loss" in line:
                seconds = time.perf_counter() - start
                break
        process.stdout.read()
        if process.wait() or not seconds:
            fail("a run failed, or reported no training step: see its output above")
    return seconds


def start_up(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds from the start of a command to its first training step, minus those of `import torch`."""

    def seconds_to_import_torch() -> float:
        start = time.perf_counter()
        run([sys.executable, "-c", "import torch"])
        return time.perf_counter() - start

    step_01 = [sys.executable, script("01"), f"--batch-size={64 * RANKS}"]
    step_02 = [sys.executable, script("02"), f"--world-size={RANKS}"]
    step_03 = [*TORCHRUN, script("03")]
    import_seconds = []
    step_seconds: dict[str, list[float]] = {"01": [], "02": [], "03": []}
    for _ in range(args.rounds):
        import_seconds.append(seconds_to_import_torch())
        step_seconds["01"].append(seconds_to_first_step(step_01))
        step_seconds["02"].append(seconds_to_first_step(step_02))
        step_seconds["03"].append(seconds_to_first_step(step_03))
    for step, goal in (("01", 1.0), ("02", 2.5), ("03", 2.5)):
        name = f"step {step}: seconds from start to first training step, minus those of `import torch`"
        pairs = list(zip(step_seconds[step], import_seconds, strict=True))
        differences = [first_step - importing for first_step, importing in pairs]
        first_step, importing = medians(pairs)
        if GPUS:
            why = "CUDA is set up, too, and each kernel is loaded when it is first used"
        elif step == "01":
            why = "torchvision and other modules are imported, too, and the first step is slow"
        else:
            why = "the launcher imports torch, and so does each rank"
        figure = f"{first_step:.2f} and {importing:.2f} s"
        yield Row(name, goal, differences, figure, at_most=True, why=why)


def snapshots(args: argparse.Namespace) -> Iterator[Row]:
    """How long a save stops the training, compared with writing the same number of bytes."""
    model = [] if args.quick else ["--model=vit", *BIG]
    flags = ["--batch-size=8", *model]
    rounds = 1 if args.quick else 7  # a disk is slow now and then
    for step, goal in (("01", 2.0), ("05", 0.5)):
        cell = {"measure": "save", "rounds": rounds, "samples": 8, "flags": flags}
        [result] = measure_in_ranks(step, [cell])
        ratios = [pause / write for pause, write in result["pairs"]]
        pause, write = medians(result["pairs"])
        megabytes = f"{result['bytes'] / 1e6:,.0f} MB"
        if step == "01":
            written = f"all {megabytes}"
            why = "a save also computes a checksum, and checks that the file can be read"
        else:
            written = f"the {megabytes} of a rank"
            why = "the shards are copied in memory, and this disk is almost as fast as the memory"
        name = f"step {step}: pause for a snapshot compared with writing {written}"
        yield Row(name, goal, ratios, f"{pause:.2f} and {write:.2f} s", at_most=True, why=why)


def time_to_accuracy(args: argparse.Namespace) -> Iterator[Row]:
    """Seconds from the start to 98.5 and 99 % accuracy: a textbook script compared with the speed run."""
    words = [sys.executable, str(ROOT / "benchmarks" / "textbook.py"), f"--data-dir={args.data_dir}"]
    start = time.perf_counter()
    process = subprocess.Popen([*words, "--epochs=8", "--until=99"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    epochs = []  # of the textbook script: seconds since the start, and accuracy in percent
    for line in process.stdout:
        epochs.append((time.perf_counter() - start, float(line)))
    if process.wait() or not epochs:
        fail("the textbook script failed, or ended without an epoch: see its output above")
    words = [sys.executable, str(ROOT / "benchmarks" / "speedrun.py"), f"--data-dir={args.data_dir}"]
    speed_run = json.loads(run([*words, "--seeds=3"]).splitlines()[-1])
    for percent, goal in ((98.5, 5), (99.0, 15)):
        name = f"from start to {percent:g} %: a textbook script compared with the speed run"
        reached = [seconds for seconds, accuracy in epochs if accuracy >= percent]
        seconds = reached[0] if reached else epochs[-1][0]
        slow = f"{seconds:.0f} s" if reached else f"more than {seconds:.0f} s"
        figure = f"{slow}, and {speed_run['wall_seconds']:.1f} s for {speed_run['mean']:.2f} %"
        why = "the textbook script ran only once, perhaps with a lucky seed"
        yield Row(name, goal, [seconds / speed_run["wall_seconds"]], figure, why=why)


Part = Callable[[argparse.Namespace], Iterator[Row]]
PARTS: list[Part] = [loops, data_path, side_by_side, start_up, snapshots, time_to_accuracy]


def table(record: dict[str, Any]) -> str:
    """The record as a table in Markdown."""
    where = f"{record['machine']}, torch {record['torch']}"
    duration = f"{record['minutes']:.0f} minutes"
    lines = [f"`make bench` on {where}, {duration}. Each ratio is a median, followed by its range.", ""]
    lines += ["| comparison | goal | ratio | measured | |", "|---|---:|---:|---|---|"]
    lines += [f"| {' | '.join(Row(**row).cells())} |" for row in record["rows"]]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)  # start the scripts as a user would
    if args.quick and not args.out:
        fail("--quick measures too little for a record of this machine: add --out FILE")
    args.rounds = 1 if args.quick or GPUS else 3
    record: dict[str, Any] = {"machine": speedrun.machine(), "torch": importlib.metadata.version("torch")}
    name = re.sub(r"\W+", "-", record["machine"]).strip("-").lower()
    out = args.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    start = time.perf_counter()
    rows = []
    for part in PARTS[:-1] if args.quick else PARTS:
        for row in part(args):
            rows.append(asdict(row))
            minutes = round((time.perf_counter() - start) / 60, 1)
            print(f"{minutes} minutes: {' | '.join(row.cells())}", file=sys.stderr, flush=True)
            record |= {"minutes": minutes, "rows": rows}
            out.write_text(json.dumps(record, indent=1) + "\n")  # after each row: the user may stop it early
    print(table(record))
    out.with_suffix(".md").write_text(table(record))
    print(f"results: {out} and {out.with_suffix('.md')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where MNIST is (data)")
    parser.add_argument("--quick", action="store_true", help="few samples and one round: does it run?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes (benchmarks/results/…)")
    main(parser.parse_args())
