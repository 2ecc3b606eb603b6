"""What mutants.py says of the tests is true today: it knows the code, and names tests that do catch."""

import json
import os
import random
import re
import subprocess
import sys
import threading

import mutants
import pytest
from helpers import finish, start
from mutants import PYTHON, REPORT, ROOT, Lane, in_lanes, known, mutants_of, reason

SAMPLE = 20
QUICK = "shellcheck|bash_3_2|help_names|bad_input|prints|elastic_commands|without_(hosts|the_command)"
SOURCE = '''
"""A docstring is no statement, and a message no constant: "a b"."""
import os
import torch.distributed as dist

@record
def f(x: int = 1):
    os.nice(0)
    with a(), b() as c:
        dist.barrier()
    if x and x + 1 > 2:
        g("no one", f"{x}",
          mode="w",
          late=True)
    return x
'''


def test_what_no_linter_lets_through_is_no_mutant():
    """An import, or a variable, that is gone and used; one that is not used is a mutant."""
    source = "import os\nimport sys\n\n\ndef f():\n    x = os.nice(1)\n    y = 2\n    return x\n"
    assert kinds(source)["statement"] == ["import sys", "y = 2", "return x"]


def kinds(source):
    """What each kind of mutant has in the place of which text."""
    found = {}
    for mutant in mutants_of("common/example.py", source):
        assert mutant.source != source
        found.setdefault(mutant.kind, []).append(mutant.was)
    return found


def test_each_kind_of_place_is_found():
    assert kinds(SOURCE) == {
        "statement": [
            "@record",
            "os.nice(0)",
            "with a(), b() as c:",
            "a()",
            "dist.barrier()",
            "if x and x + 1 > 2:",
            'g("no one", f"{x}"',
            "return x",
        ],
        "one rank": ["dist.barrier()"],
        "condition": ["x", "x + 1 > 2"],
        "plus one": ["x + 1"],
        "keyword": ['mode="w"', "late=True"],
        "constant": ["1", "0", "1", "2", '"w"', "True"],
    }


def keys(source):
    """The keys of a file's mutants, with what stands in the place of each."""
    return {
        mutant.key: mutant.source.splitlines()[mutant.line - 1]
        for mutant in mutants_of("common/example.py", source)
    }


def test_a_mutant_is_the_same_while_its_line_is_the_same():
    """A record of one line must not become the record of another one that has the same number in it."""
    before = keys("def f(x):\n    x += 1  # so\n    return 2 + 2\n")
    moved = keys("def f(x):\n    y = 1\n    x += 1  # for another reason\n    return 2 + 2\n")
    changed = keys("def f(x):\n    x -= 1\n    return 2 + 2\n")
    assert before.keys() < moved.keys()
    lost = before.keys() - changed.keys()
    assert {before[key] for key in lost} == {"    pass  # so", "    x += 2  # so"} and len(lost) == 2
    assert len(before.keys() & changed.keys()) == len(before) - 2 > 2  # `2 + 2` has two twos in it


def test_the_places_of_a_shell_script_are_its_commands():
    source = "#!/bin/bash\n# none\nif a; then\n    b \\\n        c\nfi\nd <<'END'\ntext\nEND\n"
    assert [mutant.source for mutant in mutants_of("example.sh", source)] == [
        "#!/bin/bash\n# none\n:\nd <<'END'\ntext\nEND\n",
        "#!/bin/bash\n# none\nif a; then\n    :\n        c\nfi\nd <<'END'\ntext\nEND\n",
        "#!/bin/bash\n# none\nif a; then\n    b \\\n        :\nfi\nd <<'END'\ntext\nEND\n",
        "#!/bin/bash\n# none\nif a; then\n    b \\\n        c\nfi\n:\n",
    ]


def everything():
    return [mutant for file in (*mutants.PYTHON, *mutants.SHELL) for mutant in mutants_of(file)]


@pytest.mark.slow
def test_the_report_knows_this_code():
    """But for what has changed since, a tenth at most; and it has a reason for whatever survives."""
    results = known()
    tried = [mutant for mutant in everything() if mutant.file in mutants.PYTHON]
    unknown = [str(mutant) for mutant in tried if mutant.key not in results and not reason(mutant)]
    print(f"{len(unknown)} of {len(tried)} are not known: make mutants", *unknown, sep="\n")
    assert len(unknown) <= len(tried) / 10


@pytest.mark.slow
def test_the_tests_that_the_report_names_are_there():
    """One that has another name now would end its mutant's trial, and be found only when it is drawn."""
    words = ["-o", "addopts=", "--all", "--long", "--collect-only", "--quiet", "tests"]
    status, out, err = finish(start([sys.executable, "-m", "pytest", *words], ROOT))
    assert status == 0, err
    there = {name for line in out.splitlines() for name in (line, line.split("[")[0], line.split("::")[0])}
    named = {test for test in known().values() if "/test_" in test}
    assert len(named) > 100 and named <= there, sorted(named - there)


