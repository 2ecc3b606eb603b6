"""Cards: each is a small change that breaks training. You see what happens, and look for the reason.

    python workshop/break_it.py                   list the cards
    python workshop/break_it.py 07                run the commands of card 07 with its change, and ask why
    python workshop/break_it.py 07 --show         show the change
    python workshop/break_it.py 07 --reason       explain the reason, how to find it, and how to fix it
    python workshop/break_it.py 07 --unbroken     run the same commands without the change
    python workshop/break_it.py 07 --diagnose     run them with the change and with tools that find the reason
    python workshop/break_it.py 07 --into DIR     make the changed copy in DIR, so that you can fix it there

The change is made in a temporary copy of the project, never in the project itself. Each card is also a page:
workshop/break_it/*/card.md. The exit status is 0 when the commands have run, even if they failed. It is 2 if
break_it.py itself cannot do what you want, for example because there is no such card.
"""

import argparse
import contextlib
import importlib.util
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
TIMEOUT = 120  # seconds until a command is stopped, unless the card has another number
COMPARED_LINES = r"^epoch \d"  # the lines that are shown side by side, unless the card has another pattern


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def all_cards() -> dict[str, Path]:
    """The folder of each card by its number, in order."""
    folders = [path.parent for path in sorted(HERE.glob("break_it/[0-9]*/card.toml"))]
    return {folder.name[:2]: folder for folder in folders}


def read_facts(card: Path) -> dict[str, Any]:
    """The content of card.toml. All cards have `title` and `commands`. A card may also have:

    `diagnosis`: the commands of --diagnose
    `labels`: names for the last commands, whose lines are shown side by side
    `lines`: a pattern for these lines, if not COMPARED_LINES
    `seconds`: the timeout of a command, if not TIMEOUT
    `text`: the folders of the steps that train on a text, with the patch that makes them do so
    `root`: whether the commands need root
    """
    return tomllib.loads((card / "card.toml").read_text())


