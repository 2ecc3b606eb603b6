"""Predicts how long a step takes: on this machine, where the prediction is checked, and on a large machine.

    python benchmarks/predict.py --paper       # measures nothing: a large machine, and the bytes of a rank
    python benchmarks/predict.py --bytes       # the same, and the bytes that step 05 itself reports
    python benchmarks/predict.py               # all; as root, also step 04 over slow links between two hosts

A collective of n bytes takes α + β·n seconds: α is the latency, 1/β the bandwidth (an old model, see Thakur
et al., 2005, doi.org/10.1177/1094342005051521). α and β are fitted to ten message sizes. A step takes the
time of a rank's own work plus the time of its collectives, one after another: on a busy CPU, nothing
overlaps. The rank's own work is measured in two runs of one rank each, side by side, because ranks share the
machine. Two ranks wait for each other in each step, so of each pair of steps the slower one counts.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "harness")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hosts import WHY, network, possible  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks import bench, slow_link, speedrun  # noqa: E402
from benchmarks.in_rank import load  # noqa: E402
from common.models import build_model  # noqa: E402
from common.options import warn  # noqa: E402
from common.process_group import release_meshes  # noqa: E402

MESSAGE_BYTES = [*(1 << power for power in range(10, 27, 2)), 48_000_000]  # resnet18's gradients: 44.7 MB
SLOW_MESSAGE_BYTES = [1 << power for power in range(11, 21)]
SAMPLES = {"cnn": 8192, "resnet18": 512}  # of a rank in an epoch
CASES = [("cnn", 64), ("cnn", 512), ("resnet18", 64)]
TARGET_COUNT_BYTES = 8  # the ranks add up their numbers of targets in each step
# The flags that decide how step 05 builds and shards a model.
FLAGS: dict[str, Any] = {"model": "cnn", "precision": "float32", "vit_width": 64, "vit_depth": 4}
FLAGS |= {"no_reshard": False, "activation_checkpointing": False, "cpu_offload": False}

# A DGX H100: eight GPUs with NVLink of 900 GB/s, both directions together; eight network cards of 400 Gbit/s,
# each of which can carry a ring; 989 TFLOP/s in bf16 (NVIDIA's data sheets of H100 SXM and DGX H100). Large
# trainings use about 40 % of that: Llama 3 38 to 43 % (arxiv.org/abs/2407.21783).
PEAK_FLOPS = 989e12  # per second
UTILIZATION = 0.4
GPUS_PER_NODE = 8
NVLINK = 450e9  # bytes per second in one direction, for each GPU
NETWORK = 8 * 50e9  # bytes per second in one direction, for each node
# Seconds: for the start, for a hop in a node, for a hop between nodes. These values, and how they add up, are
# those that NCCL plans with (github.com/NVIDIA/nccl, src/graph/tuning.cc at 01afd20, protocol LL128).
RING_LATENCIES = (10.0e-6, 1.9e-6, 4.0e-6)
TREE_LATENCIES = (4.4e-6, 1.2e-6, 8.5e-6)
WORLD_SIZES = [8, 64, 1024]
BILLION: dict[str, Any] = {"model": "vit", "vit_width": 2048, "vit_depth": 30}  # parameters

Points = dict[str, list[tuple[int, float]]]  # for each collective: bytes and seconds
Costs = dict[str, tuple[float, float]]  # for each collective: α and β


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """α and β for which the relative errors at these points (bytes and seconds) are smallest."""
    rows = torch.tensor([[1 / seconds, size / seconds] for size, seconds in points], dtype=torch.float64)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    alpha, beta = torch.linalg.lstsq(rows, ones).solution.flatten().tolist()
    return max(0.0, alpha), beta


def meta_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model that these flags select, on the meta device: shapes without data."""
    with torch.device("meta"):
        return build_model(args.model, args.precision, args.vit_width, args.vit_depth)


def unit_bytes(model_name: str) -> tuple[list[int], int]:
    """The bytes of the parameters in each of step 05's units, and of the parameters that are in no unit."""
    args = argparse.Namespace(**{**FLAGS, "model": model_name})
    model = meta_model(args)
    units = load("05").units(args, model)
    sizes = [sum(p.nbytes for p in unit.parameters()) for unit in units]
    return sizes, sum(p.nbytes for p in model.parameters()) - sum(sizes)


def collective_seconds(step: str, model_name: str, costs: Costs) -> float:
    """Seconds of all collectives in one training step, one after another."""
    units, rest = unit_bytes(model_name)

    def seconds(collective: str, size: int) -> float:
        alpha, beta = costs[collective]
        return alpha + beta * size if size else 0.0

    target_count = seconds("all_reduce", TARGET_COUNT_BYTES)
    if step != "05":
        return target_count + seconds("all_reduce", sum(units) + rest)
    gathers = 2 * sum(seconds("all_gather", size) for size in units) + seconds("all_gather", rest)
    reduces = sum(seconds("reduce_scatter", size) for size in [*units, rest])
    return target_count + gathers + reduces


