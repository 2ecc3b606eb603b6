"""How long a step will take, before it is run: on this machine, where it can be checked, and on a large one.

    python benchmarks/predict.py --paper       # without measuring: a large machine, and the bytes of a rank
    python benchmarks/predict.py --bytes       # these, and the bytes that step 05 itself reports
    python benchmarks/predict.py               # all; as root also step 04, over slow links between two hosts

A collective of n bytes takes α + β·n seconds: α until the first byte is there, β for each byte (a model as
old as collectives, see Thakur et al., 2005, doi.org/10.1177/1094342005051521). α and β are fitted to ten
sizes. A step takes what a rank does by itself, plus its collectives, one after another: nothing overlaps on a
busy CPU. What a rank does by itself is measured with two runs of one rank side by side, since they share the
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

SIZES = [*(1 << power for power in range(10, 27, 2)), 48_000_000]  # 1 kB to more than resnet18's gradients
SLOW_SIZES = [1 << power for power in range(11, 21)]
SAMPLES = {"cnn": 8192, "resnet18": 512}  # of a rank in an epoch
CASES = [("cnn", 64), ("cnn", 512), ("resnet18", 64)]
TARGETS = 8  # bytes: the ranks' numbers of targets, which they add up in each step
# The flags by which step 05 shards a model.
FLAGS: dict[str, Any] = {"model": "cnn", "precision": "float32", "vit_width": 64, "vit_depth": 4}
FLAGS |= {"no_reshard": False, "activation_checkpointing": False, "cpu_offload": False}

# A DGX H100: eight GPUs with NVLink of 900 GB/s, both directions together; eight network cards of 400 Gbit/s,
# each of which can carry a ring; 989 TFLOP/s in bf16 (NVIDIA's data sheets of H100 SXM and DGX H100). Large
# trainings use about 40 % of that: Llama 3 38 to 43 % (arxiv.org/abs/2407.21783).
FLOPS, USED, NODE = 989e12, 0.4, 8
NVLINK, NETWORK = 450e9, 8 * 50e9  # bytes a second, one way: of a GPU, of a node
# Seconds of a beginning, of a hop in a node and of one between nodes; how they add up, too, is as NCCL itself
# plans it (github.com/NVIDIA/nccl, src/graph/tuning.cc at 01afd20, protocol LL128).
RING, TREE = (10.0e-6, 1.9e-6, 4.0e-6), (4.4e-6, 1.2e-6, 8.5e-6)
LARGE = [8, 64, 1024]
BILLION: dict[str, Any] = {"model": "vit", "vit_width": 2048, "vit_depth": 30}

Link = dict[str, tuple[float, float]]  # of each collective α and β


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """α and β that are least wrong, in proportion, at all sizes."""
    rows = torch.tensor([[1 / seconds, size / seconds] for size, seconds in points], dtype=torch.float64)
    alpha, beta = (
        torch.linalg.lstsq(rows, torch.ones(len(rows), 1, dtype=torch.float64)).solution.flatten().tolist()
    )
    return max(0.0, alpha), beta


def shapes(args: argparse.Namespace) -> torch.nn.Module:
    """The model that these flags ask for, without its numbers."""
    with torch.device("meta"):
        return build_model(args.model, args.precision, args.vit_width, args.vit_depth)


def unit_bytes(name: str) -> tuple[list[int], int]:
    """Of step 05: the bytes of each unit's parameters, and of those that are in none."""
    args = argparse.Namespace(**{**FLAGS, "model": name})
    model = shapes(args)
    of_units = [sum(p.nbytes for p in unit.parameters()) for unit in load("05").units(args, model)]
    return of_units, sum(p.nbytes for p in model.parameters()) - sum(of_units)


def talk(step: str, model: str, link: Link) -> float:
    """Seconds of a step's collectives, one after another."""
    units, rest = unit_bytes(model)

    def takes(collective: str, size: int) -> float:
        alpha, beta = link[collective]
        return alpha + beta * size if size else 0.0

    counted = takes("all_reduce", TARGETS)
    if step != "05":
        return counted + takes("all_reduce", sum(units) + rest)
    gathered = 2 * sum(takes("all_gather", size) for size in units) + takes("all_gather", rest)
    return counted + gathered + sum(takes("reduce_scatter", size) for size in [*units, rest])


