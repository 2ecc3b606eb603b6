"""What only a fresh start shows: each step from the command line, as a user types it.

The other tests start forks of a process that has imported torch (forks.py). They would not notice an import
that a script lacks, threads that an import leaves, or an interpreter that fails at its end. So here every
step is started with `python` or `torchrun`, without preparation, and must end as its fork does, bit for bit.

Other tests start real processes because they are about what happens between processes: a rank of step 03 is
killed under torchrun in test_resume.py, launchers get Ctrl-C in test_launcher.py, hosts lose each other in
test_multinode.py.

Promise: started by `python`, `torchrun` or `mp.spawn` in a fresh process, every step does what it does in
the other tests, which fork a process that has already imported torch.
"""

import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    ROOT,
    children,
    command,
    errors,
    finish,
    kill,
    largest_difference,
    last_saved,
    pause,
    planted,
    ranks_of,
    start,
    train,
    wait_for_step,
    wait_until,
)

SCRIPTS = [ROOT / folder / "train.py" for folder in FOLDERS.values()]


FLAGS = ["--num-samples=251", "--epochs=1", "--precision=float64"]  # 20 steps

# Code that prints the names of a rank's threads at the end of its `worker`.
THREADS = """
def threads():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
    return names


class Trainer:"""
WRITES = "__import__('os').write(1, f'threads {threads()}\\n'.encode())"
THREADS_AT_THE_END = [
    ("\nclass Trainer:", THREADS),
    ("        dist.destroy_process_group()\n", f"        dist.destroy_process_group()\n        {WRITES}\n"),
]
LINUX = Path("/proc/self/task").exists()


@pytest.mark.sample(2)
@pytest.mark.few(2)
@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=pytest.mark.slow if step == "04" else []) for step in FOLDERS]
)
def test_a_fresh_start_does_what_a_fork_does(once, tmp_path, step):
    """Also, no gloo thread outlives its group: such a thread aborts the process in a few of 100 runs."""
    ranks = ranks_of(step)
    planted(tmp_path, step, *(THREADS_AT_THE_END if step != "01" else []))
    flags = [*FLAGS, f"--batch-size={GLOBAL_BATCH // ranks}"]
    # Python then finds no modules beside a script by itself. In step 01, it also drops asserts and
    # docstrings: one step is enough, because Python compiles all of torch again for this.
    strict = {"PYTHONSAFEPATH": "1"} | ({"PYTHONOPTIMIZE": "2"} if step == "01" else {})
    run, fork = (
        train(step, ranks, tmp_path / "run", *flags, root=tmp_path, real=True, **strict),
        once(step, ranks, *flags),
    )
    difference = largest_difference(run.weights, fork.weights)
    lines = [line for line in run.out.splitlines() if line.startswith("threads")]
    print(f"step {step}, really started, against a fork: {difference} (must be 0.0); {lines}")
    assert difference == 0.0 and run.test == fork.test
    # When ranks end well, standard error has only torchrun's own warnings.
    assert "Error" not in run.err and "terminate called" not in run.err
    assert len(lines) == (ranks if step != "01" else 0)
    assert not any("gloo" in line for line in lines)


CASES = [
    ("02", "ends in an exception", False),
    ("02", "without the early import", True),  # only a fresh start lacks what is not imported
    pytest.param("04", "ends in an exception", False, marks=pytest.mark.slow),
    ("05", "ends in an exception", False),
    ("05", "with the mesh's groups", False),
]


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="counts threads in /proc: Linux only")
@pytest.mark.parametrize(("step", "case", "real"), CASES)
def test_threads_of_gloo(tmp_path, step, case, real):
    """None is left after an exception, either. Without the scripts' measures against them, some are."""
    edits = list(THREADS_AT_THE_END)
    if case == "ends in an exception":
        loads = "        self.stop = GracefulStop(self.args.timeout)\n"
        edits.append((loads, f"{loads}        raise ZeroDivisionError\n"))
    elif case == "without the early import":
        planted(tmp_path, "common/process_group.py", ("import torch.distributed.nn ", "# "))
    else:
        planted(tmp_path, "common/process_group.py", ('getattr(thing, "_pg_registry", {}).clear()', "pass"))
    planted(tmp_path, step, *edits)
    flags = ["--num-samples=128", "--epochs=1", "--use-gpu=0"]
    process = start([*command(step, 2, tmp_path), *flags], tmp_path, real)
    try:
        process.wait_for("(?s)threads.*threads")
        if case.startswith("with"):  # such a thread may keep its process from ending
            kill([*children(process.pid), process.pid])
    finally:
        _, out, err = finish(process)
    lines = [line for line in out.splitlines() if line.startswith("threads")]
    print(f"step {step}, {case}: {lines}\n{err[-300:]}")
    assert lines
    assert any("gloo" in line for line in lines) == case.startswith("with")


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("step", FOLDERS)
def test_a_fresh_start_that_gets_a_signal_saves(tmp_path, step):
    flags = [
        "--num-samples=480",
        "--epochs=1000",
        "--save-every=4",
        "--use-gpu=0",
        "--snapshot-dir=snapshots",
    ]
    process = start([*command(step, ranks_of(step)), *flags], tmp_path, real=True)
    try:
        wait_for_step(process, tmp_path / "snapshots")
        process.send_signal(signal.SIGTERM)
    finally:
        status, out, _ = finish(process)
    assert status == (143 if step < "03" else 1)
    assert f"SIGTERM: saved at step {last_saved(tmp_path / 'snapshots')}; " in out


