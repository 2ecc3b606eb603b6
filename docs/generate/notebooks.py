"""Makes each step's walkthrough.ipynb from what exists: its README, script, an exercise, questions.

A notebook writes the script again in pieces, with the README's sections before the functions that they tell
of, runs it, and draws what it has learned. Texts that are written here are in capitals at the top.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat

from docs.generate.pieces import FOLDERS, ROOT, asked_for, functions, piece, script

REPOSITORY = "https://example.org/ddp.git"  # where this is published: a hosted notebook clones it from there
WORKSHOP = ROOT / "workshop"
GUIDE, MISCONCEPTIONS = WORKSHOP / "GUIDE.md", WORKSHOP / "README.md"
SHORT = 8  # lines: a shorter function that no section tells of stays in the cell of the one before it

EXERCISE = {"02": "03", "03": "10", "04": "12", "05": "16"}  # the one to write in the step's notebook
# Questions of GUIDE.md by their first words; misconceptions by words of their command; cards by number.
ASKED = {
    "01": ["Why is there a sampler", "Why not threads", "Does it work on Windows"],
    "02": ["Why is it slower", "Does DDP send", "When does it talk"],
    "03": ["Do I have to change the learning rate"],
    "04": ["What is an `nnodes` range", "My job hangs"],
    "05": ["FSDP or DDP"],
}
REFUTED = {
    "01": [],
    "02": ["refute.py step", "refute.py seeds", "refute.py ragged"],
    "03": ["refute.py torchrun", "--nproc-per-node=1 03_multigpu_torchrun"],
    "04": ["launch_multinode.sh --local 2", "refute.py accumulate", "refute.py barrier"],
    "05": ["refute.py fsdp"],
}
CARDS = {"01": [], "02": ["01"], "03": ["05"], "04": ["08"], "05": ["11", "15"]}

# One thread for each rank is what torchrun takes by itself, with five lines of warning.
TORCHRUN = "OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2"
COMMAND = {  # a step takes 64 images in each of them, so all five learn the same
    "01": "python 01_single_gpu/my_train.py",
    "02": "python 02_multigpu_spawn/my_train.py --world-size 2 --use-gpu 0 --batch-size 32",
    "03": f"{TORCHRUN} 03_multigpu_torchrun/my_train.py --use-gpu 0 --batch-size 32",
    "04": f"{TORCHRUN} 04_multinode/my_train.py --use-gpu 0 --batch-size 16 --accumulate 2",
    "05": f"{TORCHRUN} 05_fsdp/my_train.py --use-gpu 0 --batch-size 32",
}
RUNTIME = {
    "01": "Any runtime will do: the script takes a GPU if there is one.",
    "02": "Choose a runtime without a GPU: the ranks train on the CPU (`--use-gpu 0`). With two GPUs or "
    "more, take that flag away.",
}
BEFORE = """\
## Before the first cell

All commands run in the top folder of the repository. On a hosted notebook, the next cell fetches the
repository and installs what is missing. {runtime}

The tests run this notebook on CPUs. It has not been run on a hosted service."""
SETUP = """\
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

here = Path.cwd()
top = next((folder for folder in (here, here.parent, here / "ddp") if (folder / "common").is_dir()), None)
if top is None:  # a hosted notebook
    top = here / "ddp"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", "{repository}", top], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--requirement"]
    subprocess.run([*install, top / "requirements.txt"], check=True)
os.chdir(top)
os.makedirs("workshop/mine", exist_ok=True)
# `python` and `torchrun` are those of this kernel.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]"""
SCRIPT = """\
## The script

The cells of this section write `{name}`. In the end it is [`train.py`](train.py), byte for byte."""
RUN = """\
%%bash
rm -rf checkpoints/walkthrough-{step}  # or the run would resume from the snapshot of the last one
{command} \\
    --num-samples 2560 --epochs 2 \\
    --snapshot-dir checkpoints/walkthrough-{step} --metrics checkpoints/walkthrough-{step}/metrics.jsonl"""
PLOT = """\
import json

import matplotlib.pyplot as plt

with open("checkpoints/walkthrough-{step}/metrics.jsonl") as file:
    events = [json.loads(line) for line in file]
losses = [loss for event in events if event["event"] == "train" for loss in event["losses"]]
tests = [event for event in events if event["event"] == "eval"]

plt.plot(range(1, len(losses) + 1), losses, label="training, each step")
plt.plot([test["global_step"] for test in tests], [test["loss"] for test in tests], "o", label="test")
plt.title(f"{{tests[-1]['correct']:,}} of {{tests[-1]['total']:,}} test images are right")
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()"""
CHECK = """\
%%bash
python workshop/check.py {number} workshop/mine/notebook_{number}.py || [ $? = 1 ]  # 1: not solved yet"""


