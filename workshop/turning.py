"""Judges exercises that are whole scripts: "turn step N - 1 into step N".

The learner's script is run in the way a step is run. On 2 ranks, it trains one epoch, loses its last
snapshot, and is started again for two epochs, so that it must resume in the middle of the first. On 3 ranks,
it trains two epochs at once. Both are compared with step 01, which is run at the same time, in float64. How
the script is written does not matter.
"""

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from break_it import descendants, kill_tree
from check import script_of
from judging import ROOT, JudgeError, Verdict, activity, place_in

sys.path.insert(0, str(ROOT / "tests" / "harness"))

import forks
from helpers import FOLDERS, SHARDED, Run, read_run

from common.snapshot import snapshots, step_of

GLOBAL_BATCH = 12
STEPS = 3  # in an epoch of 47 images, of which 11 are left over
SAVED = 2  # the step from which the script resumes
TESTED = 7  # images in the test set
FLAGS = ["--num-samples=47", "--precision=float64", "--use-gpu=0", "--snapshot-dir=snapshots"]
FLAGS += ["--metrics=metrics.jsonl", f"--save-every={SAVED}"]
IMPORTS = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__mp_main__')\n"
TOLERANCE = 1e-10  # as in the steps' own proof: sums in another order
SILENCE = 8  # a run hangs if for so many seconds no process computes, and nothing is written,
COMPUTING = 120  # or if it writes nothing in so many CPU seconds
SAMPLE = 0.5  # seconds between two looks at what the processes do
RESUMED = "2 ranks, resumed"
# The error of a script that is still the step before: it does not know a flag, or torchrun has started it.
NOT_BEGUN = "unrecognized arguments|this script is not for torchrun"


@dataclass
class Attempt:
    """A run that has ended, or had to be ended."""

    status: int | None  # None: it hung
    out: str
    err: str
    folder: Path  # in which it was started
    run: Run | None  # what it has written, if it ended well
    places: list[str]  # if it hung: a line about each rank


@dataclass
class Extra:
    """A promise of one exercise only, and the run that shows it: two ranks on each of `nodes`, with `flags`.

    `check(reference, attempts)` gets step 01's run and the attempt of each node, and returns the lines that
    say what is wrong. With `resumes`, the script trains one epoch, loses its last snapshot, and is started
    again for two epochs. Then `attempts` are the one before and the one after.
    """

    says: str
    page: str
    flags: list[str]
    check: Callable[[Run, list[Attempt]], list[str]]
    nodes: int = 1
    resumes: bool = False


@dataclass
class Found:
    """All attempts of one script, by their names, and what to compare them with."""

    reference: Run  # of step 01
    attempts: dict[str, Attempt]
    todo: str

    def whole_runs(self, at_two_ranks: str = RESUMED) -> list[tuple[str, Run]]:
        """The run at 2 ranks, before or after it was resumed, and the one at 3 ranks."""
        runs = []
        for ranks, name in (("2 ranks", at_two_ranks), ("3 ranks", "3 ranks")):
            run = self.attempts[name].run
            assert run is not None
            runs.append((ranks, run))
        return runs


