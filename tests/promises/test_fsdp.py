"""Step 05: its flags do not change what is learned, memory falls, a snapshot is complete or not there.

Promise: FSDP, with each of its flags, learns what DDP learns. Its bytes per rank fall as they should.
Training continues while a snapshot is written.
"""

import argparse
import functools
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    GROWN,
    NORMED,
    ROOT,
    after_a_step,
    command,
    disagreements,
    errors,
    finish,
    largest_difference,
    left_over,
    load,
    newest,
    planted,
    saved,
    start,
    train,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import sharded
from common import snapshot
from common.mnist import Digits
from common.models import build_model
from common.reporting import Reporter
from common.run import Run
from common.synthetic import synthetic_digits

STEP = "05"
SCRIPT = ROOT / FOLDERS[STEP] / "train.py"


@pytest.mark.parametrize("flags", [[], ["--use-gpu=1"]], ids=["unset", "asked for"])
def test_without_a_gpu_it_names_the_flag(tmp_path, flags):
    status, out, err = finish(start([*command(STEP, 2), "--num-samples=128", *flags], tmp_path))
    print(out, err)
    assert status == 1 and "exitcode  : 2" in err  # torchrun's own status, and the script's
    root_cause = err.partition("Root Cause")[2]  # at the very end
    assert "traceback : error: FSDP is for GPUs, and there are none here: practice on CPUs" in root_cause
    assert errors(err) == [
        "error: FSDP is for GPUs, and there are none here: practice on CPUs with --use-gpu 0"
    ]
    assert out == ""


# Ranks, flags, and how far the weights may be from step 03's: for a sum of four numbers, the order matters.
WAYS = {
    "activations computed twice": (2, ["--activation-checkpointing", "--model=vit", "--vit-depth=2"], 0.0),
    "gathered, offloaded, from meta": (2, ["--no-reshard", "--cpu-offload", "--meta-init"], 0.0),
    "two replicas of two shards": (4, ["--replicas=2", "--meta-init"], 1e-12),
}


FEW = ["--num-samples=259", "--epochs=2", "--precision=float64"]  # 42 steps, with a remainder


@pytest.mark.few(1)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_the_same_function(once, tmp_path, way):
    ranks, flags, tolerance = WAYS[way]
    same = [*FEW, f"--batch-size={GLOBAL_BATCH // ranks}"]
    run = train(STEP, ranks, tmp_path, *same, *flags)
    other = once("03", ranks, *same, *[flag for flag in flags if flag.startswith(("--model", "--vit"))])
    difference = largest_difference(run.weights, other.weights)
    print(f"{way}, {ranks} ranks: {difference} from step 03")
    assert difference <= tolerance
    assert len(run.losses) == 42 and run.test["correct"] == other.test["correct"]


def test_accumulating_and_clipping_are_step_04s(once, tmp_path):
    flags = [*FEW, f"--batch-size={GLOBAL_BATCH // 6}", "--accumulate=3", "--clip-norm=0.5"]
    run, other = (train(step, 2, tmp_path / step, *flags) for step in (STEP, "04"))
    difference = largest_difference(run.weights, other.weights)
    without = largest_difference(
        run.weights, once(STEP, 2, *FEW, "--batch-size=6").weights
    )  # without --accumulate, too
    print(f"step 05 against step 04: {difference}; without --clip-norm {without:.1e}")
    assert difference <= 1e-12  # the norm's squares are added in another order
    assert without > 1e-6
    assert disagreements(run, other) == []


def test_ranks_with_a_batch_of_test_images_more_do_not_wait_for_ever(tmp_path):
    """The ranks have 11, 10 and 10 images, in batches of 10: without padding, rank 0 would gather again."""
    flags = ["--num-samples=186", "--batch-size=12", "--epochs=1", "--timeout=20", "--eval-batch-size=10"]
    run = train(STEP, 3, tmp_path, *flags)
    print(run.test)
    assert run.test["total"] == 186 // 6


def build_sharded(script, args, mesh):
    """The model as step 05's main() builds it at the start of a run."""
    device = torch.device("cpu")
    build = functools.partial(build_model, args.model, args.precision, args.vit_width, args.vit_depth)
    with torch.device("meta" if args.meta_init else "cpu"):
        model = build()
    script.shard_model(args, model, device, mesh)
    if args.meta_init:
        model.to_empty(device=device)
        script.fsdp_options.initialize(model, build, device, resumes=False)
    return model


BIG = {"model": "vit", "vit_width": 768, "vit_depth": 12, "meta_init": True}


