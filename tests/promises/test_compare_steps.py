"""compare_steps.py: its table, its files, and what it says when steps disagree."""

import json
import shutil
import sys

import pytest
from helpers import FOLDERS, ROOT, finish, planted, start

FLAGS = ["--num-samples=301", "--batch-size=12", "--use-gpu=0"]


def compare(folder, *flags, root=ROOT):
    words = [sys.executable, str(root / "compare_steps.py"), *FLAGS, *flags]
    status, out, err = finish(start(words, folder), 240)
    print(out, err)
    return status, out, err


def test_it_compares_all_steps_at_all_ranks(tmp_path):
    status, out, _ = compare(
        tmp_path, "--ranks=2,3", "--precision=float64", "--epochs=1", "--num-samples=151"
    )
    assert status == 0
    assert "The steps agree (weights and losses within 1e-10, the same number of correct answers)" in out
    result = json.loads((tmp_path / "comparison.json").read_text())
    runs = [(run["step"][:2], run["ranks"]) for run in result["runs"]]
    assert runs == [("01", 1), *((step, ranks) for step in FOLDERS if step != "01" for ranks in (2, 3))]
    assert all(len(run["losses"]) == 12 for run in result["runs"])
    for run in result["runs"]:
        assert any(
            line.startswith(run["step"]) and f"{run['final_loss']:.4f}" in line for line in out.splitlines()
        )
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("precision", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_step_that_trains_wrong_makes_it_exit_1(tmp_path, precision):
    # In float64 a small mistake is enough; in float32 only one that costs accuracy can be seen.
    wrong = {"float64": "(1.001 * loss).backward()", "float32": "(-loss).backward()"}[precision]
    planted(tmp_path, "02", ("loss.backward()", wrong), steps=tuple(FOLDERS))
    shutil.copy(ROOT / "compare_steps.py", tmp_path)
    flags = [f"--precision={precision}", "--steps=02", "--num-samples=600", "--epochs=2"]
    status, out, _ = compare(tmp_path, *flags, root=tmp_path)
    assert status == 1
    assert "The steps disagree" in out and "02_multigpu_spawn at 2 ranks: " in out


def test_weights_that_come_from_gpus_are_compared_on_the_cpu(tmp_path):
    """The files say that their tensors were on the second GPU, as steps 01 to 04 save them on GPUs."""
    saves = "            torch.save(state, checked)  #"
    gpu = "            torch.serialization.register_package(0, lambda s: 'cuda:1', lambda s, place: None)\n"
    planted(tmp_path, "common/snapshot.py", (saves, gpu + saves), steps=tuple(FOLDERS))
    shutil.copy(ROOT / "compare_steps.py", tmp_path)
    status, out, _ = compare(tmp_path, "--steps=02,04", "--epochs=1", root=tmp_path)
    assert status == 0 and "The steps agree" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ranks=5"], "--batch-size 12 cannot be divided among 5 ranks: make it a multiple"),
        (["--ranks=0"], "must be a whole number"),
        (["--steps=01,09"], "there is no step 09, only 01"),
        (["--epochs=0"], "--epochs: must be a whole number"),
        (["--num-smaples=5"], "unrecognized arguments: --num-smaples=5"),
    ],
)
def test_bad_flags(tmp_path, flags, said):
    status, _, err = compare(tmp_path, *flags)
    assert status == 2
    assert err.startswith("error: ") and said in err
