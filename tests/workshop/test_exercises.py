"""The exercises' checker: solutions pass, starters say what to write, each mistake gets its own message."""

import contextlib
import re
import sys
import tomllib
import zlib
from collections import Counter

import pytest
from filelock import FileLock
from helpers import ROOT, finish, load, start

WORKSHOP = ROOT / "workshop"
TEXT_OF, ABOUT = (getattr(load(WORKSHOP / "check.py"), name) for name in ("text_of", "about"))
FOLDERS = {path.parent.name[:2]: path.parent for path in sorted(WORKSHOP.glob("exercises/*/exercise.toml"))}
# A whole script takes ten times as long to judge as a function.
NUMBERS = [
    pytest.param(number, marks=pytest.mark.slow) if "todo" in ABOUT(folder) else number
    for number, folder in FOLDERS.items()
]
CHECK = [sys.executable, str(WORKSHOP / "check.py")]


def checked(folder, number, text):
    """Run check.py on a file with this text; return its status and its output."""
    file = folder / "answer.py"
    file.write_text(text)
    with contextlib.ExitStack() as stack:
        if "todo" in ABOUT(FOLDERS[number]):  # many ranks: only two files at a time, or they seem to hang
            lock = folder.parents[1] / f"judging-{zlib.crc32(folder.name.encode()) % 2}.lock"
            stack.enter_context(FileLock(lock, timeout=600))
        status, out, err = finish(start([*CHECK, number, str(file)], folder), 60)
    print(out, err)
    return status, out


def broken(out):
    """The promise that is broken, and what the output says about it."""
    [promise] = re.findall(r"^  broken  (.*)$", out, re.M)
    return promise, out.partition(promise)[2]


@pytest.mark.few(5)
@pytest.mark.parametrize("number", NUMBERS)
def test_our_solution_passes(tmp_path, number):
    status, out = checked(tmp_path, number, TEXT_OF(FOLDERS[number], "solution"))
    assert status == 0 and "passed in" in out and "broken" not in out
    promises = re.findall(r"^  kept    (.*)$", out, re.M)
    assert len(promises) >= 4 and max(Counter(promises).values()) == 1
    assert "One more thing: " in out


@pytest.mark.few(5)
@pytest.mark.parametrize("number", NUMBERS)
def test_the_starter_says_what_to_write(tmp_path, number):
    start_py = TEXT_OF(FOLDERS[number], "start")
    status, out = checked(tmp_path, number, start_py)
    _, said = broken(out)
    assert status == 1
    if "todo" in (facts := ABOUT(FOLDERS[number])):  # the script of the step before
        assert f"where to begin: {facts['todo']}" in said
    else:
        holes = re.findall(r'raise NotImplementedError\(\s*"(.*)"', start_py)
        assert holes and re.search(r"not written yet in line \d+ of answer.py: ", said)
        assert any(hole in said for hole in holes)


WRONG = tomllib.loads((ROOT / "tests" / "workshop" / "wrong_answers.toml").read_text())["wrong"]


def test_each_exercise_knows_four_mistakes():
    assert Counter(wrong["exercise"] for wrong in WRONG).keys() == FOLDERS.keys()
    assert min(Counter(wrong["exercise"] for wrong in WRONG).values()) >= 4


@pytest.mark.sample(20)
@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG, ids=[f"{wrong['exercise']} {wrong['idea']}" for wrong in WRONG])
def test_a_mistake_gets_its_message(tmp_path, wrong):
    text = TEXT_OF(FOLDERS[wrong["exercise"]], "solution")
    for old, new in wrong["edits"]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    status, out = checked(tmp_path, wrong["exercise"], text)
    promise, told = broken(out)
    assert status == 1
    assert promise in wrong["breaks"]
    assert re.search(wrong["says"], told)
