"""What a run prints and writes, to the letter: its lines, its metrics, its snapshots.

Promise: what a run prints, writes to `--metrics` and saves exactly matches what it does. A terminal shows
one progress bar, not one for each rank.
"""

import fcntl
import json
import math
import os
import pty
import re
import select
import socket
import struct
import sys
import termios
import time

import forks
import pytest
import torch
from helpers import (
    FOLDERS,
    SHARDED,
    after_a_step,
    command,
    environment,
    errors,
    finish,
    left_over,
    newest,
    planted,
    ranks_of,
    saved,
    start,
)

from common import snapshot
from common.output import print_line
from common.reporting import Reporter, ends_within_a_line
from common.run import Run
from common.stopping import GracefulStop

# At three ranks, 131 images make ten steps of 12; a sampler that pads would make eleven.
EVERY = 4  # steps between two reports, planted; step 01 runs enough steps to need no change
PARAMETERS = 827_688  # bytes of cnn's 206,922 float32
LARGEST = 4 * (1568 * 128 + 128)  # bytes of its largest layer: one layer is gathered at a time
COUNTERS = 8 * 4  # bytes of AdamW's step counts, one for each of eight tensors
TIMES = r"[\d.]+ s( of training, [\d,]+ samples/s)?$|[\d,]+ samples/s$"


def without_times(line):
    return re.sub(TIMES, "", line)


