"""Exercises for the five steps, and the program that judges your answers.

    python workshop/check.py                 the exercises, and your progress
    python workshop/check.py 05              try your file, workshop/mine/05.py; the first time, create it
    python workshop/check.py 05 FILE         try any file
    python workshop/check.py 05 --watch      try it each time that you save it; Ctrl-C ends this
    python workshop/check.py 05 --hint       the next hint
    python workshop/check.py 05 --solution   the difference between your file and ours
    python workshop/check.py --all           judge all answers in workshop/mine, one line for each exercise
    python workshop/check.py --all DIR       judge all answers in DIR: 01.py, 02.py and so on
    python workshop/check.py --all --json    the same, as JSON, for a program that gives grades

What is judged is what your functions do on 1, 2 and 3 ranks, not how they are written. Exit status: 0 when
every promise is kept, 1 when one is broken, 2 when the command was wrong. With --all, missing files do not
count, but there must be at least one file.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
import textwrap
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from judging import Verdict

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

MINE = HERE / "mine"
COLORS = {"red": "31", "green": "32", "yellow": "33", "faint": "2"}


def say(text: str = "", color: str = "") -> None:
    """Print a line, in a color if this is a terminal."""
    if color and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        text = f"\033[{COLORS[color]}m{text}\033[0m"
    print(text, flush=True)


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def exercises() -> dict[str, Path]:
    """The folder of each exercise, by its number."""
    return {path.parent.name[:2]: path.parent for path in sorted(HERE.glob("exercises/[0-9]*/exercise.toml"))}


def text_of(exercise: Path, which: str) -> str:
    """The text of start.py or solution.py. For a whole script, that is a step's script, as in mine/."""
    facts = about(exercise)
    if which in facts:
        return script_of(facts[which], facts)
    return (exercise / f"{which}.py").read_text()


def script_of(step: str, facts: dict[str, Any]) -> str:
    """A step's script as it would be in mine/, with the variation of an exercise.

    The variation is what no page shows: without it, an answer could be copied from the pages.
    """
    text = (HERE.parent / step / "train.py").read_text()
    here = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    # Both steps' folders: the script imports modules of the first one, and may import some of the second.
    names = f'("", "{facts["solution"]}", "{facts["start"]}")'
    folders = f"(Path(__file__).resolve().parents[2] / name for name in {names})"
    for old, new in [[here, f"sys.path[:0] = map(str, {folders})"], *facts["variation"]]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def about(exercise: Path) -> dict[str, Any]:
    """Title, minutes, step, hints, and the fact that you see after passing."""
    return tomllib.loads((exercise / "exercise.toml").read_text())


def remembered() -> dict[str, Any]:
    """The learner's progress: exercises that have passed, hints given, solutions that may be shown."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return dict(json.loads((MINE / "progress.json").read_text()))
    return {"passed": [], "hints": {}, "agreed": []}


def remember(progress: dict[str, Any]) -> None:
    MINE.mkdir(exist_ok=True)
    (MINE / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")


def bar(done: int, of: int, width: int = 30) -> str:
    """The learner's progress: a bar on a terminal, a number elsewhere."""
    full = round(width * done / of)
    picture = f"[{'#' * full}{'.' * (width - full)}] " if sys.stdout.isatty() else ""
    return f"{picture}{done} of {of} exercises"


def ladder() -> None:
    """Print all exercises, and mark those that have passed."""
    passed = remembered()["passed"]
    step = None
    for number, folder in exercises().items():
        facts = about(folder)
        if facts["step"] != step:
            step = facts["step"]
            say(f"\nstep {step}")
        mark = "x" if number in passed else " "
        color = "green" if number in passed else ""
        say(f"  [{mark}] {number}  {facts['title']}  ({facts['minutes']} min)", color)
    say(f"\n{bar(len(passed), len(exercises()))}")
    rest = [number for number in exercises() if number not in passed]
    if rest:
        say(f"next: python workshop/check.py {rest[0]}")


def learners_file(number: str, folder: Path) -> Path:
    """The learner's file. The first time, it is created from start.py."""
    file = MINE / f"{number}.py"
    if not file.exists():
        MINE.mkdir(exist_ok=True)
        file.write_text(text_of(folder, "start"))
        say(f"created {shorter(file)}: read {shorter(folder / 'README.md')}, then fill in what is missing")
    return file


def shorter(path: Path) -> str:
    """A path, relative to the current folder if it is inside it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def judged(folder: Path, file: Path) -> Verdict:
    """Judge a file. If the judge itself fails, stop."""
    from judging import JudgeError, judge  # imports torch

    try:
        return judge(folder, file)
    except JudgeError as error:
        stop(f"{shorter(file)} was not judged: {error}")


def record_pass(number: str, file: Path) -> None:
    """Remember that an exercise has passed, if the file is the learner's."""
    progress = remembered()
    if file.parent == MINE and number not in progress["passed"]:
        progress["passed"] = sorted([*progress["passed"], number])
        remember(progress)


