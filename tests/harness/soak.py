"""Interrupt training at random moments, start it again with the same command, and compare the results.

    make soak                              # 100 interruptions, and 20 restarts by torchrun
    make soak ARGS="--kills 10 --seed 7"   # fewer; all seeds are printed
    make soak ARGS="--ranks 3,4"           # only at these world sizes; otherwise 2, 3 and 4

A run of a step is interrupted several times, in a different way each time. It must end, bit for bit, with the
weights and the optimizer's state of an uninterrupted run. This needs Linux's /proc.
"""

import argparse
import contextlib
import os
import random
import re
import secrets
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this folder, where `forks` is

import forks
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    ROOT,
    UNDER_TORCHRUN,
    Started,
    command,
    errors,
    finish,
    has_ended,
    kill,
    last_saved,
    left_over,
    newest,
    planted,
    start,
    states_equal,
    wait_for_step,
    wait_until,
)

from sharded import unfinished

SAVE_EVERY = 5
EPOCH = 21  # steps: an epoch must not end where a snapshot is due anyway
EPOCHS = 5
SIZES = (2, 3, 4)  # of the world
LAST = EPOCHS * EPOCH
FLAGS = [
    f"--num-samples={GLOBAL_BATCH * EPOCH + 5}",
    f"--epochs={EPOCHS}",
    f"--save-every={SAVE_EVERY}",
    "--use-gpu=0",
]
ROOM = 12 * SAVE_EVERY  # no run is interrupted this close to its end: it might end first

# What is ended, and how. The launcher is mp.spawn's parent or torchrun; its ranks outlive it for a moment.
KINDS = {
    "one rank": signal.SIGKILL,
    "all ranks": signal.SIGKILL,
    "the launcher": signal.SIGKILL,
    "everything": signal.SIGKILL,
    "everything, early": signal.SIGKILL,  # in the seconds before the first step
    "everything, in a save": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "Ctrl-C": signal.SIGINT,
    "SIGHUP": signal.SIGHUP,
    "SIGTERM, no batch": signal.SIGTERM,  # while one rank waits for a batch that does not come
}
GRACEFUL = {"SIGTERM", "Ctrl-C", "SIGHUP"}

# An edit of a train.py: while the file `stall` exists, the last rank gets no batch.
LOADS = "    train_data, test_data = load_mnist(args.data_dir, args.num_samples)\n"
STALLS = f"""{LOADS}    import os, time
    usual = type(train_data).__getitems__

    def stalling(data, indices):
        while os.path.exists("stall") and os.environ["LOCAL_RANK"] == "LAST":
            open("stalled", "w").close()
            time.sleep(0.1)
        return usual(data, indices)

    type(train_data).__getitems__ = stalling
"""


def kinds_for(step: str) -> list[str]:
    alone = ("one rank", "all ranks", "the launcher")
    return [kind for kind in KINDS if step != "01" or kind not in alone]


class StuckSave:
    """A pipe in place of the next snapshot, to act like a disk that blocks in the middle of a save."""

    def __init__(self, step: str, ranks: int, folder: Path, rng: random.Random):
        saved = last_saved(folder / "snapshots")
        due = min(saved - saved % SAVE_EVERY + SAVE_EVERY, saved - saved % EPOCH + EPOCH)
        self.reader, self.other = None, None
        if step == "05":  # one rank's shard gets stuck, the next rank's is written
            shards, rank = unfinished(folder / "snapshots", due), rng.randrange(ranks)
            shutil.rmtree(shards, ignore_errors=True)
            shards.mkdir(parents=True)
            self.pipe, self.other = shards / f"__{rank}_0.distcp", shards / f"__{(rank + 1) % ranks}_0.distcp"
        else:
            self.pipe = folder / "snapshots" / f".snapshot-{due:08d}.pt.tmp"
            self.pipe.parent.mkdir(exist_ok=True)
            self.pipe.unlink(missing_ok=True)
        os.mkfifo(self.pipe)
        if step != "05":
            self.reader = os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK)

    def is_reached(self) -> bool:
        """Whether a rank has begun to write the snapshot, and is stuck."""
        if self.reader is None:
            return self.other.exists() and self.other.stat().st_size > 0
        return bool(select.select([self.reader], [], [], 0)[0])

    def clear(self) -> None:
        """Keep what has been written so far, as a disk would."""
        half = b"half"
        if self.reader is not None:
            with contextlib.suppress(BlockingIOError):
                half = os.read(self.reader, 65536)
            os.close(self.reader)
        self.pipe.unlink()
        self.pipe.write_bytes(half)


