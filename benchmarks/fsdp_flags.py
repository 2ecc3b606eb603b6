"""Measures what step 05's flags cost and save: seconds, bytes sent, memory, for a vit of 56.8 M parameters.

    python benchmarks/fsdp_flags.py

Two ranks train on this machine: on two GPUs if it has them, otherwise on CPUs with one thread each. A row is
the difference between a long and a short run, so startup and shutdown cancel out. The bytes are counted at
the loopback interface. This works on Linux with gloo, because NCCL sends data in other ways.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from common.cores import count_cores  # noqa: E402

RANKS = 2
BATCH_SIZE = 8
SHORT_RUN = 2  # steps
LONG_RUN = 10
STEP_04 = ROOT / "04_multinode" / "train.py"
STEP_05 = ROOT / "05_fsdp" / "train.py"
VARIANTS = {
    "step 04: DDP": (STEP_04, []),
    "step 05": (STEP_05, []),
    "`--no-reshard`": (STEP_05, ["--no-reshard"]),
    "`--activation-checkpointing`": (STEP_05, ["--activation-checkpointing"]),
    "`--precision bf16`": (STEP_05, ["--precision=bf16"]),
    "`--replicas 2`": (STEP_05, ["--replicas=2"]),
    "`--cpu-offload`": (STEP_05, ["--cpu-offload"]),
}
MODEL = ["--model=vit", "--vit-width=768", "--vit-depth=12", "--epochs=1", f"--batch-size={BATCH_SIZE}"]


def loopback() -> int:
    """The bytes that this machine has sent to itself so far."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def measure(script: Path, flags: list[str], steps: int) -> tuple[float, int, float, float]:
    """Train: seconds and bytes sent of the whole run; peak MB of a rank's model states and of its process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    use_gpu = int(torch.cuda.device_count() >= RANKS)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*MODEL, *flags, f"--num-samples={steps * RANKS * BATCH_SIZE}", f"--use-gpu={use_gpu}"]
        flags += [f"--snapshot-dir={folder}/snapshots", f"--metrics={folder}/metrics.jsonl"]
        sent_before = loopback()
        process = subprocess.Popen([*torchrun, str(script), *flags], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # peak memory: of torchrun or a rank
        if status != 0:
            sys.exit(1)
        events = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    reports = [event for event in events if event["event"] == "memory"]
    states = reports[-1]["ranks"][0][4] / 1e6 if reports else 0.0
    return events[-1]["seconds"], loopback() - sent_before, states, usage.ru_maxrss / 1e3


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"torch {torch.__version__}, {platform.machine()}, {count_cores()} cores")
    print(f"{RANKS} ranks, vit 768×12, batch {BATCH_SIZE} each, {torch.cuda.device_count()} GPUs\n")
    print("| | seconds a step | MB sent by a rank in a step | MB of model states | MB of the process |")
    print("|---|---|---|---|---|")
    for name, (script, flags) in VARIANTS.items():
        short_seconds, short_bytes, _, _ = measure(script, flags, SHORT_RUN)
        long_seconds, long_bytes, states, process = measure(script, flags, LONG_RUN)
        steps = LONG_RUN - SHORT_RUN
        seconds = (long_seconds - short_seconds) / steps
        sent = (long_bytes - short_bytes) / steps / RANKS / 1e6
        states_cell = f"{states:,.0f}" if states else "–"
        print(f"| {name} | {seconds:.2f} | {sent:,.0f} | {states_cell} | {process:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
