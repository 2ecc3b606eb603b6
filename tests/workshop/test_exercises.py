"""The exercises' checker: solutions pass, starters say what to write, each mistake gets its own message."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import tomllib
import types
import zlib
from collections import Counter

import pytest
import torch
from filelock import FileLock
from helpers import ROOT, command, errors, finish, load, ranks_of, start, state, wait_until

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
        status, out, err = finish(start([*CHECK, number, str(file)], folder), 180)
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


@pytest.mark.parametrize("number", [number for number, folder in FOLDERS.items() if "todo" in ABOUT(folder)])
def test_a_whole_script_starts_as_one_that_runs(tmp_path, number):
    """It lies in another folder than the step's own script, and still finds the step's modules."""
    folder = tmp_path / "workshop" / "mine"
    folder.mkdir(parents=True)
    for path in [ROOT / "common", *ROOT.glob("0[1-5]_*")]:
        (tmp_path / path.name).symlink_to(path)
    script = folder / f"{number}.py"
    script.write_text(TEXT_OF(FOLDERS[number], "start"))
    step = ABOUT(FOLDERS[number])["start"][:2]
    words = [str(script) if word.endswith("train.py") else word for word in command(step, ranks_of(step))]
    status, out, err = finish(
        start([*words, "--num-samples=48", "--batch-size=4", "--epochs=1", "--use-gpu=0"], tmp_path)
    )
    assert (status, errors(err)) == (0, []) and "test loss" in out


WRONG = tomllib.loads((ROOT / "tests" / "workshop" / "wrong_answers.toml").read_text())["wrong"]


def test_each_exercise_knows_four_mistakes():
    assert Counter(wrong["exercise"] for wrong in WRONG).keys() == FOLDERS.keys()
    assert min(Counter(wrong["exercise"] for wrong in WRONG).values()) >= 4
    assert [wrong["idea"] for wrong in WRONG if not wrong.get("ask", "").endswith("?")] == []


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


@pytest.mark.long
@pytest.mark.parametrize("number", [number for number in NUMBERS if isinstance(number, str)])
def test_a_broken_solution_fails_or_is_as_right(tmp_path, number):
    """Each mutant of our solution breaks a promise, or equivalent_answers.toml says why it need not."""
    program = ROOT / "tests" / "harness" / "answer_mutants.py"
    status, out, err = finish(start([sys.executable, str(program), number], tmp_path), 600)
    print(out, err)
    assert re.match(rf"{number}: [1-9]\d* tried, [1-9]", out)
    assert status == 0


def all_judged(directory, *flags):
    """Run check.py --all; return its status, its output and its errors."""
    status, out, err = finish(start([*CHECK, "--all", str(directory), *flags], directory), 120)
    print(out, err)
    return status, out, err


def solution(number):
    return TEXT_OF(FOLDERS[number], "solution")


WRONG_LOSS = solution("06").replace("dist.all_reduce(totals)", "dist.reduce(totals, 0)")


def test_all_answers_of_a_folder_get_a_line_each(tmp_path):
    (tmp_path / "05.py").write_text(solution("05"))
    (tmp_path / "06.py").write_text(WRONG_LOSS)
    status, out, _ = all_judged(tmp_path)
    *lines, total = out.splitlines()
    assert status == 1
    assert [line.split()[:2] for line in lines] == [
        [{"05": "passed", "06": "broken"}.get(number, "missing"), number] for number in FOLDERS
    ]
    assert ": equal batches: the mean over all images, on every rank" in lines[5]
    assert total == f"1 passed, 1 broken, {len(FOLDERS) - 2} missing"


def test_a_grader_can_read_the_results(tmp_path):
    (tmp_path / "05.py").write_text(solution("05"))
    (tmp_path / "06.py").write_text(WRONG_LOSS)
    status, out, _ = all_judged(tmp_path, "--json")
    results = json.loads(out)["exercises"]
    assert status == 1
    assert [result["number"] for result in results] == [*FOLDERS]
    _, _, _, _, right, wrong, missing, *_ = results
    assert (right["status"], right["passed"], right["broken"], right["message"]) == ("passed", True, None, [])
    assert right["title"] == "deal out the data" and len(right["kept"]) >= 4
    assert (wrong["status"], wrong["passed"], wrong["kept"]) == ("broken", False, [])
    assert wrong["broken"] == "equal batches: the mean over all images, on every rank"
    assert wrong["message"][0] == "with 2 ranks:" and len(wrong["message"]) == 4
    assert (missing["status"], missing["passed"]) == ("missing", False)


def test_missing_answers_do_not_count(tmp_path):
    (tmp_path / "05.py").write_text(solution("05"))
    status, out, _ = all_judged(tmp_path, "--json")
    assert status == 0 and json.loads(out)["exercises"][4]["passed"]


TALKS = 'import os\nprint("hello")\nos.write(1, b"hello\\n")\n'
ROUGH = {
    "05": solution("05").replace("import torch\n", f"{TALKS}import torch\n"),
    "06": "import os\n\n\ndef mean_loss(losses):\n    os.abort()\n",
    "07": "def evaluate(model, images, labels):\n    return (\n",
    "08": solution("08").replace("    dist.barrier()", "        dist.barrier()"),  # hangs
    "10": "raise SystemExit(0)\n",
}


def test_whatever_an_answer_does_the_json_stays_valid(tmp_path):
    for number, text in ROUGH.items():
        (tmp_path / f"{number}.py").write_text(text)
    (tmp_path / "12.py").write_bytes(b"\xff\x00")
    status, out, _ = all_judged(tmp_path, "--json")
    results = {result["number"]: result for result in json.loads(out)["exercises"]}
    assert status == 1
    passed = {number: results[number]["passed"] for number in [*ROUGH, "12"]}
    assert passed == {"05": True, "06": False, "07": False, "08": False, "10": False, "12": False}
    assert "it hangs" in results["08"]["message"][0]
    assert "SyntaxError" in str(results["07"]["message"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--json"], "--json needs --all"),
        (["05", "--all"], "leave out 05"),
        (["--all", "nowhere"], "nowhere is not a folder"),
        (["--all", "."], "there is no answer in"),
    ],
)
def test_a_wrong_use_of_all_is_one_line(tmp_path, words, says):
    status, out, err = finish(start([*CHECK, *words], tmp_path))
    assert status == 2 and not out
    assert len(errors(err)) == 1 and says in err


def test_time_without_a_cpu_is_no_hang(tmp_path, monkeypatch):
    """Ranks that are ready to run, but get no CPU, are not counted. Those that wait or compute are."""
    judging = load(WORKSHOP / "judging.py")
    samples = round(judging.SECONDS / judging.SAMPLE) + 10
    ranks = [types.SimpleNamespace(pid=number) for number in range(2)]

    def hangs(*activities):
        monkeypatch.setattr(judging, "activity", lambda pid: activities[pid])
        watch = judging.Watch(judging.Ranks(2, tmp_path, ranks))
        return any([watch.hangs() for _ in range(samples)])

    assert not hangs((True, 0.0), (False, 0.0))
    assert not hangs((True, judging.SECONDS / 2), (True, judging.SECONDS / 2))
    assert hangs((False, 0.0), (False, 0.0))
    assert hangs((True, 1.1 * judging.SECONDS), (False, 0.0))


def test_a_process_that_waits_is_told_from_one_that_is_ready():
    judging = load(WORKSHOP / "judging.py")
    words = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            wait_until(lambda: not judging.activity(process.pid)[0], "the process to wait")
            process.send_signal(signal.SIGSTOP)  # as good as a machine that never gives it a CPU
            wait_until(lambda: "State: T" in state(process.pid), "the process to stop")
            assert judging.activity(process.pid)[0]
        finally:
            process.kill()


def test_a_long_result_is_shown_by_its_first_difference():
    judging = load(WORKSHOP / "judging.py")
    expected = {"weight": torch.arange(1.0, 41.0).reshape(2, 20) / 7, "bias": torch.ones(2)}
    summed = {name: 2 * tensor for name, tensor in expected.items()}
    other = {"weight": expected["weight"].clone(), "bias": torch.ones(2)}
    other["weight"][1][3] = 0.25
    assert judging.differences(3, [(expected, expected), (expected, summed), (expected, other)]) == [
        "with 3 ranks:",
        "  rank 0: as expected",
        "  rank 1: at weight[0][0], expected 0.142857, seen 0.285714 (2 × the expected numbers)   <--",
        "  rank 2: at weight[1][3], expected 3.42857, seen 0.25   <--",
    ]
    assert judging.differences(1, [(0.1, 0.1 + 1e-7)])[1:] == [
        "  expected on every rank: 0.1",
        "  rank 0: seen 0.1000001   <--",
    ]


@pytest.mark.parametrize("function", ["send", "recv"])
def test_a_rank_that_sends_to_itself_reads_why_not(tmp_path, function):
    text = f"import torch.distributed as dist\n\n\ndef all_reduce(tensor):\n    dist.{function}(tensor, 0)\n"
    status, out = checked(tmp_path, "01", text)
    assert status == 1 and "with 1 rank, rank 0 ended with an error in line 5 of answer.py" in out
    assert "a rank cannot send to itself or receive from itself; a rank that is alone need not" in out
