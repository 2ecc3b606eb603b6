"""Flags: what they do in every step, and that errors and warnings are printed once."""

import ast
import re
import shlex
import sys
import time

import pytest
import torch
from helpers import FOLDERS, GROWN, ROOT, command, errors, finish, load, start, train

from common import device as devices
from common.device import setup_device
from common.options import check_torchrun, fail, make_parser
from common.run import Run
from common.snapshot import SnapshotFolder


@pytest.mark.parametrize("step", GROWN)
def test_several_ranks_print_an_error_once(tmp_path, step):
    flags = ["--num-samples=1", "--batch-size=1", "--use-gpu=0"]
    status, _, err = finish(start([*command(step, 2), *flags], tmp_path))
    print(err)
    assert status != 0
    assert errors(err) == ["error: a step takes 2 samples, synthetic-1 has 1: lower --batch-size"]
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
    assert "2 × batch 32 = 64 samples a step" in out
    assert (tmp_path / "a folder" / "snapshot-00000002.pt").exists()


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("step", FOLDERS)
def test_every_rank_speaks_with_verbose_and_only_one_warns(proof, tmp_path, step):
    ranks = 1 if step == "01" else 3
    use_gpu = 0 if step == "05" else 1  # without a GPU, step 05 ends with an error: test_fsdp.py
    flags = ["--num-samples=128", "--batch-size=16", "--epochs=1", "--verbose", f"--use-gpu={use_gpu}"]
    status, out, err = finish(start([*command(step, ranks), *flags], tmp_path, CUDA_VISIBLE_DEVICES=""))
    print(out, err)
    assert status == 0
    warning = "warning: --use-gpu 1, but there is no GPU here that ranks can use: training on the CPU"
    assert err.count(warning) == use_gpu
    assert ", cpu, float32" in out
    batches = 128 // (16 * ranks)
    for rank in range(ranks):
        assert f"[rank {rank}] local rank {rank}, world size {ranks}, device cpu" in out
        assert f"[rank {rank}] epoch 1: {batches} steps" in out
        assert f"[rank {rank}] step {batches}: {batches} steps in " in out
    assert "[rank 0] saved checkpoints/" in out
    assert "[rank" not in proof(step, ranks).out


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_needs_no_torchrun(tmp_path, flag):
    script = str(ROOT / FOLDERS["05"] / "train.py")
    status, out, err = finish(start([sys.executable, script, flag], tmp_path))
    assert status == 0 and err == ""
    assert out.startswith("usage: train.py [-h]") and "--meta-init" in out
    assert "\nStep 05: FSDP: each rank keeps a shard of the weights" in out


def test_step_02_starts_two_ranks_where_there_is_no_gpu(tmp_path):
    script = str(ROOT / FOLDERS["02"] / "train.py")
    flags = ["--num-samples=64", "--batch-size=32", "--epochs=1"]
    status, out, err = finish(start([sys.executable, script, *flags], tmp_path))
    assert status == 0, err
    assert "2 × batch 32 = 64 samples a step" in out


def test_two_spawns_at_the_same_time_do_not_meet(tmp_path):
    flags = ["--num-samples=128", "--batch-size=32", "--epochs=1"]
    (tmp_path / "other").mkdir()
    first = start([*command("02", 2), *flags], tmp_path)
    second = start([*command("02", 2), *flags], tmp_path / "other")
    for process in (first, second):
        status, out, err = finish(process)
        assert status == 0, err
        assert "done: 128 samples" in out


@pytest.mark.parametrize(
    ("step", "flags"),
    [("02", ["--precision=bf16"]), pytest.param("03", ["--compile"], marks=pytest.mark.slow)],
)
def test_bf16_and_compile_train(tmp_path, step, flags):
    same = ["--num-samples=512", "--batch-size=16", "--epochs=2"]
    run = train(step, 2, tmp_path, *same, *flags, timeout=400)  # a compiler takes minutes on a busy machine
    first, last = run.losses[:4].mean().item(), run.losses[-4:].mean().item()
    print(f"{run.name} {flags}: loss {first:.3f}, then {last:.3f}; test loss {run.test['loss']!r}")
    assert last < first - 0.3
    # The sum is in float32 or more: in bf16, with eight bits, the sum of 85 losses would be a round number.
    assert run.test["loss"] * 85 % 0.25 != 0
    assert not any("_orig_mod" in name or name.startswith("module.") for name in run.weights)


