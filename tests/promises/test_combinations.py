"""Flags given together, and the moments at which a run is stopped: it ends like an uninterrupted run.

With 3 and 4 ranks: two numbers have only one sum, but with three, the order matters. In float32, where this
shows soonest.

Promise: the same after a signal during an evaluation or in the last step of an epoch, and with
`--accumulate`, `--replicas`, `--cpu-offload`, `--meta-init`, `--compile` and `--num-workers`.
"""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    NORMED,
    SHARDED,
    after_a_step,
    children,
    command,
    errors,
    finish,
    has_ended,
    kill,
    last_saved,
    left_over,
    newest,
    planted,
    saved,
    start,
    states_equal,
    traced,
    train,
    wait_until,
)

from common import snapshot
from common.stopping import STEPS_BETWEEN_VOTES

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds ranks in /proc: Linux only"
)

# An epoch has 10 steps of 12 images, and a remainder; 20 test images. Snapshots of steps 10, 14 and 20 stay.
EPOCH = 10
SAME = [f"--num-samples={GLOBAL_BATCH * EPOCH + 3}", "--epochs=2", "--save-every=7"]
# Within this number of steps, a vote begins and is read: see common/stopping.py.
SOON = STEPS_BETWEEN_VOTES + 1


def flags_for(ranks):
    return [*SAME, f"--batch-size={GLOBAL_BATCH // ranks}"]


def slow_but(quick, *cases):
    """The cases. Those that are not in `quick` are marked slow, and two of these are drawn."""
    slow = [pytest.mark.slow, pytest.mark.sample(2)]
    return [pytest.param(*case, marks=[] if case in quick else slow) for case in cases]


def different(state, expected, *but):
    """The keys in which two snapshots differ, bit for bit, without those in `but`."""
    assert state.keys() == expected.keys()
    return [key for key in expected if key not in but and not states_equal(state[key], expected[key])]


def leave_out(folder, newer_than, sharded=False):
    """Delete the snapshots in `folder` after a step, as if the run had been killed soon after that step."""
    for path in snapshot.snapshots(folder, sharded):
        if snapshot.step_of(path) > newer_than:
            shutil.rmtree(path) if sharded else path.unlink()
    assert last_saved(folder) == newer_than


def until_told(when, whom="True"):
    """Code for a train.py: if `when` is true, print a line; ranks with a true `whom` wait for a signal.

    They wait for at most a minute: then the run continues to its end, and the test fails.
    """
    wait = f"{when} and {whom} and not GracefulStop.received"
    return (
        f"{when} and self.report.say('waiting'); "
        f"[__import__('time').sleep(0.01) for _ in range(6000) if {wait}]"
    )


def check_left(process, step, number):
    """Wait for the end of a run that was told to stop; check its status, and return the saved step."""
    status, out, err = finish(process)
    said = re.search(rf"{number.name}: saved at step (\d+); run the same command again to resume", out)
    print(f"step {step}: status {status}, {said and said[0]}")
    assert said, process.story
    assert status == (128 + number if step < "03" else 1), process.story
    # torchrun ends with its own SignalException. No rank has lost another rank, or one of its workers.
    assert "RuntimeError" not in err and "Seen by" not in err and "DataLoader worker" not in err, err
    if step < "03":
        assert "Traceback" not in err, err
    return int(said[1])


# --- A signal while a run does not train


DURING = [(step, 1 if step == "01" else 3, "the launcher") for step in FOLDERS]
DURING += [(step, 4, "rank 1") for step in ("02", "04", SHARDED)]