def memory_lines(events):
    """Step 05's tables, made from the numbers in its metrics."""
    found = []
    for event in events:
        if event["event"] == "memory":
            names = ("parameters", "gradients", "optimizer", "gathered", "peak")
            found.append(f"{event['moment']:<18}" + "".join(f"{name:>13}" for name in names))
            rows = {f"rank {rank}": row for rank, row in enumerate(event["ranks"])}
            rows["each under DDP"] = [*event["ddp"], 0, sum(event["ddp"])]
            for name, row in rows.items():
                found.append(f"{name:<18}" + "".join(f"{number / 1e6:>10.2f} MB" for number in row))
    return found


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize("step", FOLDERS)
def test_a_run_says_and_writes_down_what_it_does(tmp_path, step):
    ranks, parts = (1 if step == "01" else 3), (2 if step > "03" else 1)
    images, steps, every = (1300, 108, 100) if step == "01" else (131, 10, EVERY)
    batch, folder, ending = 12 // ranks // parts, FOLDERS[step], "" if step == SHARDED else ".pt"
    tells = "        accuracy = correct / total\n"
    edits = [(tells, f"        assert not torch.is_grad_enabled()\n{tells}")]  # a test needs no gradients
    edits += [] if step == "01" else [("LOG_EVERY = 100", f"LOG_EVERY = {EVERY}")]
    root = planted(tmp_path / "root", "common/reporting.py", *edits, steps=(step,))
    flags = [f"--num-samples={images}", f"--batch-size={batch}", "--epochs=2", "--lr=0.002", "--seed=5"]
    flags += [
        "--save-every=9",
        "--use-gpu=0",
        "--precision=float32",
        "--verbose",
        "--metrics=deep/er/m",
        "--snapshot-dir=s",
    ]
    flags += [f"--accumulate={parts}"] if parts > 1 else []
    begun = time.monotonic()
    node = "7" if step == "02" else "0"  # step 01 has none; from step 03 on, torchrun sets it
    told = {"GROUP_RANK": node} if step == "02" else {}
    status, out, err = finish(start([*command(step, ranks, root), *flags], tmp_path, **told))
    took = time.monotonic() - begun
    print(out, err)
    assert status == 0 and "error" not in err and "warning" not in err
    assert step != "01" or err == ""  # torchrun, and torch in its ranks, print something
    events = [json.loads(line) for line in (tmp_path / "deep" / "er" / "m").read_text().splitlines()]
    of_kind = {kind: [e for e in events if e["event"] == kind] for kind in ("train", "eval", "memory")}

    # The first event: what the run was asked to do.
    begins = events[0]
    data = f"synthetic-{images}"
    said = {"epochs": 2, "batch_size": batch, "lr": 0.002, "seed": 5, "save_every": 9, "verbose": True}
    said |= {"model": "cnn", "precision": "float32", "compile": False, "use_gpu": 0}
    said |= {"accumulate": parts} if parts > 1 else {}
    said |= {"num_samples": images, "num_workers": 0, "run": f"cnn-{data}", "dataset": data}
    said |= {"step": folder, "vit_width": 64, "vit_depth": 4}
    paths = {"data_dir": "data", "snapshot_dir": "s", "metrics": "deep/er/m"}
    here = {"event": "start", "world_size": ranks, "device": "cpu", "train_samples": images}
    assert {**said, **paths, **here}.items() <= begins.items()

    # Each report: which steps it covers, and that its numbers fit together.
    due = [  # after `every` steps, before each save, and at the end of an epoch
        (epoch, last)
        for epoch in range(2)
        for last in range(1, steps + 1)
        if last % every == 0 or (epoch * steps + last) % 9 == 0 or last == steps
    ]
    keys = {"event", "epoch", "global_step", "loss", "samples_per_s", "losses"}
    ends = [epoch * steps + last for epoch, last in due]
    assert [e["global_step"] for e in of_kind["train"]] == ends
    assert [e["epoch"] for e in of_kind["train"]] == [epoch for epoch, _ in due]
    counts = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    for event, count in zip(of_kind["train"], counts, strict=True):
        assert event.keys() == keys and len(event["losses"]) == count
        assert event["loss"] == pytest.approx(sum(event["losses"]) / count)
    assert of_kind["train"][0]["losses"][0] == pytest.approx(2.303, abs=0.3)  # log 10, for ten classes
    keys = {"event", "epoch", "global_step", "loss", "accuracy", "correct", "total"}
    for epoch, event in enumerate(of_kind["eval"]):
        assert event.keys() == keys and event["epoch"] == epoch
        assert event["global_step"] == steps * (epoch + 1) and event["total"] == images // 6
        assert event["accuracy"] == event["correct"] / event["total"]
    assert len(of_kind["eval"]) == 2
    end = events[-1]
    assert end.keys() == {"event", "global_step", "samples_per_s", "seconds"} and end["event"] == "end"
    trained = 2 * steps * 12
    assert end["global_step"] == 2 * steps and end["samples_per_s"] == pytest.approx(
        trained / end["seconds"], rel=0.01, abs=1
    )
    assert end["seconds"] == round(end["seconds"], 3)
    # Rates are rounded to whole images a second, which matters for slow runs; seconds, to a thousandth.
    reported = [(12 * len(e["losses"]), e["samples_per_s"]) for e in of_kind["train"]]
    least = sum(count / (rate + 0.5) for count, rate in reported)
    most = sum(count / max(rate - 0.5, 1e-9) for count, rate in reported)
    assert least - 0.001 <= end["seconds"] <= most + 0.001 and end["seconds"] < took

    # What rank 0 prints.
    micro = f"{parts} × " if parts > 1 else ""
    head = f"{folder}: cnn on {data}, cpu, float32, {ranks} × {micro}batch {batch} = 12 samples a step"
    wanted = [f"{head}, 2 epochs of {steps} steps", *memory_lines(events)]
    for e in of_kind["train"] + of_kind["eval"]:
        place = f"epoch {e['epoch'] + 1}/2  "
        if e["event"] == "train":
            rate = f"{e['samples_per_s']:,} samples/s"
            wanted.append(f"{place}step {e['global_step']}  loss {e['loss']:.4f}  {rate}")
        else:
            right = f"({e['correct']:,} of {e['total']:,})"
            wanted.append(f"{place}test loss {e['loss']:.4f}, accuracy {e['accuracy']:.2%} {right}")
    seconds = re.search(r"[\d.]+(?= s of training)", out)[0]  # rounded, but not as in the event
    assert float(seconds) == pytest.approx(end["seconds"], abs=0.051)
    speed = f"{end['samples_per_s']:,} samples/s"
    wanted.append(f"done: {trained:,} samples in {seconds} s of training, {speed}")
    lines = [line for line in out.splitlines() if line]
    assert sorted(line for line in lines if not line.startswith("[")) == sorted(wanted)
    assert lines[-1] == wanted[-1]
    tables = [e["moment"] for e in of_kind["memory"]]
    assert tables == (["at the start", "after one step"] if step == SHARDED else [])
    for event, copies in zip(of_kind["memory"], (0, 1), strict=False):
        whole = [PARAMETERS, copies * PARAMETERS, copies * (2 * PARAMETERS + COUNTERS)]
        assert event["ddp"] == whole
        rows = event["ranks"]
        assert [sum(row[i] for row in rows) for i in range(2)] == whole[:2]
        assert all(row[2] == copies * (2 * row[0] + COUNTERS) for row in rows)
        assert all(row[3] == copies * LARGEST and row[4] == sum(row[:4]) for row in rows)

    # What each rank prints with --verbose, in order.
    snapshots = [n for n in range(1, 2 * steps + 1) if n % 9 == 0 or n % steps == 0]
    for rank in range(ranks):
        mine = [line.removeprefix(f"[rank {rank}] ") for line in lines if line.startswith(f"[rank {rank}]")]
        place = rf"local rank {rank}, world size {ranks}, device cpu, 1 threads, pid \d+"
        assert re.fullmatch(rf"{place}, on {socket.gethostname()}, node {node}", mine.pop(0))
        saves = [line for line in mine if line.startswith("saved")]
        assert saves == [f"saved s/snapshot-{n:08d}{ending}" for n in snapshots if rank == 0]
        wanted = []
        for epoch in range(2):
            wanted.append(f"epoch {epoch + 1}: {steps} steps")
            for event, count in zip(of_kind["train"], counts, strict=True):
                if event["epoch"] == epoch:
                    wanted.append(f"step {event['global_step']}: {count} steps in ")
        assert [without_times(line) for line in mine if line not in saves] == wanted

    # What it saves: the newest three, each with everything that a run needs to continue.
    assert saved(tmp_path / "s") == snapshots[:-4:-1]
    state = newest(tmp_path / "s")
    rest = {name: state[name] for name in state.keys() - {"model", "optimizer", "rng"}}
    place = {"epoch": 2, "samples_seen": 0, "global_step": 2 * steps}
    assert rest == {
        **place,
        "format": snapshot.FORMAT,
        "run": f"cnn-{data}",
        "precision": "float32",
        "seed": 5,
        "flags": {
            **{"batch_size": batch, "epochs": 2, "lr": 0.002, "schedule": "constant"},
            **({"accumulate": parts, "clip_norm": None} if parts > 1 else {}),
        },
    }
    (group,) = state["optimizer"]["param_groups"]
    assert group["lr"] == 0.002 and group["fused"] is False
    assert [each.keys() for each in state["rng"]] == [{"cpu"}] * ranks
    if step != SHARDED:
        before, _ = snapshot.read(tmp_path / "s" / f"snapshot-{snapshots[-2]:08d}.pt")
        assert (before["epoch"], before["samples_seen"]) == (1, (snapshots[-2] - steps) * 12)

    # The same command again: it has nothing left to do, and prints this.
    status, out, err = finish(start([*command(step, ranks, root), *flags], tmp_path))
    print(out, err)
    assert status == 0
    assert f"resumed from s: epoch 2, step {2 * steps}" in out.splitlines()
    assert out.splitlines()[-1] == (
        "nothing left to train: raise --epochs, or choose another --snapshot-dir to start again"
    )
    again = [json.loads(line) for line in (tmp_path / "deep" / "er" / "m").read_text().splitlines()][
        len(events) :
    ]
    again = [event for event in again if event["event"] != "memory"]
    # The first run might have been stopped before its last evaluation, so the second repeats it.
    last = of_kind["eval"][-1]
    end = {"event": "end", "global_step": 2 * steps, "samples_per_s": 0, "seconds": 0.0}
    assert again == [begins, last, end]
    assert left_over(tmp_path / "s") == []  # not even a mark of a rank