class Script:
    """A learner's script, in a temporary folder, where it can be started several times."""

    def __init__(self, step: str, file: Path, folder: Path):
        self.step = step
        self.folder = folder
        # The script lies where it would lie in the repository, so that it finds `common` in the same way.
        (folder / "workshop" / "mine").mkdir(parents=True)
        for name in ("common", *FOLDERS.values()):
            (folder / name).symlink_to(ROOT / name)
        self.path = folder / "workshop" / "mine" / file.name
        self.path.write_bytes(file.read_bytes())
        (folder / "imports.py").write_text(IMPORTS)

    def command(self, ranks: int, *rendezvous: str) -> list[str]:
        if self.step == "02":
            return [sys.executable, str(self.path), f"--world-size={ranks}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *(rendezvous or ["--standalone"])]
        return [*torchrun, f"--nproc-per-node={ranks}", str(self.path)]

    def start(self, name: str, words: list[str], *flags: str) -> tuple[str, Any]:
        """Start a command in a folder that is called `name`."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(place / "out", "wb") as out, open(place / "err", "wb") as err:
            process = subprocess.Popen(
                [*words, *FLAGS, *flags],
                cwd=place,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return name, process

    def start_extra(self, extra: Extra) -> list[tuple[str, Any]]:
        """Start two ranks on each of its nodes, which are all this machine."""
        rendezvous = ["--standalone"]
        if extra.nodes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            rendezvous = [f"--nnodes={extra.nodes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        started = []
        for node in range(extra.nodes):
            name = f"node {node} of {' '.join(extra.flags)}"
            command = self.command(2, *rendezvous, f"--node-rank={node}")
            started.append(self.start(name, command, *extra.flags))
        return started

    def wait(self, name: str, process: Any) -> Attempt:
        """Wait until a run ends or hangs."""
        place = self.folder / name
        watch = Watch(process, place)
        next_look = time.monotonic() + SAMPLE
        hangs = False
        while (status := process.poll()) is None and not hangs:
            time.sleep(0.02)
            if time.monotonic() > next_look:
                hangs = watch.hangs()
                next_look = time.monotonic() + SAMPLE
        places = [] if status is not None else places_of_ranks(process, place / "err", self.path)
        kill_tree(process)
        out, err = ((place / stream).read_text(errors="replace") for stream in ("out", "err"))
        ended_well = status == 0 and (place / "metrics.jsonl").exists()
        run = read_run(name, place, out, err) if ended_well else None
        return Attempt(status, out, err, place, run, places)

    def resume(self, name: str, *flags: str) -> Attempt:
        """Start the run of this name again, for two epochs, from its snapshot after step SAVED."""
        folder = self.folder / name / "snapshots"
        for path in [*snapshots(folder), *snapshots(folder, sharded=True)]:
            if step_of(path) > SAVED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.wait(*self.start(name, self.command(2), *flags, "--epochs=2"))


class Watch:
    """Decides whether a run hangs.

    A busy machine must not make a correct script look like one that hangs. So the time in which a process of
    the run waits for the CPU does not count: only the time in which all of them wait for something else.
    Whatever the run writes starts the count again.
    """

    def __init__(self, process: Any, place: Path):
        self.process = process
        self.place = place
        self.written = -1  # bytes
        self.looked_at = time.monotonic()
        self.waited = 0.0  # seconds
        self.computed_before = 0.0  # CPU seconds, until it wrote something

    def hangs(self) -> bool:
        """Call this about every SAMPLE seconds."""
        activities = [activity(pid) for pid in [self.process.pid, *descendants(self.process.pid)]]
        computed = sum(seconds for _, seconds in activities)
        written = sum(path.stat().st_size for path in self.place.iterdir() if path.is_file())
        now = time.monotonic()
        if written != self.written:
            self.written = written
            self.waited = 0.0
            self.computed_before = computed
        elif not any(active for active, _ in activities):
            since_the_last_look = now - self.looked_at
            self.waited += min(since_the_last_look, 2 * SAMPLE)  # the judge, too, may have waited for a CPU
        self.looked_at = now
        return self.waited > SILENCE or computed - self.computed_before > COMPUTING


def places_of_ranks(process: Any, err: Path, script: Path) -> list[str]:
    """A line about each rank of a run that hangs: where in the learner's script it is."""
    source = script.read_text(errors="replace").splitlines()
    lines = []
    for rank, pid in enumerate(children_of(process.pid)):
        place = place_in(stack_of(pid, err), script)
        if place is None:
            lines.append(f"  rank {rank} is not in {script.name}")
        else:
            line, waits = place
            verb = "waits" if waits else "is"
            lines.append(f"  rank {rank} {verb} in {script.name}, line {line}: {source[line - 1].strip()}")
    return lines


def stack_of(pid: int, err: Path) -> str:
    """What a process writes to the file `err` when it is asked where it is."""
    before = err.stat().st_size
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, forks.STACKS)
    stack = ""
    give_up = time.monotonic() + 5
    while time.monotonic() < give_up:
        time.sleep(0.2)
        written = err.read_bytes()[before:].decode(errors="replace")
        if "most recent call first" in written and written == stack:
            break
        stack = written
    return stack