def bytes_of_rank_0(ranks, **changed):
    """The bytes of parameters, gradients, AdamW's state and gathered units after a step; and the model.

    This is in PyTorch's "fake" group: there are no other ranks, and collectives return immediately.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    script, args = load(SCRIPT), argparse.Namespace(**{**FLAGS, **changed})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    gathered = []
    try:
        model = build_sharded(script, args, init_device_mesh("cpu", (ranks,)))
        for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
            unit.register_forward_pre_hook(
                lambda *_: gathered.append(
                    sum(p.nbytes for p in model.parameters() if not isinstance(p, DTensor))
                )
            )
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.zeros(1, 28, 28, dtype=torch.uint8)).sum().backward()
        optimizer.step()
    finally:
        dist.destroy_process_group()
    slots = [slot for state in optimizer.state.values() for slot in state.values()]
    kinds = (model.parameters(), [p.grad for p in model.parameters()], slots)
    local = [[t.to_local() if isinstance(t, DTensor) else t for t in kind] for kind in kinds]
    return [*(sum(t.nbytes for t in kind) for kind in local), max(gathered)], model


@pytest.mark.sample(2)
@pytest.mark.few(1)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_bytes_per_rank_fall_with_the_ranks(ranks):
    """With 56.8 million parameters."""
    row, model = bytes_of_rank_0(ranks, **BIG)
    count = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.net.encoder.layers[0].parameters())
    assert count >= 50_000_000
    # Each parameter has one gradient and AdamW's two moments; a float32 has four bytes.
    expected = 16 * count / ranks + 4 * block
    print(f"{ranks} ranks: {sum(row) / 1e6:.1f} MB, expected {expected / 1e6:.1f} MB, within 2 %")
    assert abs(sum(row) - expected) <= 0.02 * expected
    for found, size in zip(row, (4, 4, 8), strict=False):
        assert abs(found - size * count / ranks) <= 0.02 * size * count / ranks


def test_the_bytes_of_real_ranks_are_those_of_the_fake_ones(tmp_path):
    """Two ranks with gloo, and the report that they print, for a small vit."""
    flags = ["--model=vit", "--vit-depth=2", "--num-samples=24", "--epochs=1", "--batch-size=12"]
    run = train(STEP, 2, tmp_path, *flags)
    report = [event for event in run.events if event["event"] == "memory"][-1]
    row, model = bytes_of_rank_0(2, vit_depth=2)
    count = sum(p.numel() for p in model.parameters())
    print(run.out, row)
    assert report["ranks"][0] == [*row, sum(row)]
    for found, size in zip(report["ddp"], (4, 4, 8), strict=True):
        assert 0 <= found - size * count <= 4 * 200  # AdamW also counts its steps, once for each tensor
    for kind in range(3):
        parts = sum(row[kind] for row in report["ranks"])
        # Each rank has AdamW's step counts, four bytes for each tensor, and no shard is padded by much.
        assert 0 <= parts - report["ddp"][kind] <= 4 * 200
    assert "each under DDP" in run.out


@pytest.fixture
def alone():
    """The mesh of a group in which this process is the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


FLAGS = {
    "model": "vit",
    "vit_width": 64,
    "vit_depth": 4,
    "precision": "float32",
    "compile": False,
    "replicas": 1,
    "timeout": 60,
    "no_reshard": False,
    "activation_checkpointing": False,
    "cpu_offload": False,
    "meta_init": False,
}


def test_on_a_gpu_the_allocators_peak_stands_beside_the_table():
    """It is 0 where there is no GPU. test_gpu.py shows that it agrees with the table."""
    model, said, written = torch.nn.Linear(3, 5), [], {}
    report = argparse.Namespace(say=said.append, write=lambda event, **values: written.update(values))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        memory = load(SCRIPT.with_name("memory.py")).MemoryReport
        memory(model, torch.optim.AdamW(model.parameters()), torch.device("cuda"), report).table("now")
    finally:
        dist.destroy_process_group()
    print(*said, sep="\n")
    names = ["now", "parameters", "gradients", "optimizer", "gathered", "peak", "allocator"]
    assert said[0].split() == names and said[1].split()[-2:] == ["0.00", "MB"]
    assert written == {"moment": "now", "ranks": [[80, 0, 0, 0, 80, 0]], "ddp": [80, 0, 0]}


GATHERED = {"as usual": {}, "kept": {"no_reshard": True}, "bf16": {"precision": "bf16"}}


