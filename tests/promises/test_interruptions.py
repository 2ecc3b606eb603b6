"""Signals, full disks, ranks that fall silent: what is saved stays, and no rank waits forever.

`make soak` does the same at random moments; this file has a short version of it.

Promise: nothing is lost and no rank waits forever when a run is interrupted at a random moment or in the
middle of a save, when the disk is full, or when a rank dies or hangs: [see below](#nothing-lost).
"""

import collections
import itertools
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak
import torch
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    GROWN,
    after_a_step,
    children,
    command,
    drawn,
    environment,
    errors,
    finish,
    has_ended,
    kill,
    largest_difference,
    last_saved,
    left_over,
    newest,
    planted,
    ranks_of,
    saved,
    start,
    telling,
    traced,
    train,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds ranks in /proc: Linux only"
)

STEPS = list(FOLDERS)
FOREVER = ["--num-samples=480", "--epochs=1000", "--save-every=4", "--use-gpu=0", "--snapshot-dir=snapshots"]


SHORT = {
    "01": ["everything, in a save", "SIGTERM"],
    "02": ["SIGTERM", "one rank"],
    "03": ["Ctrl-C", "the launcher"],
    "04": ["everything, in a save", "SIGTERM"],
    "05": ["everything, in a save"],
}


@pytest.mark.few(1)
@pytest.mark.parametrize("step", STEPS)
def test_interrupted_and_resumed_it_ends_bit_identical(tmp_path, step):
    seed = int.from_bytes(os.urandom(2))
    ranks = 1 if step == "01" else soak.SIZES[seed % len(soak.SIZES)]
    expected = soak.undisturbed(step, ranks, tmp_path / "left alone")
    lines = soak.interrupted_run(step, ranks, SHORT[step], seed, tmp_path / "interrupted", expected)
    print("\n".join(lines))
    assert len(lines) == len(SHORT[step])


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_soak(tmp_path, step):
    """Like `make soak`: 8 interruptions of one step and, if torchrun starts it, a restart."""
    restarts = int(step in soak.UNDER_TORCHRUN)
    assert soak.soak(8, restarts, int.from_bytes(os.urandom(2)), tmp_path, steps=(step,))


@pytest.mark.few(2)
@pytest.mark.parametrize("step", GROWN)
def test_ranks_without_a_launcher_save_and_leave(tmp_path, step):
    """SIGKILL only the launcher: if ranks stayed, the next run would meet them in the same folder."""
    process = start([*command(step, 2), *FOREVER], tmp_path)
    ranks = []
    try:
        wait_for_step(process, tmp_path / "snapshots")
        ranks = process.ranks()
        kill([process.pid])
        wait_until(lambda: all(map(has_ended, ranks)), f"the end of {ranks}", 60)
    finally:
        kill([pid for pid in ranks if not has_ended(pid)])
        _, out, err = finish(process)
    said = re.search(r"(SIGINT|SIGTERM): saved at step (\d+)", out)
    print(f"{len(ranks)} ranks: {said and said[0]}")
    assert len(ranks) == 2 and said and int(said[2]) == last_saved(tmp_path / "snapshots"), process.story
    assert "Traceback" not in err


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_when_the_terminal_goes_away_all_is_saved(tmp_path, step):
    """When a connection drops, Linux sends SIGHUP to all processes, and nothing more can be printed."""
    ranks = 1 if step == "01" else 3
    words = [*command(step, ranks), *FOREVER]
    ours, theirs = pty.openpty()
    # A process in its own session, which has this terminal.
    inside = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    inside += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # the tests themselves may run under nohup
    inside += "os.execvp(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", inside, *words],
        cwd=tmp_path, env=environment(), start_new_session=True, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    left = []
    try:
        wait_until(lambda: last_saved(tmp_path / "snapshots") >= 4, "a snapshot")
        left = [process.pid, *children(process.pid)]
        before = last_saved(tmp_path / "snapshots")
        os.close(ours)
        process.wait(60)
        wait_until(lambda: all(map(has_ended, left)), f"the end of {left}", 60)
    finally:
        kill([pid for pid in left if not has_ended(pid)])
    print(process.returncode, before, saved(tmp_path / "snapshots"))
    assert process.returncode == (129 if step < "03" else 1)
    assert last_saved(tmp_path / "snapshots") > before
    assert not list((tmp_path / "snapshots").glob(".snapshot-*.tmp"))


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize(("step", "status"), [("01", 143), ("02", 143), ("03", 1)])
def test_nohup_keeps_a_run_alive(tmp_path, step, status):
    """torchrun needs `--signals-to-handle` for this. Otherwise, it would end its ranks after SIGHUP."""
    words = [*command(step, 2), *FOREVER]
    if step == "03":
        words.insert(words.index("--standalone"), "--signals-to-handle=SIGTERM,SIGINT")
    process = start(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *words], tmp_path)
    try:
        wait_for_step(process, tmp_path / "snapshots")
        os.killpg(process.pid, signal.SIGHUP)
        wait_for_step(process, tmp_path / "snapshots", last_saved(tmp_path / "snapshots") + 40)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    finally:
        found, out, err = finish(process)
    print(found, out[-300:], err[-1000:])
    assert found == status and "SIGTERM: saved at step" in out