QUICK = [(script, "--help", 0) for script in [*SCRIPTS, ROOT / "compare_steps.py"]]
QUICK += [(script, flag, 2) for script in SCRIPTS for flag in ("--no-such-flag", "--epochs=0")]


@pytest.mark.parametrize(
    ("script", "flag", "status"), QUICK, ids=lambda x: getattr(x, "parent", Path(str(x))).name
)
def test_help_and_bad_flags_are_answered(tmp_path, script, flag, status):
    status_now, out, err = finish(start([sys.executable, str(script), flag], tmp_path))
    print(f"{script.parent.name} {flag}: status {status_now}\n{out}\n{err}")
    assert status_now == status
    assert ("usage: " in out) if flag == "--help" else len(errors(err)) == len(err.splitlines()) == 1


PROGRAMS = ["compare_steps.py", "05_fsdp/convert.py", "workshop/doctor.py", "workshop/check.py"]
PROGRAMS += ["workshop/break_it.py", "workshop/bundle.py", "workshop/diff_steps.py", "workshop/export.py"]
PROGRAMS += ["benchmarks/bench.py", "tests/harness/soak.py", "tests/harness/mutants.py"]
PROGRAMS += [f"{FOLDERS[step]}/train.py" for step in ("02", "05")]  # these have modules beside them


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_finds_its_modules_with_python_safe_path(tmp_path, program):
    """With this variable, Python does not look for modules in the folder of a script."""
    words = [sys.executable, str(ROOT / program), "--help"]
    status, out, err = finish(start(words, tmp_path, real=True, PYTHONSAFEPATH="1"))
    print(out, err)
    assert status == 0 and "usage: " in out


def test_one_folder_and_common_are_all_that_a_copy_needs(tmp_path):
    """From another directory, without the repository around them."""
    for name in ("common", FOLDERS["01"]):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    words = [sys.executable, "../copy/01_single_gpu/train.py", "--num-samples=128", "--epochs=1"]
    status, out, err = finish(start(words, elsewhere, real=True))
    assert status == 0, err
    assert "done: 128 samples" in out


@pytest.mark.sample(1)
@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("step", "flag"),
    [("01", ""), pytest.param("01", "--verbose", marks=pytest.mark.slow), ("05", "--verbose")],
)
def test_what_a_run_says_can_be_read_at_once(tmp_path, step, flag):
    """By somebody who follows a file: no output waits for a full buffer. The run waits until it is read."""
    root = planted(tmp_path / "root", step, pause(3, tmp_path / "read"))
    flags = ["--num-samples=64", "--batch-size=16", "--epochs=1", "--save-every=2", "--use-gpu=0"]
    words = [*command(step, 1, root), *flags, "--snapshot-dir=s", "--metrics=m", *filter(None, [flag])]
    process = start(words, tmp_path, real=True, PYTHONUNBUFFERED="")
    try:
        process.wait_for(r"\[rank 0\] saved s/snapshot-00000002" if flag else "16 samples a step", 60)
        wait_until(lambda: '{"event": "start", ' in (tmp_path / "m").read_text(), "the metrics' first line")
        (tmp_path / "read").touch()
    finally:
        status, _, _ = finish(process)
    assert status == 0