class Cells(list[Any]):
    """The cells of a notebook. Their ids are numbers, so that a second build makes the same."""

    def text(self, *paragraphs: str) -> None:
        source = "\n\n".join(filter(None, paragraphs))
        self.append(nbformat.v4.new_markdown_cell(source, id=f"cell-{len(self) + 1:02}"))

    def code(self, source: str) -> None:
        self.append(nbformat.v4.new_code_cell(source, id=f"cell-{len(self) + 1:02}"))


def sections(text: str) -> list[str]:
    """A page in parts, each of which begins with a heading; `#` in a code block makes none."""
    parts, in_block = [""], False
    for line in text.splitlines(keepends=True):
        in_block ^= line.startswith("```")
        if not in_block and re.match("#+ ", line):
            parts.append("")
        parts[-1] += line
    return [part for part in parts if part]


def section(page: Path, heading: str) -> str:
    """The part of a page below a heading, down to the next heading of any level."""
    [found] = [part for part in sections(page.read_text()) if part.startswith(f"{heading}\n")]
    return found


def shown(text: str, page: Path, step: str) -> str:
    """A part of a page for a cell: without marks, with pictures in Markdown, links from the step's folder."""

    def follow(found: re.Match[str]) -> str:
        target, mark, anchor = found[1].partition("#")
        if "://" in target:
            return found[0]
        there = os.path.relpath((page.parent / target) if target else page, ROOT / FOLDERS[step])
        return f"]({there}{mark}{anchor})"

    text = re.sub(r"<!--.*?-->\n*", "", text, flags=re.S)
    picture = r'<picture>.*?<img alt="([^"]+)" src="([^"]+)">.*?</picture>'
    text = re.sub(picture, r"![\1](\2)", text, flags=re.S)
    return re.sub(r"\]\(([^)\s]+)\)", follow, text).strip()


def below(text: str) -> str:
    """The same, with headings of the third level, because the notebook's own have the second."""
    return "".join(re.sub("^#+ ", "### ", part) for part in sections(text))


def folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text.strip()}\n\n</details>"


def exercise_of(number: str) -> tuple[Path, dict[str, Any]]:
    """An exercise's folder, and what its exercise.toml says."""
    [folder] = WORKSHOP.glob(f"exercises/{number}_*")
    return folder, tomllib.loads((folder / "exercise.toml").read_text())


def readme(step: str) -> Path:
    return ROOT / FOLDERS[step] / "README.md"


def parts_of(step: str) -> dict[str, str]:
    """The script in pieces by the names of its functions; joined, they are its text.

    The class's first line belongs to its first method. Empty lines belong to what comes behind them.
    """
    text, found, empty = script(step), {"imports": ""}, ""
    for line, name in zip(text.splitlines(keepends=True), functions(text), strict=True):
        if line.strip():
            name = {"docstring": "imports", "Trainer": "Trainer.__init__"}.get(name, name)
            found[name] = found.get(name, "") + empty + line
            empty = ""
        else:
            empty += line
    assert "".join(found.values()) == text, f"step {step}: the pieces are not the script"
    return found


def told_of(step: str) -> dict[str, list[str]]:
    """The sections of the README that are to be read before a function.

    A section with diffs stands before the function of which they have the most lines. Step 01's README has no
    diffs, and tells how its class works.
    """
    if step == "01":
        return {"Trainer.__init__": [section(readme(step), "## How it works")]}
    found: dict[str, list[str]] = {}
    before, there = f"{int(step) - 1:02}", parts_of(step)
    for part in sections(readme(step).read_text().partition("\n## Run it\n")[2]):
        lines: dict[str, int] = {}
        for request in re.findall(r"<!-- diff\n(.*?)-->", part, re.S):
            for function, begin, end in asked_for(request):
                changed = [line for line in piece(before, step, function, begin, end) if line.sign != " "]
                if function in there:
                    lines[function] = lines.get(function, 0) + len(changed)
        if lines:
            most = max(lines, key=lambda function: (function != "imports", lines[function]))
            found.setdefault(most, []).append(part)
    return found


def write_script(cells: Cells, step: str) -> None:
    """Cells that write the script, with the README's sections between them."""
    name, told = f"{FOLDERS[step]}/my_train.py", told_of(step)
    [why] = re.findall(r"^- \*\*(Hosted notebooks\*\*: .*?)\n\n", GUIDE.read_text(), re.M | re.S)
    fact = exercise_of("09")[1]["fact"] if step == "02" else ""  # of mp.spawn
    cells.text(SCRIPT.format(name=name), f"**{why}", fact)
    cuts: list[tuple[list[str], str]] = []  # sections, and the code behind them
    for function, code in parts_of(step).items():
        if cuts and function not in told and len(code.strip().splitlines()) < SHORT:
            cuts[-1] = cuts[-1][0], cuts[-1][1] + code
        else:
            cuts.append((told.get(function, []), code))
    for number, (before, code) in enumerate(cuts):
        for part in before:
            cells.text(below(shown(part, readme(step), step)))
        cells.code(f"%%writefile {'-a ' if number else ''}{name}\n{code}".removesuffix("\n"))


