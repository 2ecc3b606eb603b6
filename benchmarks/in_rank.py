"""What bench.py times inside of a step's own ranks: an epoch, a vote, a save, each beside the bare work.

    python benchmarks/in_rank.py 01 CELLS                                             # bench.py starts these
    torchrun --standalone --nproc-per-node=2 benchmarks/in_rank.py 03 CELLS

CELLS is JSON: a list of objects with `measure` (`loop`, `steps` or `save`), `rounds` (of a loop as many of
them as fit into eight seconds, at least two), `samples` (of a rank in an epoch) and `flags` of the step. Each
cell builds what the step's `main` builds, and takes turns (A B A B …). Rank 0 prints, for each cell, one line
of JSON that begins with `cell: `.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS = 8  # for the rounds of a loop, of which there are two or more

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from common.device import count_gpus, setup_device  # noqa: E402
from common.loading import to_device  # noqa: E402
from common.models import build_model  # noqa: E402
from common.process_group import release_process_group  # noqa: E402
from common.snapshot import snapshots  # noqa: E402
from common.stopping import GracefulStop  # noqa: E402

TIMEOUT = 600.0  # seconds, the scripts' default


def load(step: str) -> ModuleType:
    """A step's train.py, as a module."""
    [path] = ROOT.glob(f"{step}_*/train.py")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("script", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.argv[0] = str(path)
    os.environ.pop("TORCHELASTIC_RUN_ID", None)  # step 02 refuses torchrun, which starts its ranks here
    return script


def seconds(work: Callable[[], Any]) -> float:
    """How long all ranks take, who begin together, until the last one has done its work: alike on all."""
    together()
    begun = time.perf_counter()
    work()
    together()
    took = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def together() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    if dist.is_initialized():
        dist.barrier()


def bare_loop(trainer: Any) -> tuple[list[Any], Callable[[], None]]:
    """An epoch's batches of this rank, on the device, and a loop over them that does nothing else.

    On a GPU it is the loop of a single process, and its step is one CUDA graph.
    """
    model = getattr(trainer, "ddp_model", trainer.model)
    optimizer = trainer.optimizer
    data = trainer.train_loader.dataset
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    rows_of_rank = order[trainer.report.rank :: trainer.report.world_size]
    batches = [to_device(data[rows], trainer.device) for rows in rows_of_rank.split(trainer.args.batch_size)]

    def bare() -> None:
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return batches, graph(trainer, batches) if trainer.device.type == "cuda" else bare


def graph(trainer: Any, batches: list[Any]) -> Callable[[], None]:
    """The loop over the batches as a GPU could do it at best: the CPU starts a step's kernels all at once."""
    args = trainer.args
    model = build_model(args.model, args.precision, args.vit_width, args.vit_depth).to(trainer.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True, capturable=True)
    images, labels = (tensor.clone() for tensor in batches[0])  # a graph reads where it has read before

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # as pytorch.org/docs/stable/notes/cuda.html has it
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()

    def bare(keep: Any = (model, optimizer)) -> None:  # which the graph writes to, and Python would free
        for some_images, some_labels in batches:
            images.copy_(some_images)
            labels.copy_(some_labels)
            captured.replay()

    return bare


def run_batch(trainer: Any, batch: Any) -> None:
    """A step of one batch, which steps 04 and 05 want in a list."""
    trainer.run_batch([batch] if hasattr(trainer.args, "accumulate") else batch)


def on_the_gpu(trainer: Any, batch: Any, steps: int = 5) -> dict[str, float]:
    """Of one step: how many kernels and copies there are, and the seconds that they take."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(steps):
            run_batch(trainer, batch)
        torch.accelerator.synchronize()
    own = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in own) / 1e6
    return {"kernels": len(own) / steps, "busy": busy / steps}


def loop(trainer: Any, rounds: int) -> dict[str, Any]:
    """Seconds of an epoch of the step, and of the same on batches that lie ready; and those of a vote."""
    trainer.stop = GracefulStop(TIMEOUT)
    vote = trainer.stop.requested
    votes: list[float] = []

    def timed() -> bool:
        begun = time.perf_counter()
        stopping = vote()
        votes.append(time.perf_counter() - begun)
        return bool(stopping)

    trainer.stop.requested = timed
    batches, bare = bare_loop(trainer)
    trainer.model.train()
    bare()  # the first steps are slow
    pairs: list[tuple[float, float]] = []
    while len(pairs) < min(2, rounds) or (len(pairs) < rounds and sum(map(sum, pairs)) < SECONDS):
        pairs.append((seconds(trainer.run_epoch), seconds(bare)))
    assert all(weights.isfinite().all() for weights in trainer.model.parameters())  # nobody else wrote there
    samples = sum(len(labels) for _, labels in batches) * trainer.report.world_size
    found = {"pairs": pairs, "samples": samples, "vote": sum(votes) / len(votes)}
    if trainer.device.type == "cuda":
        found |= on_the_gpu(trainer, batches[0])
    return found


def steps(trainer: Any, rounds: int) -> dict[str, Any]:
    """Seconds of each step of the last of some epochs, from one to the next."""
    trainer.stop = GracefulStop(TIMEOUT)
    train = trainer.run_batch
    moments: list[float] = []

    def noted(batch: Any) -> Any:
        moments.append(time.perf_counter())
        return train(batch)

    trainer.run_batch = noted
    for _ in range(rounds):
        moments.clear()
        trainer.run_epoch()
    return {"seconds": [after - before for before, after in itertools.pairwise(moments)]}


def save(trainer: Any, rounds: int) -> dict[str, Any]:
    """Seconds for which a save stops the training, and for copying as many bytes to the same disk.

    In step 05 every rank writes its shards, and the bytes are those of rank 0.
    """
    sharded = hasattr(trainer, "saver")
    # Before its first step, the optimizer has no state.
    run_batch(trainer, trainer.train_loader.dataset[: trainer.args.batch_size])
    folder = trainer.args.snapshot_dir
    folder.mkdir(parents=True, exist_ok=True)
    content = b""
    pairs = []

    def copy() -> None:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    for _ in range(rounds + 1):
        trainer.global_step += 1
        pause = seconds(trainer.save_snapshot)
        if sharded:
            trainer.saver.wait()
        [newest, *_] = snapshots(folder, sharded)
        rank = dist.get_rank() if sharded else 0
        content = (
            b"".join(path.read_bytes() for path in newest.glob(f"__{rank}_*"))
            if sharded
            else newest.read_bytes()
        )
        pairs.append((pause, seconds(copy)))
    return {"pairs": pairs[1:], "bytes": len(content)}  # the first ones make buffers


def one(
    script: ModuleType, cell: dict[str, Any], device: torch.device, ranks: int, folder: str
) -> dict[str, Any]:
    """Let a step's `main` build all it needs, and measure in the place of training."""
    found: dict[str, Any] = {}
    measure = {"loop": loop, "steps": steps, "save": save}[cell["measure"]]
    # Step 05 gives `train` the snapshot that it has found: here, there is none.
    script.Trainer.train = lambda trainer, state=None: found.update(measure(trainer, cell["rounds"]))
    flags = [f"--num-samples={cell['samples'] * ranks}", f"--use-gpu={int(device.type != 'cpu')}"]
    sys.argv[1:] = [*flags, f"--snapshot-dir={folder}", "--epochs=1000", *cell["flags"]]
    args = script.parse_args()
    script.main(args, device) if dist.is_initialized() else script.main(args)
    return found


def end() -> None:
    release_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def main(step: str, cells: list[dict[str, Any]]) -> None:
    script = load(step)
    rank, local_rank, ranks = (
        int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    device = setup_device(None if count_gpus() >= ranks else 0, local_rank)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    with contextlib.ExitStack() as stack:
        if step != "01":
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            stack.callback(end)
        folder = [stack.enter_context(tempfile.TemporaryDirectory()) if rank == 0 else ""]
        if step != "01":
            dist.broadcast_object_list(folder)
        for number, cell in enumerate(cells):
            found = one(script, cell, device, ranks, f"{folder[0]}/{number}")
            if rank == 0:
                print("cell: " + json.dumps({**cell, "step": step, **found}), flush=True)
        together()  # or rank 0 would take the folder from the others


if __name__ == "__main__":
    which, asked = sys.argv[1:]
    main(which, json.loads(asked))