def first_step(tmp_path, monkeypatch, mesh, batch_size, number=0, **changed):
    """Step 05's report of bytes after one step on `mesh`, and the model."""
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    script, device = load(SCRIPT), torch.device("cpu")
    size = batch_size * dist.get_world_size()
    data = Digits(*synthetic_digits(size, seed=0), f"synthetic-{size}")
    defaults = vars(script.make_parser(str(SCRIPT), "").parse_args([]))
    args = argparse.Namespace(**{**defaults, **FLAGS, **changed, "batch_size": batch_size})
    args.accumulate, args.clip_norm, args.metrics = 1, None, tmp_path / f"metrics-{number}"
    with warnings.catch_warnings(action="ignore"):
        model = build_sharded(script, args, mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        report = Reporter(Run(args.step, "model", data.name, args.precision, 0), device, args.metrics)
        trainer = script.Trainer(args, device, model, optimizer, data, data, None, report)
        trainer.stop = script.GracefulStop(args.timeout)
        trainer.run_epoch()
    trainer.report.end(1)
    reports = [json.loads(line) for line in args.metrics.read_text().splitlines()]
    return next(report for report in reports if report["event"] == "memory"), model


def test_what_is_gathered(alone, tmp_path, monkeypatch):
    """One block and the root; with --no-reshard, everything; with bf16, half of the bytes."""
    rows = {}
    for number, (name, changed) in enumerate(GATHERED.items()):
        report, model = first_step(tmp_path, monkeypatch, alone, batch_size=8, number=number, **changed)
        rows[name] = report["ranks"][0]
    block = 4 * sum(p.numel() for p in model.net.encoder.layers[0].parameters())
    whole = 4 * sum(p.numel() for p in model.parameters())
    root = whole - 4 * block
    print(f"{rows}; a block {block}, the root {root}, all {whole} bytes")
    assert rows["as usual"][3] == block + root
    assert rows["kept"][3] == whole
    assert rows["bf16"][3] == (block + root) / 2
    assert {row[0] for row in rows.values()} == {whole}  # kept in float32, whatever the precision


def kept_for_backward(model, images):
    """The bytes that a forward pass keeps for the backward pass, weights included."""
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(images).sum().backward()
    return kept


def test_activation_checkpointing_keeps_less(alone):
    script = load(SCRIPT)
    images, _ = synthetic_digits(256, seed=0)
    kept = {}
    for flag in (False, True):
        args = argparse.Namespace(**{**FLAGS, "activation_checkpointing": flag, "no_reshard": True})
        kept[flag] = kept_for_backward(build_sharded(script, args, alone), images)
    print(f"kept for the backward pass: {kept[False]:,} bytes, with checkpointing {kept[True]:,}")
    assert kept[True] < kept[False] / 2


@pytest.mark.few(1)
@pytest.mark.parametrize("flag", ["", "--no-reshard"])
def test_nothing_stays_gathered_after_a_test(tmp_path, flag):
    """A backward pass would free it, but none follows."""
    sums = "        dist.all_reduce(totals)\n"
    looks = "        whole = [p for p in self.model.parameters() if not hasattr(p, 'to_local')]\n"
    looks += "        self.report.say(f'whole {len(whole)}', self.rank)\n"
    root = planted(tmp_path / "root", STEP, (sums, looks + sums))
    flags = ["--num-samples=24", "--batch-size=12", "--epochs=1", *flag.split()]
    run = train(STEP, 2, tmp_path, *flags, root=root)
    assert run.out.count("whole 0") == 2


# After a micro-batch: whether the gradients are those of all ranks.
REDUCED = {
    "04": "(both := [0, 0], dist.all_gather_object(both, [p.grad.sum().item() for p in model.parameters()]),"
    " both[0] == both[1])[-1]",
    STEP: "any(p.grad is not None for p in model.parameters())",
}


@pytest.mark.parametrize("step", REDUCED)
def test_gradients_are_reduced_once_in_a_step(tmp_path, step):
    """Otherwise, with --accumulate, the network would carry every micro-batch's, for the same sums."""
    adds = "            step_loss += loss.detach()\n"
    looks = f"            model = self.model\n            done = {REDUCED[step]}\n"
    looks += "            self.report.say(f'part {number} reduced {done}', self.rank)\n"
    root = planted(tmp_path / "root", step, (adds, looks + adds))
    flags = ["--num-samples=72", "--batch-size=12", "--accumulate=3", "--epochs=1"]
    run = train(step, 2, tmp_path, *flags, root=root)
    parts = re.findall(r"part \d reduced \w+", run.out)
    assert sorted(parts) == [f"part {part} reduced {part == 3}" for part in (1, 1, 2, 2, 3, 3)]


@pytest.mark.few(2)
@pytest.mark.parametrize("step", GROWN)
def test_there_may_be_fewer_test_images_than_ranks(tmp_path, step):
    run = train(step, 3, tmp_path, "--num-samples=12", "--batch-size=4", "--epochs=1")
    assert run.test["total"] == 2


@pytest.mark.slow
def test_an_optimizer_from_before_fully_shard_is_refused(tmp_path):
    """Without our check, it trains nothing, and nobody notices until the first snapshot."""
    right = "optimizer = torch.optim.AdamW(model.named_parameters(), "
    early = (right, "optimizer = torch.optim.AdamW(build().parameters(), ")
    flags = ["--num-samples=240", "--batch-size=12", "--use-gpu=0", "--epochs=1"]
    root = planted(tmp_path / "checked", STEP, early)
    status, _, err = finish(start([*command(STEP, 2, root), *flags], tmp_path))
    print(err[-1500:])
    assert status == 1 and "TypeError: the optimizer was built before fully_shard" in err
    unchecked = ("    fsdp_options.check_sharded(optimizer)", "    # ")
    total = "sum(p.full_tensor().abs().sum() for p in self.model.parameters())"
    says = after_a_step(f"self.report.say(f'weights {{{total}}}')")
    for name, edits in {"early": [early], "in time": []}.items():
        root = planted(tmp_path / name, STEP, *edits, unchecked, says)
        _, out, _ = finish(start([*command(STEP, 2, root), *flags], tmp_path))
        weights = [line for line in out.splitlines() if line.startswith("weights")]
        print(f"optimizer built {name}: {len(set(weights))} different weights in {len(weights)} steps")
        assert len(weights) == 10
        assert len(set(weights)) == (1 if name == "early" else 10)


SAVING = ["--num-samples=457", "--epochs=2", "--precision=float64", "--save-every=10", "--batch-size=12"]


@pytest.fixture
def uninterrupted(once):
    return once(STEP, 2, *SAVING)


def test_training_goes_on_while_a_snapshot_is_written_and_ends_when_it_cannot_be(tmp_path):
    """With a slow disk, two more steps are done before the next snapshot waits. Then the disk fails."""
    slow = sharded.unfinished(tmp_path / "snapshots", 2) / "__1_0.distcp"
    slow.parent.mkdir(parents=True)
    os.mkfifo(slow)
    root = planted(tmp_path / "root", STEP, after_a_step("self.report.say(f'stepped {self.global_step}')"))
    flags = ["--num-samples=480", "--batch-size=12", "--epochs=1", "--save-every=2", "--use-gpu=0"]
    process = start([*command(STEP, 2, root), *flags, "--snapshot-dir=snapshots"], tmp_path)
    try:
        process.wait_for("stepped 4\n")
        slow.read_bytes()  # now rank 1 can write; but it finds that a pipe is not a file
    finally:
        status, out, err = finish(process)
    print(f"{out.count('stepped')} steps\n{errors(err)}")
    assert "stepped 5" not in out
    assert status == 1 and "exitcode  : 2" in err
    assert len(errors(err)) == 1 and errors(err)[0].startswith("error: rank 1 cannot write its shards: ")
    assert "Illegal seek" in errors(err)[0]
    assert not snapshot.snapshots(tmp_path / "snapshots", sharded=True)


SLOW_DISK = """
def wait_for_step_3(self, plan, planner, write=dcp.FileSystemWriter.write_data):
    while not os.path.exists("step 3 is done"):
        __import__("time").sleep(0.01)
    return write(self, plan, planner)


dcp.FileSystemWriter.write_data = wait_for_step_3


class Trainer:"""


def test_what_is_saved_in_the_background_is_what_there_was(tmp_path):
    """The shards of step 2 are written after step 3 has changed the weights. The snapshot has step 2's."""
    keeps = (
        "weights = {n: p.full_tensor() for n, p in self.model.named_parameters()}; "
        "torch.save(weights, f'rank-{self.rank}-step-{self.global_step}'); "
        "self.global_step == 3 and open('step 3 is done', 'w').close()"
    )
    root = planted(tmp_path / "root", STEP, ("\nclass Trainer:", SLOW_DISK), after_a_step(keeps))
    train(STEP, 2, tmp_path, "--num-samples=96", "--batch-size=12", "--epochs=1", "--save-every=2", root=root)
    path = tmp_path / "snapshots" / "snapshot-00000002"
    saved = load(SCRIPT.with_name("convert.py")).gather(sharded.read(path)[0])["model"]
    step_2, step_3 = (torch.load(tmp_path / f"rank-0-step-{step}") for step in (2, 3))
    right, wrong = largest_difference(saved, step_2), largest_difference(saved, step_3)
    print(f"the snapshot of step 2 against the weights of step 2: {right} (0.0), of step 3: {wrong} (> 0)")
    assert right == 0.0 and wrong > 0


def test_an_error_waits_for_a_snapshot_that_is_being_written(tmp_path):
    """It ends the groups with which the ranks tell each other that all shards are there."""
    fails = (
        "if self.global_step == 3: open('step 3 is done', 'w').close(); raise ZeroDivisionError('planted')"
    )
    root = planted(tmp_path / "root", STEP, ("\nclass Trainer:", SLOW_DISK), after_a_step(fails))
    flags = ["--num-samples=96", "--batch-size=12", "--epochs=1", "--save-every=2", "--use-gpu=0"]
    status, _, err = finish(start([*command(STEP, 2, root), *flags, "--snapshot-dir=s"], tmp_path))
    print(err)
    assert status == 1 and "ZeroDivisionError: planted" in err
    assert saved(tmp_path / "s") == [2] and left_over(tmp_path / "s") == []
    assert sharded.read(tmp_path / "s" / "snapshot-00000002")[1] == ""


def test_a_run_that_stops_does_not_say_saved_when_it_is_not(tmp_path):
    fails = (
        "                    path = commit(folder, ",
        "                    raise OSError(28, 'planted')\n                    path = commit(folder, ",
    )
    root = planted(tmp_path / "root", "05_fsdp/sharded.py", fails)
    planted(root, STEP, after_a_step("self.global_step == 2 and os.kill(os.getpid(), signal.SIGTERM)"))
    flags = ["--num-samples=480", "--batch-size=4", "--epochs=1", "--use-gpu=0", "--snapshot-dir=s"]
    status, out, err = finish(start([*command(STEP, 2, root), *flags], tmp_path))
    print(out, err)
    # Rank 0 reports it and ends. torchrun then ends rank 1, which may still be on its way out.
    said = [line for line in errors(err) if "rank 1 received SIGTERM for the second time" not in line]
    assert status == 1 and said == [f"error: cannot write to s: planted; {snapshot.REMEDY}"]
    assert "SIGTERM" not in out and "done" not in out


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("error", "said"),
    [("OSError(28, 'planted')", f"planted; {snapshot.REMEDY}"), ("ValueError('planted')", "planted")],
)
def test_a_snapshot_that_failed_stops_the_run_before_the_next_one(tmp_path, error, said):
    """The disk has room again by then. But a lost snapshot must be reported, and all ranks must stop."""
    finishes = "                    path = commit(folder, "
    fails = f"                    if state['global_step'] == 2:\n                        raise {error}\n"
    root = planted(tmp_path / "root", "05_fsdp/sharded.py", (finishes, fails + finishes))
    flags = ["--num-samples=96", "--batch-size=12", "--epochs=1", "--save-every=2", "--use-gpu=0"]
    status, out, err = finish(start([*command(STEP, 2, root), *flags, "--snapshot-dir=s"], tmp_path))
    print(out, err)
    assert status == 1 and errors(err) == [f"error: cannot write to s: {said}"]
    assert err.count("exitcode  : 2 ") == 2
    assert "done" not in out and not [*(tmp_path / "s").glob("snapshot-*")]