def run_script(cells: Cells, step: str) -> None:
    """The run, and a plot of its metrics."""
    text = readme(step).read_text()
    told = re.findall(r"^((?:`--batch-size` is per process|FSDP is for GPUs)\..*?)\n\n", text, re.M | re.S)
    cells.text("## Run it", *told)
    cells.code(RUN.format(step=step, command=COMMAND[step]))
    if step == "04":  # two nodes, which run the step's own script
        [(told, command)] = re.findall(r"^(Who is where\?.*?)\n\n```bash\n(.*?)\n```", text, re.M | re.S)
        folder = command.rpartition("--snapshot-dir ")[2]
        cells.text(told)
        cells.code(f"%%bash\nrm -rf {folder}\n{command}".replace(" -- ", " -- \\\n    "))
    metrics = section(readme("01"), "### The metrics file")
    cells.text("## Its metrics", shown(metrics[metrics.index("| event") :], readme("01"), step))
    cells.code(PLOT.format(step=step))


def exercise(cells: Cells, step: str) -> None:
    """One of the step's exercises, to be written here, and a list of the others."""
    number = EXERCISE[step]
    folder, facts = exercise_of(number)
    page = folder / "README.md"
    cells.text("## An exercise", below(shown(page.read_text(), page, step)))
    start = (folder / "start.py").read_text().rstrip()
    cells.code(f"%%writefile workshop/mine/notebook_{number}.py\n{start}")
    cells.code(CHECK.format(number=number))
    hints = [folded(f"hint {place}", hint) for place, hint in enumerate(facts["hints"], start=1)]
    solution = f"```python\n{(folder / 'solution.py').read_text()}```\n\n{facts['fact']}"
    cells.text(*hints, folded("our solution", solution))
    rows = []
    for path in sorted(WORKSHOP.glob("exercises/*/exercise.toml")):
        other = path.parent.name[:2]
        folder, facts = exercise_of(other)
        if facts["step"] == step and other != number:
            link = os.path.relpath(folder / "README.md", ROOT / FOLDERS[step])
            command = f"`python workshop/check.py {other}`"
            rows.append(f"| [{other}]({link}) | {facts['title']} | {facts['minutes']} | {command} |")
    cells.text("\n".join(["| more exercises | | minutes | |", "|---|---|---|---|", *rows]))


def questions(cells: Cells, step: str) -> None:
    """What the guide says to ask, misconceptions and cards, each with its answer folded away."""
    cells.text("## Questions")
    guide = GUIDE.read_text()
    if step == "01":
        pattern = r"Then ask (what .*?), and\s+collect the answers on the board: (.*?)\."
        [said] = re.findall(pattern, guide, re.S)
        question, answer = (" ".join(part.split()).capitalize() for part in said)
        cells.text(f"**{question}?**", folded("the answer", f"{answer}."))
    for words in ASKED[step]:
        [(question, answer)] = re.findall(rf"^\| ({re.escape(words)}.*?) \| (.*) \|$", guide, re.M)
        cells.text(f"**{question}**", folded("the answer", shown(answer, GUIDE, step)))
    for place, words in enumerate(REFUTED[step]):
        if place == 0:
            cells.text(below(shown(section(MISCONCEPTIONS, "## Misconceptions"), MISCONCEPTIONS, step)))
        parts = [part for part in sections(MISCONCEPTIONS.read_text()) if part.startswith("### “")]
        [part] = [part for part in parts if words in part]
        sentence, _, rest = part.removeprefix("### ").partition("\n")
        answer = shown(rest, MISCONCEPTIONS, step)
        cells.text(f"**{sentence}**", folded("the command, and the answer", answer))
    for number in CARDS[step]:
        [card] = WORKSHOP.glob(f"break_it/{number}_*/card.md")
        cells.text(below(shown(card.read_text(), card, step)).replace("### ", "### Card ", 1))


def notebook(step: str) -> str:
    """A step's notebook, as its file should be."""
    cells = Cells()
    cells.text(shown(readme(step).read_text().partition("\n## Run it\n")[0], readme(step), step))
    cells.text(BEFORE.format(runtime=RUNTIME["01" if step == "01" else "02"]))
    cells.code(SETUP.replace("{repository}", REPOSITORY))
    write_script(cells, step)
    run_script(cells, step)
    if step in EXERCISE:
        exercise(cells, step)
    questions(cells, step)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    made = nbformat.v4.new_notebook(cells=list(cells), metadata=about)
    return nbformat.writes(made, version=4) + "\n"


def path_of(step: str) -> Path:
    return ROOT / FOLDERS[step] / "walkthrough.ipynb"


def build_all() -> None:
    """Write the notebooks of all steps."""
    for step in FOLDERS:
        path_of(step).write_text(notebook(step))
