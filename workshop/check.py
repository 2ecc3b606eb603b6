"""Exercises for the five steps, and the program that judges your answers.

    python workshop/check.py                 the exercises, and your progress
    python workshop/check.py 05              try your file, workshop/mine/05.py; the first time, create it
    python workshop/check.py 05 FILE         try any file
    python workshop/check.py 05 --watch      try it each time that you save it; Ctrl-C ends this
    python workshop/check.py 05 --hint       the next hint
    python workshop/check.py 05 --solution   the difference between your file and ours

What is judged is what your functions do on 1, 2 and 3 ranks, not how they are written. Exit status: 0 when
every promise is kept, 1 when one is broken, 2 when the command was wrong.
"""

import argparse
import contextlib
import difflib
import json
import os
import sys
import textwrap
import time
import tomllib
from pathlib import Path
from typing import Any, NoReturn

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
    """The exercises' folders by their numbers, in order."""
    return {path.parent.name[:2]: path.parent for path in sorted(HERE.glob("exercises/[0-9]*/exercise.toml"))}


def text_of(exercise: Path, which: str) -> str:
    """The `start` or the `solution` of an exercise: its own file, or one of the five scripts, as in mine/."""
    facts = about(exercise)
    if which not in facts:
        return (exercise / f"{which}.py").read_text()
    text = (HERE.parent / facts[which] / "train.py").read_text()
    here = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    assert text.count(here) == 1
    there = f'(Path(__file__).resolve().parents[2] / name for name in ("", "{facts["solution"]}"))'
    return text.replace(here, f"sys.path[:0] = map(str, {there})")


def about(exercise: Path) -> dict[str, Any]:
    """Title, minutes, step, hints, and the fact that is told after passing."""
    return tomllib.loads((exercise / "exercise.toml").read_text())


def remembered() -> dict[str, Any]:
    """What is known of this learner: exercises that have passed, hints given, solutions agreed to."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return dict(json.loads((MINE / "progress.json").read_text()))
    return {"passed": [], "hints": {}, "agreed": []}


def remember(progress: dict[str, Any]) -> None:
    MINE.mkdir(exist_ok=True)
    (MINE / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")


def bar(done: int, of: int, width: int = 30) -> str:
    """How far one is: a bar on a terminal, a number elsewhere."""
    full = round(width * done / of)
    drawn = f"[{'#' * full}{'.' * (width - full)}] " if sys.stdout.isatty() else ""
    return f"{drawn}{done} of {of} exercises"


def ladder() -> None:
    """Print all exercises, with a mark at those that have passed."""
    passed, step = remembered()["passed"], None
    for number, folder in exercises().items():
        facts = about(folder)
        if facts["step"] != step:
            step = facts["step"]
            say(f"\nstep {step}")
        mark = "x" if number in passed else " "
        say(
            f"  [{mark}] {number}  {facts['title']}  ({facts['minutes']} min)", "green" if mark == "x" else ""
        )
    say(f"\n{bar(len(passed), len(exercises()))}")
    rest = [number for number in exercises() if number not in passed]
    if rest:
        say(f"next: python workshop/check.py {rest[0]}")


def own_file(number: str, folder: Path) -> Path:
    """The learner's file; made of start.py the first time."""
    file = MINE / f"{number}.py"
    if not file.exists():
        MINE.mkdir(exist_ok=True)
        file.write_text(text_of(folder, "start"))
        say(f"created {shorter(file)}: read {shorter(folder / 'README.md')}, then fill in what is missing")
    return file


def shorter(path: Path) -> str:
    """A path as it is seen from here, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def run(number: str, folder: Path, file: Path) -> bool:
    """Judge a file and say what came of it."""
    from judging import judge  # imports torch

    begun = time.perf_counter()
    found = judge(folder, file)
    for promise in found.kept:
        say(f"  kept    {promise}", "green")
    if found.passed:
        say(f"passed in {time.perf_counter() - begun:.1f} s", "green")
        progress = remembered()
        if file.parent == MINE and number not in progress["passed"]:
            progress["passed"] = sorted([*progress["passed"], number])
            remember(progress)
        say(f"\n{textwrap.fill('One more thing: ' + about(folder)['fact'], 100)}\n")
        say(bar(len(progress["passed"]), len(exercises())))
        return True
    say(f"  broken  {found.broken}", "red")
    for line in found.lines:
        say(f"          {line}")
    say(f"          read on: {found.told}", "faint")
    say(f"a hint: python workshop/check.py {number} --hint", "faint")
    return False


def watch(number: str, folder: Path, file: Path) -> None:
    """Judge the file now, and each time that it has changed."""
    seen = None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            with contextlib.suppress(FileNotFoundError):  # an editor is just replacing it
                if (changed := file.stat().st_mtime_ns) != seen:
                    seen = changed
                    say(f"\n{time.strftime('%H:%M:%S')}  {shorter(file)}", "faint")
                    run(number, folder, file)
            time.sleep(0.2)


def hint(number: str, folder: Path) -> None:
    """Give one hint more than the last time."""
    hints, progress = about(folder)["hints"], remembered()
    given = min(progress["hints"].get(number, 0) + 1, len(hints))
    for place, text in enumerate(hints[:given], start=1):
        say(textwrap.fill(f"hint {place} of {len(hints)}: {text}", 100))
    progress["hints"][number] = given
    remember(progress)


def solution(number: str, folder: Path, file: Path) -> None:
    """Show how ours differs; who has not passed is asked once."""
    progress = remembered()
    if number not in [*progress["passed"], *progress["agreed"]]:
        answer = input(f"You have not passed exercise {number} yet. See the solution anyway? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            return
        progress["agreed"].append(number)
        remember(progress)
    mine, ours = (text.splitlines() for text in (file.read_text(), text_of(folder, "solution")))
    for line in difflib.unified_diff(mine, ours, shorter(file), "our solution", lineterm=""):
        say(line, {"+": "green", "-": "red"}.get(line[:1], ""))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", nargs="?", metavar="NN", help="which exercise")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="workshop/mine/NN.py by default")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--watch", action="store_true", help="try it each time that it is saved")
    what.add_argument("--hint", action="store_true", help="the next hint")
    what.add_argument("--solution", action="store_true", help="the difference between your file and ours")
    args = parser.parse_args()
    if args.number is None:
        ladder()
        return 0
    folder = exercises().get(args.number.zfill(2))
    if folder is None:
        stop(f"there is no exercise {args.number}: take one of {', '.join(exercises())}")
    number = folder.name[:2]
    if args.hint:
        hint(number, folder)
        return 0
    file = (args.file or own_file(number, folder)).resolve()
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
