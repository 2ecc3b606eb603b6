"""Start a project of your own from one of the five steps: a folder with that step, and only what it needs.

    python workshop/export.py 03 DIR     DIR is new, or empty

DIR gets train.py and the files beside it, the modules of `common` that they import, a README, the licence,
requirements.txt, and a test. Nothing in it refers to a file that is not there. Exit status: 0 when DIR is
there, 2 when the question was wrong or DIR could not be written, and then nothing of it is there.
"""

import argparse
import ast
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# What a step needs and does not import.
BESIDE = {
    "04": ["04_multinode/slurm.sbatch", "04_multinode/kubernetes.yaml", "launch_multinode.sh"],
    "05": ["05_fsdp/convert.py"],
}
# In the repository, `common` is not beside a step's scripts. Where it is, Python finds it by itself, unless
# PYTHONSAFEPATH is set.
PATHS = r"(sys\.path\.insert\(0, .*\n)+"
THIS_FOLDER = "sys.path.insert(0, str(Path(__file__).resolve().parent))  # this folder, where `common` is\n"

# What refers to more than is exported, and what stands there instead. Paths of the step's own folder need no
# edit: `rewritten` shortens them.
NO_CONVERTER = {
    "common/snapshot.py": [
        ("Step 05's is a folder, see 05_fsdp/sharded.py.", "Step 05's is a folder."),
        ("python 05_fsdp/convert.py {others[0]}", "step 05 has a converter"),
    ]
}
EDITS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "01": NO_CONVERTER,
    "02": NO_CONVERTER,
    "03": NO_CONVERTER,
    "04": {
        **NO_CONVERTER,
        "04_multinode/kubernetes.yaml": [
            (
                "# Our tests check this file against Kubernetes' schema and run its command on two hosts;"
                " they do not run a cluster.\n",
                "# Tests have checked it against Kubernetes' schema and run its command on two hosts;"
                " no cluster has run it.\n",
            )
        ],
        "launch_multinode.sh": [
            ("  --step 04|05              which step to train (04)\n", ""),
            ("    --step) step=$2 ;;\n", ""),
            (" step=04 ", " "),
            (
                "[[ $step =~ ^0[45]$ ]] || fail \"--step is 04 or 05, not '$step'\"\n"
                'script=$(cd "$here" && ls "${step}"_*/train.py 2>/dev/null) ||'
                ' fail "there is no step $step in $here"\n',
                "script=train.py\n",
            ),
            ('    [ "$step" = 04 ] || disk="on one disk that all nodes have in common"\n', ""),
            ("c10d rendezvous, see 04_multinode/README.md", "a c10d rendezvous"),
            ("cat 0*/train.py common/*.py", "cat *.py common/*.py"),
        ],
    },
    "05": {},
}

# The test is written for two ranks under torchrun, whose snapshots are files: steps 03 and 04.
STARTED = '"-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]'
TEST_EDITS = {
    "01": [(STARTED, '"train.py"]'), (": neither number divides by two", "")],
    "02": [(STARTED, '"train.py", "--world-size=2"]')],
    "05": [
        (
            "import torch.nn.functional as F\n\n",
            "import torch.nn.functional as F\n\nimport convert\nimport sharded\n",
        ),
        ("snapshot.snapshots(folder)", "snapshot.snapshots(folder, sharded=True)"),
        ("snapshot.read(saved(folder)[0])", "sharded.read(saved(folder)[0])"),
        ("    return state\n", "    return convert.gather(state)\n"),
    ],
}

# The list of what to replace, in README.
DATA = """the data: `load_mnist(` in `main`. Any map-style dataset works, and a batch may be a tuple, a list
or a dictionary of tensors. If the dataset has a `name`, snapshots and reports use it."""
CHECKSUM = " If it has a `checksum()`, nodes compare that, and otherwise its name and length."
MODEL = "the model: `build_model(` in `main`. If it has a `name`, snapshots and reports use it."
METHODS = """`Trainer.count_targets`, how many answers a batch asks for; `Trainer.loss`, the sum of their
losses; `Trainer.per_sample_metrics`, for each sample its loss, how many of its answers are right, and how
many count."""
DDP_MODEL = """ `loss` has to call `self.ddp_model`: with `self.model`, no gradient is averaged. Before
training, `fix_bucket_order` calls it once in eval mode, on two samples. The model must use the same
parameters there as in training."""
TEST = """in [test_train.py](test_train.py), the flags that name the data, and what evaluates beside the
run."""

