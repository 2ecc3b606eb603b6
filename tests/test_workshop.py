"""The workshop's pages: the plans add up, links lead somewhere, every exercise is told as it is."""

import ast
import re
import sys

from helpers import ROOT, errors, finish, start

WORKSHOP = ROOT / "workshop"
EXERCISES = sorted(path.parent for path in WORKSHOP.glob("exercises/*/exercise.toml"))
CHECK = [sys.executable, str(WORKSHOP / "check.py")]


def test_the_minutes_of_the_plans_add_up():
    plans = re.split(r"^### ", (WORKSHOP / "GUIDE.md").read_text(), flags=re.M)
    found = {}
    for plan in plans:
        rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in plan.splitlines()]
        minutes = [list(map(int, row[1:])) for row in rows if len(row) == 6 and row[1].isdigit()]
        if minutes:
            *parts, total = minutes
            assert all(sum(part[:4]) == part[4] for part in parts)
            assert [sum(column) for column in zip(*parts, strict=True)] == total
            found[plan.partition("\n")[0]] = total[-1]
    assert list(found.values()) == [90, 240, 440]
    assert all("90 minutes" in name or "day" in name for name in found)


def test_the_pages_links_lead_somewhere():
    pages = [*WORKSHOP.glob("*.md"), *WORKSHOP.glob("exercises/*/README.md"), ROOT / "AGENTS.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
                anchors = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
                assert anchor in anchors, f"{page}: {target}"


def test_each_exercise_has_its_page():
    """With its number and its minutes; where a promise sends its reader, there is something to read."""
    for folder in EXERCISES:
        page, facts = (folder / "README.md").read_text(), (folder / "exercise.toml").read_text()
        assert page.startswith(f"# {folder.name[:2]} · ")
        minutes = re.search(r"^minutes = (\d+)$", facts, re.M)[1]
        assert f"*{minutes} minutes.*" in page and 5 <= int(minutes) <= 60
        assert 2 <= len(re.findall(r'^    "', facts, re.M)) <= 3  # hints
        for told in re.findall(r'^TOLD = "(.*)"$', (folder / "judge.py").read_text(), re.M):
            for place in told.split(", and "):
                name, _, head = place.partition(", ")
                text = (ROOT / name).read_text()
                assert re.search(rf"^#+ {re.escape(head)}$", text, re.M) or not head or head in text, told


def test_what_is_given_is_alike_in_starter_and_solution():
    """So that a learner's file and ours are trained, cut and sharded alike."""
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
