"""What a user can get wrong, in every step: one line that says what to do, status 2, nothing left behind.

Promise: in every step, a user's mistake gives one line that says what to do, and exit status 2. Under
torchrun, this line is also the last one on the screen.
"""

import json
import os
import resource
import socket
import sys

import pytest
import torch
from helpers import FOLDERS, ROOT, UNDER_TORCHRUN, command, errors, finish, planted, start, wait_until

from common import options
from common.mnist import FILES
from common.snapshot import FORMAT, REMEDY, write

ALL = list(FOLDERS)
LONG = "long" * 1300  # no file system takes such a name
DIGITS = "--num-samples=128"
ANOTHER = "choose another --metrics or --profile"

# One rank as torchrun would start it. Port 0 is any free port, which is enough for a single rank.
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
ONE_RANK |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def in_session(pid):
    """The processes of the session that `pid` leads."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(name)) == pid:
                found.append(int(name))
        except ProcessLookupError:
            continue
    return found


def run(step, flags, folder, **env):
    """Run a step's script with one rank; return its status, stdout and stderr. It leaves no process behind.

    It runs as under torchrun, which shows the rank's error file in its summary, the last thing on the screen.
    """
    world = {"02": {}, "01": {}}.get(step, {**ONE_RANK, "TORCHELASTIC_ERROR_FILE": str(folder / "summary")})
    extra = {name: value for name, value in {**world, **env}.items() if value is not None}
    words = [sys.executable, str(ROOT / FOLDERS[step] / "train.py")]
    process = start([*words, *(["--world-size=1"] if step == "02" else []), *flags], folder, **extra)
    status = process.process.wait(60)
    wait_until(lambda: not in_session(process.pid), "the end of all processes that it started", 20)
    if step in UNDER_TORCHRUN and status:
        summary = json.loads((folder / "summary").read_text())["message"]
        assert [summary["message"]] == errors(process.err) and int(summary["extraInfo"]["timestamp"])
    return status, process.out, process.err


def check(result, said):
    status, out, err = result
    print(f"status {status}: {err}")
    assert status == 2
    assert "Traceback" not in err
    assert len(errors(err)) == 1 and said in errors(err)[0], f"not one line with '{said}':\n{err}"
    assert "test loss" not in out


WHOLE = "must be a whole number from 1 to 1000000000, not '"
# flags: what the error says. A flag that only some steps have begins with a step's number.
FLAGS = {
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
    "--epoch=3": "unrecognized arguments: --epoch=3",  # no abbreviations: a typo is not another flag
    "--Epochs=3": "unrecognized arguments",
    "-epochs 3": "unrecognized arguments",
    "extra": "unrecognized arguments: extra",
    "--epochs": "--epochs: expected one argument",
    "--epochs=": WHOLE,
    "--epochs=0": WHOLE,
    "--epochs=-1": WHOLE,
    "--epochs=1.5": WHOLE,
    "--epochs=two": WHOLE,
    "--epochs=٣": WHOLE,  # a digit to Python, and a surprise to everybody else
    "--epochs=1000000000000": "must be a whole number from 1 to 1000000000, not '1000000000000'",
    "--batch-size=0": WHOLE,
    "--batch-size=-64": WHOLE,
    "--batch-size=1e3": WHOLE,
    "--lr=0": "must be a number above 0, not '0'",
    "--lr=-0.1": "must be a number above 0",
    "--lr=nan": "must be a number above 0",
    "--lr=inf": "must be a number above 0",
    "--lr=fast": "must be a number above 0",
    "--eval-batch-size=0": "must be a whole number from 1 to 1000000000, not '0'",
    "--schedule=cosine": "--schedule: invalid choice: 'cosine'",
    "--seed=-1": "must be a whole number from 0 to 4294967295, not '-1'",
    "--seed=4294967296": "must be a whole number from 0 to 4294967295",
    "--seed=x": "must be a whole number from 0",
    "--num-samples=0": "--num-samples: must be a whole number from 1 to 10000000, not '0'",
    "--num-samples=many": "--num-samples: must be a whole number from 1 to 10000000, not 'many'",
    "--num-samples=99999999": "--num-samples: must be a whole number from 1 to 10000000, not '99999999'",
    "--vit-width=0": "must be a multiple of 64 from 64 to 16384, not '0'",
    "--vit-width=100": "must be a multiple of 64 from 64 to 16384, not '100'",
    "--vit-width=640000": "must be a multiple of 64 from 64 to 16384",
    "--vit-depth=0": WHOLE,
    "--save-every=0": WHOLE,
    "--save-every=often": WHOLE,
    "--epoch=1": "unrecognized arguments: --epoch=1",
    "--use-gpu=2": "--use-gpu: invalid choice: 2",
    "--use-gpu=yes": "--use-gpu: invalid int value: 'yes'",
    "--model=gpt": "--model: invalid choice: 'gpt'",
    "--model=": "--model: invalid choice: ''",
    "--precision=float16": "--precision: invalid choice: 'float16'",
    "--compile=1": "ignored explicit argument '1'",
    "--verbose=yes": "ignored explicit argument 'yes'",
    "02 --world-size=0": WHOLE,
    "02 --world-size=-2": WHOLE,
    "02 --world-size=all": WHOLE,
    "04 --accumulate=0": WHOLE,
    "04 --clip-norm=0": "must be a number above 0",
    "04 --timeout=0": WHOLE.replace("from 1", "from 5"),
    "04 --timeout=99999999999": WHOLE.replace("from 1", "from 5"),
    "05 --accumulate=0": WHOLE,
    "05 --clip-norm=nan": "must be a number above 0",
    "05 --timeout=soon": WHOLE.replace("from 1", "from 5"),
    "05 --replicas=0": WHOLE,
    "05 --replicas=2": "--replicas 2 must divide the 1 ranks",
    "--model=resnet18 --batch-size=1": "--model resnet18 needs a --batch-size of 2 or more: batch norm",
    f"{DIGITS} --batch-size=129": "a step takes 129 samples, synthetic-128 has 128: lower --batch-size",
    "--num-samples=1 --batch-size=2": "a step takes 2 samples, synthetic-1 has 1",
    "--data-dir=/dev/null": "cannot download MNIST to /dev/null",
    "--data-dir=file": "cannot download MNIST to file: File exists; point --data-dir elsewhere",
    "--data-dir=file/below": "cannot download MNIST to file/below: Not a directory",
    "--data-dir=/proc/nowhere": "cannot download MNIST to /proc/nowhere",
    f"--data-dir={LONG}": "File name too long; point --data-dir elsewhere",
    f"{DIGITS} --snapshot-dir=file": "cannot write to file: File exists; make room",
    f"{DIGITS} --snapshot-dir=file/below": "cannot write to file/below: Not a directory",
    f"{DIGITS} --snapshot-dir=/proc/nowhere": "cannot write to /proc/nowhere",
    f"{DIGITS} --snapshot-dir=/proc": "cannot write to /proc",
    f"{DIGITS} --snapshot-dir={LONG}": f"File name too long; {REMEDY}",
    f"{DIGITS} --profile=file/below": f"cannot write file/below: Not a directory; {ANOTHER}",
    f"{DIGITS} --metrics=/dev/null/x": "cannot write /dev/null: File exists; choose another --metrics",
    f"{DIGITS} --metrics=.": "cannot write .: Is a directory; choose another --metrics",
    f"{DIGITS} --metrics={LONG}": "File name too long",
}


def case(step, flags):
    """Each flag, in one step. A sample shows that the other steps have the same parser."""
    alone = step == ("03" if "--snapshot-dir" in flags else "01") or flags[:2] == step
    return pytest.param(step, flags, marks=[] if alone else [pytest.mark.slow, pytest.mark.sample(60)])


@pytest.mark.few(36)
@pytest.mark.parametrize(
    ("step", "flags"),
    [case(step, flags) for flags in FLAGS for step in ALL if not flags[0].isdigit() or flags[:2] == step],
    ids=lambda value: value[:40],
)
def test_bad_flags(tmp_path, step, flags):
    (tmp_path / "file").write_text("a file")
    words = [word for word in flags.split(" ") if word not in ALL]
    use_gpu = [] if "--use-gpu" in flags else ["--use-gpu=0"]
    check(run(step, [*use_gpu, *words], tmp_path), FLAGS[flags])


@pytest.mark.parametrize("flags", [[], ["--use-gpu=1"]], ids=["by default", "--use-gpu=1"])
def test_step_05_does_not_take_cpus_for_gpus(tmp_path, flags):
    check(run("05", [DIGITS, *flags], tmp_path), "there are none here: practice on CPUs with --use-gpu 0")


def sized(path, size, header=b""):
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)


IMAGES, LABELS = bytes([0, 0, 8, 3]), bytes([0, 0, 8, 1])
DAMAGED_DATA = {
    "cut off": lambda path, size: sized(path, size // 2, IMAGES),
    "empty": lambda path, size: sized(path, 0),
    "too long": lambda path, size: sized(path, size + 1, IMAGES),
    "with another header": lambda path, size: sized(path, size, LABELS),
    "a folder": lambda path, size: path.mkdir(),
}


@pytest.mark.few(12)
@pytest.mark.parametrize("damage", [*DAMAGED_DATA, "a label of 200"])
@pytest.mark.parametrize("step", ALL)
def test_damaged_mnist(tmp_path, step, damage):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in FILES.items():
        sized(raw / name, size, IMAGES if "images" in name else LABELS)
    name = "train-images-idx3-ubyte"
    if damage in DAMAGED_DATA:
        (raw / name).unlink()
        DAMAGED_DATA[damage](raw / name, FILES[name])
    else:
        name = "train-labels-idx1-ubyte"
        sized(raw / name, FILES[name], LABELS + bytes(100) + b"\xc8")
    said = "cannot read" if damage == "a folder" else "is damaged"
    result = run(step, ["--use-gpu=0", "--data-dir=data"], tmp_path)
    check(result, said)
    assert name in result[2] and "point --data-dir elsewhere" in result[2]


OTHER = {
    "seed": (7, "was made with seed 7, this run has seed 0"),
    "precision": ("bf16", "was made with precision bf16, this run has precision float32"),
    "run": ("cnn-mnist", "was made with run cnn-mnist, this run has run cnn-synthetic-128"),
    "format": (1, f"was made with format 1, this run has format {FORMAT} (written by Python "),
}


def plain_snapshot(path, **changed):
    state = {"format": FORMAT, "run": "cnn-synthetic-128", "seed": 0, "precision": "float32"}
    state |= {"epoch": 0, "samples_seen": 0, "rng": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, {**state, "global_step": 1, **changed})


@pytest.mark.few(6)
@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("step", [step for step in ALL if step != "05"])  # step 05: see test_snapshot.py
def test_a_snapshot_of_another_run(tmp_path, step, key):
    value, said = OTHER[key]
    plain_snapshot(tmp_path / "snapshots" / "snapshot-00000001.pt", **{key: value})
    check(run(step, ["--use-gpu=0", DIGITS, "--snapshot-dir=snapshots"], tmp_path), said)


UNUSABLE = {
    "of no length": lambda path: path.touch(),
    "text": lambda path: path.write_text("not a snapshot"),
    "cut off": lambda path: (plain_snapshot(path), os.truncate(path, 1000)),
    "of another program": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "an empty folder": lambda path: path.mkdir(),
}


@pytest.mark.few(8)
@pytest.mark.parametrize("what", UNUSABLE)
@pytest.mark.parametrize("step", ALL)
def test_no_snapshot_can_be_used(tmp_path, step, what):
    folder = tmp_path / "snapshots"
    folder.mkdir()
    path = folder / "snapshot-00000001.pt"
    if step == "05":
        (folder / "snapshot-00000001").mkdir()
        path = folder / "snapshot-00000001" / "state.pt"
    UNUSABLE[what](path)
    result = run(step, ["--use-gpu=0", DIGITS, "--snapshot-dir=snapshots"], tmp_path)
    check(result, "no good snapshot is left; to start again, move snapshots away")
    assert path.exists()


@pytest.mark.parametrize("step", ALL)
def test_the_other_kind_of_snapshot(tmp_path, step):
    path = tmp_path / "snapshots" / ("snapshot-00000009.pt" if step == "05" else "snapshot-00000009")
    path.mkdir(parents=True)
    result = run(step, ["--use-gpu=0", DIGITS, "--snapshot-dir=snapshots"], tmp_path)
    check(result, "to resume from it: python 05_fsdp/convert.py snapshots/snapshot-00000009")


@pytest.mark.parametrize("step", ["01", "02"])
def test_torchrun_is_not_for_steps_01_and_02(tmp_path, step):
    """Each of torchrun's processes would train on its own, and save to the same folder."""
    script = str(ROOT / FOLDERS[step] / "train.py")
    words = [*command("03", 2)[:-1], script, DIGITS, "--use-gpu=0"]
    status, out, err = finish(start(words, tmp_path))
    print(status, out, err)
    said = f"error: this script is not for torchrun; use: python {script} {DIGITS} --use-gpu=0"
    assert status == 1 and errors(err) == [said] and not (tmp_path / "checkpoints").exists()


