"""The break-it cards: what a card quotes is what happens, and without the card's change, it does not."""

import os
import py_compile
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, finish, has_ended, kill, load, paths, quoted_pattern, start, wait_until
from hosts import WHY, possible

BREAK_IT = ROOT / "workshop" / "break_it.py"
CARDS = {path.parent.name[:2]: path.parent for path in sorted(BREAK_IT.parent.glob("break_it/*/card.toml"))}
FACTS = {number: tomllib.loads((card / "card.toml").read_text()) for number, card in CARDS.items()}
ROOTS = [pytest.mark.root, pytest.mark.skipif(not possible(), reason=WHY)]
EACH = [pytest.param(number, marks=ROOTS if "root" in FACTS[number] else []) for number in CARDS]
# torch reads TORCH_DISTRIBUTED_DEBUG when it is imported: a fork would be too late.
REAL = {number for number, facts in FACTS.items() if "TORCH_DISTRIBUTED_DEBUG" in str(facts.get("diagnosis"))}
DIAGNOSED = [
    pytest.param(number, marks=[pytest.mark.slow] if number in REAL else [])
    for number, facts in FACTS.items()
    if "diagnosis" in facts
]


def page(number):
    return (CARDS[number] / "card.md").read_text()


def fences(number, language):
    """The contents of the code blocks of a card's page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page(number), re.M | re.S)


def ask(folder, *words, real=False, timeout=400):
    """Run break_it.py; return its status, its output, and its errors."""
    process = start([sys.executable, str(BREAK_IT), *words], folder, real, PATH=paths(real))
    status, out, err = finish(process, timeout)
    print(out, err)
    return status, out, err


def words(text):
    return re.findall(r"\w+", text)


def folded(number):
    """The folded part of a card's page: reason, diagnosis and fix."""
    return page(number).partition("</summary>")[2].partition("</details>")[0]


def assert_gives_nothing_away(number, out):
    """The output of a run has no line of the card's change, and no sentence of its reason."""
    changed = [line for line in change(number).splitlines() if line.startswith(("+", "-"))]
    assert changed and not set(changed) & set(out.splitlines())
    prose = re.sub(r"^```.*?^```$|`[^`]*`", "", folded(number), flags=re.M | re.S)
    sentences = [words(sentence) for sentence in re.split(r"[.:?]\s", prose)]
    sentences = [sentence for sentence in sentences if len(sentence) >= 5]
    printed = " ".join(words(out))
    assert sentences and not [sentence for sentence in sentences if " ".join(sentence) in printed]


def change(number):
    return (CARDS[number] / "change.patch").read_text()


@pytest.mark.parametrize("mode", ["", "--unbroken"])
@pytest.mark.parametrize("number", CARDS)
def test_a_run_gives_nothing_away(number, mode, monkeypatch, capsys):
    """It prints the title, the commands and the question, and says how to see the rest. No command is run."""
    break_it = load(BREAK_IT)
    monkeypatch.setattr(break_it, "run", lambda command, folder, timeout: "")
    monkeypatch.setattr(sys, "argv", ["break_it.py", number, *mode.split()])
    break_it.main()
    out = capsys.readouterr().out
    print(out)
    assert_gives_nothing_away(number, out)
    title, *commands = [FACTS[number]["title"], *(f"$ {command}\n" for command in FACTS[number]["commands"])]
    [question] = re.findall(r"^\*\*Question:\*\* (.*?)\n\n", page(number), re.M | re.S)
    question = " ".join(words(question))
    printed = " ".join(words(out))
    assert printed.startswith(" ".join(words(f"{number} {title}")))
    assert all(command in out for command in commands)
    if mode == "--unbroken":
        assert question not in printed
    else:
        assert printed.index(" ".join(words(commands[-1]))) < printed.index(question)
    assert out.splitlines()[-2:] == [
        f"The change:  python workshop/break_it.py {number} --show",
        f"The reason:  python workshop/break_it.py {number} --reason",
    ]


@pytest.mark.parametrize("number", CARDS)
def test_show_prints_the_change(tmp_path, number):
    status, out, err = ask(tmp_path, number, "--show")
    assert status == 0 and err == ""
    assert out == f"# {number} · {FACTS[number]['title']}\n\n{change(number)}"


@pytest.mark.parametrize("number", CARDS)
def test_reason_prints_all_of_the_reason(tmp_path, number):
    """As plain text: no tags, no marks, and after each link the path of a file that exists."""
    status, out, err = ask(tmp_path, number, "--reason")
    assert status == 0 and err == ""
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", folded(number))
    expected = folded(number)
    for name, target in links:
        [path] = re.findall(rf"{re.escape(name)}\s\(([^)]+)\)", out)
        assert (ROOT / path).samefile(CARDS[number] / target)
        out = out.replace(f"({path})", "")
        expected = expected.replace(f"]({target})", "]")
    expected = re.sub(r"^```\w*$", "", expected, flags=re.M)
    assert words(out) == words(f"{number} · {FACTS[number]['title']} {expected}")
    assert not re.search(r"</?\w+>|\*\*|\]\(|^```", out, re.M)