@pytest.mark.parametrize("step", GROWN)
def test_ranks_whose_launcher_is_gone_do_not_wait_to_meet(tmp_path, step):
    """SIGKILL the launcher while two of three ranks wait for the third in `init_process_group`."""
    rank = "rank" if step == "02" else "int(os.environ['RANK'])"
    meets = "        dist.init_process_group("
    late = "        print('here\\n', end='', flush=True)\n"
    late += f"        __import__('time').sleep(99 if {rank} == 1 else 0)\n"
    root = planted(tmp_path / "root", step, (meets, late + meets))
    process = start([*command(step, 3, root), *FOREVER], tmp_path)
    ranks = []
    try:
        process.wait_for("(here(.|\n)*){3}")
        ranks = process.ranks()
        kill([process.pid])
        wait_until(lambda: all(map(has_ended, ranks)), f"the end of {ranks}", 20)
    finally:
        kill([pid for pid in ranks if not has_ended(pid)])
        finish(process)
    assert len(ranks) == 3


@pytest.mark.few(2)
@pytest.mark.parametrize("step", GROWN)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, step):
    process = start([*command(step, 2), *FOREVER], tmp_path)
    try:
        wait_for_step(process, tmp_path / "snapshots")
        os.kill(process.ranks()[1], signal.SIGTERM)
    finally:
        status, out, err = finish(process)
    said = re.search(r"SIGTERM: saved at step (\d+)", out)
    print(status, out[-200:], err[-1000:])
    assert said and int(said[1]) == last_saved(tmp_path / "snapshots")
    assert status == (143 if step == "02" else 1) and "Seen by" not in err


@pytest.mark.few(2)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["01", "02"])
def test_the_status_is_the_signals(tmp_path, step, number):
    """128 plus the signal's number, as in shells. torchrun, which starts steps 03 to 05, always has 1."""
    process = start([*command(step, ranks_of(step)), *FOREVER], tmp_path)
    try:
        wait_for_step(process, tmp_path / "snapshots")
        process.send_signal(number)
    finally:
        status, out, err = finish(process)
    print(status, out.splitlines()[-1], err)
    assert status == 128 + number
    assert (
        f"{number.name}: saved at step {last_saved(tmp_path / 'snapshots')}; run the same command again"
        in out
    )
    assert "Traceback" not in err