@pytest.mark.sample(4)
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "ranks", "whom"),
    slow_but(
        [
            ("01", 1, "the launcher"),
            ("03", 3, "the launcher"),
            ("04", 4, "rank 1"),
            (SHARDED, 3, "the launcher"),
        ],
        *DURING,
    ),
)
def test_a_signal_during_an_evaluation(once, tmp_path, step, ranks, whom):
    """The epoch was saved before it. All ranks exit between two batches, and evaluate when they resume."""
    evaluates = "        self.model.eval()\n"
    one = "self.rank == 1" if whom == "rank 1" else "True"
    code = until_told("self.epoch == 1", one)
    root = planted(tmp_path / "root", step, (evaluates, f"{evaluates}        {code}\n"))
    planted(root, "common/stopping.py", ("int(SECONDS_BETWEEN_VOTES * ", "int(0 * "))  # a vote in each batch
    flags = [*flags_for(ranks), "--eval-batch-size=1"]
    own = ["--snapshot-dir=snapshots", "--use-gpu=0", "--verbose"]
    process = start([*command(step, ranks, root), *flags, *own], tmp_path)
    try:
        process.wait_for("waiting\n")
        if whom == "rank 1":
            kill([int(process.wait_for(r"\[rank 1\].* pid (\d+)")[1])], signal.SIGTERM)
        else:
            process.send_signal(signal.SIGTERM)
    finally:
        left_at = check_left(process, step, signal.SIGTERM)
    assert left_at == last_saved(tmp_path / "snapshots") == EPOCH
    assert "test loss" not in process.out
    run = train(step, ranks, tmp_path, *flags)
    assert len(run.losses) == EPOCH
    assert [event["epoch"] for event in run.events if event["event"] == "eval"] == [0, 1]
    assert different(run.state, once(step, ranks, *flags).state) == []


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "ranks", "extra"),
    slow_but(
        [("01", 1, "--num-workers=2"), ("04", 3, "--verbose"), (SHARDED, 3, "--verbose")],
        ("01", 1, "--num-workers=2"),
        *((step, 3, "--verbose") for step in FOLDERS if step != "01"),
        ("02", 4, "--num-workers=2"),
        (SHARDED, 4, "--num-workers=2"),
    ),
)
def test_a_signal_in_the_last_step_of_an_epoch(once, tmp_path, step, ranks, extra):
    """No step of the epoch is left: the resumed run evaluates, and saves the same step again."""
    at = EPOCH if ranks == 1 else EPOCH - 1  # ranks exit one step after the one in which they vote
    stops = after_a_step(f"if self.global_step == {at}: os.kill(os.getpid(), signal.SIGTERM)")
    root = planted(tmp_path / "root", step, stops)
    planted(root, "common/stopping.py", ("int(SECONDS_BETWEEN_VOTES * ", "int(0 * "))  # a vote in each step
    flags = flags_for(ranks)
    own = ["--snapshot-dir=snapshots", "--use-gpu=0", extra]
    process = start([*command(step, ranks, root), *flags, *own], tmp_path)
    assert check_left(process, step, signal.SIGTERM) == EPOCH
    folder = tmp_path / "snapshots"
    assert last_saved(folder) == EPOCH and newest(folder)["samples_seen"] == EPOCH * GLOBAL_BATCH
    if step == SHARDED:
        path = folder / f"snapshot-{EPOCH:08d}"
        files = [path, *sorted(path.iterdir())]
        before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    run = train(step, ranks, tmp_path, *flags, extra)
    assert len(run.losses) == EPOCH and [e["epoch"] for e in run.events if e["event"] == "eval"] == [0, 1]
    assert different(run.state, once(step, ranks, *flags).state) == []
    if step == SHARDED:  # replacing a good one would leave none for a moment
        assert before == [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
        assert files == [path, *sorted(path.iterdir())]
    assert left_over(folder) == []


# --- Flags together, resumed

# Steps, ranks and flags. An epoch is 5 steps of 36 images; with --save-every=3, snapshots 6, 9 and 10 stay.
TOGETHER = [
    ("04", 3, "--accumulate=3 --clip-norm=0.5"),
    ("04", 4, "--accumulate=3 --clip-norm=0.5 --precision=bf16"),
    (SHARDED, 3, "--accumulate=3 --clip-norm=0.5"),
    (SHARDED, 4, "--replicas=2"),
    (SHARDED, 3, "--cpu-offload"),
    (SHARDED, 3, "--meta-init"),
    (SHARDED, 3, "--cpu-offload --meta-init --no-reshard --accumulate=3 --clip-norm=0.5"),
    (SHARDED, 4, "--replicas=2 --cpu-offload --meta-init --accumulate=3 --clip-norm=0.5"),
    (SHARDED, 4, "--replicas=2 --precision=bf16 --meta-init --model=vit --activation-checkpointing"),
    (SHARDED, 4, "--replicas=2 --cpu-offload --meta-init --precision=float64 --no-reshard --num-workers=1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "ranks", "flags"), slow_but([TOGETHER[0], TOGETHER[7]], *TOGETHER))
def test_flags_together_resumed_in_the_middle_of_an_epoch(tmp_path, step, ranks, flags):
    words = flags.split()
    batch = 36 // ranks // (3 if "--accumulate=3" in words else 1)
    words += ["--num-samples=183", "--epochs=2", "--save-every=3", f"--batch-size={batch}"]
    whole = train(step, ranks, tmp_path / "whole", *words)
    assert saved(whole.snapshot_dir) == [10, 9, 6]
    shutil.copytree(whole.snapshot_dir, tmp_path / "snapshots")
    leave_out(tmp_path / "snapshots", 6, step == SHARDED)
    run = train(step, ranks, tmp_path, *words)
    print(f"{run.name}, {flags}: {run.losses.tolist()} after step 6, uninterrupted {whole.losses.tolist()}")
    assert len(whole.losses) == 10 and len(run.losses) == 4
    assert different(run.state, whole.state) == []
    assert run.test == whole.test


# Gives a model a table that no snapshot has, of random numbers, so that nothing restores it by accident.
TABLE = [
    ("nn.Flatten(),", "nn.Sequential(nn.Flatten(), Table()),"),
    (
        "\ndef cnn(",
        """
class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.rand(32 * 7 * 7), persistent=False)

    def forward(self, x):
        return x * self.table


def cnn(""",
    ),
]


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"), slow_but([(3, "")], (3, ""), (3, "--cpu-offload"), (4, "--replicas=2"))
)
def test_from_the_meta_device_with_buffers_that_are_in_no_snapshot(tmp_path, ranks, flags):
    """In 5 steps, and resumed after the third."""
    root = planted(tmp_path / "root", "common/models.py", *TABLE, steps=(SHARDED,))
    words = [*flags.split(), "--num-samples=63", "--epochs=1", f"--batch-size={GLOBAL_BATCH // ranks}"]
    words += ["--save-every=3"]
    usual = train(SHARDED, ranks, tmp_path / "usual", *words, root=root)
    run = train(SHARDED, ranks, tmp_path / "meta", *words, "--meta-init", root=root)
    assert not any("table" in name for name in run.weights)
    assert torch.equal(run.losses, usual.losses)
    assert different(run.state, usual.state) == []
    leave_out(run.snapshot_dir, 3, sharded=True)  # so the table is created again
    (tmp_path / "meta" / "metrics.jsonl").unlink()
    again = train(SHARDED, ranks, tmp_path / "meta", *words, "--meta-init", root=root)
    assert len(again.losses) == 2 and different(again.state, usual.state) == []


# --- Processes that load the data

BOTH = (signal.SIGINT, signal.SIGTERM)
WORKERS = [(step, 1 if step == "01" else 3, number) for step in FOLDERS for number in BOTH]
WORKERS += [("02", 4, signal.SIGTERM), ("04", 4, signal.SIGINT)]


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "ranks", "number"),
    slow_but([("01", 1, signal.SIGINT), ("02", 3, signal.SIGINT), ("04", 3, signal.SIGTERM)], *WORKERS),
    ids=str,
)
def test_workers_change_nothing_and_none_is_left(once, tmp_path, step, ranks, number):
    """Ctrl-C goes to the process group, SIGTERM to every process, as Slurm may do: workers get it, too."""
    root = planted(tmp_path / "root", step, after_a_step(until_told("self.global_step == 13")))
    traced(root)
    flags = [*flags_for(ranks), "--num-workers=2"]
    own = ["--snapshot-dir=snapshots", "--use-gpu=0"]
    process = start([*command(step, ranks, root), *flags, *own], tmp_path)
    everybody = []
    try:
        process.wait_for("waiting\n")
        everybody = [process.pid, *children(process.pid)]
        # torchrun's ranks have their own groups: from a terminal, only torchrun gets a Ctrl-C.
        groups = {os.getpgid(pid) for pid in everybody}
        assert len(groups) == (1 if step < "03" else 1 + ranks)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            kill(everybody, number)
        process.process.wait(60)
        wait_until(lambda: all(map(has_ended, everybody)), f"the end of {everybody}", 30)
    finally:
        kill([pid for pid in everybody if not has_ended(pid)])
        left_at = check_left(process, step, number)
    assert 13 <= left_at <= 13 + SOON - 1
    assert last_saved(tmp_path / "snapshots") == left_at

    lines = {int(file.name[6:]): file.read_text().splitlines() for file in tmp_path.glob("drawn-*")}
    assert all(map(has_ended, lines))  # those of the evaluation as well
    # A line: drew, the size of the data set, the images of the batch.
    trains = f"drew {GLOBAL_BATCH * EPOCH + 3} "
    batches = {pid: [line for line in text if line.startswith(trains)] for pid, text in lines.items()}
    size = GLOBAL_BATCH // ranks
    workers = {pid: texts for pid, texts in batches.items() if any(len(t.split()) == 2 + size for t in texts)}
    print(f"{len(workers)} workers drew {[len(texts) for texts in workers.values()]} batches")
    # Each rank has the same two workers in both epochs. In the first epoch, each worker draws 5 batches.
    assert len(workers) == 2 * ranks and min(map(len, workers.values())) > EPOCH // 2
    assert set(workers) <= set(everybody) - {process.pid}

    run = train(step, ranks, tmp_path, *flags)
    assert len(run.losses) == 2 * EPOCH - left_at
    assert different(run.state, once(step, ranks, *flags_for(ranks)).state) == []


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [pytest.param(step, marks=pytest.mark.slow) if step > "01" else step for step in FOLDERS],
)
def test_an_error_ends_a_run_with_workers(tmp_path, step):
    """Python ends its children with SIGTERM. Workers ignore it, and Python would wait for them forever."""
    last = "if self.report.rank == self.report.world_size - 1:"
    raises = "os.write(1, b'raises now'); raise ZeroDivisionError('planted')"
    root = planted(tmp_path / "root", step, after_a_step(f"{last} {raises}"))
    ranks = 1 if step == "01" else 3
    flags = [*flags_for(ranks), "--num-workers=2", "--use-gpu=0", "--snapshot-dir=snapshots"]
    # A real process: a fork does not keep its last error.
    process = start([*command(step, ranks, root), *flags], tmp_path, real=True)
    # Step 02 has ten processes, with the ranks and their workers, and each of them imports torch.
    process.wait_for("samples a step")
    process.wait_for("raises now")
    status, _, err = finish(process)
    assert status == 1 and "ZeroDivisionError: planted" in err
    assert "DataLoader worker" not in err and "Exception ignored" not in err, err


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_where_python_starts_workers_in_another_way(tmp_path):
    """From Python 3.14 on, a server starts workers by default. SIGTERM ends it, and would end them, too."""
    head = "import sys\n"
    default = "import multiprocessing\nmultiprocessing.set_start_method('forkserver')\n"
    root = planted(tmp_path / "root", "01", (head, f"{default}{head}"))
    flags = [*flags_for(1), "--epochs=1000", "--num-workers=1", "--use-gpu=0", "--snapshot-dir=snapshots"]
    process = start([*command("01", 1, root), *flags], tmp_path, real=True)
    try:
        wait_until(lambda: last_saved(tmp_path / "snapshots") or process.poll() is not None, "a snapshot")
        os.killpg(process.pid, signal.SIGTERM)
    finally:
        status, out, err = finish(process)
    print(out, err)
    assert status == 143
    assert f"SIGTERM: saved at step {last_saved(tmp_path / 'snapshots')}; " in out
    assert "DataLoader worker" not in err