@pytest.mark.sample(6)
@pytest.mark.slow
@pytest.mark.parametrize("number", EACH)
def test_the_symptom_is_what_comes(tmp_path, number):
    status, out, err = ask(tmp_path, number)
    assert status == 0 and err == ""
    assert quoted_pattern(fences(number, "text")[0]).search(out)
    assert_gives_nothing_away(number, out)


@pytest.mark.long
@pytest.mark.parametrize("number", EACH)
def test_without_the_change_it_does_not_come(tmp_path, number):
    status, out, err = ask(tmp_path, number, "--unbroken")
    assert status == 0 and err == "" and "without the change" in out
    assert not quoted_pattern(fences(number, "text")[0]).search(out)
    # What happens instead is what the unbroken steps do.
    assert "Traceback" not in out and "did not end by itself" not in out
    if "labels" in FACTS[number] and "lines" not in FACTS[number]:
        both = re.findall(r"^both: +epoch .*test loss .*$", out, re.M)
        assert both and not any(f"\n{label}: " in out for label in FACTS[number]["labels"])
    if "root" in FACTS[number]:
        assert re.search(r"^node1: .*Seen by rank 0 on node1", out, re.M)
        assert re.search(r"^node2: .*Seen by rank 1 on node2", out, re.M)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("number", DIAGNOSED)
def test_the_diagnosis_says_what_the_card_quotes(tmp_path, number):
    status, out, err = ask(tmp_path, number, "--diagnose", real=number in REAL)
    assert status == 0 and err == ""
    quotes = fences(number, "text")[1:]
    assert quotes
    for quoted in quotes:
        assert quoted_pattern(quoted).search(out), quoted
    said = out.partition("fr_trace flight\n")[2]
    if number == "08":  # rank 0 against both others, or both against rank 0: the files' order decides
        both = r"Culprit rank ([12]); .*Culprit rank (?!\1)[12]; "
        assert re.search(f"Culprit rank 0; |{both}", said)
        assert "'barrier'" in said and "'all_reduce'" in said
    if number == "09":
        assert re.findall(r"^missing ranks: (.*)$", said, re.M) == ["{1}"]


