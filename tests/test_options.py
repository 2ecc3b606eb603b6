"""Flags: answered at once, one line when wrong, exit status 2."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FOLDERS, ROOT, command, environment, finish, start, train

SCRIPTS = [ROOT / folder / "train.py" for folder in FOLDERS.values()]


QUICK = [(script, "--help", 0) for script in [*SCRIPTS, ROOT / "compare_steps.py"]]
QUICK += [(script, flag, 2) for script in SCRIPTS for flag in ("--no-such-flag", "--epochs=0")]


@pytest.mark.parametrize(
    ("script", "flag", "status"), QUICK, ids=lambda x: getattr(x, "parent", Path(str(x))).name
)
def test_help_and_bad_flags_are_answered_without_torch(script, flag, status):
    words = [sys.executable, "-X", "importtime", str(script), flag]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    imported = [line.split("|")[-1].strip() for line in done.stderr.splitlines() if "import time:" in line]
    print(f"{script.parent.name} {flag}: status {done.returncode}, {len(imported)} modules")
    assert done.returncode == status
    assert len(imported) > 20 and "torch" not in imported


@pytest.mark.parametrize("step", [step for step in FOLDERS if step != "01"])
def test_several_ranks_print_an_error_once(tmp_path, step):
    flags = ["--num-samples=1", "--batch-size=1", "--use-gpu=0"]
    status, _, err = finish(start([*command(step, 2), *flags], tmp_path))
    print(err)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status != 0
    assert lines == ["error: a step takes 2 images, synthetic-1 has 1: lower --batch-size"]
    if step == "02":  # torchrun has its own status and report
        assert status == 2 and "Traceback" not in err


def test_underscores_work_in_flags_and_stay_in_values(tmp_path):
    flags = ["--num_samples=128", "--batch_size", "64", "--epochs=1", "--snapshot_dir=my_snapshots"]
    status, _, err = finish(start([*command("01", 1), *flags], tmp_path))
    assert status == 0, err
    assert (tmp_path / "my_snapshots" / "snapshot-00000002.pt").exists()


def test_started_with_python_step_03_prints_the_command_that_works(tmp_path):
    script = str(ROOT / FOLDERS["03"] / "train.py")
    flags = ["--num-samples=128", "--batch-size=32", "--epochs=1", "--snapshot-dir=a folder"]
    status, _, err = finish(start([sys.executable, script, *flags], tmp_path))
    print(err)
    assert status == 2 and err.count("\n") == 1
    printed = shlex.split(err.split("use torchrun: ")[1])
    assert printed[0] == "torchrun"
    words = [sys.executable, "-m", "torch.distributed.run", *printed[1:]]
    status, out, err = finish(start(words, tmp_path))
    assert status == 0, err
    assert "2 × batch 32 = 64 images a step" in out
    assert (tmp_path / "a folder" / "snapshot-00000002.pt").exists()


@pytest.mark.parametrize("step", FOLDERS)
def test_every_rank_speaks_with_verbose_and_only_one_warns(proof, tmp_path, step):
    ranks = 1 if step == "01" else 3
    use_gpu = 0 if step == "05" else 1  # step 05 takes no CPUs for GPUs: test_fsdp.py
    flags = ["--num-samples=128", "--batch-size=16", "--epochs=1", "--verbose", f"--use-gpu={use_gpu}"]
    status, out, err = finish(start([*command(step, ranks), *flags], tmp_path, CUDA_VISIBLE_DEVICES=""))
    print(out, err)
    assert status == 0
    warning = "warning: --use-gpu 1, but CUDA is not available here: training on the CPU"
    assert err.count(warning) == use_gpu
    assert ", cpu, float32" in out
    batches = 128 // (16 * ranks)
    for rank in range(ranks):
        assert f"[rank {rank}] local rank {rank}, world size {ranks}, device cpu" in out
        assert f"[rank {rank}] epoch 1: {128 // ranks} images in this rank's shard, {batches} batches" in out
        assert f"[rank {rank}] step {batches}: {batches} batches of 16" in out
    assert "[rank" not in proof(step, ranks).out


def test_two_spawns_at_the_same_time_do_not_meet(tmp_path):
    flags = ["--num-samples=128", "--batch-size=32", "--epochs=1"]
    (tmp_path / "other").mkdir()
    first = start([*command("02", 2), *flags], tmp_path)
    second = start([*command("02", 2), *flags], tmp_path / "other")
    for process in (first, second):
        status, out, err = finish(process)
        assert status == 0, err
        assert "done: 128 images" in out


@pytest.mark.parametrize(("step", "flags"), [("02", ["--precision=bf16"]), ("03", ["--compile"])])
def test_bf16_and_compile_train(tmp_path, step, flags):
    run = train(step, 2, tmp_path, "--num-samples=512", "--batch-size=16", "--epochs=2", *flags)
    first, last = run.losses[:4].mean().item(), run.losses[-4:].mean().item()
    print(f"{run.name} {flags}: loss {first:.3f}, then {last:.3f}; test loss {run.test['loss']!r}")
    assert last < first - 0.3
    # Summed in float32 or more: a sum in bf16 has eight bits, and 85 images would make a round number.
    assert run.test["loss"] * 85 % 0.25 != 0
    assert not any("_orig_mod" in name or name.startswith("module.") for name in run.weights)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc: Linux only")
@pytest.mark.parametrize(
    ("step", "case"),
    [
        ("02", "as it is"),
        ("02", "ends in an exception"),
        ("02", "without the early import"),
        ("04", "as it is"),
        ("04", "ends in an exception"),
        ("05", "as it is"),
        ("05", "ends in an exception"),
        ("05", "with the mesh's groups"),
    ],
)
def test_no_thread_of_gloo_outlives_the_process_group(tmp_path, step, case):
    """One that does aborts the process at exit, in a few of a hundred runs."""
    edits = {"        cleanup()\n": "        cleanup()\n        print('threads', threads(), flush=True)\n"}
    if case == "ends in an exception":
        edits["        self.load_snapshot()\n"] = (
            "        self.load_snapshot()\n        raise ZeroDivisionError\n"
        )
    elif case == "without the early import":
        edits["import torch.distributed.nn "] = "# "
    elif case == "with the mesh's groups":
        edits["mesh._pg_registry.clear()"] = "pass"
    source = (ROOT / FOLDERS[step] / "train.py").read_text()
    for right, wrong in edits.items():
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    threads = (
        "def threads():\n    return [path.read_text() for path in Path('/proc/self/task').glob('*/comm')]"
    )
    source = source.replace("class Trainer:", f"{threads}\n\n\nclass Trainer:")
    shutil.copytree(ROOT / "common", tmp_path / "common")
    (tmp_path / FOLDERS[step]).mkdir()
    (tmp_path / FOLDERS[step] / "train.py").write_text(source)
    flags = ["--num-samples=128", "--epochs=1", "--use-gpu=0"]
    _, out, err = finish(start([*command(step, 2, tmp_path), *flags], tmp_path))
    lines = [line for line in out.splitlines() if line.startswith("threads")]
    print(case, lines, err[-300:])
    assert lines
    assert any("gloo" in line for line in lines) == case.startswith("with")