@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["02", "03"])
def test_a_rank_that_takes_longer_to_end_is_not_said_to_lose_anything(tmp_path, step):
    """The launcher sends it a second SIGTERM when the first rank has ended. By then, everything is saved."""
    ends = "        name = signal.Signals(self.stopping).name\n"
    slowly = "        if dist.get_rank() == 1:\n            time.sleep(3)\n"
    root = planted(tmp_path / "root", "common/stopping.py", (ends, slowly + ends), steps=(step,))
    process = start([*command(step, 2, root), *FOREVER], tmp_path)
    try:
        wait_for_step(process, tmp_path / "snapshots")
        process.send_signal(signal.SIGTERM)
    finally:
        status, out, err = finish(process)
    print(status, out, err)
    assert "SIGTERM: saved at step" in out and "for the second time" not in err


STUCK = {  # in Python code, where a signal handler runs, and in a collective, where none runs
    "01": "self.global_step == 2 and (open('stuck', 'w'), sum(0 for _ in iter(int, 1)))",
    "03": "self.rank == 1 and self.global_step == 2 and (open('stuck', 'w'), time.sleep(600))",
}


@pytest.mark.parametrize("step", STUCK)
def test_a_second_signal_ends_a_run_that_is_stuck(tmp_path, step):
    root = planted(tmp_path / "root", step, after_a_step(STUCK[step]))
    process = start([*command(step, 2, root), *FOREVER, "--save-every=1"], tmp_path)
    ranks = []
    try:
        wait_until((tmp_path / "stuck").exists, "the file that a rank creates before it is stuck", 60)
        ranks = process.ranks() or [process.pid]
        kill(ranks, signal.SIGTERM)
        time.sleep(1.2)  # within a second, the next signal would count as the same one
        assert not any(map(has_ended, ranks))
        kill(ranks, signal.SIGTERM)
        wait_until(lambda: all(map(has_ended, ranks)), f"the end of {ranks}", 10)
    finally:
        kill([pid for pid in ranks if not has_ended(pid)])
        status, out, err = finish(process)
    print(status, out, err)
    assert status == (143 if step == "01" else 1)
    assert last_saved(tmp_path / "snapshots") > 0 and "saved at step" not in out
    who = "" if step == "01" else "rank 0 received "
    assert f"error: {who}SIGTERM for the second time: ending at once, and what was trained" in err


LOADS = "    train_data, test_data = load_mnist(args.data_dir, args.num_samples)\n"
STALLS = f"""{LOADS}    import itertools, os, time
    usual, calls = type(train_data).__getitems__, itertools.count(1)

    def stalling(data, indices):
        if len(indices) == 4 and next(calls) == 8 and os.environ.get("RANK", "0") == "LAST":
            time.sleep(600)
        return usual(data, indices)

    type(train_data).__getitems__ = stalling
"""


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("step", "ranks"), [("01", 1), ("03", 3), ("05", 2)])
def test_a_signal_ends_a_rank_that_waits_for_its_batch(tmp_path, step, ranks, workers):
    """The others are already in the step, and cannot save without it: the last snapshot is what counts."""
    root = planted(tmp_path / "root", step, (LOADS, STALLS.replace("LAST", str(ranks - 1))))
    flags = [*FOREVER, "--batch-size=4", "--save-every=1", f"--num-workers={workers}"]
    process = start([*command(step, ranks, root), *flags], tmp_path)
    pids = []
    try:
        wait_until(lambda: last_saved(tmp_path / "snapshots") == 7, "the snapshot of the last whole step", 60)
        pids = [*([process.pid] if step == "01" else []), *children(process.pid)]  # ranks and their workers
        kill(pids, signal.SIGTERM)
        wait_until(lambda: all(map(has_ended, pids)), f"the end of {pids}", 60)
    finally:
        kill([pid for pid in pids if not has_ended(pid)])
        status, out, err = finish(process)
    print(status, out, err)
    assert status == (143 if step == "01" else 1)
    who = "" if step == "01" else f"rank {ranks - 1} received "
    assert f"error: {who}SIGTERM, and no batch has come for 10 s: ending at once, and what was trained" in err
    assert last_saved(tmp_path / "snapshots") == 7 and "saved at step" not in out


