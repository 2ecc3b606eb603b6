"""What step 05's flags cost and save: seconds, bytes sent and memory, for a vit of 56.8 M parameters.

    python benchmarks/fsdp_flags.py

Two ranks on this machine, on its GPUs if it has two, else on CPUs with a thread each. A row is the
difference of two runs, of which one takes more steps: what begins and ends a run is in neither.
Bytes are those that cross the loopback interface (Linux, and gloo: NCCL has ways of its own).
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

RANKS, BATCH = 2, 8
SHORT, LONG = 2, 10  # steps
STEP_04, STEP_05 = ROOT / "04_multinode" / "train.py", ROOT / "05_fsdp" / "train.py"
VARIANTS = {
    "step 04: DDP": (STEP_04, []),
    "step 05": (STEP_05, []),
    "`--no-reshard`": (STEP_05, ["--no-reshard"]),
    "`--activation-checkpointing`": (STEP_05, ["--activation-checkpointing"]),
    "`--precision bf16`": (STEP_05, ["--precision=bf16"]),
    "`--replicas 2`": (STEP_05, ["--replicas=2"]),
    "`--cpu-offload`": (STEP_05, ["--cpu-offload"]),
}
MODEL = ["--model=vit", "--vit-width=768", "--vit-depth=12", "--epochs=1", f"--batch-size={BATCH}"]


def loopback() -> int:
    """The bytes that this machine has sent to itself."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def measure(script: Path, flags: list[str], steps: int) -> tuple[float, int, float, float]:
    """Train; seconds and bytes sent in all, MB of a rank's model states and of its process, at their peak."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    use_gpu = int(torch.cuda.device_count() >= RANKS)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*MODEL, *flags, f"--num-samples={steps * RANKS * BATCH}", f"--use-gpu={use_gpu}"]
        flags += [f"--snapshot-dir={folder}/snapshots", f"--metrics={folder}/metrics.jsonl"]
        before = loopback()
        process = subprocess.Popen([*torchrun, str(script), *flags], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # its memory is the largest of torchrun's and the ranks'
        if status != 0:
            sys.exit(1)
        events = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    reports = [event for event in events if event["event"] == "memory"]
    states = reports[-1]["ranks"][0][4] / 1e6 if reports else 0.0
    return events[-1]["seconds"], loopback() - before, states, usage.ru_maxrss / 1e3


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"torch {torch.__version__}, {platform.machine()}, {count_cores()} cores")
    print(f"{RANKS} ranks, vit 768×12, batch {BATCH} each, {torch.cuda.device_count()} GPUs\n")
    print("| | seconds a step | MB sent by a rank in a step | MB of model states | MB of the process |")
    print("|---|---|---|---|---|")
    for name, (script, flags) in VARIANTS.items():
        (less, few, _, _), (more, many, states, process) = (measure(script, flags, n) for n in (SHORT, LONG))
        steps = LONG - SHORT
        sent = (many - few) / steps / RANKS / 1e6
        held = f"{states:,.0f}" if states else "–"
        print(f"| {name} | {(more - less) / steps:.2f} | {sent:,.0f} | {held} | {process:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