def children_of(pid: int) -> list[int]:
    """The processes that process `pid` has started itself: the ranks, in their order."""
    children = set(descendants(pid))
    for child in list(children):
        children -= set(descendants(child))
    return sorted(children)


def judge_script(facts: dict[str, Any], file: Path, *extras: Extra) -> Verdict:
    """Judge a learner's script that is to become the step in `facts`, which are in exercise.toml."""
    step = facts["step"]
    todo = facts["todo"]
    with tempfile.TemporaryDirectory(prefix="judging-") as name:
        script = Script(step, file, Path(name))
        reference_script = script.path.with_name("step_01.py")
        reference_script.write_text(script_of(FOLDERS["01"], facts))
        batch = {ranks: f"--batch-size={GLOBAL_BATCH // ranks}" for ranks in (1, 2, 3)}
        started = [
            script.start("reference", [sys.executable, str(reference_script)], batch[1], "--epochs=2"),
            script.start("2 ranks", script.command(2), batch[2], "--epochs=1"),
            script.start("3 ranks", script.command(3), batch[3], "--epochs=2"),
        ]
        if step == "02":  # mp.spawn imports the script in each rank
            imports = [sys.executable, str(script.folder / "imports.py"), str(script.path)]
            started.append(script.start("imported", imports))
        started_extras = [script.start_extra(extra) for extra in extras]
        for nodes in started_extras:
            started += nodes
        attempts = {}
        for name, process in started:
            attempts[name] = script.wait(name, process)
            if name in ("2 ranks", "3 ranks") and attempts[name].status is None:  # the others would hang, too
                for _, other in started:
                    kill_tree(other)
                return compare(step, todo, attempts, [])
        if attempts["2 ranks"].status == 0:
            attempts[RESUMED] = script.resume("2 ranks", batch[2])
        shown_by = []
        for extra, nodes in zip(extras, started_extras, strict=True):
            shown = [attempts[name] for name, _ in nodes]
            if extra.resumes and shown[0].status == 0:
                name = nodes[0][0]
                shown.append(script.resume(name, *extra.flags))
            shown_by.append((extra, shown))
        return compare(step, todo, attempts, shown_by)


def compare(
    step: str, todo: str, attempts: dict[str, Attempt], extras: list[tuple[Extra, list[Attempt]]]
) -> Verdict:
    """Check the promises in order, up to the first that is broken."""
    reference = attempts["reference"].run
    if reference is None:
        how = how_it_ended(attempts["reference"])[0]
        raise JudgeError(f"step 01, the reference, failed on this machine: {how}")
    found = Found(reference, attempts, todo)
    page = f"{FOLDERS[step]}/README.md"
    check = functools.partial
    promises: list[tuple[str, str, Callable[[], list[str]]]] = [
        ("it runs to its end on 2 and on 3 ranks", page, check(ends, found, "2 ranks", "3 ranks")),
        ("the ranks are one group, and rank 0 alone reports", page, check(one_group, found)),
        ("each loss of the first epoch is step 01's: that of all ranks", page, check(first_losses, found)),
        ("started again, it resumes from its snapshot and finishes", page, check(ends, found, RESUMED)),
        ("the run that was started again has not begun from scratch", page, check(resumed, found)),
        ("in mid-epoch it continues with the images that are left", page, check(rest_of_the_epoch, found)),
        ("the second epoch, in its own order, has the losses of step 01", page, check(second_losses, found)),
        ("the weights end where step 01's end", page, check(weights, found)),
        ("the evaluation counts each image once", page, check(evaluation, found)),
    ]
    if step == "02":
        says = "imported, as mp.spawn does in each rank, it starts nothing"
        promises.insert(1, (says, page, check(imported, found)))
    if step == SHARDED:
        says = "each rank saves its own shard, and not the whole model"
        promises.append((says, page, check(shards, found)))
    for extra, shown in extras:
        promises.append((extra.says, extra.page, check(extra_promise, found, extra, shown)))
    every = [*attempts.values(), *(attempt for _, shown in extras for attempt in shown)]
    verdict = Verdict(hung=any(attempt.status is None for attempt in every))
    for says, where_to_read, keeps in promises:
        if lines := keeps():
            verdict.broken = says
            verdict.lines = lines
            verdict.page = where_to_read
            break
        verdict.kept.append(says)
    return verdict