def test_what_is_saved_already_is_not_written_again(tmp_path):
    """A run that was stopped in an epoch's last step is at the end of the epoch as soon as it resumes."""
    flags = ["--num-samples=96", "--batch-size=12", "--epochs=1", "--use-gpu=0", "--snapshot-dir=s"]
    stops = after_a_step("self.global_step == 4 and os.kill(os.getpid(), signal.SIGTERM)")
    # The vote that ranks begin in one step is read in the next: here, in the same one.
    votes = (
        "            stopping = self.stop.requested()\n",
        "            self.stop.stopping = stopping = signal.SIGTERM if self.global_step == 4 else 0\n",
    )
    root = planted(tmp_path / "root", STEP, votes, stops)
    status, out, err = finish(start([*command(STEP, 2, root), *flags], tmp_path))
    print(out, err)
    path = tmp_path / "s" / "snapshot-00000004"
    before = path.stat().st_ino
    status, out, err = finish(start([*command(STEP, 2), *flags], tmp_path))
    print(out, err)
    assert status == 0 and "resumed from s: epoch 0, step 4\n" in out
    assert path.stat().st_ino == before and saved(tmp_path / "s") == [4]


def test_shards_of_another_model_are_not_loaded(tmp_path):
    """The code has changed, but the name that the flags give to the run has not."""
    flags = ["--num-samples=96", "--batch-size=12", "--epochs=1"]
    train(STEP, 2, tmp_path, *flags)
    narrower = [
        ("nn.Linear(32 * 7 * 7, 128)", "nn.Linear(32 * 7 * 7, 64)"),
        ("nn.Linear(128, 10)", "nn.Linear(64, 10)"),
    ]
    root = planted(tmp_path / "root", "common/models.py", *narrower, steps=(STEP,))
    words = [*command(STEP, 2, root), *flags, "--epochs=2", "--use-gpu=0", "--snapshot-dir=snapshots"]
    status, out, err = finish(start(words, tmp_path))
    print(out, err)
    (line,) = errors(err)
    assert status == 1 and re.match(
        r"error: snapshots/snapshot-00000004 cannot be loaded \(written by .*\): ", line
    )
    assert line.endswith("; to resume from the one before, move it away") and "Size mismatch" in line.replace(
        "size", "Size"
    )


