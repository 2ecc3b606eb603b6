"""The difference between two neighboring scripts in pieces, each named after the function that it changes.

A page asks for pieces in a comment in front of a block, one a line:

    <!-- diff
    worker
    Trainer.evaluate "metrics = "
    Trainer.__init__ line "self.rank"
    shard_model "for unit in units" … "last: it takes"
    -->

A function's name alone stands for all its changed lines. With words, it stands for the run of changed lines
in which the words are, or for the one line; with two of them, for all lines from the first to the second.
Lines outside of functions belong to `imports`, or to `end`, the last two. A line that moves takes its piece
along.
"""

import ast
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {path.parent.name[:2]: path.parent.name for path in sorted(ROOT.glob("0*/train.py"))}
DEFINITIONS = ("def ", "@")  # such a line says itself where it is


class NoSuchPieceError(Exception):
    """A page asks for what is not in the scripts."""


@dataclass(frozen=True)
class Line:
    """A line of two scripts that are merged: `sign` is "-" for the older one's, "+" for the newer one's."""

    sign: str
    text: str
    function: str
    old: int | None  # its number in the older script, from 1
    new: int | None

    def __str__(self) -> str:
        return (self.sign + self.text).rstrip()


def script(step: str) -> str:
    return (ROOT / FOLDERS[step] / "train.py").read_text()


def functions(text: str) -> list[str]:
    """For each line of a script, where it is: in `Trainer.train`, say, in `imports`, `end` or `docstring`."""
    tree, lines = ast.parse(text), text.splitlines()
    names = [""] * len(lines)

    def name(begin: int, end: int, what: str) -> None:
        names[begin - 1 : end] = [what] * (end - begin + 1)

    def visit(node: ast.stmt, prefix: str = "") -> None:
        end = node.end_lineno or node.lineno
        if isinstance(node, ast.FunctionDef):
            begin = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            name(begin, end, prefix + node.name)
        elif isinstance(node, ast.ClassDef):
            name(node.lineno, end, node.name)
            for each in node.body:
                visit(each, f"{node.name}.")
        elif isinstance(node, ast.If):
            name(node.lineno, end, "end")
        elif isinstance(node, ast.Expr) and node is tree.body[0]:
            name(node.lineno, end, "docstring")
        else:
            name(node.lineno, end, "imports")

    for node in tree.body:
        visit(node)
    for number, text_of in enumerate(lines):  # a comment at the top, say
        if text_of and not names[number]:
            names[number] = "imports"
    return names


@cache
def merged(before: str, after: str) -> tuple[Line, ...]:
    """Two scripts in one, behind their docstrings, without empty lines that came or went."""
    texts = [script(before), script(after)]
    lines, names = [text.splitlines() for text in texts], [functions(text) for text in texts]
    skip = [name.count("docstring") for name in names]
    old, new = (each[count:] for each, count in zip(lines, skip, strict=True))
    found = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            for i, j in zip(
                range(i1 + skip[0], i2 + skip[0]), range(j1 + skip[1], j2 + skip[1]), strict=True
            ):
                found.append(Line(" ", lines[1][j], names[1][j], i + 1, j + 1))
            continue
        for i in range(i1 + skip[0], i2 + skip[0]):
            if lines[0][i].strip():
                found.append(Line("-", lines[0][i], names[0][i], i + 1, None))
        for j in range(j1 + skip[1], j2 + skip[1]):
            if lines[1][j].strip():
                found.append(Line("+", lines[1][j], names[1][j], None, j + 1))
    return tuple(found)


def pieces(before: str, after: str) -> dict[str, list[Line]]:
    """All functions that change, in the order of the newer script, each with its changed lines."""
    found: dict[str, list[Line]] = {}
    for line in merged(before, after):
        if line.sign != " ":
            found.setdefault(line.function, []).append(line)
    return found


def asked_for(request: str) -> Iterator[tuple[str, str, str]]:
    """The lines of a request: a function, the words where its piece begins, and those where it ends.

    For a single line, both are the same; for a run of changed lines, the second is empty.
    """
    for line in filter(None, map(str.strip, request.splitlines())):
        found = re.fullmatch(r'([\w.]+)(?: (line )?"(.+?)"(?: … "(.+)")?)?', line)
        if not found:
            raise NoSuchPieceError(f'\'{line}\' is not: function "words" … "words"')
        function, one, begin, end = found.groups("")
        yield function, begin, begin if one else end


def piece(before: str, after: str, function: str, begin: str = "", end: str = "") -> list[Line]:
    """The lines of one piece.

    Raises NoSuchPieceError when the function does not change, or the words are not in one place of it.
    """
    lines = [line for line in merged(before, after) if line.function == function]
    changed = {place for place, line in enumerate(lines) if line.sign != " "}
    if not changed:
        raise NoSuchPieceError(f"{function} is the same in steps {before} and {after}")
    if not begin:
        return [lines[place] for place in sorted(changed)]

    def run(place: int) -> tuple[int, int]:
        first = last = place
        while first - 1 in changed:
            first -= 1
        while last + 1 in changed:
            last += 1
        return first, last

    def only(words: str, after_place: int = 0) -> int:
        places = [place for place in range(after_place, len(lines)) if words in str(lines[place])]
        if not end:
            places = sorted({run(place)[0] for place in places if place in changed})
        if len(places) != 1:
            found = f'"{words}" is in {len(places)} places of {function}'
            raise NoSuchPieceError(f"{found} between steps {before} and {after}, not in one")
        return places[0]

    first = only(begin)
    last = only(end, first) if end else run(first)[1]
    return lines[first : last + 1]


def block(before: str, after: str, request: str) -> list[Line]:
    """The lines that a page shows for a request, with a mark of where they are if the request has several."""
    asked = list(asked_for(request))
    several = len({function for function, _, _ in asked}) > 1
    shown: list[Line] = []
    where = ""
    for function, begin, end in asked:
        part = piece(before, after, function, begin, end)
        lines = [line for line in merged(before, after) if line.function == function]
        mark = ""
        if shown and shown[-1].function == function:
            between = lines[lines.index(shown[-1]) + 1 : lines.index(part[0])]
            if function != "imports" and any(line.sign == " " for line in between):
                mark = re.sub(r"\S.*", "…", part[0].text)
        elif several and function not in ("imports", "end") and not part[0].text.startswith(DEFINITIONS):
            method = part[0].text.startswith("    def ")
            mark = "# in class Trainer" if method else f"# in {function.removeprefix('Trainer.')}"
        if mark and mark != where:
            shown.append(Line(" ", mark, function, None, None))
        where = mark if mark.startswith("#") else where
        shown += part
    return shown
