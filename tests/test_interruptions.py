"""Signals, full disks, ranks that fall silent: what is saved stays, and nobody waits for ever.

The same at random moments is `make soak`; a short one of it is in here.
"""

import collections
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import soak
from conftest import FOLDERS, ROOT, children, command, finish, largest_difference, newest, start, train

from common.snapshot import snapshots, step_of

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds ranks in /proc: Linux only"
)

STEPS = list(FOLDERS)
GROWN = [step for step in STEPS if step != "01"]
FOREVER = ["--num-samples=480", "--epochs=1000", "--use-gpu=0", "--snapshot-dir=snapshots"]


def ranks_of(step):
    return 1 if step == "01" else 2


def saved(folder):
    """The steps of all snapshots, newest first, of whichever kind."""
    found = [*snapshots(folder), *snapshots(folder, sharded=True)]
    return sorted(map(step_of, found), reverse=True)


def wait_until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def planted(root, step, *pairs):
    """A copy of a step and `common`, with other lines."""
    shutil.copytree(ROOT / "common", root / "common")
    (root / FOLDERS[step]).mkdir()
    source = (ROOT / FOLDERS[step] / "train.py").read_text()
    for right, wrong in pairs:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    (root / FOLDERS[step] / "train.py").write_text(source)
    return root


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


SHORT = {
    "01": ["everything, in a save", "SIGTERM"],
    "02": ["SIGTERM", "one rank"],
    "03": ["Ctrl-C", "the launcher"],
    "04": ["everything, in a save", "SIGTERM"],
    "05": ["Ctrl-C", "everything, in a save"],
}


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_and_resumed_it_ends_bit_identical(tmp_path, step):
    seed = int.from_bytes(os.urandom(2))
    expected = soak.undisturbed(step, tmp_path / "left alone")
    for line in soak.interrupted_run(step, SHORT[step], seed, tmp_path / "interrupted", expected):
        print(line)


@pytest.mark.parametrize("step", GROWN)
def test_ranks_without_a_launcher_save_and_leave(tmp_path, step):
    """SIGKILL to the launcher alone: a run that is started again would meet them in the same folder."""
    process = start([*command(step, 2), *FOREVER], tmp_path)
    ranks = []
    try:
        wait_until(lambda: saved(tmp_path / "snapshots"), "a snapshot")
        ranks = children(process.pid)
        process.kill()
        wait_until(lambda: all(map(has_ended, ranks)), f"the end of {ranks}", 60)
    finally:
        soak.kill([pid for pid in ranks if not has_ended(pid)], signal.SIGKILL)
        _, out, err = finish(process)
    said = re.search(r"(SIGINT|SIGTERM): saved at step (\d+)", out)
    print(f"{len(ranks)} ranks: {said[0]}")
    assert len(ranks) == 2 and int(said[2]) == saved(tmp_path / "snapshots")[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("step", GROWN)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, step):
    process = start([*command(step, 2), *FOREVER], tmp_path)
    try:
        wait_until(lambda: saved(tmp_path / "snapshots"), "a snapshot")
        os.kill(children(process.pid)[1], signal.SIGTERM)
    finally:
        status, out, err = finish(process)
    said = re.search(r"SIGTERM: saved at step (\d+)", out)
    print(status, out[-200:], err[-1000:])
    assert said and int(said[1]) == saved(tmp_path / "snapshots")[0]
    assert status == (143 if step == "02" else 1) and "Seen by" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["01", "02"])
def test_the_status_is_the_signals(tmp_path, step, number):
    """128 and the signal's number, as shells have it; torchrun, around steps 03 to 05, has 1 for all."""
    process = start([*command(step, ranks_of(step)), *FOREVER], tmp_path)
    try:
        wait_until(lambda: saved(tmp_path / "snapshots"), "a snapshot")
        process.send_signal(number)
    finally:
        status, out, err = finish(process)
    print(status, out.splitlines()[-1], err)
    assert status == 128 + number
    assert f"{number.name}: saved at step {saved(tmp_path / 'snapshots')[0]}; run the same again" in out
    assert "Traceback" not in err


# 457 images, 2 ranks × 10: 22 steps an epoch; another size than the first's divides no place of it.
TRACED = ["--num-samples=457", "--batch-size=10", "--precision=float64", "--use-gpu=0"]


