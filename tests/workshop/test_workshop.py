"""The workshop's pages: the plans add up, links lead somewhere, pages and exercises match."""

import ast
import re
import shutil
import sys
import tomllib
from collections import Counter

import pypdf
import pytest
from helpers import FOLDERS, ROOT, errors, finish, load, paths, quoted_pattern, start

WORKSHOP = ROOT / "workshop"
EXERCISES = sorted(path.parent for path in WORKSHOP.glob("exercises/*/exercise.toml"))
CHECK = [sys.executable, str(WORKSHOP / "check.py")]
FENCED = r"((?:(?!```).*\n)*)"
# Commands and what they print: those of the experiments on misconceptions, and those that instructors show.
SAID = [
    (f"{page} {i}", *found)
    for page in ("README.md", "GUIDE.md")
    for i, found in enumerate(
        re.findall(rf"^```bash\n{FENCED}```\n\n```text\n{FENCED}```", (WORKSHOP / page).read_text(), re.M),
        1,
    )
]


def plans(text):
    """For each plan of the guide: its name, its parts with their five numbers, and what it shows when."""
    found = []
    for plan in re.split(r"^### ", text, flags=re.M):
        rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in plan.splitlines()]
        parts = [(row[0], *map(int, row[1:])) for row in rows if len(row) == 6 and row[1].isdigit()]
        shown = [(int(row[0]), row[1]) for row in rows if len(row) == 2 and row[0].isdigit()]
        if parts:
            found.append((plan.partition("\n")[0], parts, shown))
    return found


def minutes_needed(part, minutes):
    """The minutes of the exercises that a part of a plan names, without those in parentheses."""
    needed = 0
    named = r"(two of the )?exercises? (\d\d(?:(?:, | and | to )\d\d)*)"
    for two, numbers in re.findall(named, re.sub(r"\([^)]*\)", "", part)):
        chosen = re.findall(r"\d\d", numbers)
        if " to " in numbers:
            first, last = map(int, chosen)
            chosen = [f"{number:02}" for number in range(first, last + 1)]
        longest = sorted((minutes[number] for number in chosen), reverse=True)
        needed += sum(longest[:2] if two else longest)
    return needed


def too_short(text, minutes):
    """The parts of the guide's plans that have less time for their exercises than these need."""
    return [
        (name, part[0])
        for name, parts, _ in plans(text)
        for part in parts
        if part[2] < minutes_needed(part[0], minutes)
    ]


def minutes_of_exercises():
    return {
        folder.name[:2]: tomllib.loads((folder / "exercise.toml").read_text())["minutes"]
        for folder in EXERCISES
    }


def test_the_minutes_of_the_plans_add_up():
    found = {}
    for name, rows, _ in plans((WORKSHOP / "GUIDE.md").read_text()):
        *parts, total = [row[1:] for row in rows]
        assert all(sum(part[:4]) == part[4] for part in parts)
        assert [sum(column) for column in zip(*parts, strict=True)] == list(total)
        found[name] = total[-1]
    assert list(found.values()) == [90, 247, 447]
    assert all("90 minutes" in name or "day" in name for name in found)


def test_the_plans_have_time_for_their_exercises():
    text, minutes = (WORKSHOP / "GUIDE.md").read_text(), minutes_of_exercises()
    for name, parts, _ in plans(text):
        print(name, {part[0]: minutes_needed(part[0], minutes) for part in parts})
        assert any(minutes_needed(part[0], minutes) for part in parts)
    assert too_short(text, minutes) == []


@pytest.mark.parametrize(
    ("part", "needed"),
    [
        ("exercise 03 in pairs", 20),
        ("the group; exercises 03 and 04", 50),
        ("exercises 03, 04 and 05 (07 for the fast ones)", 65),
        ("each pair does two of the exercises 05 to 08", 38),
        ("step 03 (exercise 04 is for home), and how exercises are judged", 0),
    ],
)
def test_a_part_that_is_too_short_is_found(part, needed):
    minutes = {"03": 20, "04": 30, "05": 15, "06": 16, "07": 20, "08": 18}
    assert minutes_needed(part, minutes) == needed
    for given in (needed - 1, needed):
        text = f"### A day\n\n| part | teach |\n|---|---:|\n| {part} | 1 | {given} | 0 | 0 | 0 |\n"
        assert too_short(text, minutes) == ([("A day", part)] if given < needed else [])


def test_what_a_plan_shows_is_shown_while_somebody_teaches():
    for name, (*parts, _), shown in plans((WORKSHOP / "GUIDE.md").read_text()):
        begins = [sum(part[5] for part in parts[:i]) for i in range(len(parts))]
        teaching = {
            minute
            for begin, part in zip(begins, parts, strict=True)
            for minute in range(begin, begin + part[1])
        }
        assert len(shown) >= 5
        assert shown == sorted(shown)
        for minute, stop in shown:
            assert minute in teaching, f"{name}: {minute} {stop}"
            assert "](../docs/index.html#" in stop