def test_with_as_many_replicas_as_ranks_each_rank_holds_all(tmp_path):
    flags = ["--num-samples=24", "--batch-size=12", "--epochs=1", "--model=vit", "--vit-depth=1"]
    run = train(STEP, 2, tmp_path, *flags, "--replicas=2")
    report = [event for event in run.events if event["event"] == "memory"][-1]
    assert [row[:3] for row in report["ranks"]] == [report["ddp"]] * 2


def test_from_meta_the_averages_of_batch_norm_begin_as_they_should(tmp_path):
    root = planted(tmp_path / "root", "common/models.py", NORMED, steps=(STEP,))
    flags = ["--num-samples=96", "--batch-size=16", "--epochs=1", "--precision=float64"]
    whole, meta = (
        train(STEP, 3, tmp_path / f"run{flag}", *flags, *flag, root=root) for flag in ([], ["--meta-init"])
    )
    assert meta.test["loss"] == whole.test["loss"] and meta.losses.equal(whole.losses)


SAYS_WHERE = [
    (
        "    model = Normalized(net, name)\n",
        "    print('built on', torch.get_default_device())\n    model = Normalized(net, name)\n",
    ),
]
# What no snapshot contains: numbers that were drawn when the model was built, and are added to the logits.
DRAWN = [
    (
        "        self.name = name\n",
        "        self.name = name\n        self.register_buffer('drawn', torch.rand(10), persistent=False)\n",
    ),
    (
        "        return self.net(((pixels - MEAN) / STD).to(dtype))",
        "        return self.net(((pixels - MEAN) / STD).to(dtype)) + self.drawn",
    ),
]