@pytest.mark.parametrize(("step", "ranks"), [("02", 3), ("03", 1), ("04", 3), ("05", 3), ("05", 1)])
def test_at_another_world_size_no_image_is_seen_twice_or_left_out(tmp_path, step, ranks):
    """Of the epoch in which it was interrupted, from a trace of the images that all ranks have drawn."""
    root = planted(tmp_path / "root", step)
    data = root / "common" / "mnist.py"
    draws = "rows = torch.tensor(indices, dtype=torch.int64)"
    writes = f"{draws}\n        print('drew', len(self), *indices, file=open(f'drawn-{{os.getpid()}}', 'a'))"
    assert data.read_text().count(draws) == 1
    data.write_text(data.read_text().replace(draws, writes))
    stops = "\n            if self.global_step == 7: os.kill(os.getpid(), signal.SIGTERM)"
    script = root / FOLDERS[step] / "train.py"
    whole = script.read_text()
    counts = "            self.global_step += 1\n"
    assert whole.count(counts) == 1
    # In the seventh step: the vote of the eighth stops all.
    script.write_text(whole.replace(counts, f"{counts.rstrip()}{stops}\n"))
    flags = [*TRACED, "--epochs=1", "--snapshot-dir=snapshots"]
    finish(start([*command(step, 2, root), *flags], tmp_path))
    script.write_text(whole)
    done = saved(tmp_path / "snapshots")[0]
    assert done == 8
    train(step, ranks, tmp_path, *TRACED, "--epochs=1", root=root)
    seen = collections.Counter()
    for file in tmp_path.glob("drawn-*"):
        for line in file.read_text().splitlines():
            _, size, *indices = line.split()
            if size == "457":  # and not the test set
                seen.update(map(int, indices))
    before, batch = 8 * 2 * 10, ranks * 10
    skipped = -before % ranks
    expected = before + (457 // ranks * ranks - before - skipped) // batch * batch
    print(
        f"8 steps at 2 ranks, the rest at {ranks}: {len(seen)} of 457 images, {max(seen.values())} times each"
    )
    print(f"left out: {skipped} at the change, {457 - skipped - len(seen)} at the epoch's end")
    assert max(seen.values()) == 1
    assert skipped < ranks and 457 - skipped - len(seen) < batch + ranks
    assert len(seen) == expected


def mounted(folder, size):
    """A small disk of its own in `folder`."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"needs a file system of its own, as root: {done.stderr.decode().strip()}")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    mounted(folder, "9m")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder, options):
    """Change a disk; it cannot be made read-only in the moment in which something is written."""

    def done():
        return not subprocess.run(
            ["mount", "-o", f"remount,{options}", folder], capture_output=True
        ).returncode

    wait_until(done, f"remounting with {options}")


@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_stops_all_ranks_and_costs_nothing(tmp_path, disk, step):
    """Three snapshots of 2.5 MB fit, the fourth does not. With more room, the same command goes on."""
    flags = ["--num-samples=480", "--epochs=3", "--use-gpu=0", "--save-every=8"]
    flags += [f"--batch-size={24 // ranks_of(step)}"]
    words = [*command(step, ranks_of(step)), *flags, "--snapshot-dir=disk/snapshots"]
    status, out, err = finish(start(words, tmp_path))
    before = saved(disk / "snapshots")
    print(f"status {status}, snapshots {before}: {errors(err)}")
    said = "(0.0 MB are free)" if step == "05" else "No space left on device"
    assert len(errors(err)) == 1 and f"{said}; make room, make it writable" in errors(err)[0]
    assert status == 2 if step < "03" else "exitcode  : 2" in err
    assert "RuntimeError" not in err  # of ranks that find rank 0 gone
    assert len(before) >= 2
    remount(disk, "size=30m")
    status, out, err = finish(start(words, tmp_path))
    assert status == 0 and f"step {before[0]}\n" in out, err
    left_alone = train(step, ranks_of(step), tmp_path / "left alone", *flags)
    state = newest(disk / "snapshots")
    assert largest_difference(state["model"], left_alone.weights) == 0.0
    assert not list((disk / "snapshots").glob(".*"))


@pytest.mark.parametrize("step", ["01", "03", "05"])
def test_a_disk_that_becomes_read_only_stops_all_ranks(tmp_path, disk, step):
    remount(disk, "size=100m")
    words = [*command(step, ranks_of(step)), *FOREVER, "--snapshot-dir=disk/snapshots"]
    process = start(words, tmp_path)
    try:
        wait_until(lambda: saved(disk / "snapshots"), "a snapshot")
        remount(disk, "ro")
    finally:
        status, out, err = finish(process)
    print(f"status {status}: {errors(err)}")
    assert len(errors(err)) == 1 and "Read-only file system" in errors(err)[0]
    assert errors(err)[0].endswith("; make room, make it writable, or choose another --snapshot-dir")
    assert status == 2 if step < "03" else "exitcode  : 2" in err
    assert "RuntimeError" not in err
    # Started again, it says so before it trains.
    status, out, err = finish(start(words, tmp_path))
    print(f"status {status}: {errors(err)}")
    assert errors(err) == [
        "error: cannot write to disk/snapshots: Read-only file system; "
        "make room, make it writable, or choose another --snapshot-dir"
    ]
    assert "loss" not in out


# What rank 1 does in its fifth step, when the others wait for it.
SILENT = {
    "raises": "if self.rank == 1 and self.global_step == 5: raise ZeroDivisionError('planted')",
    "exits with 0": "if self.rank == 1 and self.global_step == 5: os._exit(0)",
    "stops": "if self.rank == 1 and self.global_step == 5: os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("what", SILENT)
@pytest.mark.parametrize("step", GROWN)
def test_a_rank_that_does_not_come_ends_the_others(tmp_path, step, what):
    """At three ranks. With a time-out of 5 seconds, where the scripts have 2 minutes."""
    counts = "            self.global_step += 1\n"
    pairs = [(counts, f"{counts}            {SILENT[what]}\n")]
    flags = [*FOREVER, "--timeout=5"]
    if step < "04":
        pairs.append(("timeout=timedelta(minutes=2),  #", "timeout=timedelta(seconds=5),  #"))
        pairs.append(("timeout=timedelta(minutes=2))  #", "timeout=timedelta(seconds=5))  #"))
        flags.remove("--timeout=5")
    root = planted(tmp_path / "root", step, *pairs)
    process = start([*command(step, 3, root), *flags], tmp_path)
    try:
        wait_until(lambda: len(children(process.pid)) == 3, "three ranks")
        ranks = children(process.pid)
    finally:
        status, _, err = finish(process, 120)
    print(f"status {status}\n{err[-1500:]}")
    assert status == 1
    assert all(map(has_ended, ranks))
    if what == "raises":
        assert "ZeroDivisionError: planted" in err
        assert "Connection closed by peer" not in err  # the echo on the other ranks
        assert "destroy_process_group" not in err  # torch says so when a process leaves without it
    else:
        assert re.search(
            r"Seen by rank [02]( on \S+)?\. After a time-out or a lost connection look at the o", err
        )
        assert re.search("Connection (closed|reset) by peer" if what == "exits with 0" else "5000ms", err)


DIFFERENT = {
    "flags": "sys.argv.append('--lr=0.01')",
    "data": "sys.argv[sys.argv.index('--num-samples=480')] = '--num-samples=481'",
    "code": "sys.argv[0] = sys.argv[0].replace('/one/', '/other/')",
}


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("step", ["04", "05"])
def test_a_rank_that_differs_is_named_before_the_first_step(tmp_path, step, what):
    """Ranks 1 of 3 have other flags, data or code, as on a node that was forgotten."""
    for name in ("one", "other"):
        planted(tmp_path / name, step)
    (tmp_path / "other" / FOLDERS[step] / "train.py").open("a").write("# newer\n")
    launch = tmp_path / "launch.py"
    launch.write_text(
        "import os, runpy, sys\nsys.argv.pop(0)\n"
        f"if os.environ['RANK'] == '1': {DIFFERENT[what]}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as error:\n"
        "    print(os.environ['RANK'], file=open(f'left-with-{error.code}', 'a'))\n"
        "    raise\n"
    )
    words = command(step, 3, tmp_path / "one")
    words.insert(-1, str(launch))
    status, out, err = finish(start([*words, *FOREVER], tmp_path))
    print(status, errors(err))
    said = {"flags": "--lr 0.01, rank 0", "data": "--num-samples 481, rank 0", "code": "code "}[what]
    assert len(errors(err)) == 1 and "loss" not in out
    assert errors(err)[0].startswith("error: rank 1 on ") and f" has {said}" in errors(err)[0]
    assert "rank 2 on" not in errors(err)[0] and errors(err)[0].endswith(": make the nodes the same")
    assert status == 1 and "exitcode  : 2" in err
    assert sorted((tmp_path / "left-with-2").read_text().split()) == ["0", "1", "2"]