def test_the_weeks_of_the_course_add_up():
    text, minutes = (WORKSHOP / "GUIDE.md").read_text(), minutes_of_exercises()
    weeks = re.findall(r"^\| \d \| [^|]* \| ([\d, ]+) \| (\d+) \| ([\d, ]+) \|$", text, re.M)
    assert len(weeks) == 4
    for done, total, graded in weeks:
        assert sum(minutes[number] for number in done.split(", ")) == int(total)
        assert {*graded.split(", ")} <= {*done.split(", ")}
    assert sorted(", ".join(done for done, _, _ in weeks).split(", ")) == sorted(minutes)


def test_the_pages_links_lead_somewhere():
    pages = [*WORKSHOP.glob("*.md"), *WORKSHOP.glob("exercises/*/README.md"), ROOT / "AGENTS.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page}: {target}"
            if anchor and there.suffix == ".html":
                assert f' id="{anchor}"' in there.read_text(), f"{page}: {target}"
            elif anchor:
                heads = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
                anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
                assert anchor in anchors, f"{page}: {target}"


def test_each_exercise_has_its_page():
    """With its number and its minutes. Each place to which a promise sends its reader exists."""
    for folder in EXERCISES:
        page, facts = (folder / "README.md").read_text(), (folder / "exercise.toml").read_text()
        assert page.startswith(f"# {folder.name[:2]} · ")
        minutes = re.search(r"^minutes = (\d+)$", facts, re.M)[1]
        assert f"*{minutes} minutes.*" in page and 5 <= int(minutes) <= 120
        assert 2 <= len(re.findall(r'^    "', facts, re.M)) <= 4  # hints
        for pages in re.findall(r'^PAGE\w* = "(.*)"$', (folder / "judge.py").read_text(), re.M):
            for place in pages.split(", and "):
                name, _, head = place.partition(", ")
                text = (ROOT / name).read_text()
                assert re.search(rf"^#+ {re.escape(head)}$", text, re.M) or not head or head in text, pages


def test_what_is_given_is_alike_in_starter_and_solution():
    """So that a learner's file and ours are trained, cut and sharded in the same way."""
    found = 0
    for folder in EXERCISES:
        if not (folder / "start.py").exists():
            continue
        given, ours = (
            {node.name: node for node in ast.parse((folder / name).read_text()).body if hasattr(node, "name")}
            for name in ("start.py", "solution.py")
        )
        for name, node in given.items():
            if "Nothing to write in here" in (ast.get_docstring(node) or ""):
                found += 1
                assert ast.dump(node) == ast.dump(ours[name]), f"{folder.name}: {name}"
    assert found >= 3


def asked(folder, *words, answer=""):
    folder.mkdir(exist_ok=True)
    status, out, err = finish(start([*CHECK, *words], folder))
    return status, out, err


def test_the_ladder_shows_all_exercises(tmp_path):
    status, out, _ = asked(tmp_path)
    assert status == 0
    assert re.findall(r"\] (\d\d)  ", out) == [folder.name[:2] for folder in EXERCISES]
    assert f" of {len(EXERCISES)} exercises" in out


def test_a_wrong_question_is_answered_with_one_line(tmp_path):
    for words in (["77"], ["01", "nowhere.py"]):
        status, out, err = asked(tmp_path, *words)
        assert status == 2 and len(errors(err)) == 1 and not out, words


@pytest.mark.sample(5)
@pytest.mark.slow
@pytest.mark.parametrize(("commands", "quoted"), [said[1:] for said in SAID], ids=[said[0] for said in SAID])
def test_the_commands_print_what_the_page_says(tmp_path, commands, quoted):
    """In a shell, in a copy: the commands write snapshots to the folder that they run in."""
    for name in ("common", *FOLDERS.values()):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "workshop").mkdir()
    for name in ("launch_multinode.sh", "workshop/refute.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    status, out, err = finish(start(["bash", "-ec", commands], tmp_path, PATH=paths()))
    print(out, err)
    assert status == 0
    assert quoted_pattern(quoted).search(out)


def test_every_misconception_has_its_experiment():
    text = (
        (WORKSHOP / "README.md").read_text().partition("## Misconceptions")[2].partition("### Refuted by")[0]
    )
    parts = re.split(r"^### ", text, flags=re.M)[1:]
    assert len(parts) >= 9
    for part in parts:
        assert re.search(rf"^```bash\n{FENCED}```\n\n```text\n{FENCED}```", part, re.M), part
    named = re.findall(r"workshop/refute.py (\w+)", text)
    assert sorted(named) == sorted(load(WORKSHOP / "refute.py").EXPERIMENTS)


def test_the_cheat_sheet_has_one_page_and_says_what_its_text_says():
    """`make docs` writes it: run that again when the text has changed."""
    [page] = pypdf.PdfReader(WORKSHOP / "cheatsheet.pdf").pages
    text = re.sub(r"^[-| ]+$|[`*|#]", " ", (WORKSHOP / "CHEATSHEET.md").read_text(), flags=re.M)
    assert Counter(re.findall(r"\S", text)) == Counter(re.findall(r"\S", page.extract_text()))