@pytest.mark.sample(2)
@pytest.mark.few(1)
@pytest.mark.parametrize("step", UNDER_TORCHRUN)
def test_torchs_old_launcher_is_told_apart(tmp_path, step):
    """`python -m torch.distributed.launch` gives each process a flag."""
    words = [sys.executable, "-m", "torch.distributed.launch", "--nproc-per-node=1", "--master-port=0"]
    script = str(ROOT / FOLDERS[step] / "train.py")
    status, _, err = finish(start([*words, script, DIGITS], tmp_path))
    print(status, err)
    said = "error: torch.distributed.launch passes --local-rank, which is not accepted here: use torchrun: "
    remedy = f"torchrun --standalone --nproc-per-node=2 {script} {DIGITS}"
    assert status == 1 and errors(err) == [said + remedy]


def test_an_error_is_told_where_torchruns_file_cannot_be_written(tmp_path):
    extra = {**ONE_RANK, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "nowhere" / "file")}
    words = [sys.executable, str(ROOT / FOLDERS["03"] / "train.py"), "--epochs=0"]
    status, out, err = finish(start(words, tmp_path, **extra))
    assert status == 2 and len(errors(err)) == 1 and "Traceback" not in err, out + err


def test_half_an_error_is_not_left_for_torchrun(tmp_path, monkeypatch):
    """torchrun could not read it, and would show that error instead. Here, a limit acts as a full disk."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    _, most = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, most))  # bytes
    try:
        options.tell_torchrun("planted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "error").exists()
    options.tell_torchrun("planted")
    assert json.loads((tmp_path / "error").read_text())["message"]["message"] == "planted"


def test_the_status_is_right_where_an_error_cannot_be_printed(tmp_path):
    words = [sys.executable, str(ROOT / FOLDERS["01"] / "train.py"), "--epochs=0"]
    process = start(["sh", "-c", 'exec "$@" 2> /dev/full', "sh", *words], tmp_path)
    assert finish(process) == (2, "", "")


@pytest.mark.parametrize("name", ["g++", "gcc", "clang"])
def test_any_of_three_compilers_will_do(tmp_path, monkeypatch, name):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not options.has_compiler()
    (tmp_path / name).touch(0o755)
    assert options.has_compiler()


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_a_compiler_may_have_any_name(tmp_path, monkeypatch, variable):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "my-compiler").touch(0o755)
    assert not options.has_compiler()
    monkeypatch.setenv(variable, "my-compiler")
    assert options.has_compiler()


def test_who_compiles_nothing_needs_no_compiler(tmp_path, monkeypatch):
    """convert.py has the same parser, but no --compile."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vars(options.OneLineParser().parse_args([])) == {}


