"""The notebooks: they are what `make docs` makes from pages and scripts, and run from top to bottom.

Promise: each walkthrough.ipynb writes its step's script and runs it. A cell fails when its command fails.
"""

import difflib
import os
import re
import shutil
import subprocess
import time

import nbformat
import pytest
from helpers import FOLDERS, ROOT, environment
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from docs.generate import notebooks

STEPS = list(FOLDERS)
NEEDED = [".gitignore", "common", "workshop", "tests", "launch_multinode.sh", "requirements.txt"]
WRITES = re.compile(r"%%writefile (-a )?(\S+)\n")
SECONDS = 170  # for a cell, on a busy machine; on an idle one, a whole notebook takes half a minute


def read(step):
    return nbformat.read(notebooks.path_of(step), as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def running(notebook):
    """The cells up to the one that runs the script, without the pages' text."""
    cells = code(notebook)
    last = next(i for i, cell in enumerate(cells) if cell.source.startswith("%%bash"))
    notebook.cells = cells[: last + 1]
    return notebook


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """A function that runs a notebook in a folder as Jupyter does; Jupyter's own files go to tmp_path."""
    own = {name: str(tmp_path / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")}
    for name, folder in own.items():
        monkeypatch.setenv(name, folder)

    def run(notebook, folder, **variables):
        begun = time.monotonic()
        where = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where)
        try:
            client.execute(env=environment(**variables))
        finally:
            for cell in code(notebook):
                print("".join(out.get("text", "") for out in cell.outputs), end="")
            print(f"{time.monotonic() - begun:.0f} s")

    return run


@pytest.fixture
def copy(tmp_path):
    """A copy of what the notebooks need, in which git knows every file."""
    top = tmp_path / "copy"
    top.mkdir()
    for name in [*NEEDED, *FOLDERS.values()]:
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("__pycache__", "mine", "checkpoints", "my_train.py")
            shutil.copytree(ROOT / name, top / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, top / name)
    git(top, "init", "--quiet")
    git(top, "add", "--all")
    git(top, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=a copy")
    return top


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("step", STEPS)
def test_a_notebook_is_as_make_docs_makes_it(step):
    """Made twice, it is the same, and it is the same as the file."""
    made = notebooks.notebook(step)
    assert made == notebooks.notebook(step)
    now = notebooks.path_of(step).read_text()
    stale = list(difflib.unified_diff(now.splitlines(), made.splitlines(), "the file", "make docs", n=0))
    print("\n".join(stale))
    assert stale == [] and now == made


@pytest.mark.parametrize("step", STEPS)
def test_a_notebook_is_valid_and_has_no_output(step):
    notebook = read(step)
    nbformat.validate(notebook)
    print(f"{len(notebook.cells)} cells")
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert [cell.id for cell in code(notebook) if cell.outputs or cell.execution_count] == []


@pytest.mark.parametrize("step", STEPS)
def test_the_cells_write_the_steps_script(step):
    """Byte for byte: not even the line that finds `common` differs, because both are in one folder."""
    name, written = f"{FOLDERS[step]}/my_train.py", ""
    for cell in code(read(step)):
        if (found := WRITES.match(cell.source)) and found[2] == name:
            assert bool(found[1]) == bool(written), "the first cell creates the file, the others add to it"
            written += f"{cell.source[found.end() :]}\n"
    assert written == (ROOT / FOLDERS[step] / "train.py").read_text()


@pytest.mark.parametrize("step", STEPS)
def test_links_and_pictures_of_a_notebook_are_there(step):
    folder, found = ROOT / FOLDERS[step], []
    for cell in read(step).cells:
        if cell.cell_type == "markdown":
            assert "<!--" not in cell.source and "<picture" not in cell.source
            found += re.findall(r"\]\(([^)\s]+)\)", cell.source)
    own = [target.partition("#")[0] for target in found if "://" not in target]
    print(
        f"{len(own)} links and pictures, pictures: {[target for target in own if 'docs/pictures' in target]}"
    )
    assert [target for target in own if not (folder / target).exists()] == []
    timeline = f"../docs/pictures/timeline-{step}-light.png"
    assert (timeline in own) == (timeline in (folder / "README.md").read_text())


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_notebook_runs_from_top_to_bottom(step, copy, execute):
    """It draws a loss, the exercise is not solved, git sees nothing new. Its Python starts without torch."""
    notebook = read(step)
    assert notebook.metadata.kernelspec.name == "python3"
    untouched = nbformat.v4.new_code_cell("import sys\nassert 'torch' not in sys.modules", id="untouched")
    notebook.cells.append(untouched)
    execute(notebook, copy / FOLDERS[step])
    said = "".join(out.get("text", "") for cell in code(notebook) for out in cell.outputs)
    script = copy / FOLDERS[step] / "my_train.py"
    assert script.read_bytes() == (ROOT / FOLDERS[step] / "train.py").read_bytes()
    assert re.search(rf"{FOLDERS[step]}: cnn on synthetic-2560, .* = 64 samples a step, 2 epochs", said)
    assert float(re.findall(r"epoch 2/2  test loss [\d.]+, accuracy ([\d.]+)%", said)[0]) > 70
    assert "done: 5,120 samples" in said
    assert [out for cell in code(notebook) for out in cell.outputs if "image/png" in out.get("data", {})]
    assert ("not written yet" in said) == (step in notebooks.EXERCISE)
    assert git(copy, "status", "--porcelain") == ""


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_cell_fails_when_its_command_fails(step, copy, execute):
    """A mistake in the script, which is written in one cell, ends the notebook in the cell that runs it."""
    notebook = running(read(step))
    right, wrong = "self.optimizer.step()", "raise RuntimeError('planted')"
    [cell] = [cell for cell in notebook.cells if right in cell.source]
    cell.source = cell.source.replace(right, wrong)
    with pytest.raises(CellExecutionError):
        execute(notebook, copy / FOLDERS[step])
    *before, last = notebook.cells
    assert "RuntimeError: planted" in "".join(out.get("text", "") for out in last.outputs)
    assert not [cell.id for cell in before for out in cell.outputs if out.output_type == "error"]


@pytest.mark.slow
def test_the_cell_of_an_exercise_fails_when_there_is_nothing_to_judge(copy, execute):
    """check.py exits with 1 if an exercise is not solved, and with 2 if the command was wrong."""
    notebook = read("02")
    setup = code(notebook)[0]
    [check] = [cell for cell in code(notebook) if "workshop/check.py" in cell.source]
    notebook.cells = [setup, check]
    with pytest.raises(CellExecutionError):  # the cell that writes the file has not run
        execute(notebook, copy / FOLDERS["02"])
    assert "error: " in "".join(out.get("text", "") for out in check.outputs)


@pytest.mark.sample(1)
@pytest.mark.slow
def test_the_first_cell_fetches_the_repository_where_there_is_none(tmp_path, copy, execute):
    """As on a hosted service, where a notebook comes alone. A second time, it finds the repository."""
    notebook = running(read("01"))
    setup = notebook.cells[0]
    assert setup.source.count(notebooks.REPOSITORY) == 1
    setup.source = setup.source.replace(notebooks.REPOSITORY, copy.as_uri())
    again = nbformat.v4.new_code_cell(f"os.chdir('..')\n{setup.source}\nprint('in', os.getcwd())", id="again")
    notebook.cells.append(again)
    alone = tmp_path / "alone"
    alone.mkdir()
    execute(notebook, alone, PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    assert os.listdir(alone) == ["ddp"]
    assert f"in {alone / 'ddp'}\n" in again.outputs[0].text
    assert (alone / "ddp" / FOLDERS["01"] / "my_train.py").exists()
