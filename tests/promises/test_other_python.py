"""What one Python and torch have saved, another Python and torch can resume.

The other Python is given on the command line: `--other-python=/path/to/python`, from an environment with
requirements.txt installed. `.ci/run` uses the oldest torch, and Debian's Python if there is one.

Promise: a snapshot written with one version of Python and torch can be resumed with another, older or newer
(in CI).
"""

import subprocess
import sys

import pytest
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    PROOF,
    ROOT,
    SHARDED,
    disagreements,
    finish,
    newest,
    ranks_of,
    saved,
    start,
    states_equal,
    train,
)

from common import snapshot

pytestmark = pytest.mark.other
SAYS = "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)"


@pytest.fixture
def other(request):
    """The path of the other Python."""
    python = request.config.getoption("--other-python")
    if python is None:
        pytest.skip("needs a second Python with torch: --other-python=<its path>")
    for path in (sys.executable, python):
        print(subprocess.run([path, "-c", SAYS], check=True, capture_output=True, text=True).stdout, end="")
    return python


@pytest.mark.parametrize("first", ["this Python", "the other"])
@pytest.mark.parametrize("step", ["01", "03", SHARDED])
def test_one_resumes_what_the_other_has_saved(proof, other, tmp_path, step, first):
    writer, reader = (sys.executable, other) if first == "this Python" else (other, sys.executable)
    ranks = ranks_of(step)
    flags = [*PROOF, f"--batch-size={GLOBAL_BATCH // ranks}"]
    train(step, ranks, tmp_path, *flags, "--epochs=1", real=True, python=writer)
    [step_saved] = saved(tmp_path / "snapshots")
    if step == SHARDED:
        [path] = snapshot.snapshots(tmp_path / "snapshots", sharded=True)
        words = [reader, str(ROOT / FOLDERS[SHARDED] / "convert.py"), str(path)]
        status, out, err = finish(start(words, tmp_path, real=True))
        assert (status, out) == (0, f"wrote {path}.pt\n"), err
        plain, problem = snapshot.read(path.with_suffix(".pt"))
        assert problem == "" and states_equal(plain["model"], newest(path.parent)["model"])
        path.with_suffix(".pt").unlink()
    run = train(step, ranks, tmp_path, *flags, real=True, python=reader)
    assert f": epoch 1, step {step_saved}\n" in run.out
    assert disagreements(run, proof(step, ranks)) == []