@pytest.mark.parametrize(
    ("flag", "low", "high", "between"),
    [
        ("epochs", 1, 10**9, 1),
        ("batch-size", 1, 10**9, 1),
        ("eval-batch-size", 1, 10**9, 1),
        ("seed", 0, 2**32 - 1, 1),
        ("vit-width", 64, 2**14, 64),
        ("vit-depth", 1, 10**9, 1),
        ("num-samples", 1, 10**7, 1),
        ("num-workers", 0, 1024, 1),
        ("save-every", 1, 10**9, 1),
    ],
)
def test_the_least_and_the_most_that_a_flag_takes(capsys, flag, low, high, between):
    parser = make_parser(str(ROOT / FOLDERS["01"] / "train.py"), "")
    for value in (low, high):
        assert vars(parser.parse_args([f"--{flag}={value}"]))[flag.replace("-", "_")] == value
    for value in (low - between, high + between):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--{flag}={value}"])
        assert f"from {low} to {high}, not '{value}'" in capsys.readouterr().err


def test_what_can_be_chosen_can_be_asked_for():
    parser = make_parser(str(ROOT / FOLDERS["01"] / "train.py"), "")
    choices = {
        "use-gpu": [0, 1],
        "model": ["cnn", "resnet18", "vit"],
        "precision": ["float32", "float64", "bf16"],
        "schedule": ["constant", "one-cycle"],
    }
    for flag, values in choices.items():
        for value in values:
            assert vars(parser.parse_args([f"--{flag}={value}"]))[flag.replace("-", "_")] == value


def test_batch_norm_needs_two_samples_and_no_more(capsys):
    parser = make_parser(str(ROOT / FOLDERS["01"] / "train.py"), "")
    for model, batch_size in (("resnet18", 2), ("cnn", 1)):
        assert parser.parse_args([f"--model={model}", f"--batch-size={batch_size}"]).batch_size == batch_size
    with pytest.raises(SystemExit):
        parser.parse_args(["--model=resnet18", "--batch-size=1"])


