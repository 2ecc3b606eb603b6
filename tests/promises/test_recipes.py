"""The recipes of docs/reference/your-own-model.md, taken from the page, train, stop, resume and convert.

Promise: a run of each recipe for your own model resumes bit-identically and can be converted, in steps 01,
03 and 05.
"""

import re
import shutil
import sys

import pytest
from helpers import FOLDERS, ROOT, SHARDED, finish, largest_difference, planted, start, train

from common.snapshot import snapshots, step_of

PAGE = (ROOT / "docs" / "reference" / "your-own-model.md").read_text()
[OWN] = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
RECIPES = dict(section.split("\n", 1) for section in re.split(r"^### ", PAGE, flags=re.M)[1:])
STEPS = ["01", "03", SHARDED]
# An epoch has 9 steps of 12 samples. An interrupted run has done the first 12 of 18 steps.
FLAGS = ["--num-samples=114", "--epochs=2", "--precision=float64", "--lr=0.005"]
LAST = 12
# The page's models have PyTorch's default precision, in which the steps' sums differ after the seventh digit.
IN_FLOAT64 = "torch.set_default_dtype(torch.float64)"


def hunks(recipe, step):
    """What a recipe replaces in a step, and with what."""
    found = []
    for steps, block in re.findall(r"^```diff *([\d ]*)\n(.*?)^```", recipe, re.S | re.M):
        if steps and step not in steps.split():
            continue
        if step in ("01", SHARDED):
            block = block.replace("self.ddp_model", "self.model")
        # An empty line separates two places; a "+" alone is an empty line that is added.
        for hunk in block.split("\n\n"):
            lines = hunk.strip("\n").splitlines()
            old, new = (
                "".join(f"{line[1:]}\n" for line in lines if line[:1] in kinds) for kinds in (" -", " +")
            )
            found.append((old, new))
    return found


def follow(root, recipe):
    """Copies of the steps, in `root`, with the page's recipe applied."""
    for step in FOLDERS:
        planted(root, step, *hunks(recipe, step))
        text = OWN.replace("import torch\n", f"import torch\n\n{IN_FLOAT64}\n", 1)
        (root / FOLDERS[step] / "own.py").write_text(text)
    return root


def run(step, folder, root, *flags):
    ranks = 1 if step == "01" else 3
    return train(
        step, ranks, folder, *FLAGS, "--save-every=3", f"--batch-size={12 // ranks}", *flags, root=root
    )


def interrupted(whole, folder):
    """Copy to `folder` the snapshot that a whole run had in the middle of its second epoch."""
    sharded = whole.snapshot_dir.parent.name == SHARDED
    shutil.copytree(whole.snapshot_dir, folder / "snapshots")
    for path in snapshots(folder / "snapshots", sharded):
        if step_of(path) > LAST:
            shutil.rmtree(path) if sharded else path.unlink()
    [path] = snapshots(folder / "snapshots", sharded)
    assert step_of(path) == LAST
    return path


def convert(root, path):
    words = [sys.executable, str(root / FOLDERS[SHARDED] / "convert.py"), str(path)]
    status, out, err = finish(start(words, path.parent))
    assert status == 0, out + err
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.sample(4)
@pytest.mark.few(1)
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_stops_resumes_and_converts(tmp_path, name):
    root = follow(tmp_path / "root", RECIPES[name])
    whole = {step: run(step, tmp_path / step, root) for step in STEPS}
    reference = whole["03"]
    first, second = reference.losses.view(2, 9).mean(dim=1)
    assert second < first
    # With dropout or augmentation, another number of ranks draws other random numbers.
    alike = [] if re.search("augment=True|import.*(Classifier|RowReader|Tied)", RECIPES[name]) else STEPS
    for step in alike:
        difference = largest_difference(whole[step].weights, reference.weights)
        print(f"{name}: steps {step} and 03 differ by {difference:.2g}")
        assert difference < 1e-10  # they add in different orders
    for step in STEPS:
        folder = tmp_path / "resumed" / step
        interrupted(whole[step], folder)
        resumed = run(step, folder, root)
        assert re.search(rf"^resumed from snapshots: .*, step {LAST}$", resumed.out, re.M)
        assert largest_difference(resumed.weights, whole[step].weights) == 0.0
        assert resumed.test == whole[step].test
    for first, then in (("03", SHARDED), (SHARDED, "03")):
        folder = tmp_path / "converted" / then
        convert(root, interrupted(whole[first], folder))
        converted = run(then, folder, root)
        assert re.search(rf"^resumed from snapshots: .*, step {LAST}$", converted.out, re.M)
        difference = largest_difference(converted.weights, whole[first].weights)
        print(f"{name}: converted for step {then}: {difference:.2g}")
        assert difference < 1e-10
