"""Cards: a small change that breaks training, what is printed then, and the way to find the reason.

    python workshop/break_it.py                   the cards
    python workshop/break_it.py 07                show the change of card 07, run it, show the output
    python workshop/break_it.py 07 --unbroken     the same commands, without the change
    python workshop/break_it.py 07 --diagnose     the change again, with the tools that find the reason
    python workshop/break_it.py 07 --into DIR     leave the broken copy in DIR, to fix it there

Nothing in the project is changed: each run has a copy of it, which is gone afterwards. The pages of the cards
are in workshop/break_it. Exit status: 0 when the commands have run, however they ended, 2 when the command
was wrong.
"""

import argparse
import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECONDS = 120  # until a command counts as one that hangs, unless the card says another number
LOSSES = r"^epoch \d"  # the lines that are set beside each other, unless the card says others


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def cards() -> dict[str, Path]:
    """The cards' folders by their numbers, in order."""
    return {path.parent.name[:2]: path.parent for path in sorted(HERE.glob("break_it/[0-9]*/card.toml"))}


def about(card: Path) -> dict[str, Any]:
    """What card.toml says: `title`, `commands`; and if a card needs them `diagnosis`, `labels` and others."""
    return tomllib.loads((card / "card.toml").read_text())


def copy_project(to: Path, card: Path) -> None:
    """Copy what the commands need: the steps, `common`, the launcher, and the card's own scripts."""
    for folder in [ROOT / "common", *ROOT.glob("0[1-9]_*")]:
        shutil.copytree(folder, to / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    hosts = ROOT / "tests" / "harness" / "hosts.py"
    for file in [ROOT / "launch_multinode.sh", hosts, *card.parent.glob("*.py"), *card.glob("*.py")]:
        shutil.copy(file, to)


def apply(patch: Path, folder: Path) -> None:
    """Change the copy in `folder` as the patch says; ends with an error when the patch does not fit."""
    # Not as a part of a repository around the folder: git would leave out the files that it does not know.
    own = {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    words = ["git", "apply", "--whitespace=nowarn", str(patch)]
    try:
        done = subprocess.run(words, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True)
    except FileNotFoundError:
        stop("git is needed to apply the change: install it")
    if done.returncode:
        stop(f"{patch} does not apply to the scripts: {done.stderr.strip().splitlines()[0]}")


def words_of(command: str) -> tuple[list[str], dict[str, str]]:
    """A command's words, with this Python for `python` and `torchrun`, and the variables in front of it."""
    words, variables = shlex.split(command), {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    starts = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*starts.get(words[0], words[:1]), *words[1:]], variables


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    lines = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True
    ).stdout.splitlines()
    pairs = [tuple(map(int, line.split())) for line in lines]
    found = [pid]
    for parent in found:  # grows meanwhile
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found[1:]


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End a command with all that it has started; torchrun's ranks are in groups of their own."""
    if process.poll() is None:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(command: str, folder: Path, seconds: float = SECONDS) -> str:
    """Run a command in `folder`, show what it prints, and return that; end it after so many seconds."""
    words, variables = words_of(command)
    # One thread for each rank, as torchrun has it, and the same numbers on every machine.
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ, **variables}
    if not shutil.which("torchrun"):  # for the launcher's script, when the environment is not activated
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as scratch:
        # A file, not a pipe: of a pipe the end is only seen when each process that can write to it has ended.
        output = Path(scratch, "output")
        with open(output, "wb") as file:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            process = subprocess.Popen(words, cwd=folder, env=env, start_new_session=True, **streams)
        end, shown, over = time.monotonic() + seconds, 0, False
        try:
            while not over:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                late = process.poll() is None and time.monotonic() > end
                over = late or process.poll() is not None
                text = output.read_text(errors="replace")
                whole = text if over else text[: text.rfind("\n") + 1]
                print(whole[shown:], end="", flush=True)
                shown = len(whole)
        finally:
            end_all(process)
    if late:
        print(f"(ended after {seconds:.0f} s, since it would not end by itself)", flush=True)
    return text


def beside(labels: list[str], outputs: list[str], lines: str) -> list[str]:
    """The lines of two runs that match a regular expression, beside each other, their speed left out."""
    rows = [
        [re.sub(r"  [\d,]+ samples/s$", "", line) for line in output.splitlines() if re.search(lines, line)]
        for output in outputs
    ]
    width = max(len("both"), *map(len, labels)) + 1
    found = []
    for pair in itertools.zip_longest(*rows, fillvalue="(nothing)"):
        names = ["both"] if pair[0] == pair[1] else labels
        found += [f"{name + ':':{width}} {line}" for name, line in zip(names, pair, strict=False)]
    return found


def show(card: Path, folder: Path, patches: list[Path], commands: list[str]) -> None:
    """Change the copy in `folder`, run the commands there one after the other, and show all of it."""
    facts = about(card)
    print(f"# {card.name[:2]} · {facts['title']}\n")
    for patch in patches:
        print(f"The change, in a copy of the project:\n\n{patch.read_text()}", flush=True)
        apply(patch, folder)
    outputs = []
    for command in commands:
        print(f"$ {command}", flush=True)
        outputs.append(run(command, folder, facts.get("seconds", SECONDS)))
        print()
    if "labels" in facts and commands == facts["commands"]:
        print("Side by side:\n")
        print("\n".join(beside(facts["labels"], outputs, facts.get("lines", LOSSES))), end="\n\n")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a wrong flag with one line."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help lists the flags)")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", nargs="?", metavar="NN", help="which card")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--unbroken", action="store_true", help="without the change")
    how.add_argument("--diagnose", action="store_true", help="with the tools that find the reason")
    how.add_argument(
        "--into", type=Path, metavar="DIR", help="make the broken copy in DIR, and leave it there"
    )
    args = parser.parse_args()
    if args.number is None:
        for number, card in cards().items():
            print(f"{number}  {about(card)['title']}")
        return
    if args.number.zfill(2) not in cards():
        stop(f"there is no card {args.number}: take one of {', '.join(cards())}")
    card = cards()[args.number.zfill(2)]
    facts, patches = about(card), [card / "change.patch"]
    commands = facts["commands"]
    if args.into:
        if args.into.exists():
            stop(f"{args.into} already exists: name a folder that does not")
        args.into.mkdir(parents=True)
        copy_project(args.into, card)
        apply(patches[0], args.into)
        print("\n".join([f"cd {args.into}", *commands]))
        return
    if args.unbroken:
        patches = []
    if args.diagnose:
        if "diagnosis" not in facts:
            stop(f"card {card.name[:2]} needs no tool: its page says how to find the reason")
        patches, commands = sorted(card.glob("*.patch")), facts["diagnosis"]
    with tempfile.TemporaryDirectory(prefix="break-it-") as folder:
        copy_project(Path(folder), card)
        show(card, Path(folder), patches, commands)
    print(f"What happened here? The page: {card.relative_to(ROOT) / 'card.md'}")


if __name__ == "__main__":
    main()
