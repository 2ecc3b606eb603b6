"""Start a project of your own from one of the five steps: a folder with that step, and only what it needs.

    python workshop/export.py 03 DIR     DIR is new, or empty

DIR gets train.py and the files beside it, the modules of `common` and `beyond` that they import, a README,
the license, requirements.txt, and a test. Nothing in it refers to a file that is not there. Exit status: 0
when DIR is there, 2 when the arguments are wrong or DIR cannot be written. After an error, DIR is as it was
before.
"""

import argparse
import os
import re
import shutil
import string
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "workshop" / "export"
STEPS = {folder.name[:2]: folder for folder in sorted(ROOT.glob("0[1-9]_*"))}

THIS_FOLDER = "sys.path.insert(0, str(Path(__file__).resolve().parent))  # this folder, where `common` is\n"

# Regular expressions for text that would be wrong in the new folder, and what replaces it. They apply to
# every copied file. Before that, paths into the step's own folder have become local.
EDITS = [
    # `common` is beside train.py now. With PYTHONSAFEPATH, Python does not look there by itself.
    (r"(sys\.path\.insert\(0, .*\n)+", THIS_FOLDER),
    # Snapshots go to a folder with the project's name, which may change.
    (r"\bcheckpoints/0\d_\w+/", "checkpoints/…/"),
    # The tests and the Dockerfile are not copied.
    (r"\b(test_\w+)\.py\b", r"\1 of the original"),
    (r"\bOur tests\b", "The original's tests"),
    (r"\bof the Dockerfile beside the README\b", "your own"),
    # Another step has no converter.
    (r", see 05_fsdp/sharded\.py", ""),
    (r"\bpython 05_fsdp/convert\.py \{\S+\}", "convert it with step 05 of the original"),
    # The launcher has only one script to start. Its lines about --step go.
    (r" step=04 ", " script=train.py "),
    (r"(?m)^.*(--step[ )]|\$\{?step\b).*\n", ""),
    (r"0\*/train\.py", "*.py"),
]

# test_train.py is written for steps 03 and 04.
TORCHRUN = '"-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"'
TEST_EDITS = {
    "01": [(TORCHRUN, '"train.py"')],
    "02": [(TORCHRUN, '"train.py", "--world-size=2"')],
    "05": [
        ("from common import snapshot\n", "import convert\nimport sharded\nfrom common import snapshot\n"),
        ("snapshot.snapshots(folder)", "snapshot.snapshots(folder, sharded=True)"),
        ("snapshot.read(", "sharded.read("),
        ("return state\n", "return convert.gather(state)\n"),
    ],
}


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def readme(step: str, name: str) -> str:
    """The new folder's README: the template without the blocks that are only for other steps."""

    def keep(block: re.Match[str]) -> str:
        return block["text"] if step in block["steps"].split() else ""

    template = (TEMPLATES / "README.md.in").read_text()
    blocks = r"<!-- only (?P<steps>[\d ]+) -->\n(?P<text>.*?)(?=<!-- )"
    text = re.sub(blocks, keep, template, flags=re.DOTALL)
    text = text.replace("<!-- end -->\n", "")
    return string.Template(text).substitute(name=name, step=step)


def test_file(step: str) -> str:
    """The new folder's test."""
    text = (TEMPLATES / "test_train.py").read_text()
    for old, new in TEST_EDITS.get(step, []):
        assert old in text, old
        text = text.replace(old, new)
    return text


def requirements() -> str:
    """The lines of requirements.txt, without the one that only compare_steps.py needs."""
    lines = (ROOT / "requirements.txt").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("#", "matplotlib")))


def modules(scripts: list[Path]) -> list[Path]:
    """The files of `common` and `beyond` that these scripts import, and those that they import in turn."""
    found = [ROOT / "common" / "__init__.py"]
    unread = list(scripts)
    while unread:
        text = unread.pop().read_text()
        for folder, name in re.findall(r"^\s*from (common|beyond)(?:\.| import )(\w+)", text, re.MULTILINE):
            path = ROOT / folder / f"{name}.py"
            if path not in found:
                found.append(path)
                unread.append(path)
    return found


def copied(step: str) -> dict[str, Path]:
    """The files that are copied, by their paths in the new folder."""
    folder = STEPS[step]
    beside = [path for path in folder.iterdir() if path.suffix in (".py", ".sbatch", ".yaml")]
    beside = [path for path in beside if path.name != "my_train.py"]  # which the walkthrough makes
    if step == "04":
        beside.append(ROOT / "launch_multinode.sh")
    files = {path.name: path for path in beside}
    for path in modules([path for path in beside if path.suffix == ".py"]):
        files[f"{path.parent.name}/{path.name}"] = path
    return files


def rewritten(text: str, folder_name: str) -> str:
    """The text of a copied file, from a step's folder of this name, or from `common`."""
    text = re.sub(rf"(?<!checkpoints/)\b{folder_name}/", "", text)
    for old, new in EDITS:
        text = re.sub(old, new, text)
    return text


def export(step: str, name: str) -> dict[str, str]:
    """The texts of the new folder's files, by their paths in it. `name` is the folder's."""
    texts = {path: rewritten(file.read_text(), STEPS[step].name) for path, file in copied(step).items()}
    page = readme(step, name)
    _, _, first_paragraph, *_ = page.splitlines()
    texts["train.py"] = re.sub(r'\A"""Step 0\d: .*', f'"""{first_paragraph}', texts["train.py"])
    texts["README.md"] = page
    texts["test_train.py"] = test_file(step)
    texts["requirements.txt"] = requirements()
    texts["LICENSE"] = (ROOT / "LICENSE").read_text()
    return texts


def write(to: Path, texts: dict[str, str]) -> None:
    """Make the folder `to`, which is new or empty. It appears when it is complete. Raises OSError."""
    unfinished = to.parent / f".{to.name}.{os.getpid()}.tmp"
    try:
        for path, text in texts.items():
            file = unfinished / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            if file.suffix == ".sh":
                file.chmod(0o755)
        os.rename(unfinished, to)  # refuses to replace a folder that has files
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message} (see --help)")


def check(folder: str, to: Path) -> None:
    """`stop` if the folder cannot become `to`. Raises OSError."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        stop(f"{folder} already exists and is not an empty folder: choose a new one")
    if not to.parent.is_dir():
        stop(f"there is no folder {to.parent}: create it first")
    if to == Path.cwd():
        stop("DIR is the current folder, which would be replaced: run this from the folder above")
    if not re.fullmatch(r"[\w. -]+", to.name):  # it becomes part of a help text and of the README
        stop(f"the name '{to.name}' has more than letters, digits, spaces, '.', '-' and '_': choose another")


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", metavar="NN", help="which step: 01 to 05")
    parser.add_argument("folder", metavar="DIR", help="the new folder")
    args = parser.parse_args()
    step = args.step.zfill(2)
    to = Path(args.folder).resolve()
    if step not in STEPS:
        stop(f"there is no step {args.step}: choose one of {', '.join(STEPS)}")
    try:
        check(args.folder, to)
        write(to, export(step, to.name))
    except OSError as error:
        remedy = "make room, make it writable, or choose another folder"
        stop(f"cannot write {args.folder}: {error.strerror}; {remedy}")
    print(f"created {args.folder}; start with {Path(args.folder, 'README.md')}")


if __name__ == "__main__":
    main()