def run(number: str, folder: Path, file: Path) -> bool:
    """Judge a file and print the verdict."""
    start = time.perf_counter()
    verdict = judged(folder, file)
    for promise in verdict.kept:
        say(f"  kept    {promise}", "green")
    if verdict.passed:
        say(f"passed in {time.perf_counter() - start:.1f} s", "green")
        record_pass(number, file)
        say(f"\n{textwrap.fill('One more thing: ' + about(folder)['fact'], 100)}\n")
        say(bar(len(remembered()["passed"]), len(exercises())))
        return True
    say(f"  broken  {verdict.broken}", "red")
    for line in verdict.lines:
        say(f"          {line}")
    say(f"          read on: {verdict.page}", "faint")
    say(f"a hint: python workshop/check.py {number} --hint", "faint")
    return False


def run_all(directory: Path, as_json: bool) -> bool:
    """Judge all answers in a folder, print a line or a JSON object for each, and say whether all passed."""
    files = {number: directory / f"{number}.py" for number in exercises()}
    if not any(file.is_file() for file in files.values()):
        stop(f"there is no answer in {directory}: name a folder that has files such as 01.py")
    results = []
    for number, file in files.items():
        with contextlib.redirect_stdout(sys.stderr):  # nothing may get in between the JSON
            result = judge_one(number, file)
        results.append(result)
        if not as_json:
            say_result(result)
    counts = Counter(result["status"] for result in results)
    if as_json:
        print(json.dumps({"folder": str(directory), "exercises": results}, indent=1))
    else:
        say(f"{counts['passed']} passed, {counts['broken']} broken, {counts['missing']} missing")
    return counts["broken"] == 0


def judge_one(number: str, file: Path) -> dict[str, Any]:
    """The result of one exercise, as --json prints it."""
    folder = exercises()[number]
    result = {"number": number, "title": about(folder)["title"], "file": str(file)}
    if not file.is_file():
        return {**result, "status": "missing", "passed": False, "kept": [], "broken": None, "message": []}
    verdict = judged(folder, file)
    if verdict.passed:
        record_pass(number, file)
    return {
        **result,
        "status": "passed" if verdict.passed else "broken",
        "passed": verdict.passed,
        "kept": verdict.kept,
        "broken": verdict.broken or None,
        "message": verdict.lines,
    }


def say_result(result: dict[str, Any]) -> None:
    color = {"passed": "green", "broken": "red", "missing": "faint"}[result["status"]]
    promise = f": {result['broken']}" if result["broken"] else ""
    say(f"  {result['status']:7}  {result['number']}  {result['title']}{promise}", color)


def watch(number: str, folder: Path, file: Path) -> None:
    """Judge the file now, and again each time that it changes."""
    last_change = None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            with contextlib.suppress(FileNotFoundError):  # an editor is just replacing it
                change = file.stat().st_mtime_ns
                if change != last_change:
                    last_change = change
                    say(f"\n{time.strftime('%H:%M:%S')}  {shorter(file)}", "faint")
                    run(number, folder, file)
            time.sleep(0.2)


def hint(number: str, folder: Path) -> None:
    """Print the hints given so far, and the next one."""
    hints = about(folder)["hints"]
    progress = remembered()
    given = min(progress["hints"].get(number, 0) + 1, len(hints))
    for position, text in enumerate(hints[:given], start=1):
        say(textwrap.fill(f"hint {position} of {len(hints)}: {text}", 100))
    progress["hints"][number] = given
    remember(progress)


def solution(number: str, folder: Path, file: Path) -> None:
    """Show how our solution differs. If the exercise has not passed yet, ask first, but only once."""
    progress = remembered()
    if number not in [*progress["passed"], *progress["agreed"]]:
        answer = input(f"You have not passed exercise {number} yet. See the solution anyway? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            return
        progress["agreed"].append(number)
        remember(progress)
    learners_lines = file.read_text().splitlines()
    our_lines = text_of(folder, "solution").splitlines()
    for line in difflib.unified_diff(learners_lines, our_lines, shorter(file), "our solution", lineterm=""):
        say(line, {"+": "green", "-": "red"}.get(line[:1], ""))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", nargs="?", metavar="NN", help="which exercise")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="workshop/mine/NN.py by default")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--watch", action="store_true", help="try it each time that it is saved")
    mode.add_argument("--hint", action="store_true", help="the next hint")
    mode.add_argument("--solution", action="store_true", help="the difference between your file and ours")
    mode.add_argument(
        "--all", nargs="?", type=Path, const=MINE, metavar="DIR", help="all answers in DIR (workshop/mine)"
    )
    parser.add_argument("--json", action="store_true", help="with --all: print one JSON object")
    args = parser.parse_args()
    if args.json and args.all is None:
        stop("--json needs --all")
    if args.all is not None:
        if args.number is not None:
            stop(f"--all judges every exercise: leave out {args.number}")
        if not args.all.is_dir():
            stop(f"{args.all} is not a folder: name one that has files such as 01.py")
        from judging import prepare

        prepare()
        return 0 if run_all(args.all.resolve(), args.json) else 1
    if args.number is None:
        ladder()
        return 0
    folder = exercises().get(args.number.zfill(2))
    if folder is None:
        stop(f"there is no exercise {args.number}: the exercises are {', '.join(exercises())}")
    number = folder.name[:2]
    if args.hint:
        hint(number, folder)
        return 0
    file = (args.file or learners_file(number, folder)).resolve()
    if not file.is_file():
        stop(f"{file} does not exist: leave it out to try workshop/mine/{number}.py")
    if args.solution:
        solution(number, folder, file)
        return 0
    from judging import prepare

    prepare()
    if args.watch:
        watch(number, folder, file)
        return 0
    return 0 if run(number, folder, file) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