def ends(found: Found, *names: str) -> list[str]:
    for name in names:
        attempt = found.attempts[name]
        if attempt.status != 0 or attempt.run is None:
            return ended_badly(f"with {name}", attempt, found.todo)
    return []


def ended_badly(head: str, attempt: Attempt, todo: str) -> list[str]:
    """How an attempt ended and, where that helps, where to begin."""
    first, *rest = how_it_ended(attempt)
    lines = [f"{head}, {first}", *rest]
    if re.search(NOT_BEGUN, attempt.err):
        lines.append(f"  where to begin: {todo}")
    return lines


def one_group(found: Found) -> list[str]:
    for name, run in found.whole_runs("2 ranks"):
        ranks = int(name[0])
        starts = [event for event in run.events if event["event"] == "start"]
        sizes = [event["world_size"] for event in starts]
        if sizes != [ranks]:
            return [
                f"with {name}: the start was reported {len(starts)} times, with the world sizes {sizes}",
                f"  expected: once, by rank 0, with the world size {ranks}",
            ]
    return []


def first_losses(found: Found) -> list[str]:
    expected = losses_of(found.reference)[:STEPS]
    for name, run in found.whole_runs("2 ranks"):
        if lines := other_losses(f"with {name}", expected, losses_of(run)[:STEPS], 1):
            return lines
    return []


def second_losses(found: Found) -> list[str]:
    expected = losses_of(found.reference)[STEPS:]
    for name, run in found.whole_runs():
        if lines := other_losses(f"with {name}", expected, losses_of(run)[STEPS:], STEPS + 1):
            return lines
    return []


def resumed(found: Found) -> list[str]:
    _, run = found.whole_runs()[0]
    starts = [event["world_size"] for event in run.events if event["event"] == "start"]
    if starts != [2, 2]:
        return [f"with 2 ranks, started again: two starts were reported as {starts}", "  expected [2, 2]"]
    if "resumed from" not in found.attempts[RESUMED].out:
        return ["with 2 ranks, started again: it began from scratch", "  expected: resumed from snapshots"]
    return []


def rest_of_the_epoch(found: Found) -> list[str]:
    _, run = found.whole_runs()[0]
    events = since_the_last_start(run)
    after = next(event for event in events if event["event"] == "train")
    expected = losses_of(found.reference)[SAVED]
    if after["global_step"] == STEPS and abs(after["losses"][0] - expected) <= TOLERANCE:
        return []
    losses = [f"{loss:.10f}" for loss in after["losses"]]
    return [
        f"with 2 ranks, started again after step {SAVED} of {STEPS}: it continues with the losses {losses}",
        f"  expected [{expected:.10f}], of the images that were left",
    ]


def weights(found: Found) -> list[str]:
    for name, run in found.whole_runs():
        if run.weights.keys() != found.reference.weights.keys():
            return [
                f"with {name}: the snapshot's model has the names {sorted(run.weights)[:2]}",
                f"  expected {sorted(found.reference.weights)[:2]}",
            ]
        if lines := other_weights(f"with {name}", found.reference, run):
            return lines
    return []


def evaluation(found: Found) -> list[str]:
    expected = found.reference.test
    for name, run in found.whole_runs():
        same_counts = (run.test["correct"], run.test["total"]) == (expected["correct"], expected["total"])
        if not same_counts or abs(run.test["loss"] - expected["loss"]) > TOLERANCE:
            return [
                f"with {name}: expected {evaluated(expected)}, as in step 01",
                f"  seen {evaluated(run.test)}",
            ]
    return []


def evaluated(test: dict[str, Any]) -> str:
    return f"{test['correct']} right of {test['total']} images, loss {test['loss']:.8f}"


def imported(found: Found) -> list[str]:
    attempt = found.attempts["imported"]
    if attempt.status == 0 and not attempt.out:
        return []
    first_line = attempt.out.splitlines()[0] if attempt.out else how_it_ended(attempt)[0]
    return [f"imported, not started: {first_line}", "  expected: nothing is printed, and nothing begins"]