def time_collectives() -> Points:
    """Measure the collectives of two ranks on this machine."""
    sizes = ",".join(map(str, MESSAGE_BYTES))
    words = [*bench.TORCHRUN, str(ROOT / "benchmarks" / "collectives.py"), sizes]
    return dict(json.loads(bench.run(words, OMP_NUM_THREADS="1").splitlines()[-1]))


def time_collectives_over(link: tuple[float, float]) -> Points:
    """Measure the collectives of two hosts with one rank each, with a slow link between them."""
    sizes = ",".join(map(str, SLOW_MESSAGE_BYTES))
    with tempfile.TemporaryDirectory() as scratch, network(Path(scratch, "net"), 2, link) as net:
        processes = []
        for rank, host in enumerate(net.hosts):
            words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
            words += ["--nproc-per-node=1", f"--master-addr={net.hosts[0].address}", "--master-port=29400"]
            words += [str(ROOT / "benchmarks" / "collectives.py"), sizes]
            processes.append(host.start(" ".join(words), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("\n".join(outputs))
    return dict(json.loads(outputs[0].splitlines()[-1]))


def step_seconds(step: str, model: str, batch_size: int, ranks_per_run: int) -> list[list[float]]:
    """Train on two ranks, in one run or in two runs at once: for each run, the seconds of rank 0's steps."""
    flags = [f"--model={model}", f"--batch-size={batch_size}"]
    samples = max(2 * batch_size, SAMPLES[model])
    cell = {"measure": "steps", "rounds": 2, "samples": samples, "flags": flags}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc-per-node={ranks_per_run}", str(ROOT / "benchmarks" / "in_rank.py")]
    words += [step, json.dumps([cell])]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    runs = range(bench.RANKS // ranks_per_run)
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) for _ in runs]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a run ended with an error: see its output above")
    return [json.loads(text.partition("cell: ")[2].splitlines()[0])["seconds"] for text in outputs]


def seconds_alone_and_together(step: str, model: str, batch_size: int) -> tuple[float, float]:
    """Seconds of a step: of two ranks that train separately, the slower one each time; of two in one run."""
    turns = []
    for _ in range(3):
        runs = step_seconds(step, model, batch_size, ranks_per_run=1)
        alone = statistics.mean(max(pair) for pair in zip(*runs, strict=True))
        [run] = step_seconds(step, model, batch_size, ranks_per_run=bench.RANKS)
        turns.append((alone, statistics.mean(run)))
    alone, together = bench.medians(turns)
    return alone, together


def check_predictions() -> dict[str, Any]:
    """Measure collectives, and predict and measure steps: `collectives` and `steps` of the record."""
    collectives = {"this machine": time_collectives()}
    steps: list[dict[str, Any]] = []

    def add_step(step: str, model: str, batch_size: int, link: str, alone: float, measured: float) -> None:
        costs = {name: fit(points) for name, points in collectives[link].items()}
        predicted = alone + collective_seconds(step, model, costs)
        row = {"step": step, "model": model, "batch": batch_size, "link": link, "alone": alone}
        steps.append({**row, "predicted": predicted, "measured": measured})
        print(json.dumps(steps[-1]), file=sys.stderr, flush=True)

    for step in ("03", "05"):
        for model, batch_size in CASES:
            alone, together = seconds_alone_and_together(step, model, batch_size)
            add_step(step, model, batch_size, "this machine", alone, together)
    if possible():
        alone, _ = seconds_alone_and_together("04", "cnn", 64)
        for name, link in slow_link.LINKS.items():
            if link is not None:
                collectives[name] = time_collectives_over(link)
                measured, _ = slow_link.measure(link, 1)
                add_step("04", "cnn", 64, name, alone, measured)
    else:
        warn(f"step 04 over slow links is left out: it {WHY}")
    return {"collectives": collectives, "steps": steps}


def all_reduce_seconds(size: float, ranks_per_node: int, nodes: int) -> float:
    """An all-reduce of `size` bytes on the large machine: NCCL uses a ring or a tree, whichever is faster."""
    ranks = ranks_per_node * nodes
    if nodes == 1:
        bandwidth = NVLINK
    elif ranks_per_node == GPUS_PER_NODE:
        bandwidth = NETWORK
    else:  # one GPU of each node has one network card
        bandwidth = NETWORK / GPUS_PER_NODE
    start, hop_in_node, hop_between_nodes = RING_LATENCIES
    ring = start + 2 * (ranks - nodes) * hop_in_node + 2 * (nodes - 1) * hop_between_nodes
    start, hop_in_node, hop_between_nodes = TREE_LATENCIES
    tree = start + 2 * (ranks_per_node - 1) * hop_in_node + 2 * math.log2(nodes) * hop_between_nodes
    return 2 * (ranks - 1) / ranks * size / bandwidth + min(ring, tree)


def gather_seconds(size: float, nodes: int) -> float:
    """An all-gather or a reduce-scatter of `size` bytes over whole nodes: a ring, half of an all-reduce."""
    ranks = GPUS_PER_NODE * nodes
    bandwidth = NVLINK if nodes == 1 else NETWORK
    start, hop_in_node, hop_between_nodes = RING_LATENCIES
    latency = start + (ranks - nodes) * hop_in_node + (nodes - 1) * hop_between_nodes
    return latency + (ranks - 1) / ranks * size / bandwidth


def fsdp_seconds(unit_parameters: list[int], nodes: int) -> float:
    """The collectives of step 05: gathers in bf16, for forward and backward; reduces in float32."""
    return sum(2 * gather_seconds(2 * n, nodes) + gather_seconds(4 * n, nodes) for n in unit_parameters)


def flops_per_sample(args: argparse.Namespace) -> float:
    """FLOPs of the forward pass, plus twice that number for the backward pass."""
    model = meta_model(args)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 28, 28, dtype=torch.uint8, device="meta"))  # batch norm needs two samples
    return 3.0 * counter.get_total_flops() / 2