# --- Nodes that each have their own folder

SENDS = "    state = None  # free its memory before another one is loaded\n"
TELLS = "    os.write(1, f'from rank {versions.index(newest)}\\n'.encode())\n"  # in one piece
SEED = "    torch.manual_seed(args.seed)\n"
EACH = [(SEED, f"    args.snapshot_dir /= str(dist.get_rank())  # a disk of its own\n{SEED}")]


def test_nodes_save_the_same_averages_of_batch_norm(tmp_path):
    """Each rank has its own. If each node saved its own, a checksum would decide which ones a resume gets."""
    root = planted(tmp_path / "root", "04", *EACH)
    planted(root, "common/models.py", NORMED)
    flags = [*flags_for(3), "--save-every=3"]
    train("04", 3, tmp_path, *flags, "--epochs=1", root=root)
    for step in (6, 9, 10):
        files = [*(tmp_path / "snapshots").glob(f"*/snapshot-{step:08d}.pt")]
        assert len(files) == 3 and len({path.read_bytes() for path in files}) == 1


def test_a_node_whose_disk_is_full_keeps_nobody_waiting(tmp_path):
    """The sender does not know about the disk: what it still sends must be received."""
    root = planted(tmp_path / "root", "04", *EACH)
    planted(root, "common/snapshot.py", ("CHUNK = 1 << 24", "CHUNK = 1 << 16"))  # it is sent in many pieces
    flags = [*flags_for(3), "--snapshot-dir=s", "--use-gpu=0"]
    status, _, err = finish(start([*command("04", 3, root), *flags, "--epochs=1"], tmp_path))
    assert status == 0, err
    shutil.rmtree(tmp_path / "s" / "1")
    writes = "            for chunk in chunks:\n"
    fails = f"{writes}                raise OSError(28, 'planted')\n"
    planted(root, "common/nodes.py", (writes, fails))
    # Otherwise, the sender would wait for rank 1 until the time-out, longer than this test.
    status, _, err = finish(start([*command("04", 3, root), *flags, "--timeout=100"], tmp_path), 90)
    print(err[-2000:])
    assert status == 1 and len(errors(err)) == 1
    assert errors(err)[0].startswith(
        "error: cannot copy s/1/snapshot-00000010.pt between the nodes: planted;"
    )