@pytest.mark.few(1)
@pytest.mark.parametrize("drawn", [False, True], ids=["all of it saved", "a buffer that is not"])
def test_a_resume_from_meta_builds_only_what_no_snapshot_has(tmp_path, drawn):
    """With --meta-init, rank 0 builds the whole model once; a resumed run, only for such a buffer."""
    edits = [*SAYS_WHERE, *(DRAWN if drawn else [])]
    root = planted(tmp_path / "root", "common/models.py", *edits, steps=(STEP,))
    flags = ["--num-samples=48", "--batch-size=4", "--precision=float64", "--meta-init"]
    whole = train(STEP, 3, tmp_path / "whole", *flags, "--epochs=2", root=root)
    first = train(STEP, 3, tmp_path / "resumed", *flags, "--epochs=1", root=root)
    resumed = train(STEP, 3, tmp_path / "resumed", *flags, "--epochs=2", root=root)
    for run, times in ((whole, 1), (first, 1), (resumed, int(drawn))):
        assert run.out.count("built on meta") == 3 and run.out.count("built on cpu") == times
    assert largest_difference(resumed.weights, whole.weights) == 0.0
    assert resumed.test["loss"] == whole.test["loss"]


@pytest.mark.few(6)
@pytest.mark.parametrize("victim", ["__0_0.distcp", "__1_0.distcp", ".metadata", "state.pt"])
@pytest.mark.parametrize("damage", ["flipped bit", "half", "missing"])
def test_a_damaged_shard_is_named_and_the_one_before_is_used(uninterrupted, tmp_path, capsys, victim, damage):
    folder = shutil.copytree(uninterrupted.snapshot_dir, tmp_path / "snapshots")
    last, before, _ = snapshot.snapshots(folder, sharded=True)
    file = last / victim
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if damage == "half" else content)
    if damage == "missing":
        file.unlink()
    run = Run("05_fsdp", "cnn", "synthetic-457", "float64", 0)
    state = snapshot.SnapshotFolder(folder, run, read_shards=sharded.read).load_newest()
    err = capsys.readouterr().err
    print(err)
    assert state["global_step"] == snapshot.step_of(before) == 30
    assert err.startswith(f"warning: {last} is damaged (") and victim in err + "state.pt"
    assert err.endswith(f"using {before} instead\n")


def commit_again(folder, state):
    """Finish the unfinished snapshot in `folder`, with `state` as sharded.read returns it."""
    own = ("checksums", "layout", "metadata", "path")
    rest = {key: value for key, value in state.items() if key not in own}
    return sharded.commit(folder, state["layout"], state["checksums"], rest)


def test_what_a_kill_left_does_not_spoil_the_next_snapshot(uninterrupted, tmp_path):
    """The kill came while or after `state.pt` was written, before the rename. The same step comes again."""
    path = snapshot.snapshots(uninterrupted.snapshot_dir, sharded=True)[0]
    state, _ = sharded.read(path)
    unfinished = sharded.unfinished(tmp_path, state["global_step"])
    shutil.copytree(path, unfinished)
    (unfinished / "state.pt").write_bytes(b"old")
    (unfinished / ".state.pt.tmp").write_bytes(b"half")
    (unfinished / "__7_0.distcp").write_bytes(b"of a run with more ranks")
    finished = commit_again(tmp_path, state)
    assert sharded.read(finished)[1] == ""