def copy_project(destination: Path, card: Path) -> None:
    """Copy what the commands need: the steps, `common`, the launcher, and the scripts of the card.

    Steps that train on a text also need the folder `beyond`, which has the text and its model.
    """
    text_steps = read_facts(card).get("text", {})
    folders = [ROOT / "common", *ROOT.glob("0[1-9]_*")]
    if text_steps:
        folders.append(ROOT / "beyond")
    for folder in folders:
        shutil.copytree(folder, destination / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    launcher = ROOT / "launch_multinode.sh"
    hosts = ROOT / "tests" / "harness" / "hosts.py"
    for file in [launcher, hosts, *card.parent.glob("*.py"), *card.glob("*.py")]:
        shutil.copy(file, destination)
    for step, patch in text_steps.items():
        shutil.copy(HERE / "text_model.py", destination / step)
        apply_patch(HERE / patch, destination)


def apply_patch(patch: Path, folder: Path) -> None:
    """Make the change `patch` in the copy of the project in `folder`."""
    # If the folder is inside a repository, git would skip the files that the repository does not track.
    # With this variable, git does not find the repository.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    command = ["git", "apply", "--whitespace=nowarn", str(patch)]
    try:
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        fail("git is needed to make the change: install it")
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines()[0]
        fail(f"{patch} does not fit the scripts: {reason}; undo your changes to the scripts")


def parse_command(command: str) -> tuple[list[str], dict[str, str]]:
    """A command as a list of arguments, and the environment variables that are set in front of it.

    `python` and `torchrun` become those of the Python that runs this program.
    """
    arguments = shlex.split(command)
    variables = {}
    while "=" in arguments[0]:
        name, _, value = arguments.pop(0).partition("=")
        variables[name] = value
    if arguments[0] == "python":
        arguments[:1] = [sys.executable]
    elif arguments[0] == "torchrun":
        arguments[:1] = [sys.executable, "-m", "torch.distributed.run"]
    return arguments, variables


def descendants(pid: int) -> list[int]:
    """The processes that process `pid` has started, the processes that those have started, and so on."""
    result = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    children: dict[int, list[int]] = {}
    for line in result.stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    pids = []
    unvisited = [pid]
    while unvisited:
        new_pids = children.get(unvisited.pop(), [])
        pids += new_pids
        unvisited += new_pids
    return pids


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all processes that it has started. torchrun's ranks are not in its process group."""
    if process.poll() is None:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(command: str, folder: Path, timeout: float = TIMEOUT) -> str:
    """Run a command in `folder`, print its output as it comes, and return the output.

    Stop the command after `timeout` seconds.
    """
    arguments, variables = parse_command(command)
    # Each rank has one thread, as torchrun sets it, so that every machine gets the same numbers.
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ, **variables}
    if not shutil.which("torchrun"):  # launch_multinode.sh needs it, and the environment is not activated
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as scratch:
        # A file, not a pipe: a pipe ends only after every process that can write to it has ended.
        output = Path(scratch, "output")
        with open(output, "wb") as file:
            process = subprocess.Popen(
                arguments,
                cwd=folder,
                env=env,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        deadline = time.monotonic() + timeout
        num_printed = 0
        timed_out = False
        finished = False
        try:
            while not finished and not timed_out:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                finished = process.poll() is not None
                timed_out = not finished and time.monotonic() > deadline
                text = output.read_text(errors="replace")
                # While the command runs, its last line may be incomplete.
                complete = text if finished or timed_out else text[: text.rfind("\n") + 1]
                print(complete[num_printed:], end="", flush=True)
                num_printed = len(complete)
        finally:
            kill_tree(process)
    if timed_out:
        print(f"(stopped after {timeout:.0f} s: it did not end by itself)", flush=True)
    return text


def side_by_side(labels: list[str], outputs: list[str], pattern: str) -> list[str]:
    """The lines of two outputs that match a pattern, in pairs and without their speed."""
    columns = []
    for output in outputs:
        lines = [line for line in output.splitlines() if re.search(pattern, line)]
        columns.append([re.sub(r"  [\d,]+ samples/s$", "", line) for line in lines])
    width = max(len(label) for label in ["both", *labels]) + 1
    rows = []
    for first, second in itertools.zip_longest(*columns, fillvalue="(nothing)"):
        if first == second:
            rows.append(f"{'both:':{width}} {first}")
        else:
            rows.append(f"{labels[0] + ':':{width}} {first}")
            rows.append(f"{labels[1] + ':':{width}} {second}")
    return rows


def heading(card: Path) -> str:
    return f"# {card.name[:2]} · {read_facts(card)['title']}\n"


def situation(card: Path) -> str:
    """The text of a card's page before its command: what has happened so far."""
    text = (card / "card.md").read_text()
    _, _, after_title = text.partition("\n")
    return as_plain_text(after_title.partition("```bash\n")[0], card)


def question(card: Path) -> str:
    """The question of a card's page."""
    text = (card / "card.md").read_text()
    [paragraph] = re.findall(r"^\*\*Question:\*\*.*?(?=\n\n)", text, re.M | re.S)
    return as_plain_text(paragraph, card)


def reason(card: Path) -> str:
    """The folded part of a card's page: reason, diagnosis and fix."""
    text = (card / "card.md").read_text()
    [folded] = re.findall(r"</summary>\n(.*)</details>", text, re.S)
    return as_plain_text(folded, card)


def as_plain_text(markdown: str, card: Path) -> str:
    """The Markdown of a card's page as text for a terminal, with the target of each link in parentheses."""
    # Code is kept as it is. The odd parts are code.
    parts = re.split(r"(^```.*?^```$|`[^`]*`)", markdown, flags=re.M | re.S)
    for index, part in enumerate(parts):
        if part.startswith("```"):
            code = part.splitlines()[1:-1]
            parts[index] = "\n".join(f"    {line}" for line in code)
        elif index % 2 == 0:
            parts[index] = re.sub(r"\*+(\S[^*]*)\*+", r"\1", part)
    text = "".join(parts)

    def with_target(link: re.Match[str]) -> str:
        target = link[2]
        if "://" not in target:
            target = os.path.relpath(card / target, ROOT)
        return f"{link[1]} ({target})"

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", with_target, text).strip()


def run_commands(card: Path, commands: list[str], folder: Path) -> list[str]:
    """Run the commands one after the other in `folder`, and return their outputs."""
    timeout = read_facts(card).get("seconds", TIMEOUT)
    outputs = []
    for command in commands:
        print(f"$ {command}", flush=True)
        outputs.append(run(command, folder, timeout))
        print()
    return outputs


def print_comparison(card: Path, outputs: list[str]) -> None:
    """The outputs of the last two commands side by side, if the card has labels for them."""
    facts = read_facts(card)
    if "labels" in facts:
        print("Side by side:\n")
        rows = side_by_side(facts["labels"], outputs[-2:], facts.get("lines", COMPARED_LINES))
        print("\n".join(rows), end="\n\n")


def run_card(card: Path, folder: Path) -> None:
    """Make the change in `folder`, run the commands there, and ask the question."""
    print(f"{situation(card)}\n")
    apply_patch(card / "change.patch", folder)
    outputs = run_commands(card, read_facts(card)["commands"], folder)
    print_comparison(card, outputs)
    print(f"{question(card)}\n")


def run_unbroken(card: Path, folder: Path) -> None:
    """Run the commands in `folder` without the change."""
    print("The same commands, without the change:\n")
    outputs = run_commands(card, read_facts(card)["commands"], folder)
    print_comparison(card, outputs)


def run_diagnosis(card: Path, folder: Path) -> None:
    """Make the change in `folder`, add what the tools need, and run the commands that find the reason."""
    apply_patch(card / "change.patch", folder)
    tools = card / "diagnosis.patch"
    if tools.exists():
        print(f"Added to the script, to find the reason:\n\n{tools.read_text()}", flush=True)
        apply_patch(tools, folder)
    run_commands(card, read_facts(card)["diagnosis"], folder)


def make_copy(card: Path, folder: Path) -> None:
    """Make the changed copy in the new folder `folder`, and print the commands."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        fail(f"{folder} already exists: name a new folder")
    except OSError as error:
        fail(f"cannot create {folder}: {error.strerror}; name another folder")
    copy_project(folder, card)
    apply_patch(card / "change.patch", folder)
    print(f"cd {shlex.quote(str(folder))}")
    for command in read_facts(card)["commands"]:
        print(command)


def check_can_run(card: Path) -> None:
    """End with an error if the commands of the card cannot run here."""
    number = card.name[:2]
    if importlib.util.find_spec("torch") is None:
        fail(f"{sys.executable} has no torch: use .venv/bin/python workshop/break_it.py {number}")
    if read_facts(card).get("root") and os.geteuid() != 0:
        fail(f"card {number} needs root: sudo .venv/bin/python workshop/break_it.py {number}")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong flag in one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")


def parse_args() -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("number", nargs="?", metavar="NN", help="the number of a card")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--show", action="store_true", help="show the change, and run nothing")
    modes.add_argument("--reason", action="store_true", help="explain what happens, and run nothing")
    modes.add_argument("--unbroken", action="store_true", help="run the commands without the change")
    modes.add_argument("--diagnose", action="store_true", help="run them with tools that find the reason")
    modes.add_argument(
        "--into", type=Path, metavar="DIR", help="make the changed copy in DIR, and run nothing"
    )
    args = parser.parse_args()
    if args.number is None and len(sys.argv) > 1:
        parser.error("the number of a card is missing, such as 07")
    return args


def find_card(number: str) -> Path:
    """The folder of a card. `fail`s if there is no such card."""
    cards = all_cards()
    if number.zfill(2) not in cards:
        fail(f"there is no card {number}: choose one of {', '.join(cards)}")
    return cards[number.zfill(2)]


def main() -> None:
    args = parse_args()
    if args.number is None:
        for number, card in all_cards().items():
            print(f"{number}  {read_facts(card)['title']}")
        return
    card = find_card(args.number)
    number = card.name[:2]
    if args.into:
        make_copy(card, args.into)
        return
    if args.show:
        print(heading(card))
        print((card / "change.patch").read_text(), end="")
        return
    if args.reason:
        print(heading(card))
        print(reason(card))
        return
    if args.diagnose and "diagnosis" not in read_facts(card):
        fail(f"card {number} needs no tool: --reason says how to find the reason")
    check_can_run(card)
    print(heading(card))
    with tempfile.TemporaryDirectory(prefix="break-it-") as name:
        folder = Path(name)
        copy_project(folder, card)
        if args.unbroken:
            run_unbroken(card, folder)
        elif args.diagnose:
            run_diagnosis(card, folder)
        else:
            run_card(card, folder)
    print(f"The change:  python workshop/break_it.py {number} --show")
    print(f"The reason:  python workshop/break_it.py {number} --reason")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