@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["01", "03"])
def test_a_worker_that_dies_ends_training_in_one_line(tmp_path, step):
    process = start([*command(step, 2), *FOREVER, "--num-workers=1"], tmp_path)
    try:
        wait_for_step(process, tmp_path / "snapshots")
        rank = process.pid if step == "01" else process.ranks()[0]
        kill(children(rank))
        status, out, err = finish(process)
    finally:
        kill([process.pid])
    print(status, out, err)
    assert status == (2 if step == "01" else 1)
    said = [line for line in errors(err) if line.startswith("error: a worker of --num-workers has died: ")]
    assert len(said) == 1
    assert step == "03" or "Traceback" not in err


def test_a_mark_that_a_killed_run_has_left_is_deleted(tmp_path):
    """But a new one is kept: it may belong to another run that starts at the same time."""
    folder = tmp_path / "snapshots"
    folder.mkdir()
    old = [f".mark-{number}" for number in range(300)]  # so many that several ranks delete the same one
    for name, age in (*((name, 3700) for name in old), (".mark-new", 0)):
        (folder / name).touch()
        os.utime(folder / name, times=(time.time() - age,) * 2)
    train("04", 3, tmp_path, "--num-samples=24", "--batch-size=4", "--epochs=1")
    assert left_over(folder) == [".mark-new"]


