"""Writes workshop/ANSWERS.md: what students write, what they see, what to ask. `make docs` runs it.

The mistakes come from tests/workshop/wrong_answers.toml, the titles from the exercises' pages.
"""

import tomllib
from pathlib import Path
from typing import Any

from docs.generate.pieces import ROOT

WORKSHOP = ROOT / "workshop"
PAGE = WORKSHOP / "ANSWERS.md"
MISTAKES = ROOT / "tests" / "workshop" / "wrong_answers.toml"
MAX_CODE = 60  # characters of code that a cell has room for
# In wrong_answers.toml, these lines stand in the place of a line that students leave out.
PLACEHOLDERS = ("", "pass", "if True:", "if False:", "if __name__:")
INTRODUCTION = """\
# The answer sheet

This page is for instructors. **It spoils the [exercises](exercises/)**: for each of them, it lists mistakes
that students make.

- *What students write*: the mistake. Where the code is short, an arrow leads from our code to theirs.
- *What they see as broken*: the promise after the word `broken` in the output of `python workshop/check.py`.
  The lines below it say what was expected and what was seen.
- *What to ask*: a question that leads to the mistake, and does not name it.

The messages are tested: [test_exercises.py](../tests/workshop/test_exercises.py) makes each mistake in our
solution, and checks which promise is broken. `make docs` writes this page from
[wrong_answers.toml](../tests/workshop/wrong_answers.toml): change that file, not this page.
"""
TABLE_HEAD = ["| what students write | what they see as `broken` | what to ask |", "|---|---|---|"]

Mistake = dict[str, Any]  # an entry of wrong_answers.toml


def is_short(code: str) -> bool:
    """Whether this is one line that a cell has room for."""
    return "\n" not in code and len(code) <= MAX_CODE


def code_change(old: str, new: str) -> str:
    """What students write instead of our code; nothing if it is long, or differs in its indentation only."""
    our_code = old.strip()
    student_code = new.strip()
    if our_code == student_code or not is_short(our_code) or not is_short(student_code):
        return ""
    if student_code in PLACEHOLDERS:
        return f"without `{our_code}`"
    return f"`{our_code}` → `{student_code}`"


def what_students_write(mistake: Mistake) -> str:
    """The mistake in words and, if all of its code is short, in code."""
    changes = [code_change(old, new) for old, new in mistake["edits"]]
    if not all(changes):
        return str(mistake["idea"])
    return f"{mistake['idea']} ({'; '.join(changes)})"


def row(mistake: Mistake) -> str:
    """A line of a table. A `|` in a cell would be a border."""
    cells = [what_students_write(mistake), mistake["breaks"][0], mistake["ask"]]
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def section(exercise: Path, mistakes: list[Mistake]) -> str:
    """The heading of an exercise, which links to its page, and the table of its mistakes."""
    page = exercise / "README.md"
    heading = page.read_text().splitlines()[0]
    title = heading.removeprefix("# ")
    link = page.relative_to(WORKSHOP).as_posix()
    rows = [row(mistake) for mistake in mistakes]
    return "\n".join([f"## [{title}]({link})", "", *TABLE_HEAD, *rows]) + "\n"


def make() -> str:
    """The page."""
    mistakes = tomllib.loads(MISTAKES.read_text())["wrong"]
    sections = [INTRODUCTION]
    for facts in sorted(WORKSHOP.glob("exercises/*/exercise.toml")):
        exercise = facts.parent
        number = exercise.name[:2]
        of_exercise = [mistake for mistake in mistakes if mistake["exercise"] == number]
        sections.append(section(exercise, of_exercise))
    return "\n".join(sections)


def build() -> None:
    """Write the page."""
    PAGE.write_text(make())
