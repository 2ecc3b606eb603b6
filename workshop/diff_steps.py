"""The difference between two neighboring steps, a piece at a time, in the order of the later step's page.

    python workshop/diff_steps.py 02 03                  one piece after another: Enter continues, q quits
    python workshop/diff_steps.py 02 03 --list           the pieces
    python workshop/diff_steps.py 02 03 --only imports   only this piece

Each piece has the heading under which the page shows it, the first paragraph there, and its lines. If the
output is not a terminal, all pieces come at once. docs/index.html shows the same beside the whole scripts.
Exit status: 0, or 2 when the command was wrong.
"""

import argparse
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `docs` is

from docs.generate.pieces import FOLDERS
from docs.generate.stops import Stop, stops

COLORS = {"-": "31", "+": "32", "heading": "1", "faint": "2"}


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def say(text: str = "", color: str = "") -> None:
    """Print a line, in a color if this is a terminal."""
    if color and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        text = f"\033[{COLORS[color]}m{text}\033[0m"
    print(text, flush=True)


def first_paragraph(piece: Stop) -> str:
    """What the page says first, before the lines or else behind them, without Markdown's marks."""
    text = (piece.before or piece.after).partition("\n\n")[0]
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    return " ".join(re.sub(r"\*\*(.+?)\*\*", r"\1", text).split())


def count(piece: Stop) -> str:
    signs = [line.sign for line in piece.lines]
    return f"+{signs.count('+')} −{signs.count('-')}"


def show(piece: Stop, number: int, of: int) -> None:
    """Print one piece."""
    columns = min(100, shutil.get_terminal_size().columns)
    say(f"{number} of {of} · {piece.heading.replace('`', '')} · {', '.join(piece.functions)}", "heading")
    say(f"--only {piece.name}", "faint")
    say()
    if words := first_paragraph(piece):
        say(textwrap.fill(words, columns, break_long_words=False, break_on_hyphens=False) + "\n")
    for line in piece.lines:
        say(str(line), line.sign.strip())
    say()


def goes_on() -> bool:
    """Ask at a terminal whether to go on; the end of the input means no."""
    try:
        return input("Enter: next piece, q: quit ").strip().lower() not in ("q", "quit")
    except EOFError:
        print()
        return False


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a wrong flag with one line."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help lists the flags)")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="NN", help="the earlier step")
    parser.add_argument("after", metavar="MM", help="the step after it")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--list", action="store_true", help="the names of the pieces, and how large they are")
    which.add_argument("--only", metavar="PIECE", help="show this piece")
    args = parser.parse_args()
    before, after = (step.zfill(2) for step in (args.before, args.after))
    for step in (before, after):
        if step not in FOLDERS:
            stop(f"there is no step {step}: take two neighbors of {', '.join(FOLDERS)}")
    if int(after) != int(before) + 1:
        stop(f"step {after} does not follow step {before}: take two neighbors, the earlier one first")
    pieces = [piece for piece in stops(after) if piece.request]
    if args.list:
        width = max(len(piece.name) for piece in pieces)
        for piece in pieces:
            say(f"{piece.name:{width}}  {count(piece):>7}  {', '.join(piece.functions)}")
        return
    numbered = list(enumerate(pieces, start=1))
    if args.only is not None:
        numbered = [(number, piece) for number, piece in numbered if piece.name == args.only]
        if not numbered:
            stop(f"there is no piece {args.only} between steps {before} and {after}: see --list")
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    for number, piece in numbered:
        show(piece, number, len(pieces))
        if asks and (number, piece) != numbered[-1] and not goes_on():
            return


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
