"""What the READMEs say: their commands run, their diffs match the scripts, their links lead where they say.

Promise: the commands in the READMEs work (`make test-all`), and the diffs in them match the scripts.
"""

import datetime
import difflib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FOLDERS, ROOT, environment, finish, paths, quoted_pattern, start

from common.snapshot import FORMAT
from docs.generate import answer_sheet, figures, pages, pieces, tables

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / name / "README.md" for name in FOLDERS.values()),
    ROOT / FOLDERS["05"] / "REFERENCE.md",
    ROOT / "beyond" / "README.md",
    *(ROOT / "docs" / "reference" / f"{name}.md" for name in ("gpus", "promises")),
]
STEPS = list(FOLDERS)


def fences(page, language):
    """The contents of a page's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands(page):
    return [line for block in fences(page, "bash") for line in block.splitlines() if line]


BY_HAND = [
    line for page in PAGES for line in commands(page) if line.startswith(("python3 -m venv", ".venv/"))
]
MAKE = [line for page in PAGES for line in commands(page) if line.startswith(("make ", "bash .ci/run"))]
SLURM = [line for page in PAGES for line in commands(page) if line.startswith("sbatch ")]  # test_slurm.py
SKIPPED = [*BY_HAND, *MAKE, *SLURM]


def quicker(line):
    """A command with less to train. A page that has 10240 has it in all commands with the same folder."""
    trains = "train.py" in line or "_parallel.py" in line
    if trains and "--num-samples" not in line and not line.startswith("diff"):
        return f"{line} --num-samples 2048 --epochs 1"  # not all of MNIST: `make train` does that
    return line.replace("--num-samples 10240", "--num-samples 2560").replace("20480", "1920")


def flag(line, name, default):
    found = re.search(rf"--{name}[ =](\S+)", line)
    return found[1] if found else default


def complaints(line, status, out, folder, resumed):
    """What a command should have done, but did not."""
    wanted = {f"status {int(line.startswith('diff '))}": status == int(line.startswith("diff "))}
    if line.startswith("diff "):  # it exits with 1 when there are differences, which is the point
        wanted["lines of DDP"] = re.search("^> .*DDP", out, re.M)
    elif "compare_steps.py" in line:
        steps = ["01", *flag(line, "steps", ",".join(FOLDERS)).split(",")]
        rows = len(set(steps) - {"01"}) * len(flag(line, "ranks", "2").split(",")) + 1
        wanted["The steps agree"] = "The steps agree (weights and losses within 1e-10" in out
        wanted[f"{rows} rows"] = len(re.findall(r"^0\d_\w+ +(python|mp|torchrun)", out, re.M)) == rows
        wanted["the files"] = all((folder / f"proof.{kind}").stat().st_size for kind in ("png", "json"))
    elif "train.py" in line or "--local" in line:
        step = re.search(r"(0\d_\w+)/train", line)
        step = step[1] if step else FOLDERS[flag(line, "step", "04")]
        samples, epochs = int(flag(line, "num-samples", 0)), int(flag(line, "epochs", 3))
        model = flag(line, "model", "cnn")
        if model == "vit":
            model = f"vit-{flag(line, 'vit-width', 64)}x{flag(line, 'vit-depth', 4)}"
        start = re.search(rf"{step}: {model} on synthetic-{samples}, cpu, float32, .*", out)
        ends = re.findall(r"test loss [\d.]+, accuracy ([\d.]+)% ", out)
        wanted[f"the start of {step}"] = start and f"batch {flag(line, 'batch-size', 64)} = " in start[0]
        wanted["an accuracy"] = ends
        # Batch norm's statistics and a big model need more steps than these.
        wanted["more than guessing"] = samples < 2000 or (ends and float(ends[-1]) > 20)
        wanted[f"epoch {epochs} of {epochs}"] = f"epoch {epochs}/{epochs}  test loss" in out
        wanted["its end"] = re.search(r"done: [\d,]+ samples in [\d.]+ s of training", out)
        wanted["a resume, or none"] = ("resumed from" in out) == resumed
    elif script := re.search(r"beyond/(\w+)\.py", line):
        samples, epochs = int(flag(line, "num-samples", 0)), int(flag(line, "epochs", 3))
        start = f"{script[1]}: decoder-64x4 on sums-{samples}, cpu, float32, 1 × batch 64 = 64 samples a step"
        wanted[f"the start of {script[1]}"] = start in out
        wanted["an accuracy"] = "accuracy" in out
        wanted[f"epoch {epochs} of {epochs}"] = f"epoch {epochs}/{epochs}  test loss" in out
        wanted["its end"] = re.search(r"done: [\d,]+ samples in [\d.]+ s of training", out)
    elif line.startswith("./launch_multinode.sh"):
        wanted["a command for each node"] = out.count("--node-rank=") == 2
        [quoted] = [each for each in fences(ROOT / FOLDERS["04"] / "README.md", "text") if "# --- on" in each]
        wanted["what the page quotes"] = quoted_pattern(quoted).search(out.replace(str(folder), "~/ddp"))
    else:
        assert "--no-python env" in line, f"what is {line} for?"
        wanted["both ranks' variables"] = {"RANK=0", "RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2"} <= {
            *out.split()
        }
    return [what for what, found in wanted.items() if not found]


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run_as_written(tmp_path, page):
    """One after another, in a copy of the files that they need. Each must do what it is there for."""
    for name in ["common", "beyond", "compare_steps.py", "launch_multinode.sh", *FOLDERS.values()]:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()  # `make train` creates one, and the commands name it
    used = set()
    lines = [quicker(line) for line in commands(page) if line not in SKIPPED]
    for line in lines:
        status, out, err = finish(start(["bash", "-c", line], tmp_path, PATH=paths()), 400)
        print(f"$ {line}\n{out}\n{err}")
        folder = flag(
            line,
            "snapshot-dir",
            line.split(" --")[0] + flag(line, "model", "") + flag(line, "num-samples", ""),
        )
        missing = complaints(line, status, out, tmp_path, folder in used)
        assert missing == [], f"$ {line}\nlacks {missing}"
        used.add(folder)
    print(f"{len(lines)} commands")


def test_the_commands_by_hand_are_those_of_make():
    words = ["make", "--dry-run", "--always-make", "--no-print-directory", "train", "DATA_DIR=data", "ARGS="]
    words.append("PYTHON=python3")  # whatever Python these tests run with
    printed = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    print(printed, BY_HAND)
    assert len(BY_HAND) == 3
    assert [line.strip() for line in printed if not line.startswith("touch")] == BY_HAND


def test_ci_runs_the_make_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    targets = {line.split()[1] for line in MAKE if line.startswith("make ")}
    print(targets)
    assert targets == {"train", "test", "test-all", "lint", "gpu"}
    # test-all contains `make test`, and the part of `make gpu` that needs no GPU.
    assert all(f"make {target}" in ci for target in targets - {"test", "gpu"})


PAIRS = list(itertools.pairwise(STEPS))


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_as_make_docs_makes_it(page):
    """The pieces of the diffs, the tables, the outputs, the figures and the links to lines."""
    now, then = page.read_text().splitlines(), pages.filled(page).splitlines()
    stale = list(difflib.unified_diff(now, then, "the page", "make docs", n=0, lineterm=""))
    print("\n".join(stale))
    assert stale == []


def test_the_answer_sheet_is_as_make_docs_makes_it():
    """From wrong_answers.toml and the titles of the exercises."""
    assert answer_sheet.PAGE.read_text() == answer_sheet.make()


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_number_with_a_unit_has_a_record_or_a_reason(page):
    if page.name != "mutants.md":  # `make mutants` writes it
        assert figures.loose_numbers(page, page.read_text()) == []


def test_the_code_that_opens_step_01s_page_is_in_its_script():
    folder = ROOT / FOLDERS["01"]
    [code] = fences(folder / "README.md", "python")
    assert code in (folder / "train.py").read_text()


def test_each_table_is_on_a_page():
    marked = [
        name
        for page in pages.PAGES
        for name in re.findall(r"^<!-- table: ([\w-]+) -->$", page.read_text(), re.M)
    ]
    assert sorted(marked) == sorted(tables.TABLES)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_steps_readme_shows_its_whole_diff(before, after):
    page = (ROOT / FOLDERS[after] / "README.md").read_text()
    requests = re.findall(r"^<!-- diff\n(.*?)-->$", page, re.M | re.S)
    shown = {line for request in requests for line in pieces.block(before, after, request)}
    changed = [line for lines in pieces.pieces(before, after).values() for line in lines]
    print(f"{before} to {after}: {len(changed)} changed lines")
    assert [str(line) for line in changed if line not in shown] == []


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_pieces_make_the_one_script_of_the_other(before, after):
    """What is merged is both scripts, except docstrings, and empty lines that were added or removed."""
    merged = pieces.merged(before, after)
    for step, other, number in ((before, "+", "old"), (after, "-", "new")):
        text = pieces.script(step)
        lines = text.splitlines()
        for line in merged:
            if line.sign != other:
                assert lines[getattr(line, number) - 1] == line.text
        numbers = [getattr(line, number) for line in merged if line.sign != other]
        assert numbers == sorted(set(numbers))
        code = text.split('"""\n', 1)[1].splitlines()
        left_out = set(range(len(lines) - len(code) + 1, len(lines) + 1)) - set(numbers)
        assert all(not lines[place - 1].strip() for place in left_out)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ("Trainer.nothing", "is the same"),
        ('worker "no such words"', "in 0 places"),
        ('worker "device" … "loss"', r"in \d+ places"),
        ("worker 'dist'", "is not: function"),
    ],
)
def test_a_page_that_asks_for_what_is_not_there_is_told(request_, says):
    with pytest.raises(pieces.NoSuchPieceError, match=says):
        pieces.block("02", "03", request_)