def test_step_04_sends_a_snapshot_only_to_those_that_lack_it(once, tmp_path):
    """To ranks that each have their own folder, as nodes do."""
    root = planted(tmp_path / "root", "04", *EACH)
    planted(root, "common/nodes.py", (SENDS, TELLS + SENDS))
    planted(root, "common/snapshot.py", ("CHUNK = 1 << 24", "CHUNK = 1 << 12"))  # it is sent in many pieces
    flags = flags_for(3)
    expected = once("04", 3, *flags).state

    def go_on(folder, *more):
        out = train("04", 3, folder, *flags, *more, root=root).out
        states = [newest(folder / "snapshots" / str(rank)) for rank in range(3)]
        sent = re.findall(r"from rank (\d)\n", out)
        print(f"{folder.name}: sent {sent}")
        assert len(sent) in (0, 3) and all(different(state, states[0]) == [] for state in states)
        return out, sent, states[0]

    def copy(name):
        shutil.copytree(tmp_path / "first" / "snapshots", tmp_path / name / "snapshots")
        return tmp_path / name

    out, sent, _ = go_on(tmp_path / "first", "--epochs=1")
    assert sent == []
    first = (tmp_path / "first" / "snapshots").glob("*/snapshot-00000010.pt")
    assert len({path.read_bytes() for path in first}) == 1

    out, sent, state = go_on(copy("all have it"))
    assert sent == [] and "step 10\n" in out and different(state, expected) == []

    folder = copy("rank 0 has none and rank 1 is behind")
    shutil.rmtree(folder / "snapshots" / "0")
    leave_out(folder / "snapshots" / "1", 7)
    out, sent, state = go_on(folder)
    assert sent == ["2"] * 3 and "step 10\n" in out and different(state, expected) == []
    out, sent, _ = go_on(folder)  # they are alike again
    assert sent == [] and "nothing left to train" in out

    folder = copy("rank 2 has another of the same step")
    path = folder / "snapshots" / "2" / "snapshot-00000010.pt"
    state, _ = snapshot.read(path)
    state["model"]["net.0.bias"] += 1
    del state["checksum"], state["writer"]
    snapshot.write(path, state)
    checksums = [(folder / "snapshots" / str(rank) / path.name).read_bytes()[-4:] for rank in range(3)]
    out, sent, state = go_on(folder)
    first = checksums.index(max(checksums))
    assert sent == [str(first)] * 3
    assert (different(state, expected) == []) == (first == 0)