@pytest.mark.parametrize(
    "raised", ["RuntimeError('planted')", "FileNotFoundError(2, 'planted', 'a picture')"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_is_shown_as_it_is(tmp_path, raised, workers):
    """Whatever its kind, it is not reported as a worker that has died."""
    draws = "        return self[torch.tensor(indices)]"
    root = planted(tmp_path / "root", "common/mnist.py", (draws, f"        raise {raised}"), steps=("01",))
    status, _, err = finish(start([*command("01", 1, root), *FOREVER, f"--num-workers={workers}"], tmp_path))
    print(err)
    assert status == 1 and "planted" in err and "Traceback" in err and "has died" not in err


# 457 images, 2 ranks × 10: 22 steps an epoch. 457 is a prime number, so there is always a remainder.
TRACED = ["--num-samples=457", "--batch-size=10", "--precision=float64", "--use-gpu=0"]


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "ranks"),
    [("02", 3), ("03", 1), pytest.param("04", 3, marks=pytest.mark.slow), ("05", 3), ("05", 1)],
)
def test_at_another_world_size_no_image_is_seen_twice_or_left_out(tmp_path, step, ranks):
    """In the epoch that was interrupted, from a trace of the images that all ranks have drawn."""
    root = traced(planted(tmp_path / "root", step))
    # A signal after the seventh step: all ranks stop soon after it, see common/stopping.py.
    stops = after_a_step("if self.global_step == 7: os.kill(os.getpid(), signal.SIGTERM)")
    stopping = traced(planted(tmp_path / "stopping", step, stops))
    flags = [*TRACED, "--epochs=1", "--snapshot-dir=snapshots"]
    finish(start([*command(step, 2, stopping), *flags], tmp_path))
    done = last_saved(tmp_path / "snapshots")
    assert 8 <= done <= 13
    train(step, ranks, tmp_path, *TRACED, "--epochs=1", root=root)
    seen = collections.Counter()
    for batches in drawn(tmp_path, 457):  # without those of the test set
        seen.update(itertools.chain(*batches))
    before, batch = done * 2 * 10, ranks * 10
    skipped = -before % ranks
    expected = before + (457 // ranks * ranks - before - skipped) // batch * batch
    print(
        f"{done} steps at 2 ranks, the rest at {ranks}: {len(seen)} of 457 images, {max(seen.values())} times"
    )
    print(f"left out: {skipped} at the change, {457 - skipped - len(seen)} at the epoch's end")
    assert max(seen.values()) == 1
    assert skipped < ranks and 457 - skipped - len(seen) < batch + ranks
    assert len(seen) == expected


def mounted(folder, size):
    """Mount a small disk at `folder`."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"needs root, to mount a file system: {done.stderr.decode().strip()}")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    mounted(folder, "9m")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def failing_disk(tmp_path):
    """A disk with ext4 that becomes read-only at its first error, as most are set up."""
    folder, image = tmp_path / "disk", tmp_path / "image"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(100 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fail_once(folder):
    """Cause an error in the file system of `folder`."""
    device = folder.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("planted")


@pytest.mark.sample(3)
@pytest.mark.root
@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_stops_all_ranks_and_costs_nothing(tmp_path, disk, step):
    """Three snapshots of 2.5 MB fit, the fourth does not. With more room, the same command continues."""
    flags = ["--num-samples=480", "--epochs=3", "--use-gpu=0", "--save-every=16"]
    flags += [f"--batch-size={GLOBAL_BATCH // ranks_of(step)}"]
    words = [*command(step, ranks_of(step)), *flags, "--snapshot-dir=disk/snapshots"]
    status, out, err = finish(start(words, tmp_path))
    before = saved(disk / "snapshots")
    print(f"status {status}, snapshots {before}: {errors(err)}")
    said = "(0.0 MB are free)" if step == "05" else "No space left on device"
    assert len(errors(err)) == 1 and f"{said}; make room, make it writable" in errors(err)[0]
    assert status == 2 if step < "03" else "exitcode  : 2" in err
    assert "RuntimeError" not in err  # from ranks that find rank 0 gone
    assert len(before) >= 2
    subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
    status, out, err = finish(start(words, tmp_path))
    assert status == 0 and f"step {before[0]}\n" in out, err
    left_alone = train(step, ranks_of(step), tmp_path / "left alone", *flags)
    state = newest(disk / "snapshots")
    assert largest_difference(state["model"], left_alone.weights) == 0.0
    assert left_over(disk / "snapshots") == []


@pytest.mark.root
@pytest.mark.parametrize("step", ["01", "03", "05"])
def test_a_disk_that_becomes_read_only_stops_all_ranks(tmp_path, failing_disk, step):
    words = [*command(step, ranks_of(step)), *FOREVER, "--snapshot-dir=disk/snapshots"]
    process = start(words, tmp_path)
    try:
        wait_for_step(process, failing_disk / "snapshots")
        fail_once(failing_disk)
    finally:
        status, out, err = finish(process)
    print(f"status {status}: {errors(err)}")
    # A write at this very moment gets a different error.
    assert len(errors(err)) == 1 and re.search("Read-only file system|Input/output error", errors(err)[0])
    assert errors(err)[0].endswith("; make room, make it writable, or choose another --snapshot-dir")
    assert status == 2 if step < "03" else "exitcode  : 2" in err
    assert "RuntimeError" not in err
    # Started again, it reports the error before it trains.
    status, out, err = finish(start(words, tmp_path))
    print(f"status {status}: {errors(err)}")
    assert errors(err) == [
        "error: cannot write to disk/snapshots: Read-only file system; "
        "make room, make it writable, or choose another --snapshot-dir"
    ]
    assert "loss" not in out


# Each process group that a rank is in: its backend, and the seconds until another rank counts as lost.
GROUPS = {
    "02": [("cpu:gloo", 77), ("gloo", 47)],  # the vote must be the first to give up
    "03": [("cpu:gloo", 77), ("gloo", 47)],
    "04": [("cpu:gloo", 77), ("gloo", 47)],
    "05": [("cpu:gloo", 77), ("gloo", 47), ("gloo", 77)],  # all ranks'; the vote's; the saver's
    "05 --replicas=2": [*[("cpu:gloo", 77)] * 3, ("gloo", 47), ("gloo", 77)],  # also each row's and column's
}


@pytest.mark.few(2)
@pytest.mark.parametrize("case", GROUPS)
def test_each_group_waits_for_a_rank_as_long_as_it_is_told(tmp_path, case):
    step, *own = case.split()
    tells = (
        "sorted((name, pg._get_backend(torch.device('cpu')).options._timeout.seconds) for pg, (name, _) in"
    )
    tells = f"if self.rank == 0: print({tells} dist.distributed_c10d._world.pg_map.items()))"
    root = planted(tmp_path / "root", step, after_a_step(tells))
    flags = ["--num-samples=24", "--batch-size=12", "--epochs=1", "--timeout=77", *own]
    run = train(step, 2, tmp_path, *flags, root=root)
    print(run.out)
    assert str(GROUPS[case]) in run.out.splitlines()


# What rank 1 does after its fifth step, while the others wait for it.
SILENT = {
    "raises": "if self.rank == 1 and self.global_step == 5: raise ZeroDivisionError('planted')",
    "exits with 0": "if self.rank == 1 and self.global_step == 5: os._exit(0)",
    "stops": "if self.rank == 1 and self.global_step == 5: os.kill(os.getpid(), signal.SIGSTOP)",
}
# A stopped rank takes the half minute that torchrun and mp.spawn give it.
SOON = [("02", "raises"), ("03", "raises"), ("04", "exits with 0"), ("05", "raises"), ("05", "stops")]


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "what"),
    [
        pytest.param(step, what, marks=[] if (step, what) in SOON else pytest.mark.slow)
        for step in GROWN
        for what in SILENT
    ],
)
def test_a_rank_that_does_not_come_ends_the_others(tmp_path, step, what):
    """With three ranks."""
    root = planted(tmp_path / "root", step, telling(step), after_a_step(SILENT[what]))
    process = start([*command(step, 3, root), *FOREVER, "--timeout=5"], tmp_path)
    ranks = []
    try:
        wait_until(lambda: len(process.ranks()) == 3, f"three ranks\n{process.story}")
        ranks = process.ranks()
        process.process.wait(120)
        left_over = [rank for rank in ranks if not has_ended(rank)]
    finally:
        status, out, err = finish(process)
    print(f"status {status}\n{out}\n{err[-1500:]}")
    assert status == 1
    assert left_over == []
    assert "left False" not in out
    if what == "raises":
        assert "ZeroDivisionError: planted" in err
        assert "Connection closed by peer" not in err  # the error that follows on the other ranks
        assert "left True" in out
    else:
        assert re.search(
            r"Seen by rank [02]( on \S+)?\. After a timeout or a lost connection look at the o", err
        )
        assert re.search("Connection (closed|reset) by peer" if what == "exits with 0" else "5000ms", err)


MUCH = "--lr=9 --epochs=9 --batch-size=9 --seed=9 --vit-width=128 --vit-depth=9 --timeout=99"
MORE = ["--vit-width 128, 64", "--vit-depth 9, 4"]
# What is done to rank 1 of 3, and how it then differs from rank 0; … stands for a checksum.
DIFFERENT = {
    "flags": ("sys.argv.append('--lr=0.01')", ["--lr 0.01, 0.001"]),
    "data": (
        "sys.argv[sys.argv.index('--num-samples=480')] = '--num-samples=481'",
        ["--num-samples 481, 480", "data synthetic-481 …, synthetic-480 …"],
    ),
    "code": ("sys.argv[0] = sys.argv[0].replace('/one/', '/other/')", ["code …, …"]),
    "common": ("sys.argv[0] = sys.argv[0].replace('/one/', '/third/')", ["code …, …"]),
    "torch": ("import torch; torch.__version__ = '1.0'", [f"torch 1.0, {torch.__version__}"]),
    "much": (  # only six of them are reported
        f"sys.argv += '{MUCH}'.split()",
        ["--epochs 9, 1000", "--batch-size 9, 64", "--lr 9.0, 0.001", "--seed 9, 0", *MORE],
    ),
}
MAY_DIFFER = "--num-workers=1 --verbose --metrics=1 --data-dir=elsewhere --snapshot-dir=one/../snapshots"


def start_with_another_rank(folder, step, change, *flags):
    """Start a step at three ranks. Rank 1 runs the code `change` before its train.py begins."""
    launch = folder / "launch.py"
    launch.write_text(
        "import os, runpy, sys\nsys.argv.pop(0)\nsys.path[0] = os.path.dirname(sys.argv[0])\n"
        f"if os.environ['RANK'] == '1': {change}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    print(os.environ['RANK'], file=open(f'left-with-{error.code}', 'a'))\n"
        "    raise\n"
    )
    words = command(step, 3, folder / "one")
    words.insert(-1, str(launch))
    return start([*words, *flags], folder)


@pytest.mark.sample(6)
@pytest.mark.few(2)
@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("step", ["04", "05"])
def test_a_rank_that_differs_is_named_before_the_first_step(tmp_path, step, what):
    """Rank 1 of 3 has other flags, data, code or torch, like a node that nobody has updated."""
    for name in ("one", "other", "third"):
        planted(tmp_path / name, step)
    for name, file in (("other", f"{FOLDERS[step]}/train.py"), ("third", "common/synthetic.py")):
        (tmp_path / name / file).open("a").write("# newer\n")
    change, differences = DIFFERENT[what]
    status, out, err = finish(start_with_another_rank(tmp_path, step, change, *FOREVER))
    print(status, errors(err))
    host = socket.gethostname()
    said = (difference.rpartition(", ") for difference in differences)
    said = [f"rank 1 on {host} has {theirs}, rank 0 on {host} has {ours}" for theirs, _, ours in said]
    pattern = re.escape(f"error: {'; '.join(said)}: make the nodes the same").replace("…", "[0-9a-f]{8}")
    assert len(errors(err)) == 1 and "loss" not in out
    assert re.fullmatch(pattern, errors(err)[0])
    assert status == 1 and "exitcode  : 2" in err
    assert sorted((tmp_path / "left-with-2").read_text().split()) == ["0", "1", "2"]


@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["04", "05"])
def test_what_a_node_may_have_of_its_own_stops_nobody(tmp_path, step):
    planted(tmp_path / "one", step)
    # Rank 1 also has other words for a download that failed.
    change = (
        f"sys.argv += '{MAY_DIFFER}'.split(); sys.path.insert(1, os.path.dirname(sys.path[0])); "
        "import common.mnist as mnist; load = mnist.load_mnist; mnist.load_mnist = lambda *given: "
        "[setattr(data, 'fallback', 'other words') or data for data in load(*given)]"
    )
    status, out, err = finish(start_with_another_rank(tmp_path, step, change, *FOREVER, "--epochs=1"))
    print(out, err)
    assert status == 0
    assert "[rank 1] epoch 1: " in out and "[rank 0]" not in out
    assert out.splitlines()[-1].startswith("done: 384 samples")


WATCH = """
import os, time
from pathlib import Path

def ranks():
    tasks = Path(f"/proc/{os.getppid()}/task")
    pids = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"]

def watch(rank):
    end = time.monotonic() + 3  # in which nobody is to leave
    while rank == 0 and len(ranks()) == 3 and time.monotonic() < end:
        time.sleep(0.01)
    if rank == 0:
        print(f"and {len(ranks())} are here", flush=True)
"""


def test_no_rank_leaves_before_rank_0_has_saved(tmp_path):
    """A launcher ends the others 30 s after the first rank has exited. Saving a big model takes longer."""
    stopping = "            if stopping:\n"
    watches = "                __import__('watch').watch(self.rank)\n"
    root = planted(tmp_path / "root", "03", (stopping, stopping + watches))
    (root / FOLDERS["03"] / "watch.py").write_text(WATCH)
    process = start([*command("03", 3, root), *FOREVER], tmp_path)
    wait_for_step(process, tmp_path / "snapshots")
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    print(status, out, err[-1000:])
    assert "and 3 are here" in out