def interrupt(
    life: Started, folder: Path, kind: str, due: int, stuck: StuckSave | None, rng: random.Random
) -> tuple[str, list[int]]:
    """End a run as `kind` says: in a save, at the start, or soon after it has saved step `due`.

    Returns the moment, in words, and the ranks that it had. Raises AssertionError if it ended before that.
    """
    try:
        if stuck:
            wait_until(lambda: stuck.is_reached() or life.poll() is not None, "a save that is stuck")
            moment = f"in the save of {stuck.pipe.parent.name}/{stuck.pipe.name}"
        elif kind.endswith("early"):
            end = time.monotonic() + (seconds := rng.uniform(0, 0.8))
            # Its first line comes before its first step: on a fast machine, long before this time is over.
            wait_until(lambda: time.monotonic() > end or life.out or life.poll() is not None, "the start")
            moment = f"{seconds:.2f} s after its start, or at its first line"
        else:
            wait_for_step(life, folder / "snapshots", due)
            time.sleep(seconds := rng.uniform(0, 0.1))
            moment = f"{seconds:.3f} s after the save of step {due}"
            if kind.endswith("no batch"):
                (folder / "stall").touch()
                wait_until((folder / "stalled").exists, "a rank that gets no batch")
        assert life.poll() is None, f"it ended before its moment, {moment}\n{life.story}"
        if kind.startswith("everything"):
            kill([life.pid], signal.SIGSTOP)  # so that it starts no rank that would be missed here
    except AssertionError:
        kill([life.pid, *life.ranks()])
        raise
    ranks = life.ranks()
    if kind == "one rank":
        kill([rng.choice(ranks)], KINDS[kind])
    elif kind == "all ranks":
        kill(ranks, KINDS[kind])
    elif kind.startswith("everything"):
        kill([life.pid, *ranks], KINDS[kind])
    elif kind == "Ctrl-C":  # a terminal sends it to the whole group; torchrun's ranks have their own
        os.killpg(life.pid, signal.SIGINT)
    else:
        kill([life.pid], KINDS[kind])
    return moment, ranks


def words_for(step: str, ranks: int, root: Path = ROOT) -> list[str]:
    return [
        *command(step, ranks, root),
        *FLAGS,
        f"--batch-size={GLOBAL_BATCH // ranks}",
        "--snapshot-dir=snapshots",
    ]


def undisturbed(step: str, ranks: int, folder: Path) -> dict[str, Any]:
    """The state at the end of an uninterrupted run."""
    folder.mkdir(parents=True)
    process = start(words_for(step, ranks), folder)
    status, _, _ = finish(process)
    assert status == 0, process.story
    return newest(folder / "snapshots")


def check_end(folder: Path, expected: dict[str, Any], story: str) -> None:
    state = newest(folder / "snapshots")
    assert state["global_step"] == LAST, f"ended at step {state['global_step']}, not {LAST}\n{story}"
    different = [key for key in expected if not states_equal(state[key], expected[key])]
    assert not different, f"differs from the uninterrupted run in {different}\n{story}"
    left = left_over(folder / "snapshots")
    assert not left, f"left behind: {left}\n{story}"