def test_a_damaged_one_of_the_same_step_is_replaced(uninterrupted, tmp_path):
    path = snapshot.snapshots(uninterrupted.snapshot_dir, sharded=True)[0]
    state, _ = sharded.read(path)
    shutil.copytree(path, sharded.unfinished(tmp_path, state["global_step"]))
    shutil.copytree(path, tmp_path / path.name)
    (tmp_path / path.name / "state.pt").write_bytes(b"damaged")
    finished = commit_again(tmp_path, state)
    assert sharded.read(finished)[1] == ""
    sharded.delete_old(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [finished.name]


def test_what_killed_saves_have_left_is_deleted_before_the_first_save(tmp_path):
    """It is from another step, and may fill the disk. To delete it during a save would be too late."""
    left = sharded.unfinished(tmp_path / "snapshots", 3)
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    saves = "        # Copied now,"
    looks = f"        self.rank or print('left:', Path({str(left)!r}).exists(), flush=True)\n"
    root = planted(tmp_path / "root", STEP, (saves, looks + saves))
    run = train(STEP, 2, tmp_path, "--num-samples=24", "--batch-size=12", "--epochs=1", root=root)
    assert "left: False" in run.out


# A layer that is never used, one that is used from the third epoch on if `late`, and one that is frozen.
AUX = [
    (
        "        self.name = name\n",
        "        self.name = name\n"
        "        self.unused = nn.Linear(8, 8)\n"
        "        self.sometimes = nn.Linear(10, 10)\n"
        "        self.frozen = nn.Linear(10, 10).requires_grad_(False)\n"
        "        self.late = False\n",
    ),
    (
        "        return self.net(((pixels - MEAN) / STD).to(dtype))",
        "        logits = self.frozen(self.net(((pixels - MEAN) / STD).to(dtype)))\n"
        "        return self.sometimes(logits) if self.late else logits",
    ),
]
LATE = "        self.model.train()\n"


@pytest.mark.sample(2)
@pytest.mark.few(1)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("late", [False, True], ids=["never", "late"])
def test_a_parameter_without_gradients_does_not_spoil_a_resume(tmp_path, ranks, late):
    """Nor does one that is frozen, or that gets its first gradient after the resume."""
    root = planted(tmp_path / "root", "common/models.py", *AUX, steps=(STEP,))
    planted(root, STEP, (LATE, f"{LATE}        self.model.late = {late} and self.epoch >= 2\n"))
    flags = [f"--num-samples={24 * ranks}", "--batch-size=4", "--precision=float64"]
    whole = train(STEP, ranks, tmp_path / "whole", *flags, "--epochs=4", root=root)
    for epochs in (2, 3, 4):
        resumed = train(STEP, ranks, tmp_path / "resumed", *flags, f"--epochs={epochs}", root=root)
    assert largest_difference(resumed.weights, whole.weights) == 0.0
    assert resumed.test["loss"] == whole.test["loss"]


def test_a_snapshot_that_rank_0_cannot_finish_ends_all_ranks_with_one_line(tmp_path):
    """A folder is in the place of `state.pt`; the shards themselves can be written."""
    writes = "    snapshot.write(shards / STATE,"
    root = planted(
        tmp_path / "root", "05_fsdp/sharded.py", (writes, f"    (shards / STATE).mkdir()\n{writes}")
    )
    flags = ["--num-samples=480", "--batch-size=12", "--epochs=3", "--save-every=5", "--use-gpu=0"]
    words = [*command(STEP, 2, root), *flags, "--snapshot-dir=snapshots"]
    status, out, err = finish(start(words, tmp_path))
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    print(out, lines)
    assert status == 1 and "exitcode  : 2" in err and "RuntimeError" not in err
    assert lines == [
        "error: cannot write to snapshots: Is a directory; "
        "make room, make it writable, or choose another --snapshot-dir"
    ]
    assert not snapshot.snapshots(tmp_path / "snapshots", sharded=True)


def convert(path, folder):
    status, out, err = finish(start([sys.executable, str(SCRIPT.parent / "convert.py"), str(path)], folder))
    print(out, err)
    return status, out, err


def test_there_and_back_a_snapshot_is_the_same(uninterrupted, tmp_path):
    """test_resume.py shows that a run continues from it."""
    path = snapshot.snapshots(uninterrupted.snapshot_dir, sharded=True)[0]
    copy = shutil.copytree(path, tmp_path / "a" / path.name)
    assert convert(copy, tmp_path) == (0, f"wrote {copy}.pt\n", "")
    first = newest(tmp_path / "a")
    assert {tensor.dtype for tensor in first["model"].values()} == {torch.float64}  # as it was trained
    names = {path.name for path in copy.iterdir()}
    shutil.rmtree(copy)
    left = sharded.unfinished(copy.parent, first["global_step"])  # from a convert.py that was killed
    left.mkdir()
    (left / "__7_0.distcp").write_bytes(b"half")
    assert convert(f"{copy}.pt", tmp_path) == (0, f"wrote {copy}\n", "")
    assert {path.name for path in copy.iterdir()} <= names
    os.unlink(f"{copy}.pt")
    second = newest(tmp_path / "a")
    assert first.keys() == second.keys() >= {"model", "optimizer", "epoch", "rng", "run", "format"}
    assert largest_difference(first["model"], second["model"]) == 0.0
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    for number, slots in first["optimizer"]["state"].items():
        assert slots.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert largest_difference(slots, second["optimizer"]["state"][number]) == 0.0
    assert torch.equal(first["rng"][1]["cpu"], second["rng"][1]["cpu"])
    rest = [key for key in first if key not in ("model", "optimizer", "rng")]
    assert [first[key] for key in rest] == [second[key] for key in rest]


def test_converting_tells_how(tmp_path):
    words = [sys.executable, str(SCRIPT.parent / "convert.py"), "--help"]
    status, out, err = finish(start(words, tmp_path, COLUMNS="200"))
    assert status == 0 and err == ""
    assert load(SCRIPT.with_name("convert.py")).__doc__.strip() in out  # as it is there, line by line
    assert "snapshot    snapshot-….pt, or a folder snapshot-…" in out


def test_converting_an_old_one_leaves_the_newer_ones(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted.snapshot_dir, tmp_path / "snapshots")
    before = snapshot.snapshots(folder, sharded=True)
    oldest = before[-1]
    moved = shutil.move(oldest, tmp_path / oldest.name)
    shutil.copytree(before[0], folder / "snapshot-00000099")  # three are newer
    assert convert(moved, tmp_path)[0] == 0
    shutil.move(f"{moved}.pt", folder / f"{oldest.name}.pt")
    assert convert(folder / f"{oldest.name}.pt", tmp_path)[0] == 0
    after = snapshot.snapshots(folder, sharded=True)
    print([path.name for path in after])
    assert after == [folder / "snapshot-00000099", *before]


def test_what_cannot_be_converted_is_told(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted.snapshot_dir, tmp_path / "snapshots")
    path = snapshot.snapshots(folder, sharded=True)[0]
    (folder / "snapshot-00000001.pt").write_bytes(b"half")
    (folder / f"{path.name}.pt").touch()
    for names, name in ((None, "snapshot-00000050"), (["other"], "snapshot-00000051")):
        state, _ = snapshot.read(shutil.copytree(path, folder / name) / "state.pt")
        for group in state["param_groups"]:
            group["param_names"] = names and names * len(group["params"])
            if not names:  # as from an optimizer built from model.parameters()
                del group["param_names"]
        snapshot.write(folder / name / "state.pt", {**state, "checksum": None})
    state, _ = snapshot.read(shutil.copytree(path, folder / "snapshot-00000052") / "state.pt")
    snapshot.write(folder / "snapshot-00000052" / "state.pt", {**state, "format": 99, "checksum": None})
    for given, said in {
        folder: f"{folder} is not a snapshot: give a file snapshot-….pt, or a folder snapshot-…",
        folder / "snapshot-00000077": "is not a snapshot: give",
        folder / "snapshot-00000001.pt": "snapshot-00000001.pt is damaged (",
        folder
        / "snapshot-00000050": "snapshot-00000050 cannot be converted: ValueError: its optimizer has no",
        folder / "snapshot-00000051": "snapshot-00000051 cannot be converted: KeyError: 'net.",
        folder
        / "snapshot-00000052": f"snapshot-00000052 has format 99, and this code has {snapshot.FORMAT} (",
        path: f"{path}.pt already exists: delete it first",
    }.items():
        status, out, err = convert(given, tmp_path)
        assert status == 2 and out == ""
        assert err.startswith("error: ") and said in err and err.count("\n") == 1


FULL = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # of a file: less than a snapshot has
sys.argv.pop(0)
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_told_when_a_snapshot_is_converted(uninterrupted, tmp_path):
    path = snapshot.snapshots(uninterrupted.snapshot_dir, sharded=True)[0]
    copy = shutil.copytree(path, tmp_path / "a" / path.name)
    assert convert(copy, tmp_path)[0] == 0
    plain = str(shutil.move(f"{copy}.pt", tmp_path / f"{path.name}.pt"))
    (tmp_path / "full.py").write_text(FULL)
    for given, other in ((copy, f"{copy}.pt"), (plain, plain.removesuffix(".pt"))):
        words = [sys.executable, str(tmp_path / "full.py"), str(SCRIPT.parent / "convert.py"), str(given)]
        status, out, err = finish(start(words, tmp_path))
        print(out, err)
        assert status == 2 and out == ""
        assert len(errors(err)) == 1 and errors(err)[0].startswith(f"error: cannot write {other}: ")
        assert errors(err)[0].endswith("; make room") and not Path(other).exists()


def test_each_kind_of_snapshot_tells_the_other_steps_what_to_do(uninterrupted, tmp_path, capsys):
    folder = shutil.copytree(uninterrupted.snapshot_dir, tmp_path / "snapshots")
    run = Run("05_fsdp", "cnn", "synthetic-457", "float64", 0)
    newest_one = snapshot.snapshots(folder, sharded=True)[0]
    for read, name in ((None, newest_one), (sharded.read, folder / "snapshot-00000099.pt")):
        if read:
            name.touch()  # newer than all of step 05's: to continue without it would silently lose steps
        with pytest.raises(SystemExit) as stopped:
            snapshot.SnapshotFolder(folder, run, read_shards=read).load_newest()
        err = capsys.readouterr().err
        print(err)
        assert stopped.value.code == 2
        assert err.endswith(f"to resume from it: python 05_fsdp/convert.py {name}\n")


@pytest.mark.slow
def test_resnet18_in_bf16_keeps_batch_norm_in_float32(tmp_path):
    """Some CPUs take six seconds for such a step."""
    flags = ["--model=resnet18", "--precision=bf16", "--num-samples=128", "--batch-size=8", "--epochs=1"]
    run = train(STEP, 2, tmp_path, *flags, timeout=400)
    first, last = run.losses[:2].mean().item(), run.losses[-2:].mean().item()
    print(f"loss {first:.3f}, then {last:.3f} (0.3 less)")
    assert len(run.losses) == 8 and last < first - 0.3
    assert {tensor.dtype for tensor in run.weights.values()} == {torch.float32, torch.int64}


def test_a_batch_norm_that_is_a_unit_trains_in_bf16(tmp_path):
    """It is sharded by itself, in float32, and not again as a unit."""
    own_layer = (
        "nn.ReLU(),\n        nn.Flatten()",
        "nn.BatchNorm2d(32),\n        nn.ReLU(),\n        nn.Flatten()",
    )
    root = planted(tmp_path / "root", "common/models.py", own_layer, steps=(STEP,))
    flags = ["--num-samples=96", "--batch-size=16", "--epochs=1", "--precision=bf16"]
    run = train(STEP, 2, tmp_path, *flags, root=root)
    assert "net.5.running_mean" in run.weights and run.losses.isfinite().all()