# How many lines a step's script may add to the one before it, and remove from it. Plain comes before short:
# one statement on each line takes more lines than several on one.
LIMITS = {"02": (91, 26), "03": (20, 30), "04": (48, 22), "05": (125, 55)}


def test_scripts_and_differences_stay_small():
    """The difference between two scripts is the lesson, and nothing more; the README gives the sizes."""
    sizes = tables.sizes()
    print(sizes)
    for step, limits in LIMITS.items():
        plus, minus = (int(number) for number in re.findall(r"\d+", sizes[step]))
        assert plus <= limits[0] and minus <= limits[1], (step, sizes[step])
    lines = {step: pieces.script(step).splitlines() for step in STEPS}
    assert len(lines["01"]) <= 172 and len(lines["05"]) <= 318
    longest = max(len(line) for script in lines.values() for line in script)
    print(f"the longest line has {longest} columns (100: a slide)")
    assert longest <= 100


PLUMBING = r"\bsignal\b|\bgc\b|\btraceback\b|getppid|sleep|_pg_registry|crc32|\bglobal\b"


@pytest.mark.parametrize("step", STEPS)
def test_no_plumbing_in_a_script(step):
    text = (ROOT / FOLDERS[step] / "train.py").read_text()
    assert re.findall(PLUMBING, text) == []
    assert text.count("__main__") == 1 and text.rstrip().splitlines()[-2] == 'if __name__ == "__main__":'


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_they_name(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", text)
    for name, target in links:
        if target.startswith("https://"):
            continue  # these tests need no network
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if line := re.fullmatch(r"L(\d+)", anchor):
            found = file.read_text().splitlines()[int(line[1]) - 1]
            assert name.strip("`") in found, f"{target} is '{found.strip()}', not {name}"
        elif anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target
    print(f"{len(links)} links")


def test_the_scripts_have_one_skeleton():
    """Classes and functions that two neighboring steps share are in the same order."""
    for before, after in PAIRS:
        names = [
            re.findall(r"^\s*(?:def|class) (\w+)", pieces.script(step), re.M) for step in (before, after)
        ]
        shared = [[name for name in some if name in names[0] and name in names[1]] for some in names]
        print(f"{before} and {after} share {shared[0]}")
        assert shared[0] == shared[1]
        assert len(shared[0]) >= 9


def test_the_first_page_stays_one_screen_and_a_little():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = (ROOT / "CITATION.cff").read_text()
    assert newest
    assert f"\nversion: {newest[1]}\ndate-released: {newest[2]}\n" in cited
    assert f"Snapshots have format {FORMAT}." in (ROOT / "CHANGELOG.md").read_text()


def test_every_page_is_finished_and_closes_its_fences():
    for page in PAGES:
        assert "@@" not in page.read_text(), page
        assert len(re.findall(r"^```", page.read_text(), re.M)) % 2 == 0, page


def test_the_environment_is_this_python():
    """The commands above run with the interpreter that runs the tests, not with another one on the PATH."""
    words = ["bash", "-c", "command -v python torchrun; python -c 'import sys; print(sys.executable)'"]
    for real in (False, True):
        env = environment(PATH=paths(real))
        out = subprocess.run(words, capture_output=True, text=True, env=env, check=True).stdout.split()
        print(out)
        folder = str(Path(sys.executable).parent) if real else paths().partition(os.pathsep)[0]
        assert {str(Path(line).parent) for line in out[:2]} == {folder}
        assert out[2] == sys.executable


def test_what_the_page_says_of_gpus_is_recorded():
    """Each test of `make gpu` has passed on the card, or the page says that it has not run."""
    record = json.loads((ROOT / "benchmarks" / "results" / "NVIDIA-H200.json").read_text())
    page = (ROOT / "docs" / "reference" / "gpus.md").read_text()
    assert all(ended.startswith(("passed, ", "failed as expected, ")) for ended in record["tests"].values())
    assert [name for name, ended in record["tests"].items() if not ended.startswith("passed")] == [
        "test_two_ranks_on_one_card_end_where_step_01_ends[nccl]"
    ]
    ran = {name.partition("[")[0] for name in record["tests"]}
    tests = set(
        re.findall(r"^def (test_\w+)", (ROOT / "tests" / "clusters" / "test_gpu.py").read_text(), re.M)
    )
    assert ran <= tests and tests - ran == set(re.findall(r"`(test_\w+)`", page))
    day = datetime.date.fromisoformat(record["date"])
    torch = record["torch"].partition("+")[0]
    assert f"On {day:%d %B %Y}, on one {record['card']}, with torch {torch} and NCCL {record['nccl']}" in page
    assert max(record["weights_off_by"].values()) < 4e-15
    *_, peak, allocator = record["memory"]["table"]
    assert f"{peak / 1e6:.0f} MB, the allocator's peak was {allocator / 1e6:.0f} MB" in page