README = """# {name}

{intro}

## Install

With Python 3.11 or newer:

```bash
python3 -m venv .venv
source .venv/bin/activate
python -m pip install -r requirements.txt
```

## Run

{run}

{gpus}`python train.py --help` lists the flags.

## Go on

The same command again goes on from the newest snapshot, a {snapshot} with all that a run needs for it. Ctrl-C
and SIGTERM save one before the run ends. By default snapshots go to `checkpoints/{name}/…`, after the name of
this folder: if you rename the folder, name the old place with `--snapshot-dir`.

## Test

```bash
python -m pip install pytest
python -m pytest
```

[test_train.py](test_train.py) trains on the CPU{ranks}, interrupts that, goes on, and compares the weights
bit for bit.

## Make it yours

Replace what knows about digits, and keep the test running:

{own}

## Files

{files}

From step {step} of “Distributed PyTorch, step by step”, five scripts that grow from one GPU to many machines.
You may use and change everything here; the notice in [LICENSE](LICENSE) must stay with copies of it.
"""


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def steps() -> dict[str, Path]:
    """The five train.py by their numbers, in order."""
    return {path.parent.name[:2]: path for path in sorted(ROOT.glob("0[1-9]_*/train.py"))}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; of `from a import b` a, and a.b, which may be none."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def needed(step: str) -> list[Path]:
    """The step's train.py, what lies beside it, and the modules here that these import, and those import."""
    script = steps()[step]
    found = [script, *(ROOT / name for name in BESIDE.get(step, []))]
    for file in found:  # grows meanwhile
        for name in sorted(imported(file)) if file.suffix == ".py" else []:
            # `common.options` is common/options.py, and needs common/__init__.py too.
            whole = Path(*name.split("."))
            paths = [whole.with_suffix(".py"), whole / "__init__.py", whole.parent / "__init__.py"]
            there = [folder / path for folder in (script.parent, ROOT) for path in paths]
            found += [path for path in there if path.is_file() and path not in found]
    return found


def place(file: Path) -> str:
    """Where a file of the repository lies in the exported folder."""
    path = file.relative_to(ROOT)
    return path.as_posix() if path.parts[0] == "common" else path.name


def edited(file: Path, edits: list[tuple[str, str]]) -> str:
    """The text of a file with other text in it, each of which must stand there once."""
    text = file.read_text()
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(
                f"{file} has this {text.count(old)} times, workshop/export.py wants it once: {old}"
            )
        text = text.replace(old, new)
    return text


def rewritten(step: str, file: Path) -> str:
    """The text of one of the step's files, as it is to be where `common` lies beside train.py."""
    edits = list(EDITS[step].get(file.relative_to(ROOT).as_posix(), []))
    text = edited(file, edits)
    if file.suffix == ".py":
        text = re.sub(PATHS, THIS_FOLDER, text)
        # The tests are not exported, except for one.
        text = re.sub(r"(?<=\.)(\s+)test_\w+\.py\b", r"\1A test of the original", text)
        text = re.sub(r"\btest_\w+\.py\b", "a test of the original", text)
    # Snapshots go to a folder that is called after the scripts' one, whatever its name will be.
    text = re.sub(r"\bcheckpoints/0\d_\w+/", "checkpoints/…/", text)
    return text.replace(f"{steps()[step].parent.name}/", "")


def requirements(files: list[Path]) -> str:
    """The lines of requirements.txt that the Python files need."""
    used = {name.partition(".")[0] for file in files if file.suffix == ".py" for name in imported(file)}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if re.split(r"\W", line)[0] in used)


def first_sentence(name: str, text: str) -> str:
    """What a file says of itself: the beginning of its docstring, or of its first comment."""
    if name.endswith(".py"):
        said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    else:
        said = next(line for line in text.splitlines() if line.startswith("# "))[2:]
    return re.split(r"(?<=\.) ", said)[0].rstrip(".:")


