"""Measures in the ranks of a step: an epoch or a save, compared with the bare work, or single steps.

    python benchmarks/in_rank.py 01 CELLS                                             # bench.py starts these
    torchrun --standalone --nproc-per-node=2 benchmarks/in_rank.py 03 CELLS

CELLS is a JSON list. Each object in it is one measurement: `measure` (`loop`, `steps` or `save`), `rounds`
(`loop` does fewer if they take longer than eight seconds, but at least two), `samples` (of a rank in an
epoch) and `flags` of the step. The step's `main` builds everything, and then this program measures instead of
training. The two sides of a comparison take turns (A B A B …). For each measurement, rank 0 prints one line:
`cell: `, followed by JSON.
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
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

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

LOOP_SECONDS = 8
TIMEOUT = 600.0  # seconds, the scripts' default


def load(step: str) -> ModuleType:
    """A step's train.py as a module. From then on, this process looks as if it had started that script."""
    [path] = ROOT.glob(f"{step}_*/train.py")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("script", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.argv[0] = str(path)
    os.environ.pop("TORCHELASTIC_RUN_ID", None)  # step 02 refuses torchrun, which has started these ranks
    return script


def wait_for_all() -> None:
    """Wait for this rank's GPU, then for all other ranks."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    if dist.is_initialized():
        dist.barrier()


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds from the common start of all ranks until the last one has finished. The same on all ranks."""
    wait_for_all()
    start = time.perf_counter()
    work()
    wait_for_all()
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return elapsed.item()


def bare_loop(trainer: Any) -> tuple[list[Any], Callable[[], None]]:
    """An epoch's batches of this rank, already on the device, and a loop that only trains on them.

    On a GPU it is the loop of a single process, with each step as one CUDA graph.
    """
    model = getattr(trainer, "ddp_model", trainer.model)
    optimizer = trainer.optimizer
    data = trainer.train_loader.dataset
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    rows_of_rank = order[trainer.report.rank :: trainer.report.world_size]
    batches = [to_device(data[rows], trainer.device) for rows in rows_of_rank.split(trainer.args.batch_size)]
    if trainer.device.type == "cuda":
        return batches, cuda_graph_loop(trainer, batches)

    def train() -> None:
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return batches, train


def cuda_graph_loop(trainer: Any, batches: list[Any]) -> Callable[[], None]:
    """A loop over the batches at a GPU's best: the CPU launches all kernels of a step at once."""
    args = trainer.args
    model = build_model(args.model, args.precision, args.vit_width, args.vit_depth).to(trainer.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True, capturable=True)
    images, labels = (tensor.clone() for tensor in batches[0])  # each replay reads these two tensors

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):  # warm-up, as in pytorch.org/docs/stable/notes/cuda.html
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    # The graph writes to the model and the optimizer: the default argument keeps Python from freeing them.
    def train(keep_alive: Any = (model, optimizer)) -> None:
        for next_images, next_labels in batches:
            images.copy_(next_images)
            labels.copy_(next_labels)
            graph.replay()

    return train


def run_batch(trainer: Any, batch: Any) -> None:
    """Train on one batch. Steps 04 and 05 take a list of batches."""
    trainer.run_batch([batch] if hasattr(trainer.args, "accumulate") else batch)