@pytest.mark.parametrize("step", FOLDERS)
def test_a_snapshot_keeps_the_flags_that_change_what_is_trained(monkeypatch, step):
    """But not flags that identify the run, or that only change where, how fast or how verbosely it runs."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = load(ROOT / FOLDERS[step] / "train.py").parse_args()
    kept = Run(args.step, "cnn", "mnist", "float32", 0, vars(args)).settings()
    own = {"accumulate", "clip_norm"} if step > "03" else set()
    assert kept.keys() == {"epochs", "batch_size", "lr", "schedule", *own}


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2"}, False),  # some schedulers set it, too
        ({"TORCHELASTIC_RUN_ID": "x"}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}, True),
    ],
)
def test_step_01_is_refused_where_torchrun_starts_it_more_than_once(monkeypatch, capsys, variables, refused):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["01/train.py", "--snapshot-dir=a b"])
    if not refused:
        check_torchrun(expected=False)
        return
    with pytest.raises(SystemExit):
        check_torchrun(expected=False)
    said = "error: this script is not for torchrun; use: python 01/train.py '--snapshot-dir=a b'\n"
    assert capsys.readouterr().err == said


@pytest.mark.few(2)
@pytest.mark.parametrize("step", FOLDERS)
def test_help_tells_what_each_flag_takes_and_what_holds_without_it(tmp_path, step):
    status, out, err = finish(start([*command(step, 1), "--help"], tmp_path, COLUMNS="200"))
    assert status == 0, err
    print(out)
    assert ast.get_docstring(ast.parse((ROOT / FOLDERS[step] / "train.py").read_text())) in out
    shown = {
        name: (takes, text)
        for name, takes, text in re.findall(r"^  --(\S+)(?: (\S+))?\s{2,}(\S.*)$", out, re.MULTILINE)
    }
    run = train(step, 1, tmp_path / "run", "--num-samples=64")
    without = {name.replace("_", "-"): value for name, value in run.events[0].items()}
    # What the run's first event has besides flags.
    own = {"event", "step", "run", "dataset", "device", "train-samples"}
    own |= set() if step == "02" else {"world-size"}
    assert shown.keys() == without.keys() - own
    for name, (takes, text) in shown.items():
        print(f"--{name} {takes}: {text}; without: {without[name]!r}")
        assert takes in ("N", "X", "DIR", "FILE", "WORLD_SIZE") or takes[:1] in ("{", "")
        assert (takes == "") == (without[name] is False)
        if default := re.search(r" \((\S+?)(: none)?\)$", text):
            if name != "snapshot-dir":  # the run was given one
                assert default[1] == str(without[name])
        elif by_default := re.match(r"(\S+) by default", text):
            assert by_default[1] == without[name]
        else:
            assert without[name] in (None, False) or name in (
                "num-samples",
                "use-gpu",
                "metrics",
                "world-size",
            )


def test_who_is_alone_with_a_mistake_says_it_at_once(monkeypatch, capsys):
    """No launcher will end it, so it has nothing to wait for."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stopped:
        fail("planted")
    assert stopped.value.code == 2 and waited == []
    assert capsys.readouterr().err == "error: planted\n"


def test_a_gpu_for_each_process_or_none_starts(monkeypatch, capsys):
    """The number of GPUs is faked: the test is about which GPU is chosen, not whether it works."""
    monkeypatch.setattr(devices, "count_gpus", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    before = torch.get_float32_matmul_precision()
    try:
        with pytest.raises(SystemExit):
            setup_device(None, 0, 3)
        said = "error: 3 processes, but 2 GPU(s): start one per GPU, or add --use-gpu 0\n"
        assert capsys.readouterr().err == said and torch.get_float32_matmul_precision() == before
        if torch.accelerator.current_accelerator():  # what this torch is built for, even without a GPU
            assert [setup_device(None, rank, 2).index for rank in (0, 1)] == [0, 1]
            assert setup_device(1, 0, 1).type == torch.accelerator.current_accelerator().type
            assert torch.get_float32_matmul_precision() == "high"
        assert setup_device(0, 1, 3) == torch.device("cpu")
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_cores_are_shared_unless_the_user_has_said_otherwise(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_RANK", "0")
    try:
        monkeypatch.setattr(devices, "count_cores", lambda: 8)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        for of_torchrun, given, threads in (
            (None, 0, 3),
            (None, 2, 4),
            ("4", 0, 2),
            ("16", 0, 1),
            ("4", 2, 4),
        ):
            torch.set_num_threads(3)
            if of_torchrun:
                monkeypatch.setenv("LOCAL_WORLD_SIZE", of_torchrun)
            setup_device(0, 0, given) if given else setup_device(0, 0)
            assert torch.get_num_threads() == threads  # alone, a process keeps what torch has chosen
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
        torch.set_num_threads(9)
        setup_device(0, 0)
        assert torch.get_num_threads() == 8  # unless that is more than it may use
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        setup_device(0, 0, 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_snapshots_have_a_place_of_their_own_unless_they_are_given_one():
    parser = make_parser(str(ROOT / FOLDERS["01"] / "train.py"), "")
    for words, place in (([], "checkpoints/01_single_gpu/cnn-mnist"), (["--snapshot-dir=here"], "here")):
        args = parser.parse_args(words)
        run = Run(args.step, "cnn", "mnist", "float32", 0)
        assert str(SnapshotFolder(args.snapshot_dir, run).path) == place