def test_a_terminal_shows_one_bar_which_leaves_nothing_behind(tmp_path):
    """With three ranks: three bars would overwrite each other."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    root = planted(tmp_path / "root", "02", after_a_step("time.sleep(0.2)"))  # tqdm draws every 0.1 s
    words = [*command("02", 3, root), "--num-samples=96", "--batch-size=8", "--epochs=2"]
    with open(os.devnull) as nothing, open(tmp_path / "err", "w") as err:
        job = forks.Job(words, tmp_path, environment(), [nothing.fileno(), end, err.fileno()])
    shown, until = b"", time.monotonic() + 120
    while job.poll() is None or select.select([terminal], [], [], 0.2)[0]:
        assert time.monotonic() < until, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096)
    os.close(terminal)
    os.close(end)
    text = shown.decode()
    print(repr(text), (tmp_path / "err").read_text())
    assert job.returncode == 0
    for epoch in (1, 2):
        # It is drawn once more after the line that reports an epoch's steps.
        assert 1 <= text.count(f"epoch {epoch}/2:   0%|") <= 2
    assert re.search(r"0/4 \[.* steps/s\]", text) and re.search(r"[23]/4 \[.* steps/s\]", text)
    lines = [line.rpartition("\r")[2] for line in text.strip().split("\r\n")]
    assert not [line for line in lines if "%|" in line]  # the lines that stay are messages
    assert re.fullmatch(r"done: 192 samples in [\d.]+ s of training, [\d,]+ samples/s", lines[-1])


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize("step", FOLDERS)
def test_a_full_disk_for_metrics_stops_all_after_a_save(tmp_path, step):
    """The error is one line, and nothing that was trained is lost."""
    ranks = 1 if step == "01" else 3
    flags = ["--num-samples=480", "--batch-size=4", "--epochs=100", "--use-gpu=0", "--metrics=/dev/full"]
    status, out, err = finish(start([*command(step, ranks), *flags, "--snapshot-dir=s"], tmp_path))
    print(status, out, err)
    step_saved = max(saved(tmp_path / "s"))
    said = f"error: cannot write /dev/full: No space left on device; saved at step {step_saved}: "
    assert f"{said}run the same command again to resume" in errors(err)
    assert status == (1 if step > "02" else 2)


def test_the_other_nodes_say_why_they_stop(tmp_path):
    """Only rank 0 writes the metrics, but each node has its own screen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--num-samples=480", "--batch-size=4", "--epochs=100", "--use-gpu=0", "--metrics=/dev/full"]
    nodes = []
    for number in range(2):
        place = [f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *place]
        nodes.append(start([*words, command("04", 1)[-1], *flags, "--snapshot-dir=s"], tmp_path))
    for node in nodes:
        status, out, err = finish(node)
        print(status, out, err)
        [line] = errors(err)
        assert line.startswith("error: cannot write /dev/full: No space left on device; saved at step ")
        assert status == 1