def collectives_here() -> dict[str, list[tuple[int, float]]]:
    words = [*bench.TORCHRUN, str(ROOT / "benchmarks" / "collectives.py"), ",".join(map(str, SIZES))]
    return dict(json.loads(bench.run(words, OMP_NUM_THREADS="1").splitlines()[-1]))


def collectives_over(link: tuple[float, float]) -> dict[str, list[tuple[int, float]]]:
    """The same between two hosts with a slow cable."""
    with tempfile.TemporaryDirectory() as scratch, network(Path(scratch, "net"), 2, link) as net:
        running = []
        for rank, host in enumerate(net.hosts):
            words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
            words += ["--nproc-per-node=1", f"--master-addr={net.hosts[0].address}", "--master-port=29400"]
            words += [str(ROOT / "benchmarks" / "collectives.py"), ",".join(map(str, SLOW_SIZES))]
            running.append(host.start(" ".join(words), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
        out = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            raise SystemExit("\n".join(out))
    return dict(json.loads(out[0].splitlines()[-1]))


def steps(step: str, model: str, size: int, of_a_run: int) -> list[list[float]]:
    """Seconds of each step of two ranks, in one run or in a run each: of each run's rank 0."""
    cell = {"measure": "steps", "rounds": 2, "samples": max(2 * size, SAMPLES[model])}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={of_a_run}"]
    words += [str(ROOT / "benchmarks" / "in_rank.py"), step]
    words.append(json.dumps([{**cell, "flags": [f"--model={model}", f"--batch-size={size}"]}]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    starts = range(bench.RANKS // of_a_run)
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) for _ in starts]
    out = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a run ended with an error: see its output above")
    return [json.loads(text.partition("cell: ")[2].splitlines()[0])["seconds"] for text in out]


def seconds_a_step(step: str, model: str, size: int) -> tuple[float, float]:
    """Of two ranks apart, the slower one of each pair of steps; and of two ranks together. In turns."""
    turns = []
    for _ in range(3):
        apart = statistics.mean(map(max, *steps(step, model, size, 1)))
        turns.append((apart, statistics.mean(steps(step, model, size, bench.RANKS)[0])))
    apart, together = map(statistics.median, zip(*turns, strict=True))
    return apart, together


def measured() -> dict[str, Any]:
    """Predictions for this machine, and what came."""
    found: dict[str, Any] = {"collectives": {"this machine": collectives_here()}, "steps": []}
    here = {name: fit(points) for name, points in found["collectives"]["this machine"].items()}

    def compare(step: str, model: str, size: int, link: Link, where: str, own: float, took: float) -> None:
        row = {"step": step, "model": model, "batch": size, "link": where, "alone": own}
        found["steps"].append({**row, "predicted": own + talk(step, model, link), "measured": took})
        print(json.dumps(found["steps"][-1]), file=sys.stderr, flush=True)

    for step in ("03", "05"):
        for model, size in CASES:
            compare(step, model, size, here, "this machine", *seconds_a_step(step, model, size))
    if not possible():
        warn(f"step 04 over slow links is left out: it {WHY}")
        return found
    own, _ = seconds_a_step("04", "cnn", 64)
    for where, link in slow_link.LINKS.items():
        if link:
            points = found["collectives"][where] = collectives_over(link)
            took, _ = slow_link.measure(link, 1)
            compare("04", "cnn", 64, {name: fit(each) for name, each in points.items()}, where, own, took)
    return found


def all_reduce(size: float, of_node: int, nodes: int) -> float:
    """NCCL's on the large machine: a ring has the bandwidth, a tree few hops, and the faster one is taken."""
    ranks = of_node * nodes
    # One GPU of each node has one network card, the whole node has all of them.
    speed = NVLINK if nodes == 1 else NETWORK if of_node == NODE else NETWORK / NODE
    begin, near, far = RING
    ring = begin + 2 * (ranks - nodes) * near + 2 * (nodes - 1) * far
    begin, near, far = TREE
    tree = begin + 2 * (of_node - 1) * near + 2 * math.log2(nodes) * far
    return 2 * (ranks - 1) / ranks * size / speed + min(ring, tree)


def gather(size: float, nodes: int) -> float:
    """An all-gather or a reduce-scatter of so many bytes, over whole nodes: a ring, half of an all-reduce."""
    ranks = NODE * nodes
    begin, near, far = RING
    band = (ranks - 1) / ranks * size / (NVLINK if nodes == 1 else NETWORK)
    return begin + (ranks - nodes) * near + (nodes - 1) * far + band


def flops(args: argparse.Namespace) -> float:
    """Of one sample: forward, and twice as many for the gradients."""
    model = shapes(args)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 28, 28, dtype=torch.uint8, device="meta"))  # batch norm wants more than one
    return 3.0 * counter.get_total_flops() / 2


def on_paper() -> list[dict[str, Any]]:
    """Seconds of a step's parts on 8, 64 and 1,024 GPUs of the large machine, in bf16."""
    rows = []
    for flags, size in (({"model": "cnn"}, 512), ({"model": "resnet18"}, 512), (BILLION, 256)):
        args = argparse.Namespace(**{**FLAGS, **flags})
        model = shapes(args)
        parameters = sum(p.numel() for p in model.parameters())
        compute = size * flops(args) / (FLOPS * USED)
        for ranks in LARGE:
            nodes = ranks // NODE
            ddp = all_reduce(4 * parameters, NODE, nodes)  # gradients in float32
            row = {"model": args.model, "parameters": parameters, "batch": size, "ranks": ranks}
            row |= {"compute": compute, "ddp": ddp}
            if flags is BILLION:  # step 05: gathers in bf16, reduces in float32
                script = load("05")
                blocks = [sum(p.numel() for p in unit.parameters()) for unit in script.units(args, model)]
                row["fsdp"] = sum(2 * gather(2 * n, nodes) + gather(4 * n, nodes) for n in blocks)
                # `--replicas`: sharded in a node, and each shard averaged over the nodes.
                inside = sum(2 * gather(2 * n, 1) + gather(4 * n, 1) for n in blocks)
                between = sum(all_reduce(4 * n / NODE, 1, nodes) for n in blocks) if nodes > 1 else 0.0
                row["hybrid"] = inside + between
            rows.append(row)
    return rows


def bytes_of_a_rank(flags: dict[str, Any], worlds: list[int]) -> list[dict[str, Any]]:
    """Of step 05's model on rank 0, at world sizes that are not there: torch's fake process group."""
    script = load("05")
    args = argparse.Namespace(**{**FLAGS, **flags})
    rows = []
    for ranks in worlds:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        model: Any = shapes(args)
        script.shard_model(args, model, torch.device("cpu"), init_device_mesh("cpu", (ranks,)))
        shard = sum(p.to_local().nbytes for p in model.parameters())
        # Gradients are as large as the shards, and so is each of AdamW's two averages. It counts steps, too.
        counts = 4 * sum(1 for _ in model.parameters())
        row = {**flags, "ranks": ranks, "states": 4 * shard + counts}
        rows.append({**row, "ddp": 4 * sum(p.nbytes for p in model.parameters()) + counts})
        release_meshes()
        dist.destroy_process_group()
    return rows


def bytes_measured(ranks: int) -> int:
    """What step 05 itself says that rank 0 holds after a step."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        flags = [f"--snapshot-dir={folder}/s", f"--metrics={folder}/m", "--epochs=1", "--use-gpu=0"]
        flags += ["--model=vit", *bench.BIG, "--batch-size=8", f"--num-samples={8 * ranks}"]
        bench.run([*words, bench.script("05"), *flags])
        events = [json.loads(line) for line in Path(folder, "m").read_text().splitlines()]
    row = [event["ranks"][0] for event in events if event["event"] == "memory"][-1]
    return int(sum(row[:3]))


def main(args: argparse.Namespace) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    record: dict[str, Any] = {"machine": speedrun.machine(), "torch": torch.__version__.partition("+")[0]}
    record |= {"paper": on_paper(), "bytes": bytes_of_a_rank(BILLION, LARGE)}
    if not args.paper:
        rows = bytes_of_a_rank({"model": "vit", "vit_width": 768, "vit_depth": 12}, [1, 2, 3, 4])
        record["bytes"] += [{**row, "measured": bytes_measured(row["ranks"])} for row in rows]
    if not args.paper and not args.bytes:
        record |= measured()
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--paper", action="store_true", help="only what needs no measuring")
    parser.add_argument("--bytes", action="store_true", help="also measure a rank's bytes, but no seconds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    main(parser.parse_args())
