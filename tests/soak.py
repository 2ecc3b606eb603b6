"""Interrupt training at random moments, start it again with the same command, and compare how it ends.

    python tests/soak.py                          # make soak: 100 interruptions, and 20 restarts by torchrun
    python tests/soak.py --kills 10 --seed 7      # fewer; all seeds are printed

A run of a step is interrupted several times, in a different way each time, and must end with the weights
and the optimizer's state of a run that was left alone, bit for bit. Needs Linux's /proc.
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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from conftest import FOLDERS, children, command, environment, newest

from common.snapshot import snapshots, step_of, unfinished

SAVE_EVERY = 5
EPOCH = 21  # steps, so that an epoch does not end where a snapshot is due anyway
LAST = 10 * EPOCH
FLAGS = [f"--num-samples={24 * EPOCH + 5}", "--epochs=10", f"--save-every={SAVE_EVERY}", "--use-gpu=0"]
LIMIT = 240  # seconds; a run takes a tenth of it
MOMENTS = 2.5  # seconds after the first step, about as many as a run takes for the rest

# What is ended and how. The launcher is mp.spawn's process or torchrun; its ranks live on for a moment.
KINDS = {
    "one rank": signal.SIGKILL,
    "all ranks": signal.SIGKILL,
    "the launcher": signal.SIGKILL,
    "everything": signal.SIGKILL,
    "everything, early": signal.SIGKILL,  # in the seconds before the first step
    "everything, in a save": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "Ctrl-C": signal.SIGINT,
}


def kinds_for(step: str) -> list[str]:
    alone = ("one rank", "all ranks", "the launcher")
    return [kind for kind in KINDS if step != "01" or kind not in alone]


class Life:
    """One start of a step, until it ends or is ended."""

    def __init__(self, words: list[str], folder: Path, **extra: str):
        self.log = folder / "log"
        self.were: list[int] = []  # the ranks' process ids when it was interrupted
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                words,
                cwd=folder,
                env=environment(**extra),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ranks(self) -> list[int]:
        """The process ids of the ranks; of step 01, which has no launcher, its own."""
        return children(self.process.pid) or [self.process.pid]

    def has_said(self, text: str) -> bool:
        """Wait until it has printed `text`; False if it ended before."""
        end = time.monotonic() + LIMIT
        while text not in self.log.read_text():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, f"never came to '{text}':\n{self.log.read_text()}"
            time.sleep(0.01)
        return True

    def end(self) -> int:
        """Wait for its end; its status."""
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            kill([*children(self.process.pid), self.process.pid], signal.SIGKILL)
            raise AssertionError(f"it hung:\n{self.log.read_text()}") from None


def kill(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_for_end(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, f"still there: {pids}"
        time.sleep(0.01)


def last_saved(folder: Path) -> int:
    found = [*snapshots(folder / "snapshots"), *snapshots(folder / "snapshots", sharded=True)]
    return max(map(step_of, found), default=0)


class StuckSave:
    """A pipe where the next snapshot is to be written: a disk that takes no more in the middle of it."""

    def __init__(self, step: str, folder: Path, rng: random.Random):
        saved = last_saved(folder)
        due = min(saved - saved % SAVE_EVERY + SAVE_EVERY, saved - saved % EPOCH + EPOCH)
        self.reader, self.other = None, None
        if step == "05":  # one rank's shard gets nowhere, the other one's is written
            shards, rank = unfinished(folder / "snapshots", due), rng.randrange(2)
            shutil.rmtree(shards, ignore_errors=True)
            shards.mkdir(parents=True)
            self.pipe, self.other = shards / f"__{rank}_0.distcp", shards / f"__{1 - rank}_0.distcp"
        else:
            self.pipe = folder / "snapshots" / f".snapshot-{due:08d}.pt.tmp"
            self.pipe.parent.mkdir(exist_ok=True)
            self.pipe.unlink(missing_ok=True)
        os.mkfifo(self.pipe)
        if step != "05":
            self.reader = os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK)

    def is_reached(self) -> bool:
        """Whether a rank has begun to write the snapshot, and waits."""
        if self.reader is None:
            return self.other.exists() and self.other.stat().st_size > 0
        return bool(select.select([self.reader], [], [], 0)[0])

    def clear(self) -> None:
        """Leave what has been written, as a disk would."""
        half = b"half"
        if self.reader is not None:
            with contextlib.suppress(BlockingIOError):
                half = os.read(self.reader, 65536)
            os.close(self.reader)
        self.pipe.unlink()
        self.pipe.write_bytes(half)


def interrupt(life: Life, kind: str, stuck: StuckSave | None, rng: random.Random) -> str:
    """End a life in the way of `kind`, at a random moment; when it was, or "" if it was over before."""
    if stuck:
        end = time.monotonic() + LIMIT
        while not stuck.is_reached():
            assert life.process.poll() is None, f"it ended without a save:\n{life.log.read_text()}"
            assert time.monotonic() < end, f"never came to save:\n{life.log.read_text()}"
            time.sleep(0.01)
        moment = f"in the save of {stuck.pipe.parent.name}/{stuck.pipe.name}"
    else:
        early = kind.endswith("early")
        seconds = rng.uniform(0, 4 if early else MOMENTS)
        if not early and not life.has_said("images a step"):
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            life.process.wait(seconds)
            return ""
        moment = f"{seconds:.2f} s after {'its start' if early else 'the first line'}"
    ranks = life.were = life.ranks()
    launcher = [life.process.pid]
    if kind == "one rank":
        kill([rng.choice(ranks)], KINDS[kind])
    elif kind == "all ranks":
        kill(ranks, KINDS[kind])
    elif kind.startswith("everything"):
        # The launcher first: it would end the ranks more gently.
        kill([*launcher, *ranks], KINDS[kind])
    elif kind == "Ctrl-C":  # from a terminal it comes to the whole group; torchrun's ranks have their own
        os.killpg(life.process.pid, signal.SIGINT)
    else:
        kill(launcher, KINDS[kind])
    return moment


def states_equal(a: Any, b: Any) -> bool:
    """Whether two states hold the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return bool(a == b)


