"""workshop/export.py: an exported step trains as it does in the repository, and its own test passes there."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import forks
import pytest
import yaml
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    ROOT,
    SHARDED,
    Started,
    after_a_step,
    command,
    environment,
    finish,
    largest_difference,
    newest,
    ranks_of,
    saved,
)

EXPORT = ROOT / "workshop" / "export.py"
FLAGS = ["--num-samples=251", "--epochs=1", "--precision=float64"]  # 20 steps, as test_real_start.py's
PYTEST = [sys.executable, str(Path(pytest.__file__).parent / "__main__.py")]  # a script, so that it can fork
# Writes down, on each rank, the files of all modules that are neither Python's nor installed. Torch has some
# that name a file which is not there.
LOADED = (
    "import sys; [print(m.__file__, file=open(f'loaded-{os.getpid()}', 'a')) for m in [*sys.modules.values()]"
    " if os.path.isfile(getattr(m, '__file__', None) or '')"
    " and not m.__file__.startswith((sys.prefix, sys.base_prefix))]"
)
# The others in `make test-all`, where `test_the_readme` also starts them for real.
TRAINED = [pytest.param(step, marks=[] if step in ("01", "03") else [pytest.mark.slow]) for step in FOLDERS]


def clean(**extra):
    """The variables of somebody who has not got this repository."""
    inside = {name for name, value in os.environ.items() if str(ROOT) in value.split(os.pathsep)}
    return {**{k: v for k, v in environment().items() if k not in {"PYTHONPATH", *inside}}, **extra}


def ask(folder, *words):
    """What export.py answers, started for real: its status, what it prints, and its errors."""
    return finish(Started([sys.executable, str(EXPORT), *words], folder, True, clean()))


def export(step, folder):
    """The exported step, in `folder`."""
    status, out, err = ask(folder.parent, step, folder.name)
    assert (status, err) == (0, "") and out.startswith(f"created {folder.name}; ")
    return folder


def files(folder):
    """The files in a folder, without what running it has left there."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    left = {"__pycache__", "checkpoints", ".pytest_cache"}
    return {path for path in found if not left & set(path.relative_to(folder).parts)}


def run(folder, step, *flags):
    """Train in the exported folder, as its README has it."""
    words = ["train.py" if word.endswith("train.py") else word for word in command(step, ranks_of(step))]
    own = [f"--batch-size={GLOBAL_BATCH // ranks_of(step)}", "--use-gpu=0"]
    status, out, err = finish(Started([*words, *FLAGS, *own, *flags], folder, False, clean()))
    assert status == 0, f"{out}\n{err}"
    return out


def its_test(folder, timeout=400):
    """The exported folder's own test: its status, and what it prints."""
    process = Started([*PYTEST, "-s", "-rA", "-p", "no:cacheprovider"], folder, False, clean())
    status, out, err = finish(process, timeout)
    print(out, err)
    return status, out


def failed_in(out):
    """The last words of the names of the tests that failed in the exported folder."""
    return re.findall(r"^FAILED test_train.py::test_\w+_(\w+)", out, re.M)