def test_half_a_line_of_metrics_spoils_no_other(tmp_path):
    """A full disk may leave such a line, which ends in the middle of a number."""
    (tmp_path / "m").write_text('{"event": "train", "loss": 2.3')
    flags = ["--num-samples=24", "--batch-size=12", "--epochs=1", "--use-gpu=0", "--metrics=m"]
    status, out, err = finish(start([*command("01", 1), *flags], tmp_path))
    assert status == 0, out + err
    _, *lines = (tmp_path / "m").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "train", "eval", "end"]


@pytest.mark.parametrize(
    ("content", "half"), [(None, False), (b"", False), (b"{}\n", False), (b"{}", True), (b"\n\n{", True)]
)
def test_half_a_line_is_one_without_its_end(tmp_path, content, half):
    path = tmp_path / "m"
    if content is not None:
        path.write_bytes(content)
    assert ends_within_a_line(path) is half


@pytest.fixture
def reporter(tmp_path, monkeypatch):
    """The reporter of a run of two epochs, with metrics in `m`."""
    monkeypatch.setattr(GracefulStop, "problem", "")
    report = Reporter(Run("01", "cnn", "noise", "float32", 0), torch.device("cpu"), tmp_path / "m")
    flags = {"save_every": None, "snapshot_dir": None}
    report.start(range(10), epochs=2, batch_size=5, flags=flags)
    return report


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_test_loss_that_is_not_finite_stops_the_run(reporter, tmp_path, capsys, loss):
    """A step may have spoiled the weights after the last report; their snapshot already exists."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        reporter.evaluation(1, 20, loss, 3, 10)
    out, err = capsys.readouterr()
    remedy = "try a smaller --lr, and another --snapshot-dir: the newest snapshot has these weights"
    assert out == "" and err == f"error: the test loss is {loss} after step 20; {remedy}\n"
    assert "eval" not in (tmp_path / "m").read_text()


def test_without_targets_there_is_no_test(reporter, tmp_path, capsys):
    capsys.readouterr()
    reporter.evaluation(1, 20, 0.0, 0, 0)
    assert capsys.readouterr().out == "epoch 1/2  no test: the test set has no targets\n"
    reporter.evaluation(2, 40, 0.5, 1, 1)  # one target is enough
    assert "test loss 0.5000, accuracy 100.00% (1 of 1)" in capsys.readouterr().out
    assert (tmp_path / "m").read_text().count("eval") == 1


class AlmostFull:
    """A disk that takes all but the last byte of a line. Only the next write would raise the error."""

    name = "m"

    def write(self, line):
        return len(line) - 1


def test_metrics_that_end_within_a_line_stop_the_run_at_its_end(reporter, capsys):
    reporter.metrics = AlmostFull()
    reporter.write("train", loss=1.0)
    assert GracefulStop.problem == "cannot write m: No space left on device" and reporter.metrics is None
    reporter.write("train", loss=1.0)  # no second attempt
    capsys.readouterr()
    with pytest.raises(SystemExit):
        reporter.end(20)
    assert capsys.readouterr().err == "error: cannot write m: No space left on device\n"


@pytest.mark.root
def test_without_room_for_traces_training_continues(tmp_path):
    small = "mkdir traces && mount -t tmpfs -o size=8k none traces"
    words = [*command("03", 2), "--num-samples=96", "--batch-size=4", "--epochs=1", "--use-gpu=0"]
    script = f'{small} && "$@" --profile=traces && ls -A traces'
    process = start(["unshare", "--mount", "bash", "-c", script, "bash", *words], tmp_path)
    status, out, err = finish(process)
    print(status, out, err)
    for rank in range(2):
        path = f"traces/03_multigpu_torchrun-rank-{rank}.json"
        assert f"warning: rank {rank} cannot write {path}: this rank has no trace\n" in err
    assert status == 0 and re.search(r"\ndone: .*\n$", out)  # ls has found nothing half written


def test_a_line_that_nobody_can_read_is_not_tried_again():
    """Python would try it again at its end, and exit with status 120."""
    with open("/dev/full", "w") as full:
        print_line("one", full)
        print("two", file=full)  # from here on it goes nowhere
        full.flush()


@pytest.mark.sample(2)
@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["01", "03", "05"])
def test_where_nobody_can_read_the_lines_training_goes_on(tmp_path, step):
    """The log is on a full disk. The metrics, on another disk, are complete."""
    flags = [
        "--num-samples=96",
        "--batch-size=4",
        "--epochs=2",
        "--use-gpu=0",
        "--metrics=m",
        "--snapshot-dir=s",
    ]
    words = [*command(step, ranks_of(step)), *flags]
    process = start(["sh", "-c", 'exec "$@" > /dev/full', "sh", *words], tmp_path)
    status, _, err = finish(process)
    print(status, err)
    assert status == 0 and "Traceback" not in err
    assert "warning: cannot write to standard output: No space left on device" in err
    assert json.loads((tmp_path / "m").read_text().splitlines()[-1])["event"] == "end"


@pytest.mark.few(3)
@pytest.mark.parametrize("step", FOLDERS)
def test_a_loss_that_is_not_finite_stops_all_and_nothing_more_is_saved(tmp_path, step):
    """In the sixth step, because of a learning rate with which AdamW moves each weight by 1e30."""
    ranks = 1 if step == "01" else 3
    takes = "        self.optimizer.step()\n"
    explodes = (
        "        if self.global_step == 5:\n"
        "            for group in self.optimizer.param_groups:\n"
        "                group['lr'] = 1e30\n"
    )
    root = planted(tmp_path / "root", step, (takes, explodes + takes))
    flags = ["--num-samples=480", "--batch-size=4", "--epochs=100", "--use-gpu=0", "--metrics=m"]
    flags += ["--save-every=4", "--snapshot-dir=s"]
    status, out, err = finish(start([*command(step, ranks, root), *flags], tmp_path))
    print(status, out, err)
    assert status == (1 if step > "02" else 2)
    assert re.search(
        r"^error: the loss is (nan|inf) by step 8: nothing more is saved; try a smaller --lr,", err, re.M
    )
    assert saved(tmp_path / "s") == [4]
    text = (tmp_path / "m").read_text()
    assert "NaN" not in text and "Infinity" not in text