def gpu_work(trainer: Any, batch: Any, steps: int = 5) -> dict[str, float]:
    """Per step: the number of kernels and copies on the GPU, and the seconds that they take together."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(steps):
            run_batch(trainer, batch)
        torch.accelerator.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    busy_seconds = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {"kernels": len(kernels) / steps, "busy": busy_seconds / steps}


def measure_loop(trainer: Any, rounds: int) -> dict[str, Any]:
    """Seconds of epochs, each paired with those of the bare loop; samples of all ranks; seconds of a vote.

    On a GPU, also what its kernels do in a step.
    """
    trainer.stop = GracefulStop(TIMEOUT)
    requested = trainer.stop.requested
    vote_seconds: list[float] = []

    def timed_vote() -> bool:
        start = time.perf_counter()
        stopping = requested()
        vote_seconds.append(time.perf_counter() - start)
        return bool(stopping)

    trainer.stop.requested = timed_vote
    batches, train_bare = bare_loop(trainer)
    trainer.model.train()
    train_bare()  # the first steps are slow
    pairs: list[tuple[float, float]] = []
    total_seconds = 0.0
    while len(pairs) < rounds and (len(pairs) < 2 or total_seconds < LOOP_SECONDS):
        epoch_seconds = seconds_of(trainer.run_epoch)
        bare_seconds = seconds_of(train_bare)
        pairs.append((epoch_seconds, bare_seconds))
        total_seconds += epoch_seconds + bare_seconds
    # A CUDA graph could have written to memory that was no longer its own.
    assert all(weights.isfinite().all() for weights in trainer.model.parameters())
    samples = sum(len(labels) for _, labels in batches) * trainer.report.world_size
    result = {"pairs": pairs, "samples": samples, "vote": sum(vote_seconds) / len(vote_seconds)}
    if trainer.device.type == "cuda":
        result |= gpu_work(trainer, batches[0])
    return result


def measure_steps(trainer: Any, rounds: int) -> dict[str, Any]:
    """Seconds of each step in the last of `rounds` epochs, from the start of a step to the next start."""
    trainer.stop = GracefulStop(TIMEOUT)
    train = trainer.run_batch
    starts: list[float] = []

    def train_and_note_start(batch: Any) -> Any:
        starts.append(time.perf_counter())
        return train(batch)

    trainer.run_batch = train_and_note_start
    for _ in range(rounds):
        starts.clear()
        trainer.run_epoch()
    return {"seconds": [after - before for before, after in itertools.pairwise(starts)]}


def measure_save(trainer: Any, rounds: int) -> dict[str, Any]:
    """Seconds for which a save stops the training, paired with those of writing the same bytes to its disk.

    In step 05 each rank writes its own shards; `bytes` are those of rank 0.
    """
    sharded = hasattr(trainer, "saver")
    # The optimizer has no state before its first step.
    run_batch(trainer, trainer.train_loader.dataset[: trainer.args.batch_size])
    folder = trainer.args.snapshot_dir
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for _ in range(rounds + 1):
        trainer.global_step += 1
        pause = seconds_of(trainer.save_snapshot)
        if sharded:
            trainer.saver.wait()
        newest = snapshots(folder, sharded)[0]
        files = sorted(newest.glob(f"__{dist.get_rank()}_*")) if sharded else [newest]
        content = b"".join(file.read_bytes() for file in files)
        pairs.append((pause, seconds_of(partial(write_to_disk, folder, content))))
    return {"pairs": pairs[1:], "bytes": len(content)}  # the first save allocates buffers


def write_to_disk(folder: Path, content: bytes) -> None:
    """Write a temporary file, and wait until it is on the disk."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


MEASURES = {"loop": measure_loop, "steps": measure_steps, "save": measure_save}


def measure_cell(
    script: ModuleType, cell: dict[str, Any], device: torch.device, world_size: int, folder: str
) -> dict[str, Any]:
    """Let a step's `main` build everything, but measure instead of training. Returns the results."""
    result: dict[str, Any] = {}

    # Step 05 passes the snapshot that it has loaded: here, there is none.
    def measure_instead(trainer: Any, state: Any = None) -> None:
        result.update(MEASURES[cell["measure"]](trainer, cell["rounds"]))

    script.Trainer.train = measure_instead
    flags = [f"--num-samples={cell['samples'] * world_size}", f"--use-gpu={int(device.type != 'cpu')}"]
    sys.argv[1:] = [*flags, f"--snapshot-dir={folder}", "--epochs=1000", *cell["flags"]]
    args = script.parse_args()
    if dist.is_initialized():
        script.main(args, device)
    else:
        script.main(args)
    return result


def end_process_group() -> None:
    release_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def main(step: str, cells: list[dict[str, Any]]) -> None:
    script = load(step)
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = setup_device(None if count_gpus() >= world_size else 0, local_rank)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    with contextlib.ExitStack() as stack:
        if step != "01":
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            stack.callback(end_process_group)
        folder = [""]  # a list, because the ranks exchange lists of objects
        if rank == 0:
            folder[0] = stack.enter_context(tempfile.TemporaryDirectory())
        if step != "01":
            dist.broadcast_object_list(folder)
        for number, cell in enumerate(cells):
            result = measure_cell(script, cell, device, world_size, f"{folder[0]}/{number}")
            if rank == 0:
                print("cell: " + json.dumps({**cell, "step": step, **result}), flush=True)
        wait_for_all()  # or rank 0 would delete the folder too early


if __name__ == "__main__":
    step, cells = sys.argv[1:]
    main(step, json.loads(cells))