# --- Speed and precision

TRAINS = [(step, "--precision=bf16") for step in ("01", "03", "04")]
TRAINS += [(step, "--compile") for step in ("01", "02", "03", "04")]
# FSDP's hooks split compiled code at each unit. The cnn's units are single layers, so nothing is left of it.
TRAINS += [(SHARDED, "--compile --model=vit --vit-depth=1 --lr=0.003 --epochs=3")]
FASTER = ("--compile", "--precision=bf16")


@pytest.mark.sample(2)
@pytest.mark.few(1)
@pytest.mark.parametrize(("step", "flags"), slow_but(TRAINS[:2], *TRAINS))
def test_bf16_and_compile_train_on_the_other_steps_too(once, tmp_path, step, flags):
    """The steps that are not in test_options.py."""
    ranks = 1 if step == "01" else 3
    same = ["--num-samples=513", "--epochs=2", f"--batch-size={48 // ranks}", *flags.split()]
    run = train(step, ranks, tmp_path, *same, timeout=400)  # a compiler takes minutes on a busy machine
    usual = once(step, ranks, *(flag for flag in same if flag not in FASTER))
    first, last = run.losses[:4].mean().item(), run.losses[-4:].mean().item()
    off = (run.losses - usual.losses).abs().max().item()
    print(f"{run.name} {flags}: loss {first:.3f}, then {last:.3f}; up to {off:.1e} off the usual run's")
    assert last < first - 0.3
    # The flag has had an effect. Three ranks may add in another order: that changes the last of float32's
    # 24 bits, about 1e-7. bf16 has 8 bits.
    assert off > (1e-4 if "bf16" in flags else 0)
    kinds = [{name: tensor.dtype for name, tensor in one.weights.items()} for one in (run, usual)]
    assert kinds[0] == kinds[1]


COMPILED = [(step, "") for step in FOLDERS if step != SHARDED]
COMPILED += [("04", "--accumulate=3 --precision=bf16 --num-samples=363")]
COMPILED += [(SHARDED, "--model=vit --vit-depth=1 --meta-init --clip-norm=0.5")]


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(("step", "flags"), COMPILED)
def test_compiled_it_is_resumed_bit_identical(tmp_path, step, flags):
    ranks = 1 if step == "01" else 3
    words = [*flags_for(ranks), *flags.split(), "--compile"]
    whole = train(step, ranks, tmp_path / "whole", *words, timeout=400)
    shutil.copytree(whole.snapshot_dir, tmp_path / "snapshots")
    leave_out(tmp_path / "snapshots", 14, step == SHARDED)
    run = train(step, ranks, tmp_path, *words, timeout=400)
    print(f"{run.name}, resumed after step 14 of 20: losses {run.losses.tolist()}")
    print(f"uninterrupted {whole.losses[14:].tolist()}")
    assert len(run.losses) == 6
    assert different(run.state, whole.state) == []
