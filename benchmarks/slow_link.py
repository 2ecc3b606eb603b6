"""Prints a table: how much a slow link between two nodes slows step 04, and how much --accumulate helps.

    sudo .venv/bin/python benchmarks/slow_link.py

It needs root, for two hosts in namespaces (see tests/harness/hosts.py). Each has one rank with one thread.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "harness")]

from hosts import WHY, commands_for, network, possible  # noqa: E402

from common.cores import count_cores  # noqa: E402
from common.options import fail  # noqa: E402

LINKS = {  # delay in one direction in milliseconds, and bandwidth in Mbit/s
    "as fast as this machine copies": None,
    "100 Mbit/s, 1 ms": (1, 100),
    "10 Mbit/s, 20 ms": (20, 10),
}
ACCUMULATE = [1, 4, 16]
# 32 batches per epoch on each node. The first epoch is a warm-up.
FLAGS = ["--num-samples=4096", "--batch-size=64", "--epochs=3", "--use-gpu=0"]


def measure(link: tuple[float, float] | None, accumulate: int) -> tuple[float, float]:
    """Train step 04 on two hosts: the seconds of a step, and the samples/s of both nodes together."""
    with tempfile.TemporaryDirectory() as scratch, network(Path(scratch, "net"), 2, link) as net:
        flags = [*FLAGS, f"--accumulate={accumulate}"]
        flags += [f"--snapshot-dir={net.disk}/snapshots", f"--metrics={net.disk}/metrics.jsonl"]
        commands = commands_for(["node1", "node2"], "--nproc-per-node=1", "--", *flags)
        processes = [host.start(commands[host.name], CUDA_VISIBLE_DEVICES="") for host in net.hosts]
        for process in processes:
            output, _ = process.communicate()
            if process.returncode != 0:
                print(output)
                sys.exit(1)
        lines = (net.hosts[0].disk / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    after_warm_up = [event for event in events if event["event"] == "train" and event["epoch"] > 0]
    rate = sum(event["samples_per_s"] for event in after_warm_up) / len(after_warm_up)
    samples_per_step = 2 * 64 * accumulate
    return samples_per_step / rate, rate


def main() -> None:
    if not possible():
        fail(WHY)
    print(f"{count_cores()} cores; model cnn, gradients of 0.83 MB, batch 64 on each of two nodes")
    print("| link | " + " | ".join(f"`--accumulate {n}`" for n in ACCUMULATE) + " |")
    print("|---" * (1 + len(ACCUMULATE)) + "|")
    for name, link in LINKS.items():
        cells = []
        for accumulate in ACCUMULATE:
            seconds, rate = measure(link, accumulate)
            cells.append(f"{seconds:.3f} s a step, {rate:,.0f} samples/s")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
