"""Measures how reliably and how fast one epoch reaches 99 % on MNIST.

    python benchmarks/speedrun.py --data-dir data --seeds 30            # step 01
    python benchmarks/speedrun.py --data-dir data --seeds 30 --ranks 2  # step 03, the same global batch

With each seed, a step is run once, with label smoothing (see benchmarks/label_smoothing.py). The program
prints the accuracy and the seconds of each run, then the mean and the standard deviation of the accuracies.
The last line is JSON.

`train_seconds` is the time of the training steps alone, as the script reports it. `wall_seconds` is the time
from the start of the process to the result on the terminal: importing torch, reading MNIST from disk,
training and testing. There is no warm-up, no run is left out, and no decision in a run uses the test set.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cores import count_cores  # noqa: E402
from common.device import count_gpus  # noqa: E402
from common.options import fail, whole_number  # noqa: E402

GLOBAL_BATCH = 256
RECIPE = ["--epochs=1", "--lr=0.01", "--schedule=one-cycle"]  # label_smoothing.py adds the rest


def command(ranks: int, precision: str) -> list[str]:
    """The command that trains with the recipe on this number of ranks, all on this machine."""
    script = str(ROOT / "benchmarks" / "label_smoothing.py")
    flags = [*RECIPE, f"--batch-size={GLOBAL_BATCH // ranks}", f"--precision={precision}"]
    if ranks == 1:
        return [sys.executable, script, "01", *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, script, "03", *flags]


def run(words: list[str], seed: int, data_dir: str) -> tuple[float, float, float]:
    """Run the command: accuracy in percent, seconds of training, seconds until the result is printed."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--seed={seed}", f"--data-dir={data_dir}"]
        flags += [f"--snapshot-dir={folder}", f"--metrics={folder}/m"]
        start = time.perf_counter()
        process = subprocess.Popen([*words, *flags], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        wall_seconds = 0.0
        for line in process.stdout:
            if "accuracy" in line:
                wall_seconds = time.perf_counter() - start
        if process.wait():
            fail(f"the run with seed {seed} exited with status {process.returncode}: see its output above")
        lines = Path(folder, "m").read_text().splitlines()
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if events[0]["dataset"] != "mnist":
        fail("these are not the real digits: give the folder of MNIST as --data-dir")
    [evaluation] = [event for event in events if event["event"] == "eval"]
    return 100 * evaluation["accuracy"], events[-1]["seconds"], wall_seconds


def machine() -> str:
    """The name of the GPU, if there is one, the name of the processor, and the number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processors = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    processor = processors[0] if processors else platform.machine()
    gpu = f"{torch.cuda.get_device_name(0)}, " if count_gpus() and torch.cuda.is_available() else ""
    return f"{gpu}{processor}, {count_cores()} cores"


def main(args: argparse.Namespace) -> None:
    if GLOBAL_BATCH % args.ranks:
        fail(f"--ranks {args.ranks} does not divide the global batch of {GLOBAL_BATCH}: use 1, 2, 4 or 8")
    words = command(args.ranks, args.precision)
    print(f"$ {' '.join(word.replace(str(ROOT) + '/', '') for word in words[1:])}")
    accuracies = []
    train_seconds = []
    wall_seconds = []
    for seed in range(args.seeds):
        accuracy, training, wall = run(words, seed, args.data_dir)
        print(
            f"seed {seed:2}  {accuracy:.2f}%  {training:.1f} s of training, {wall:.1f} s in all", flush=True
        )
        accuracies.append(accuracy)
        train_seconds.append(training)
        wall_seconds.append(wall)
    mean = statistics.mean(accuracies)
    deviation = statistics.stdev(accuracies) if args.seeds > 1 else 0.0
    print(f"n {args.seeds}, mean {mean:.3f}%, standard deviation {deviation:.3f}")
    result = {
        "n": args.seeds,
        "mean": round(mean, 3),
        "sd": round(deviation, 3),
        "train_seconds": round(statistics.mean(train_seconds), 2),
        "wall_seconds": round(statistics.mean(wall_seconds), 2),
        "ranks": args.ranks,
        "precision": args.precision,
        "machine": machine(),
        "torch": importlib.metadata.version("torch"),
        "accuracies": [round(accuracy, 2) for accuracy in accuracies],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where MNIST is (data)")
    parser.add_argument("--seeds", type=whole_number, default=5, metavar="N", help="number of runs (5)")
    parser.add_argument("--ranks", type=whole_number, default=1, metavar="N", help="number of processes (1)")
    parser.add_argument(
        "--precision", choices=["float32", "float64", "bf16"], default="float32", help="float32 by default"
    )
    main(parser.parse_args())