@pytest.mark.slow
def test_with_one_folder_a_restart_goes_on(tmp_path):
    """Card 13's fix: the rank is killed as before, and the next start finds what was saved."""
    status, out, err = ask(tmp_path, "13", "--into", "copy")
    assert status == 0 and err == ""
    script = tmp_path / "copy" / "03_multigpu_torchrun" / "train.py"
    lines = script.read_text().splitlines(keepends=True)
    script.write_text("".join(line for line in lines if "mkdtemp" not in line))
    _, *words = shlex.split(FACTS["13"]["commands"][0])  # without the variable
    words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    process = start(words, tmp_path / "copy", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    status, out, err = finish(process)
    print(out, err)
    assert status == 0 and out.count("epoch 1/3  step 10") == 1
    assert re.search(r"^resumed from .*: epoch 2, step 20$", out, re.M)


@pytest.mark.slow
def test_a_collective_with_a_gradient_trains_as_one_rank_does(tmp_path):
    """Card 17's fix: with the line of the page, both steps print the same numbers."""
    break_it = load(BREAK_IT)
    [line] = fences("17", "python")
    break_it.make_copy(CARDS["17"], tmp_path / "copy")
    models = tmp_path / "copy" / "common" / "models.py"
    text, count = re.subn(r"dist\.all_reduce\(means\).*\n", line, models.read_text())
    assert count == 1
    models.write_text(text)
    outputs = break_it.run_commands(CARDS["17"], FACTS["17"]["commands"], tmp_path / "copy")
    rows = break_it.side_by_side(["03", "01"], outputs, break_it.COMPARED_LINES)
    assert len(rows) == 6 and all(row.startswith("both: ") for row in rows)
    assert "UserWarning" not in "".join(outputs)


@pytest.mark.slow
def test_names_show_that_a_snapshot_is_not_for_this_optimizer(tmp_path):
    """Card 19's fix: with names and the check of the page, step 03 resumes and step 04 does not."""
    break_it = load(BREAK_IT)
    [check] = fences("19", "python")
    break_it.make_copy(CARDS["19"], tmp_path / "copy")
    for step in ("03", "04"):
        [script] = (tmp_path / "copy").glob(f"{step}_*/train.py")
        text = script.read_text()
        load_state = "        self.optimizer.load_state_dict("
        indented = "".join(f"        {line}\n" for line in check.splitlines())
        for old, new in [
            ("[weight for name, weight in", "[(name, weight) for name, weight in"),
            (
                "    groups = [",
                "    names = {w: name for name, w in model.named_parameters()}\n    groups = [",
            ),
            ("block.parameters()", "[(names[weight], weight) for weight in block.parameters()]"),
            (load_state, f"{indented}{load_state}"),
        ]:
            assert text.count(old) == 1
            text = text.replace(old, new)
        script.write_text(text)
    *_, step_04, step_03 = break_it.run_commands(CARDS["19"], FACTS["19"]["commands"], tmp_path / "copy")
    assert "AssertionError" in step_04 and "epoch 2/2" not in step_04
    assert "resumed from" in step_03 and "epoch 2/2  test loss" in step_03


@pytest.mark.parametrize("number", CARDS)
def test_each_change_fits_the_scripts(tmp_path, number):
    """It changes the files that it names and no others, and they are still Python."""
    break_it = load(BREAK_IT)
    break_it.copy_project(tmp_path, CARDS[number])
    before = {path: path.read_text() for path in tmp_path.rglob("*.py")}
    for patch in sorted(CARDS[number].glob("*.patch")):
        break_it.apply_patch(patch, tmp_path)
    named = {
        line.removeprefix("+++ b/").strip()
        for patch in CARDS[number].glob("*.patch")
        for line in patch.read_text().splitlines()
        if line.startswith("+++ ")
    }
    changed = {path for path, text in before.items() if path.read_text() != text}
    assert {str(path.relative_to(tmp_path)) for path in changed} == named and named
    for path in changed:
        py_compile.compile(str(path), doraise=True)


@pytest.mark.parametrize("number", CARDS)
def test_a_page_is_whole(number):
    """Title, command, symptom, question and, after a click, the reason, the diagnosis and the fix."""
    text, facts = page(number), FACTS[number]
    assert text.splitlines()[0] == f"# {number} · {facts['title']}"
    [asked] = fences(number, "bash")
    assert asked.split()[-2:] == ["workshop/break_it.py", number]
    said = [line for block in fences(number, "sh") for line in block.splitlines()]
    assert said == [*facts["commands"], *facts.get("diagnosis", [])]
    places = ["```text", "**Question:**", "<details><summary>The reason</summary>\n\n"]
    places += ["**Reason.**", "**Diagnosis.**", "**Fix.**", "</details>"]
    found = [text.index(place) for place in places]
    assert found == sorted(found) and all(text.count(place) == 1 for place in places[1:])
    assert ("--diagnose" in text) == ("diagnosis" in facts)
    assert len(re.findall(r"^```", text, re.M)) % 2 == 0
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (CARDS[number] / target).exists(), target


def test_without_a_number_it_lists_the_cards(tmp_path):
    status, out, err = ask(tmp_path)
    assert status == 0 and err == ""
    assert out.splitlines() == [f"{number}  {facts['title']}" for number, facts in FACTS.items()]
    assert len(CARDS) >= 12 and list(CARDS) == [f"{i:02}" for i in range(1, len(CARDS) + 1)]


WRONG = {
    "99": "there is no card 99: choose one of 01, 02, ",
    "seven": "there is no card seven: choose one of 01, ",
    "--show": "the number of a card is missing, such as 07 (--help lists the flags)",
    "01 --show --reason": "argument --reason: not allowed with argument --show (--help lists the flags)",
    "01 --diagnose": "card 01 needs no tool: --reason says how to find the reason",
    "01 --broken": "unrecognized arguments: --broken (--help lists the flags)",
    "01 --into .": ". already exists: name a new folder",
    "01 --into /dev/null/copy": "cannot create /dev/null/copy: Not a directory; name another folder",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_mistake_of_the_user_is_one_line(tmp_path, arguments):
    status, out, err = ask(tmp_path, *arguments.split())
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {WRONG[arguments]}")


def test_without_torch_or_root_it_says_which_command_to_use(monkeypatch, capsys):
    break_it = load(BREAK_IT)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="2"):
        break_it.check_can_run(CARDS["16"])
    break_it.check_can_run(CARDS["01"])
    expected = "error: card 16 needs root: sudo .venv/bin/python workshop/break_it.py 16\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setattr(break_it.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        break_it.check_can_run(CARDS["01"])
    expected = f"error: {sys.executable} has no torch: use .venv/bin/python workshop/break_it.py 01\n"
    assert capsys.readouterr().err == expected


def test_a_command_that_hangs_is_ended_with_all_that_it_has_started(tmp_path, capfd):
    (tmp_path / "hang.py").write_text(
        "import os, subprocess, sys, time\n"
        "words = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "child = subprocess.Popen(words, start_new_session=True)\n"  # as torchrun starts its ranks
        "print('started', os.getpid(), child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    out = load(BREAK_IT).run("python hang.py", tmp_path, timeout=2)
    pids = list(map(int, re.findall(r"\d+", out)))
    try:
        wait_until(lambda: all(map(has_ended, pids)), f"the end of {pids}", 10)
    finally:
        kill([pid for pid in pids if not has_ended(pid)])
    assert len(pids) == 2
    assert "(stopped after 2 s: it did not end by itself)" in capfd.readouterr().out


def test_the_project_stays_as_it_was(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in ROOT.glob("[0c]*/*.py")}
    status, out, _ = ask(tmp_path, "12", "--into", str(tmp_path / "copy"))
    assert status == 0 and out.splitlines()[0] == f"cd {tmp_path / 'copy'}"
    assert "set_num_threads(16)" in (tmp_path / "copy" / "02_multigpu_spawn" / "train.py").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in ROOT.glob("[0c]*/*.py")}
    assert os.listdir(tmp_path) == ["copy"] and Path(tmp_path, "copy", "record_flight.py").exists()