def edit(file, *edits):
    text = file.read_text()
    for right, wrong in edits:
        assert text.count(right) == 1, f"{file} has this {text.count(right)} times: {right}"
        text = text.replace(right, wrong)
    file.write_text(text)


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize("step", TRAINED)
def test_it_trains_as_the_step_does(once, tmp_path, step):
    """Bit for bit, also when it resumes; with every file that it has, and with no other."""
    folder = export(step, tmp_path / "my-project")
    edit(folder / "train.py", after_a_step(LOADED))
    whole = once(step, ranks_of(step), *FLAGS, f"--batch-size={GLOBAL_BATCH // ranks_of(step)}")
    out = run(folder, step, "--save-every=8")
    snapshots = folder / "checkpoints" / "my-project" / "cnn-synthetic-251"
    assert saved(snapshots) == [20, 16, 8]
    first = largest_difference(newest(snapshots)["model"], whole.weights)
    for path in snapshots.glob("snapshot-000000[12]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert saved(snapshots) == [8]
    assert "resumed from" not in out and re.search(r"^resumed .*: epoch 0, step 8$", run(folder, step), re.M)
    second = largest_difference(newest(snapshots)["model"], whole.weights)
    print(f"step {step}, exported, against the repository's: {first}, and resumed {second} (must be 0.0)")
    assert first == second == 0.0

    ranks = [set(path.read_text().splitlines()) for path in folder.glob("loaded-*")]
    assert len(ranks) == 2 * ranks_of(step)
    exported = {str(path) for path in files(folder) if path.suffix == ".py"}
    print(*sorted(exported))
    # Without the test, and the script beside that has a main of its own.
    alone = {str(folder / name) for name in ("test_train.py", "convert.py")} & exported
    for loaded in ranks:  # the tests' own server is in each fork
        assert {os.path.abspath(folder / file) for file in loaded} - {forks.__file__} == exported - alone


@pytest.mark.slow
def test_its_own_test_passes(tmp_path):
    """Step 01's, in forks: `test_the_readme` runs those of all steps."""
    status, out = its_test(export("01", tmp_path / "my-project"))
    assert status == 0 and "2 passed" in out and "(must be 0.0)" in out


PADDED = ("metric[:remaining].double(", "metric.double(")
AGAIN = ("start=self.samples_seen // self.world_size", "start=0")
PLANTED = [
    ("01", ("start=self.samples_seen", "start=0"), "weights"),
    ("01", ("metric.double().sum()", "metric.double().sum() + 1"), "once"),
    ("02", AGAIN, "weights"),
    ("02", PADDED, "once"),
    ("03", ('        self.model.load_state_dict(state["model"])\n', ""), "weights"),
    ("03", PADDED, "once"),
    ("04", ('        self.optimizer.load_state_dict(state["optimizer"])\n', ""), "weights"),
    ("04", ("        dist.all_reduce(totals)\n", ""), "once"),
    ("05", AGAIN, "weights"),
    ("05", PADDED, "once"),
]


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize(("step", "bug", "promise"), PLANTED)
def test_its_own_test_fails_when_it_should(tmp_path, step, bug, promise):
    """The one of its two tests that is about what was planted, and not the other."""
    folder = export(step, tmp_path / "my-project")
    edit(folder / "train.py", bug)
    status, out = its_test(folder)
    assert status == 1 and failed_in(out) == [promise]


def environment_without_this_repository(folder):
    """A new virtual environment in `folder`: its PATH.

    What `pip install -r requirements.txt` would put there (5 GB, from the network) comes from the packages of
    the tests' own environment, by way of a .pth file. pip would also write the `torchrun`.
    """
    venv.create(folder, with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(packages, "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    torchrun = folder / "bin" / "torchrun"
    torchrun.write_text(f"#!/bin/sh\nexec '{folder}/bin/python' -m torch.distributed.run \"$@\"\n")
    torchrun.chmod(0o755)
    return f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"


INSTALLS = ("python3 -m venv ", "source ", "python -m pip install ")


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("step", FOLDERS)
def test_the_readme(tmp_path, step):
    """Its commands run in a new environment, really started; among them the folder's own test."""
    folder = export(step, tmp_path / "my project")
    path = environment_without_this_repository(tmp_path / "venv")
    blocks = re.findall(r"^```bash\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    used, quicker = [], "--num-samples=256 --epochs=1 --use-gpu=0 --vit-width=64 --vit-depth=1"
    for line in [line for line in lines if not line.startswith(INSTALLS)]:
        command, _, _ = line.partition("  #")
        if "pytest" not in line:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            command += f"{'' if ' -- ' in line or 'launch' not in line else ' --'} {quicker}"
        process = Started(["bash", "-c", command], folder, True, clean(PATH=path, PYTHONSAFEPATH="1"))
        status, out, err = finish(process, 300)
        print(f"$ {command}\n{out}\n{err}")
        assert status == 0
        used.append("test" if "2 passed" in out else "run" if "done: 256 samples" in out else "print")
        assert (used[-1] == "print") == ("--hosts" in line), out
        if used[-1] == "run":
            assert re.search(r"^(\[node 0\] )?my project: ", out, re.M) and "epoch 1/1  test loss" in out
            [made] = (folder / "checkpoints" / "my project").glob("*/snapshot-*")
    runs = {"04": ["print", "run"], "05": ["run", "run", "run"]}.get(step, ["run", "run"])
    assert used == [*runs, "test"]
    if step == SHARDED:
        assert made.is_dir()
        process = Started(["bash", "-c", f"python convert.py '{made}'"], folder, True, clean(PATH=path))
        status, out, err = finish(process)
        assert (status, out) == (0, f"wrote {made}.pt\n"), err


@pytest.mark.parametrize("step", FOLDERS)
def test_it_has_what_the_step_has_and_no_more(tmp_path, step):
    folder = export(step, tmp_path / "my-project")
    # README.md is another; REFERENCE.md and the notebook are about this repository.
    left_out = (".ipynb", ".md", "")
    beside = {path.name for path in (ROOT / FOLDERS[step]).iterdir() if path.suffix not in left_out}
    common = {f"common/{path.name}" for path in (ROOT / "common").glob("*.py")}
    # Which the others import.
    common -= {"common/nodes.py"} if step < "04" else set()
    common -= {"common/buckets.py"} if step in ("01", SHARDED) else set()
    wanted = {*beside, *common, "README.md", "LICENSE", "requirements.txt", "test_train.py"}
    wanted |= {"launch_multinode.sh"} if step == "04" else set()
    assert {path.relative_to(folder).as_posix() for path in files(folder)} == wanted
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    # What is installed is what is imported; torch brings filelock, and pytest is the test's.
    used = {name.partition(".")[0] for path in folder.rglob("*.py") for name in imports(path)}
    asked = set(re.findall(r"^\w+", (folder / "requirements.txt").read_text(), re.M))
    own = {"common", *(path.stem for path in folder.glob("*.py"))}
    print(f"requirements.txt: {sorted(asked)}")
    assert asked == used - own - sys.stdlib_module_names - {"pytest"}


def test_a_module_of_ones_own_comes_along(tmp_path):
    """With what it imports from `common`. The walkthrough's my_train.py does not."""
    copy = tmp_path / "copy"
    for name in ("common", FOLDERS["01"], "workshop/export"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("workshop/export.py", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("own.py", "my_train.py"):
        (copy / FOLDERS["01"] / name).write_text("from common.nodes import check_ranks_agree\n")
    words = [sys.executable, str(copy / "workshop" / "export.py"), "01", "new"]
    status, _, err = finish(Started(words, tmp_path, True, clean()))
    assert (status, err) == (0, "")
    there = {path.relative_to(tmp_path / "new").as_posix() for path in files(tmp_path / "new")}
    assert {"train.py", "own.py", "common/nodes.py"} < there and "my_train.py" not in there


@pytest.mark.parametrize("step", FOLDERS)
def test_its_remedy_for_the_other_kind_of_snapshot_is_there(tmp_path, step):
    """Step 05 has the converter. The others say where it is."""
    text = (export(step, tmp_path / "my-project") / "common" / "snapshot.py").read_text()
    remedy = "python convert.py {others[0]}" if step == SHARDED else "convert it with step 05 of the original"
    assert remedy in text


def imports(path):
    """The names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        yield from [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from [node.module] if isinstance(node, ast.ImportFrom) else []


def strays(folder):
    """What the files in a folder name and what is not there: paths of the repository, files, links."""
    found = []
    for path in sorted(files(folder)):
        text = path.read_text()
        found += re.findall(r"0\d_[a-z]\w*|\.\./\S*|parents\[\d\]|[Oo]ur tests", text)
        named = {*re.findall(r"[\w./-]*\w\.(?:py|sh|sbatch|yaml|md|txt)\b|\b(?:Docker|Make)file\b", text)}
        named |= {*re.findall(r"\]\(([^)#]+)\)", text)} if path.suffix == ".md" else set()
        found += [name for name in sorted(named) if not (folder / name).exists()]
    return found


@pytest.mark.parametrize("step", FOLDERS)
def test_it_names_no_file_that_it_has_not(tmp_path, step):
    folder = export(step, tmp_path / "my-project")
    assert strays(folder) == []
    with open(folder / "README.md", "a") as script:  # and it would be seen
        script.write("# 01_single_gpu/train.py, ../README.md common/data.py Dockerfile [a page](docs)\n")
    assert strays(folder) == [
        "01_single_gpu",
        "../README.md",
        "../README.md",
        "01_single_gpu/train.py",
        "Dockerfile",
        "common/data.py",
        "docs",
    ]


@pytest.mark.parametrize("step", FOLDERS)
def test_its_readme_is_about_this_step(tmp_path, step):
    """It names each file, and nothing of the template is left in it. `--help` begins as it does."""
    folder = export(step, tmp_path / "my-project")
    page = (folder / "README.md").read_text()
    assert not re.search(r"[{}$]|<!--|\n\n\n", page) and max(map(len, page.splitlines())) <= 120
    assert page.startswith("# my-project\n\n") and "`checkpoints/my-project/…`" in page
    assert f"began as step {step} of" in page
    there = {path.relative_to(folder).parts[0] for path in files(folder)}
    assert set(re.findall(r"\]\((.*?)\)", page)) == there - {"README.md", "requirements.txt"}
    says = (ast.get_docstring(ast.parse((folder / "train.py").read_text())) or "").splitlines()[0]
    assert says == page.splitlines()[2] and says.startswith("Train a model ")


OTHER_DATA = """import torch
from torch import nn
from torch.utils.data import TensorDataset


def load_points(num_samples):
    points = torch.randn(num_samples + 55, 8, dtype=torch.float64)
    labels = points.argmax(dim=1)
    train = TensorDataset(points[55:], labels[55:])
    test = TensorDataset(points[:55], labels[:55])
    return train, test


def build():
    return nn.Linear(8, 10, dtype=torch.float64)
"""


@pytest.mark.slow
def test_with_another_model_its_first_test_passes(tmp_path):
    """And its second one names what to replace, as the README says; without the files about digits."""
    folder = export("01", tmp_path / "my-project")
    (folder / "points.py").write_text(OTHER_DATA)
    edit(
        folder / "train.py",
        ("from common.mnist import load_mnist\nfrom common.models import build_model\n", ""),
        ("import GracefulStop\n", "import GracefulStop\nfrom points import build, load_points\n"),
        ("load_mnist(args.data_dir, args.num_samples)", "load_points(args.num_samples)"),
        ("build_model(args.model, args.precision, args.vit_width, args.vit_depth)", "build()"),
    )
    for name in ("mnist.py", "synthetic.py", "models.py"):
        (folder / "common" / name).unlink()
    status, out = its_test(folder)
    assert status == 1 and "1 passed" in out and failed_in(out) == ["once"]
    assert "No module named 'common.mnist'" in out


@pytest.mark.parametrize("step", FOLDERS)
def test_its_code_is_clean(tmp_path, step):
    """No import is left of what was taken out."""
    folder = export(step, tmp_path / "my-project")
    ruff, config = Path(sys.executable).with_name("ruff"), f"--config={ROOT / 'pyproject.toml'}"
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *words, config, "."], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_what_starts_many_machines_starts_this(tmp_path):
    """The same commands as in the repository, where slurm.sbatch and kubernetes.yaml are tested."""
    folder, inside = export("04", tmp_path / "my-project"), ROOT / FOLDERS["04"]
    before, after = ((place / "slurm.sbatch").read_text() for place in (inside, folder))
    assert after == before.replace("04_multinode/", "") != before
    before, after = ((place / "kubernetes.yaml").read_text() for place in (inside, folder))
    assert [*yaml.safe_load_all(after)] == [*yaml.safe_load_all(before.replace("04_multinode/", ""))]
    flags = ["--hosts=alpha,beta", "--elastic=1:2", "--rdzv-id=one", "--", "--epochs=5"]
    printed = []
    for place in (ROOT, folder):
        words = [str(place / "launch_multinode.sh"), "--setup=true", *flags]
        status, out, err = finish(Started(words, tmp_path, True, clean()))
        assert (status, err) == (0, "")
        printed.append(out)
    assert printed[1] == printed[0].replace("04_multinode/", "").replace(str(ROOT), str(folder))
    assert printed[1].count("\n    train.py --epochs=5\n") == 2
    words = [str(folder / "launch_multinode.sh"), "--step=04"]
    status, _, err = finish(Started(words, tmp_path, True, clean()))
    assert (status, err) == (
        2,
        "error: unknown option '--step' (--help lists the options; training flags come after --)\n",
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck: apt-get install shellcheck")
def test_its_shell_scripts_are_clean(tmp_path):
    folder = export("04", tmp_path / "my-project")
    words = ["shellcheck", "launch_multinode.sh", "slurm.sbatch"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


WRONG = {
    "07 new": "there is no step 07: choose one of 01, 02, 03, 04, 05",
    "three new": "there is no step three: choose one of 01, ",
    "03 full": "full already exists and is not an empty folder: choose a new one",
    "03 file": "file already exists and is not an empty folder: choose a new one",
    "03 no/new": "there is no folder {}/no: create it first",
    "03 file/new": "there is no folder {}/file: create it first",
    "03 50%": "the name '50%' has more than letters, digits, spaces, '.', '-' and '_': choose another",
    "03": "the following arguments are required: DIR (see --help)",
    "03 new --force": "unrecognized arguments: --force (see --help)",
}


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_question_is_one_line(tmp_path, words):
    """And changes nothing."""
    (tmp_path / "full").mkdir()
    for name in ("file", "full/train.py"):
        (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    status, out, err = ask(tmp_path, *words.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {WRONG[words].format(tmp_path)}")
    assert tree(tmp_path) == before


def test_an_empty_folder_will_do_but_for_the_one_that_one_is_in(tmp_path):
    (tmp_path / "empty").mkdir()
    status, out, err = ask(tmp_path / "empty", "3", ".")
    assert (status, out) == (2, "") and err.startswith("error: DIR is the current folder, ")
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]
    (tmp_path / "link").symlink_to("empty")
    assert ask(tmp_path, "3", "link") == (0, "created link; start with link/README.md\n", "")
    assert (tmp_path / "empty" / "train.py").exists() and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("there", [True, False])
def test_when_it_cannot_be_written_nothing_of_it_is_left(tmp_path, there):
    """As on a disk that is full: the limit is between the sizes of its files."""
    if there:
        (tmp_path / "new").mkdir()
    before = tree(tmp_path)
    line = f"ulimit -f 6 && exec '{sys.executable}' '{EXPORT}' 03 new"
    status, out, err = finish(Started(["bash", "-c", line], tmp_path, True, clean()))
    assert (status, out) == (2, "")
    assert (
        err
        == "error: cannot write new: File too large; make room, make it writable, or choose another folder\n"
    )
    assert tree(tmp_path) == before