@pytest.mark.parametrize("step", ["01", "03"])
def test_no_compiler(tmp_path, step):
    (tmp_path / "bin").mkdir()
    check(
        run(step, [DIGITS, "--compile"], tmp_path, PATH=str(tmp_path / "bin")),
        "--compile needs a C++ compiler",
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", ["01", "04"])
def test_a_terminal_that_is_ascii_only(tmp_path, step):
    flags = [DIGITS, "--use-gpu=0", "--epochs=1", "--batch-size=16"]
    run = finish(start([*command(step, 1), *flags], tmp_path, real=True, PYTHONIOENCODING="ascii"))
    print(*run)
    assert run[0] == 0 and "1 ? batch 16 = 16 samples a step" in run[1]


HOW = "use torchrun: torchrun --standalone --nproc-per-node=2 "
ENVIRONMENTS = {
    **{f"no {name}": ({name: None}, f"not set: {name}; {HOW}") for name in ONE_RANK},
    "no torchrun": (dict.fromkeys(ONE_RANK), "not set: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, "),
}


@pytest.mark.few(10)
@pytest.mark.parametrize("case", ENVIRONMENTS)
@pytest.mark.parametrize("step", UNDER_TORCHRUN)
def test_bad_environments(tmp_path, step, case):
    changed, said = ENVIRONMENTS[case]
    check(run(step, ["--use-gpu=0", DIGITS], tmp_path, **changed), said)


@pytest.mark.parametrize("step", UNDER_TORCHRUN)
def test_a_port_in_use(tmp_path, step):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        result = run(step, ["--use-gpu=0", DIGITS], tmp_path, MASTER_PORT=port)
    check(result, f"port: {port}")
    assert "address already in use" in result[2]
    assert "is the port free, and has every rank started?" in result[2]


@pytest.mark.few(1)
@pytest.mark.parametrize("step", [step for step in UNDER_TORCHRUN if step != "03"])
def test_a_rank_that_is_not_started(tmp_path, step):
    result = run(step, ["--use-gpu=0", DIGITS, "--timeout=5"], tmp_path, WORLD_SIZE="2")
    check(result, "the ranks did not find each other: ")


def test_every_rank_saves(tmp_path):
    """Both have written the same file when the first one gives it its name."""
    edit = "            if self.rank == 0:  # all ranks have the same weights\n"
    planted(tmp_path, "03", (edit, edit.replace("self.rank == 0", "True")))
    renames = "        os.replace(temporary, path)\n"
    arrived = "open(f'here-{os.getpid()}', 'w').close()"
    both = "len(list(Path().glob('here-*'))) == 2"
    waits = f"import time; {arrived}; [time.sleep(0.01) for _ in range(6000) if not {both}]"
    planted(tmp_path, "common/snapshot.py", (renames, f"        {waits}\n{renames}"))
    process = start([*command("03", 2, tmp_path), DIGITS, "--use-gpu=0", "--epochs=1"], tmp_path)
    status, _, err = finish(process)
    print(err)
    assert status == 1 and len(errors(err)) == 1
    assert errors(err)[0].endswith("; another rank writes this file, too: only one rank may save")
