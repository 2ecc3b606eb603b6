"""Fills the pages: what comes from a script or a run stands between marks, and is made anew.

    <!-- diff                        lines of the two scripts of a step's page, see pieces.py
    Trainer.evaluate "metrics = "
    -->

    <!-- output: COMMAND             what the command has printed, from benchmarks/results/outputs.json:
    epoch 1/3 *                      the lines that are like one of these patterns, `…` for those between
    -->

    <!-- printed: COMMAND -->        the rows of a table that the command has printed, also from there

    <!-- table: NAME -->             a table, see tables.py

Each ends with `<!-- end -->`. Links to a line, `[words](file#L7)`, follow the words, and figures in sentences
follow the records (figures.py).
"""

import fnmatch
import re
from pathlib import Path

from docs.generate.figures import with_figures
from docs.generate.pictures import results
from docs.generate.pieces import FOLDERS, ROOT, block
from docs.generate.tables import TABLES

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / folder / "README.md" for folder in FOLDERS.values()),
    ROOT / FOLDERS["05"] / "REFERENCE.md",
    ROOT / "beyond" / "README.md",
    *sorted((ROOT / "docs" / "reference").glob("*.md")),
]
MARKED = re.compile(
    r"<!-- (diff|output|printed|table)(?:: ([^\n]*?))?(?:\n(.*?))? ?-->\n(.*?)\n<!-- end -->", re.S
)


def diff_block(page: Path, request: str) -> str:
    """The lines that a step's page asks for."""
    step = page.parent.name[:2]
    before = f"{int(step) - 1:02}"
    return "```diff\n" + "".join(f"{line}\n" for line in block(before, step, request)) + "```"


def output_block(command: str, patterns: str) -> str:
    """What a command has printed, as far as a page shows it; all of it without patterns."""
    lines = results("outputs.json")[command]["output"]
    wanted = patterns.splitlines() or ["*"]
    shown: list[str] = []
    for line in lines:
        if any(fnmatch.fnmatchcase(line, pattern) for pattern in wanted):
            shown.append(line)
        elif line and shown and shown[-1] != "…":
            shown.append("…")
    for pattern in wanted:
        assert fnmatch.filter(lines, pattern), f"{command}: no line is like '{pattern}'"
    while shown[-1] == "…":
        shown.pop()
    return "```text\n" + "".join(f"{line}\n" for line in shown) + "```"


def linked(page: Path, text: str) -> str:
    """A page whose links to lines lead to where their words stand.

    Raises ValueError when the words are in no line, or in several, none of which is the one that it had.
    """

    def follow(found: re.Match[str]) -> str:
        words, target, number = found[1], found[2], int(found[3])
        lines = (page.parent / target).read_text().splitlines()
        places = [place for place, line in enumerate(lines, start=1) if words.strip("`") in line]
        if number not in places and len(places) != 1:
            raise ValueError(f"{page.name}: {words} is in lines {places} of {target}")
        return f"[{words}]({target}#L{number if number in places else places[0]})"

    return re.sub(r"\[([^\]\n]+)\]\(([^)#\s]+)#L(\d+)\)", follow, text)


def filled(page: Path) -> str:
    """A page as it should be."""

    def fill(found: re.Match[str]) -> str:
        kind, name, request, old = (part or "" for part in found.groups())
        if kind == "diff":
            made = diff_block(page, request)
        elif kind == "output":
            made = output_block(name, request)
        elif kind == "printed":
            lines = results("outputs.json")[name]["output"]
            made = "\n".join(line for line in lines if line.startswith("|"))
        else:
            made = TABLES[name](old.strip("\n") + "\n").rstrip("\n")
        opening = found[0][: found[0].index("-->") + 3]
        return f"{opening}\n\n{made}\n\n<!-- end -->"

    return linked(page, with_figures(page, MARKED.sub(fill, page.read_text())))
