"""Judges exercises that are whole scripts: "turn step N - 1 into step N".

A learner's script is run as a step is: on 2 ranks for an epoch, of which the last snapshot is then taken
away, and again for two, so that it has to go on in mid-epoch; and on 3 ranks for two epochs at once.
Both are compared with step 01, which is run beside them, in float64. Nothing is asked about how the script is
written.
"""

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

from break_it import kill_tree
from judging import ROOT, Verdict

sys.path.insert(0, str(ROOT / "tests" / "harness"))

from helpers import FOLDERS, SHARDED, Run, read_run

from common.snapshot import snapshots, step_of

GLOBAL_BATCH = 12
STEPS, SAVED = 3, 2  # of an epoch: 47 images, of which 11 are left over
TESTED = 7  # images to test on
FLAGS = ["--num-samples=47", "--precision=float64", "--use-gpu=0", "--snapshot-dir=snapshots"]
FLAGS += ["--metrics=metrics.jsonl", f"--save-every={SAVED}"]
IMPORTS = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__mp_main__')\n"
TOLERANCE = 1e-10  # as in the steps' own proof: sums in another order
SECONDS = 8  # without a word, until a run counts as one that hangs; on a slow machine more:
TIMES = 3  # as many times as long as step 01 takes beside it
LIMIT = 120  # for step 01 itself, which does not hang


@dataclass
class Attempt:
    """A run that has ended, well or not."""

    status: int | None  # None: it had to be ended, for it hangs
    out: str
    err: str
    folder: Path  # where it was started
    run: Run | None


@dataclass
class Extra:
    """A promise of one exercise alone, and the run that shows it: two ranks on each of `nodes`, with `flags`.

    `check(reference, runs)` gets step 01's run and that of each node, and returns the lines of what is wrong.
    """

    says: str
    told: str
    flags: list[str]
    check: Callable[[Run, list[Attempt]], list[str]]
    nodes: int = 1