def as_markdown(docstring: str) -> str:
    """A docstring whose commands begin with `$`, and go on in lines that are indented."""
    found = []
    for part in docstring.split("\n\n"):
        commands = re.sub(r"^\$ ", "", part, flags=re.M)
        found.append(f"```bash\n{commands}\n```" if part.startswith("$ ") else part)
    return "\n\n".join(found)


def as_list(entries: Iterable[str]) -> str:
    """A list in Markdown, as wide as the page."""
    return "\n".join(
        textwrap.fill(f"- {entry}", 120, subsequent_indent="  ", break_on_hyphens=False) for entry in entries
    )


def replacements(step: str) -> str:
    """What knows about digits, as a list."""
    data, model, methods = DATA, MODEL, METHODS
    if step in ("04", "05"):
        data += CHECKSUM
    if step == "05":
        model = model.replace("in `main`", "in `main`, and its parts in `units`")
    if step in ("02", "03", "04"):
        methods += DDP_MODEL
    return as_list([data, model, methods, TEST])


def readme(step: str, name: str, texts: dict[str, str]) -> str:
    """The exported folder's page."""
    intro, _, run = (ast.get_docstring(ast.parse(texts["train.py"])) or "").partition("\n\n")
    gpus = "Each rank takes a GPU of its own; with `--use-gpu 0`, ranks use the CPU. "
    # What README.md itself says of train.py is its docstring's beginning.
    others = {path: text for path, text in texts.items() if text and path != "train.py"}
    return README.format(
        name=name,
        step=step,
        intro=intro.replace("\n", " "),
        run=as_markdown(run),
        gpus=gpus if step != "01" else "",
        snapshot="folder" if step == "05" else "file",
        ranks=" with two ranks" if step != "01" else "",
        own=replacements(step),
        files=as_list(f"[{path}]({path}): {first_sentence(path, others[path])}" for path in sorted(others)),
    )


def export(step: str, name: str) -> dict[str, str]:
    """The files of the exported folder called `name`, by their paths in it."""
    files = needed(step)
    texts = {place(file): rewritten(step, file) for file in files}
    page = readme(step, name, texts)
    test = edited(HERE / "export" / "test_train.py", TEST_EDITS.get(step, []))
    rest = {"LICENSE": (ROOT / "LICENSE").read_text(), "requirements.txt": requirements(files)}
    return {"README.md": page, **texts, "test_train.py": test, **rest}


def write(to: Path, texts: dict[str, str]) -> None:
    """Make the folder `to`, which is not there or empty; it appears when it is whole. Raises OSError."""
    unfinished = to.parent / f".{to.name}.{os.getpid()}.tmp"
    try:
        for path, text in texts.items():
            (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path).write_text(text)
            if path.endswith(".sh"):
                (unfinished / path).chmod((unfinished / path).stat().st_mode | 0o111)
        os.rename(unfinished, to)  # refuses to replace a folder in which something lies
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a wrong flag with one line."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help says how)")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", metavar="NN", help="which step: 01 to 05")
    parser.add_argument("to", type=Path, metavar="DIR", help="the new folder")
    args = parser.parse_args()
    step, to = args.step.zfill(2), args.to.resolve()
    if step not in steps():
        stop(f"there is no step {args.step}: take one of {', '.join(steps())}")
    try:
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            stop(f"{args.to} is there already, and not an empty folder: name one that is new")
        if not to.parent.is_dir():
            stop(f"there is no folder {to.parent}: make it first")
        if to == Path.cwd():
            stop("DIR is the folder that you are in, and would be replaced: name it from the folder above")
        if not re.fullmatch(r"[\w. -]+", to.name):  # it gets into the help of --snapshot-dir, and into a page
            stop(
                f"the name '{to.name}' has more than letters, digits, blanks, '.', '-' and '_': take another"
            )
        write(to, export(step, to.name))
    except OSError as error:
        stop(f"cannot write {args.to}: {error.strerror}; make room, make it writable, or name another folder")
    print(f"{args.to} is there; it begins with {args.to / 'README.md'}")


if __name__ == "__main__":
    main()