def interrupted_run(
    step: str, ranks: int, kinds: list[str], seed: int, folder: Path, expected: dict[str, Any]
) -> list[str]:
    """Start a step, interrupt it in each of the ways in `kinds`, and let it finish.

    Returns one line for each of `kinds`. Raises AssertionError if the run does not end as it should.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    done: list[str] = []
    ranks_were: list[int] = []
    for number, kind in enumerate(kinds):
        if kind.endswith("in a save") or kind in GRACEFUL:
            # Ranks that have lost their launcher save and exit. They would get stuck at the pipe, or save
            # the step after which this run is to get its signal.
            wait_until(lambda: all(map(has_ended, ranks_were)), f"the end of {ranks_were}")  # noqa: B023
        before = last_saved(folder / "snapshots")
        if kind.endswith("in a save") and before and before % EPOCH == 0:
            kind = "everything"  # the end of the epoch saves the same step again, and deletes the pipe
        stuck = StuckSave(step, ranks, folder, rng) if kind.endswith("in a save") else None
        # Each interruption comes in its own part of the remaining steps.
        part = (LAST - ROOM - before) // (len(kinds) - number)
        due = before + max(SAVE_EVERY, rng.randrange(max(1, part)) // SAVE_EVERY * SAVE_EVERY)
        root = ROOT
        if kind.endswith("no batch"):
            root = planted(folder / f"stalls-{number}", step, (LOADS, STALLS.replace("LAST", str(ranks - 1))))
        life = start(words_for(step, ranks, root), folder)
        moment, ranks_were = interrupt(life, folder, kind, due, stuck, rng)
        _, text, err = finish(life)
        if stuck:
            stuck.clear()
        for name in ("stall", "stalled"):
            (folder / name).unlink(missing_ok=True)
        after = last_saved(folder / "snapshots")
        done.append(
            f"step {step}, ranks {ranks}, seed {seed}: {kind}, {moment}; saved at {before}, then at {after}"
        )
        assert after >= before, f"{done[-1]}\n{life.story}"
        # The rank without a batch ends after ten seconds. Step 02's parent then sends SIGTERM to the others.
        ends = "no batch has come|SIGTERM for the second time" if kind.endswith("no batch") else "nothing"
        unexpected = [line for line in errors(err) if not re.search(ends, line)]
        assert not unexpected, f"{done[-1]}\n{life.story}"
        if kind in GRACEFUL:
            said = re.search(r"(SIGTERM|SIGINT|SIGHUP): saved at step (\d+)", text)
            # Before the first step, there is nothing to lose, and nothing is saved.
            assert int(said[2]) == after if said else after == before, f"{done[-1]}, unsaved\n{life.story}"
        if kind.startswith("everything"):  # only the kernel still has work to do
            wait_until(lambda: all(map(has_ended, ranks_were)), f"the end of {ranks_were}")  # noqa: B023
    wait_until(lambda: all(map(has_ended, ranks_were)), f"the end of {ranks_were}")
    for mark in (folder / "snapshots").glob(".mark-*"):  # left by a rank that was killed in ranks_sharing
        os.utime(mark, times=(0, 0))  # more than an hour ago: the next run deletes it
    last = start(words_for(step, ranks), folder)
    status, _, _ = finish(last)
    story = "\n".join([*done, last.story])
    assert status == 0, f"the last start ended with status {status}\n{story}"
    check_end(folder, expected, story)
    assert len(done) == len(kinds)
    return done


def restarted_run(step: str, ranks: int, seed: int, folder: Path, expected: dict[str, Any]) -> list[str]:
    """SIGKILL one rank at a random moment under `--max-restarts=3`, and let torchrun do the rest."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    words = words_for(step, ranks)
    words.insert(words.index("--standalone"), "--max-restarts=3")
    life = start(words, folder, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    due = rng.randrange(SAVE_EVERY, LAST - ROOM, SAVE_EVERY)
    moment, _ = interrupt(life, folder, "one rank", due, None, rng)
    status, text, _ = finish(life)
    line = f"step {step}, ranks {ranks}, seed {seed}: torchrun restarts after one rank is killed {moment}"
    assert status == 0, f"{line}\n{life.story}"
    starts = text.count("samples a step")
    assert starts == 2, f"{line}: {starts} starts, not 2\n{life.story}"
    check_end(folder, expected, f"{line}\n{life.story}")
    return [line]


def soak(
    interruptions: int,
    restarts: int,
    seed: int,
    folder: Path,
    sizes: tuple[int, ...] = SIZES,
    steps: tuple[str, ...] = tuple(FOLDERS),
) -> bool:
    """Interrupt runs of the steps, two at a time, at least `interruptions` times. True if all ended well."""
    began, rng, lock = time.monotonic(), random.Random(seed), threading.Lock()
    counts = {"interruptions": 0, "restarts": 0, "runs": 0, "failures": 0}
    print(f"seed {seed}: {interruptions} interruptions, {restarts} restarts", flush=True)

    def attempt(what: str, run: Callable[..., list[str]], step: str, run_seed: int, *rest: Any) -> None:
        place = folder / f"{step}-{what}-{run_seed}"
        ranks = 1 if step == "01" else sizes[run_seed % len(sizes)]
        lines, failed = [], False
        try:
            lines = run(step, ranks, *rest, run_seed, place, expected[step, ranks])
        except AssertionError as error:
            failed = True
            lines = [f"FAILED: {error}"]
        with lock:
            counts["failures" if failed else "runs"] += 1
            counts[what] += 0 if failed else len(lines)
            for line in lines:
                print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)
        shutil.rmtree(place)

    def wait_for(attempts: list[Future[None]]) -> None:
        for one in attempts:
            one.result()

    with ThreadPoolExecutor(2) as pool:
        cases = [(step, ranks) for step in steps for ranks in ((1,) if step == "01" else sizes)]
        alone = [pool.submit(undisturbed, *case, folder / f"{case[0]}-{case[1]}") for case in cases]
        expected = {case: run.result() for case, run in zip(cases, alone, strict=True)}
        while counts["interruptions"] < interruptions and not counts["failures"]:
            wait_for(
                [
                    pool.submit(attempt, "interruptions", interrupted_run, step, rng.randrange(10**6), kinds)
                    for step in steps
                    for kinds in [rng.sample(kinds_for(step), 4)]
                ]
            )
        under_torchrun = [step for step in steps if step in UNDER_TORCHRUN]
        wait_for(
            [
                pool.submit(
                    attempt,
                    "restarts",
                    restarted_run,
                    under_torchrun[i % len(under_torchrun)],
                    rng.randrange(10**6),
                )
                for i in range(restarts)
            ]
        )
    minutes = (time.monotonic() - began) / 60
    print(", ".join(f"{name}: {count}" for name, count in counts.items()), f"{minutes:.1f} minutes", sep="; ")
    return not counts["failures"] and counts["interruptions"] >= interruptions


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="at least this many interruptions (100)")
    parser.add_argument("--restarts", type=int, default=20, help="runs that torchrun restarts (20)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="a new one each time")
    parser.add_argument("--ranks", default="2,3,4", help="the world sizes (2,3,4)")
    args = parser.parse_args()
    sizes = tuple(map(int, args.ranks.split(",")))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, forks.server(Path(temporary)):
        sys.exit(0 if soak(args.kills, args.restarts, args.seed, Path(temporary), sizes) else 1)