def predict_large() -> list[dict[str, Any]]:
    """Seconds of a step's parts on 8, 64 and 1,024 GPUs of the large machine, in bf16."""
    rows = []
    for flags, batch_size in (({"model": "cnn"}, 512), ({"model": "resnet18"}, 512), (BILLION, 256)):
        args = argparse.Namespace(**{**FLAGS, **flags})
        model = meta_model(args)
        parameters = sum(p.numel() for p in model.parameters())
        compute = batch_size * flops_per_sample(args) / (PEAK_FLOPS * UTILIZATION)
        for ranks in WORLD_SIZES:
            nodes = ranks // GPUS_PER_NODE
            row = {"model": args.model, "parameters": parameters, "batch": batch_size, "ranks": ranks}
            row["compute"] = compute
            row["ddp"] = all_reduce_seconds(4 * parameters, GPUS_PER_NODE, nodes)  # gradients in float32
            if flags is BILLION:
                units = load("05").units(args, model)
                unit_parameters = [sum(p.numel() for p in unit.parameters()) for unit in units]
                row["fsdp"] = fsdp_seconds(unit_parameters, nodes)
                # `--replicas`: sharded in a node, and each shard is averaged over the nodes.
                row["hybrid"] = fsdp_seconds(unit_parameters, 1)
                if nodes > 1:
                    shards = [4 * n / GPUS_PER_NODE for n in unit_parameters]
                    row["hybrid"] += sum(all_reduce_seconds(size, 1, nodes) for size in shards)
            rows.append(row)
    return rows


def predict_bytes(flags: dict[str, Any], world_sizes: list[int]) -> list[dict[str, Any]]:
    """Bytes of step 05's model states on rank 0 (`states`), and under DDP (`ddp`).

    torch's fake process group pretends to have that many ranks.
    """
    script = load("05")
    args = argparse.Namespace(**{**FLAGS, **flags})
    rows = []
    for ranks in world_sizes:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        model: Any = meta_model(args)
        script.shard_model(args, model, torch.device("cpu"), init_device_mesh("cpu", (ranks,)))
        shard = sum(p.to_local().nbytes for p in model.parameters())
        whole = sum(p.nbytes for p in model.parameters())
        # Weights, gradients and AdamW's two averages have the same size. AdamW also counts its steps.
        counts = 4 * sum(1 for _ in model.parameters())
        rows.append({**flags, "ranks": ranks, "states": 4 * shard + counts, "ddp": 4 * whole + counts})
        release_meshes()
        dist.destroy_process_group()
    return rows


def measure_bytes(ranks: int) -> int:
    """The bytes of model states that step 05 itself reports for rank 0 after a step."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        flags = [f"--snapshot-dir={folder}/s", f"--metrics={folder}/m", "--epochs=1", "--use-gpu=0"]
        flags += ["--model=vit", *bench.BIG, "--batch-size=8", f"--num-samples={8 * ranks}"]
        bench.run([*words, bench.script("05"), *flags])
        events = [json.loads(line) for line in Path(folder, "m").read_text().splitlines()]
    reports = [event for event in events if event["event"] == "memory"]
    return int(sum(reports[-1]["ranks"][0][:3]))


def main(args: argparse.Namespace) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)  # start the scripts as a user would
    record: dict[str, Any] = {"machine": speedrun.machine(), "torch": torch.__version__.partition("+")[0]}
    record |= {"paper": predict_large(), "bytes": predict_bytes(BILLION, WORLD_SIZES)}
    if not args.paper:
        rows = predict_bytes({"model": "vit", "vit_width": 768, "vit_depth": 12}, [1, 2, 3, 4])
        record["bytes"] += [{**row, "measured": measure_bytes(row["ranks"])} for row in rows]
    if not args.paper and not args.bytes:
        record |= check_predictions()
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--paper", action="store_true", help="only what needs no measurement")
    parser.add_argument("--bytes", action="store_true", help="also measure a rank's bytes, but no seconds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON to this file")
    main(parser.parse_args())