class Attempts:
    """The runs of one file, in a folder of their own."""

    def __init__(self, step: str, file: Path, folder: Path):
        self.step, self.folder = step, folder
        # Where the script would lie in the repository, so that it finds `common` in the same way.
        (folder / "workshop" / "mine").mkdir(parents=True)
        for name in ("common", *FOLDERS.values()):
            (folder / name).symlink_to(ROOT / name)
        self.script = folder / "workshop" / "mine" / file.name
        self.script.write_text(file.read_text())
        (folder / "imports.py").write_text(IMPORTS)

    def command(self, ranks: int, where: tuple[str, ...] = ("--standalone",)) -> list[str]:
        if self.step == "02":
            return [sys.executable, str(self.script), f"--world-size={ranks}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *where]
        return [*torchrun, f"--nproc-per-node={ranks}", str(self.script)]

    def start_extra(self, extra: Extra) -> list[tuple[str, Any]]:
        """Start a run of two ranks on each of its nodes, all of which are this machine."""
        where = ["--standalone"]
        if extra.nodes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            where = [f"--nnodes={extra.nodes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        return [
            self.start(
                f"node {node} of {' '.join(extra.flags)}",
                self.command(2, (*where, f"--node-rank={node}")),
                *extra.flags,
            )
            for node in range(extra.nodes)
        ]

    def start(self, name: str, words: list[str], *flags: str) -> tuple[str, Any]:
        place = self.folder / name
        place.mkdir(exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(place / "out", "wb") as out, open(place / "err", "wb") as err:
            return name, subprocess.Popen(
                [*words, *FLAGS, *flags],
                cwd=place,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self, name: str, process: Any, seconds: float) -> Attempt:
        """Until a run has ended, or has written nothing for so many seconds."""
        place = self.folder / name
        heard, size = time.monotonic(), -1
        while (status := process.poll()) is None and time.monotonic() < heard + seconds:
            now = sum(path.stat().st_size for path in place.iterdir() if path.is_file())
            heard, size = (time.monotonic() if now != size else heard), now
            time.sleep(0.02)
        kill_tree(process)  # torchrun's ranks are in groups of their own
        out, err = ((place / stream).read_text(errors="replace") for stream in ("out", "err"))
        run = read_run(name, place, out, err) if status == 0 and (place / "metrics.jsonl").exists() else None
        return Attempt(status, out, err, place, run)


def judge_script(step: str, todo: str, file: Path, *extras: Extra) -> Verdict:
    """Judge a learner's script that is to be step `step`; `todo` tells where to begin."""
    with tempfile.TemporaryDirectory(prefix="judging-") as name:
        attempts = Attempts(step, file, Path(name))
        reference_script = str(ROOT / FOLDERS["01"] / "train.py")
        batch = {ranks: f"--batch-size={GLOBAL_BATCH // ranks}" for ranks in (1, 2, 3)}
        begun = [
            attempts.start("reference", [sys.executable, reference_script], batch[1], "--epochs=2"),
            attempts.start("2 ranks", attempts.command(2), batch[2], "--epochs=1"),
            attempts.start("3 ranks", attempts.command(3), batch[3], "--epochs=2"),
        ]
        if step == "02":  # mp.spawn imports the script in each rank
            words = [sys.executable, str(attempts.folder / "imports.py"), str(attempts.script)]
            begun.append(attempts.start("imported", words))
        of_extras = [attempts.start_extra(extra) for extra in extras]
        begun += [run for runs in of_extras for run in runs]
        clock = time.monotonic()
        found = {"reference": attempts.wait(*begun[0], seconds=LIMIT)}
        silence = max(SECONDS, TIMES * (time.monotonic() - clock))
        for name, process in begun[1:]:
            found[name] = attempts.wait(name, process, silence)
        if found["2 ranks"].status == 0:
            saved = attempts.folder / "2 ranks" / "snapshots"
            for path in [*snapshots(saved), *snapshots(saved, sharded=True)]:
                if step_of(path) > SAVED:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            again = attempts.start("2 ranks", attempts.command(2), batch[2], "--epochs=2")
            found["2 ranks, resumed"] = attempts.wait(*again, seconds=silence)
        of_nodes = [[found[name] for name, _ in runs] for runs in of_extras]
        return compared(step, todo, found, list(zip(extras, of_nodes, strict=True)))


def compared(
    step: str, todo: str, found: dict[str, Attempt], extras: list[tuple[Extra, list[Attempt]]]
) -> Verdict:
    """The promises in order, up to the first that is broken."""
    page = f"{FOLDERS[step]}/README.md"
    reference = found["reference"].run
    if reference is None:
        why = end_of(found["reference"])
        print(f"error: not judged, because step 01 failed here: {why}", file=sys.stderr)
        sys.exit(2)
    verdict = Verdict()

    def both(check: Callable[[str, Run], list[str]], two: str = "2 ranks, resumed") -> list[str]:
        for name, run in (("2 ranks", found[two].run), ("3 ranks", found["3 ranks"].run)):
            assert run is not None
            if lines := check(name, run):
                return lines
        return []

    def ends(*names: str) -> Callable[[], list[str]]:
        def check() -> list[str]:
            for name in names:
                attempt = found[name]
                if attempt.status != 0 or attempt.run is None:
                    return [f"with {name}, {end_of(attempt)}", *todo_lines(todo if attempt.status else "")]
            return []

        return check

    def one_group() -> list[str]:
        def check(name: str, run: Run) -> list[str]:
            ranks = int(name[0])
            starts = [event for event in run.events if event["event"] == "start"]
            seen = {event["world_size"] for event in starts}
            if seen == {ranks} and len(starts) == (2 if ranks == 2 else 1):
                return []
            told = f"a run of {ranks} ranks has announced itself {len(starts)} times, with world size {seen}"
            return [
                f"with {name}: {told}",
                "  expected: once for each start, by rank 0, with the number of ranks",
            ]

        return both(check)

    def losses(begin: int, stop: int) -> Callable[[], list[str]]:
        def check(name: str, run: Run) -> list[str]:
            ours, theirs = (losses_of(each)[begin:stop] for each in (reference, run))
            for number, (a, b) in enumerate(zip(ours, theirs, strict=False), start=begin + 1):
                if abs(a - b) > TOLERANCE:
                    return [
                        f"with {name}, step {number}: expected {a:.10f}, as in step 01",
                        f"  seen {b:.10f}",
                    ]
            if len(ours) != len(theirs):
                return [f"with {name}: {len(theirs)} steps in this epoch", f"  expected {len(ours)}"]
            return []

        return lambda: both(check, "2 ranks" if begin == 0 else "2 ranks, resumed")

    def weights() -> list[str]:
        def check(name: str, run: Run) -> list[str]:
            ours, theirs = reference.weights, run.weights
            if ours.keys() != theirs.keys():
                return [
                    f"with {name}: the snapshot's model has the names {sorted(theirs)[:2]}",
                    f"  expected {sorted(ours)[:2]}",
                ]
            off = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
            return (
                [f"with {name}: weights differ by {off:.1e}", f"  expected {TOLERANCE} at most"]
                if off > TOLERANCE
                else []
            )

        return both(check)

    def evaluation() -> list[str]:
        def check(name: str, run: Run) -> list[str]:
            a, b = ((one.test["correct"], one.test["total"], one.test["loss"]) for one in (reference, run))
            if a[:2] == b[:2] and abs(a[2] - b[2]) <= TOLERANCE:
                return []
            told = [f"{right} right of {count} images, loss {loss:.8f}" for right, count, loss in (a, b)]
            return [f"with {name}: expected {told[0]}, as in step 01", f"  seen {told[1]}"]

        return both(check)

    def resumed() -> list[str]:
        said = "resumed from" in found["2 ranks, resumed"].out
        return (
            []
            if said
            else ["with 2 ranks, started again: it began from scratch", "  expected: resumed from snapshots"]
        )

    def rest() -> list[str]:
        run = found["2 ranks, resumed"].run
        assert run is not None
        last = [place for place, event in enumerate(run.events) if event["event"] == "start"][-1]
        [again, *_] = [event for event in run.events[last:] if event["event"] == "train"]
        if (
            again["global_step"] == STEPS
            and abs(again["losses"][0] - losses_of(reference)[SAVED]) <= TOLERANCE
        ):
            return []
        told = [f"{loss:.10f}" for loss in again["losses"]]
        return [
            f"with 2 ranks, started again after step {SAVED} of {STEPS}: it continues with the losses {told}",
            f"  expected [{losses_of(reference)[SAVED]:.10f}], of the images that were left",
        ]

    def imported() -> list[str]:
        attempt = found["imported"]
        if attempt.status == 0 and not attempt.out:
            return []
        said = (attempt.out.splitlines() or [end_of(attempt)])[0]
        return [f"imported, not started: {said}", "  expected: nothing is printed, and nothing begins"]

    def shards() -> list[str]:
        run = found["2 ranks, resumed"].run
        assert run is not None
        if snapshots(run.snapshot_dir, sharded=True):
            return []
        return [
            "with 2 ranks: one file has all the weights",
            "  expected: a folder, with a file from each rank",
            *todo_lines(todo),
        ]

    def kept(extra: Extra, runs: list[Attempt]) -> Callable[[], list[str]]:
        def check() -> list[str]:
            for node, attempt in enumerate(runs):
                if attempt.status != 0:
                    where = f"on node {node} of {extra.nodes}" if extra.nodes > 1 else "with 2 ranks"
                    return [f"{where} and {' '.join(extra.flags)}, {end_of(attempt)}", *todo_lines(todo)]
            return extra.check(reference, runs)

        return check

    promises: list[tuple[str, str, Callable[[], list[str]]]] = [
        ("it runs to its end on 2 and on 3 ranks", page, ends("2 ranks", "3 ranks")),
        ("started again, it resumes from its snapshot and finishes", page, ends("2 ranks, resumed")),
        *([("imported, as mp.spawn does in each rank, it starts nothing", page, imported)] * (step == "02")),
        ("the ranks are one group, and rank 0 alone reports", page, one_group),
        ("each loss of the first epoch is step 01's: that of all ranks", page, losses(0, STEPS)),
        ("the run that was started again has not begun from scratch", page, resumed),
        ("in mid-epoch it continues with the images that are left", page, rest),
        ("the second epoch, in its own order, has the losses of step 01", page, losses(STEPS, 2 * STEPS)),
        ("the weights end where step 01's end", page, weights),
        ("the evaluation counts each image once", page, evaluation),
        *(
            [("each rank saves its own shard, and not the whole model", page, shards)]
            if step == SHARDED
            else []
        ),
        *((extra.says, extra.told, kept(extra, runs)) for extra, runs in extras),
    ]
    for says, told, check in promises:
        if lines := check():
            verdict.broken, verdict.lines, verdict.told = says, lines, told
            break
        verdict.kept.append(says)
    return verdict


def like_step_01(reference: Run, runs: list[Attempt]) -> list[str]:
    """For an Extra: its run ends with step 01's weights, after as many steps."""
    run = runs[0].run
    if run is None or run.weights.keys() != reference.weights.keys():
        return ["there are no metrics, or the snapshot's weights have other names"]
    off = max(float((reference.weights[key] - run.weights[key]).abs().max()) for key in reference.weights)
    if off > TOLERANCE or len(run.losses) != len(reference.losses):
        return [
            f"with 2 ranks: {len(run.losses)} steps, weights differ by {off:.1e}",
            f"  expected {len(reference.losses)} steps, and {TOLERANCE} at most",
        ]
    return []


def losses_of(run: Run) -> list[float]:
    """The loss of each step; of a step that was made again after a new start, the last one."""
    found: dict[int, float] = {}
    for event in run.events:
        if event["event"] == "train":
            first = event["global_step"] - len(event["losses"]) + 1
            found |= dict(enumerate(event["losses"], start=first))
    return [found[step] for step in sorted(found)]


def todo_lines(todo: str) -> list[str]:
    return [f"  where to begin: {todo}"] if todo else []


def end_of(attempt: Attempt) -> str:
    """How a run has ended, in one line: what it says itself if it does."""
    if attempt.status is None:
        return "it hangs: it has written nothing for a while (on a very busy machine: try again)"
    text = attempt.err
    errors = re.findall(r"^error: .*$", text, re.M) + re.findall(
        r"^(?:\[rank\d+\]: )?(\w+(?:\.\w+)*Error: .*)$", text, re.M
    )
    what = errors[0] if errors else (text.strip().splitlines() or ["no message"])[-1]
    return f"it ended with status {attempt.status}: {what}"