def test_the_page_of_promises_gives_the_reports_figures():
    row = r"^\| scripts and `common` \| (\d+) \| (\d+) \| \d+ \| (\S+) \|$"
    [(count, known, score)] = re.findall(row, REPORT.read_text(), re.M)
    page = " ".join((ROOT / "docs" / "reference" / "promises.md").read_text().split())
    says = f"of {int(count):,} such places, {int(known):,} have been tried or excused since they last changed"
    assert f"{says}, and the tests notice {score} of those." in page


@pytest.mark.slow
def test_what_its_test_does_not_catch_is_forgotten(tmp_path):
    """Of three mutants: one that is caught, one whose test does not see it, one whose test is gone."""
    root = Lane(tmp_path, 0, "").folder / ROOT.name
    for words in (["init", "-q"], ["add", "-A"]):  # a lane copies what git knows
        subprocess.run(["git", *words], cwd=root, check=True)
    caught = [key for key, by in known().items() if key[0] == "common/synthetic.py" and by]
    tests = [
        known()[caught[0]],
        "tests/harness/test_mutants.py::test_each_kind_of_place_is_found",
        "tests/gone.py::a",
    ]
    record = root / mutants.KNOWN.relative_to(ROOT)
    lines = [json.dumps([*key, by]) for key, by in zip(caught, tests, strict=False)]
    record.write_text("\n".join(lines))
    words = [sys.executable, "tests/harness/mutants.py", "--check", "--only=common/synthetic.py", "--lanes=1"]
    # It makes all mutants of all files first, which takes half a minute on a core of its own.
    status, out, err = finish(start(words, root), 400)
    print(out, err)
    assert status == 0 and f"not caught by {tests[1]}" in out and f"not caught by {tests[2]}" in out
    left = [json.loads(line) for line in record.read_text().splitlines()]
    assert [by for *_, by in left if by] == tests[:1]


@pytest.mark.slow
def test_one_that_fails_by_chance_is_not_recorded(tmp_path):
    """It fails the first time that it is asked; the test after it fails each time."""
    lane = Lane(tmp_path, 0, "")
    lines = "from pathlib import Path\n\n\ndef test_by_chance():\n"
    lines += f"    there, place = Path({str(tmp_path / 'asked before')!r}), 'exists'\n"
    lines += "    before = getattr(there, place)()\n    there.touch()\n    assert before\n\n\n"
    lines += "def test_always():\n    assert False\n"
    (lane.folder / ROOT.name / "tests" / "test_chance.py").write_text(lines)
    tests = ["tests/test_chance.py::test_by_chance", "tests/test_chance.py::test_always"]
    mutant = mutants_of("common/synthetic.py")[0]
    found = lane.first_that_catches(tests, 60, mutant)
    print(found)
    assert found["killer"] == tests[1] and found["ran"] == tests
    (tmp_path / "asked before").unlink()
    assert lane.first_that_catches(tests[:1], 60, mutant)["killer"] == ""


@pytest.mark.slow
def test_a_sample_of_mutants_is_caught_by_the_tests_that_the_report_names(tmp_path, request):
    seed = int(os.environ["SEED"])
    print(f"SEED={seed}")
    results = known()
    caught = [mutant for mutant in everything() if results.get(mutant.key)]
    # Of the shell's, those that no launcher has to be started for: that takes a minute or two.
    caught = [mutant for mutant in caught if mutant.file in PYTHON or re.search(QUICK, results[mutant.key])]
    assert len(caught) >= SAMPLE, "make mutants: the code is another than that of the report"
    data_dir = request.config.getoption("--data-dir")
    lanes = [Lane(tmp_path, number, str(data_dir.resolve()) if data_dir else "") for number in range(2)]
    survivors, skipped, lock = [], [], threading.Lock()

    def run(lane, mutant):
        test = results[mutant.key]
        found = lane.catches(mutant, test)
        with lock:
            print(f"{mutant}\n    {test}: {found['why']}")
            if found["skipped"]:
                skipped.append(f"{mutant}, whose {test} is skipped here")
            elif not found["killer"]:
                survivors.append(f"{mutant}, not caught by {test}")

    in_lanes(lanes, run, random.Random(seed).sample(caught, SAMPLE))
    print(f"{len(skipped)} left out, because this machine lacks what their tests need", *skipped, sep="\n")
    assert survivors == []
    assert len(skipped) < SAMPLE / 2