def words_for(step: str) -> list[str]:
    ranks = 1 if step == "01" else 2
    return [*command(step, ranks), *FLAGS, f"--batch-size={24 // ranks}", "--snapshot-dir=snapshots"]


def undisturbed(step: str, folder: Path) -> dict[str, Any]:
    """The state at the end of a run that is left alone."""
    folder.mkdir(parents=True)
    life = Life(words_for(step), folder)
    assert life.end() == 0, life.log.read_text()
    return newest(folder / "snapshots")


def check_end(folder: Path, expected: dict[str, Any]) -> None:
    state = newest(folder / "snapshots")
    assert state["global_step"] == LAST
    different = [key for key in expected if not states_equal(state[key], expected[key])]
    assert not different, f"differs from the run that was left alone in {different}"
    left = [path.name for path in (folder / "snapshots").glob(".*")]
    assert not left, f"left behind: {left}"


def interrupted_run(
    step: str, kinds: list[str], seed: int, folder: Path, expected: dict[str, Any]
) -> list[str]:
    """Start a step, interrupt it in each way of `kinds`, and let it come to its end.

    Returns a line for each interruption. Raises AssertionError if it does not end as it should.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    done: list[str] = []
    ranks_were: list[int] = []
    for kind in kinds:
        if last_saved(folder) == LAST:
            break
        if kind.endswith("in a save") and last_saved(folder) and last_saved(folder) % EPOCH == 0:
            continue  # the epoch's end saves the same step once more, and would sweep the pipe away
        if kind.endswith("in a save"):
            wait_for_end(ranks_were)  # ranks without a launcher would run into the pipe, and stay there
        stuck = StuckSave(step, folder, rng) if kind.endswith("in a save") else None
        before = last_saved(folder)
        life = Life(words_for(step), folder)
        moment = interrupt(life, kind, stuck, rng)
        if not moment:  # it was over before
            assert life.end() == 0, life.log.read_text()
            break
        ranks_were = life.were
        status = life.end()
        text = life.log.read_text()
        if stuck:
            stuck.clear()
        after = last_saved(folder)
        done.append(f"step {step}, seed {seed}: {kind}, {moment}; saved at {before}, then at {after}")
        assert after >= before
        if kind in ("SIGTERM", "Ctrl-C") and after < LAST:
            said = re.search(r"(SIGTERM|SIGINT): saved at step (\d+)", text)
            # Before the first step nothing is lost, and nothing saved.
            assert int(said[2]) == after if said else after == before, f"{done[-1]}, unsaved\n{text}"
        if kind.startswith("everything"):  # nobody to wait for, but the kernel
            wait_for_end(ranks_were)
    last = Life(words_for(step), folder)
    status = last.end()
    assert status == 0, "\n".join([*done, f"the last start ended with {status}", last.log.read_text()])
    try:
        check_end(folder, expected)
    except AssertionError as error:
        raise AssertionError("\n".join([*done, str(error), last.log.read_text()])) from None
    return done


def restarted_run(step: str, seed: int, folder: Path, expected: dict[str, Any]) -> list[str]:
    """SIGKILL one rank at a random moment under `--max-restarts=3`, and leave the rest to torchrun."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    words = words_for(step)
    words.insert(words.index("--standalone"), "--max-restarts=3")
    life = Life(words, folder, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    moment = interrupt(life, "one rank", None, rng)
    status, text = life.end(), life.log.read_text()
    line = f"step {step}, seed {seed}: torchrun restarts after one rank is killed {moment}"
    assert status == 0, f"{line}\n{text}"
    assert not moment or text.count("images a step") == 2, f"{line}\n{text}"  # one restart, not several
    check_end(folder, expected)
    return [line] if moment else []


def soak(kills: int, restarts: int, seed: int, folder: Path) -> bool:
    """Interrupt runs of all steps, two at a time, `kills` times or more; whether all ended as they should."""
    began, rng, lock = time.monotonic(), random.Random(seed), threading.Lock()
    counts = {"interruptions": 0, "restarts": 0, "runs": 0, "failures": 0}
    print(f"seed {seed}: {kills} interruptions, {restarts} restarts", flush=True)

    def attempt(what: str, run: Callable[..., list[str]], step: str, run_seed: int, *rest: Any) -> None:
        place = folder / f"{step}-{what}-{run_seed}"
        lines, failed = [], False
        try:
            lines = run(step, *rest, run_seed, place, expected[step])
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
        expected = dict(zip(FOLDERS, pool.map(lambda s: undisturbed(s, folder / s), FOLDERS), strict=True))
        while counts["interruptions"] < kills and not counts["failures"]:
            wait_for(
                [
                    pool.submit(attempt, "interruptions", interrupted_run, step, rng.randrange(10**6), kinds)
                    for step in FOLDERS
                    for kinds in [rng.sample(kinds_for(step), 4)]
                ]
            )
        steps = [step for step in FOLDERS if step > "02"]
        wait_for(
            [
                pool.submit(attempt, "restarts", restarted_run, steps[i % len(steps)], rng.randrange(10**6))
                for i in range(restarts)
            ]
        )
    minutes = (time.monotonic() - began) / 60
    print(", ".join(f"{name}: {count}" for name, count in counts.items()), f"{minutes:.1f} minutes", sep="; ")
    return not counts["failures"] and counts["interruptions"] >= kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="interruptions, at least (100)")
    parser.add_argument("--restarts", type=int, default=20, help="runs that torchrun restarts (20)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="a new one each time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        sys.exit(0 if soak(args.kills, args.restarts, args.seed, Path(temporary)) else 1)