def shards(found: Found) -> list[str]:
    _, run = found.whole_runs()[0]
    if snapshots(run.snapshot_dir, sharded=True):
        return []
    return [
        "with 2 ranks: one file has all the weights",
        "  expected: a folder, with a file from each rank",
        f"  where to begin: {found.todo}",
    ]


def extra_promise(found: Found, extra: Extra, attempts: list[Attempt]) -> list[str]:
    for node, attempt in enumerate(attempts):
        if attempt.status != 0:
            where = f"on node {node} of {extra.nodes}" if extra.nodes > 1 else "with 2 ranks"
            return ended_badly(f"{where} and {' '.join(extra.flags)}", attempt, found.todo)
    return extra.check(found.reference, attempts)


def other_losses(head: str, expected: list[float], seen: list[float], first_step: int) -> list[str]:
    """The first loss that is not step 01's, or another number of steps."""
    for step, (a, b) in enumerate(zip(expected, seen, strict=False), start=first_step):
        if abs(a - b) > TOLERANCE:
            return [f"{head}, step {step}: expected {a:.10f}, as in step 01", f"  seen {b:.10f}"]
    if len(expected) != len(seen):
        return [f"{head}: {len(seen)} steps in this epoch", f"  expected {len(expected)}"]
    return []


def other_weights(head: str, reference: Run, run: Run) -> list[str]:
    """By how much two models with the same names differ, if that is too much."""
    expected, seen = reference.weights, run.weights
    difference = max(float((expected[name] - seen[name]).abs().max()) for name in expected)
    if difference <= TOLERANCE:
        return []
    return [f"{head}: weights differ by {difference:.1e}", f"  expected {TOLERANCE} at most"]


def like_step_01(reference: Run, attempts: list[Attempt]) -> list[str]:
    """For an Extra that resumes: before and after, its losses are step 01's, and so are the last weights."""
    first, second = (attempt.run for attempt in attempts)
    if first is None or second is None or second.weights.keys() != reference.weights.keys():
        return ["there are no metrics, or the snapshot's weights have other names"]
    expected = losses_of(reference)
    if lines := other_losses("with 2 ranks", expected[:STEPS], losses_of(first), 1):
        return lines
    steps_left = 0  # of the epoch in which the run was stopped
    for event in since_the_last_start(second):
        if event["event"] == "train" and event["epoch"] == 0:
            steps_left += len(event["losses"])
    again = f"with 2 ranks, started again after step {SAVED} of {STEPS}"
    if steps_left != STEPS - SAVED:
        return [
            f"{again}: it made {steps_left} steps more in this epoch",
            f"  expected {STEPS - SAVED}: samples_seen counts the images of all batches of a step",
        ]
    if lines := other_losses(again, expected[SAVED:], losses_of(second)[SAVED:], SAVED + 1):
        return lines
    return other_weights("with 2 ranks", reference, second)


def since_the_last_start(run: Run) -> list[dict[str, Any]]:
    """What a run has reported since it was started for the last time."""
    starts = [position for position, event in enumerate(run.events) if event["event"] == "start"]
    return run.events[starts[-1] :]


def losses_of(run: Run) -> list[float]:
    """The loss of each step; of a step that was repeated after a new start, the last one."""
    losses: dict[int, float] = {}
    for event in run.events:
        if event["event"] == "train":
            first_step = event["global_step"] - len(event["losses"]) + 1
            losses |= dict(enumerate(event["losses"], start=first_step))
    return [losses[step] for step in sorted(losses)]


def how_it_ended(attempt: Attempt) -> list[str]:
    """How a run has ended: in one line, with the run's own message if there is one. If it hung: where."""
    if attempt.status is None:
        hangs = "it hangs: a rank waits for another that does not come, or never stops computing"
        return [hangs, *attempt.places]
    errors = re.findall(r"^error: .*$", attempt.err, re.M)
    errors += re.findall(r"^(?:\[rank\d+\]: )?(\w+(?:\.\w+)*Error: .*)$", attempt.err, re.M)
    lines = attempt.err.strip().splitlines()
    message = errors[0] if errors else lines[-1] if lines else "no message"
    return [f"it ended with status {attempt.status}: {message}"]
