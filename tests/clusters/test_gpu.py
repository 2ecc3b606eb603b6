"""What the other tests prove on CPUs, proved on a GPU, and what only a GPU can show.

    make gpu                        one card is enough, with torch, torchvision, pytest and tqdm
    make gpu GPU_PRETEND=cpu        the same tests without a GPU, smaller, so that each line of them runs

`make gpu` writes what it measured, and how each test ended, to benchmarks/results/<card>.json; with
GPU_PRETEND=cpu, to a temporary folder. If only some tests run (ARGS="-k …"), the results of the others stay
as they are. Without a GPU, `make gpu` fails, and `make test-all` uses CPUs instead. `make test` leaves these
tests out.

Each run is a real process: a fork (forks.py) of a process that has used CUDA cannot use it. Such a start
takes ten seconds, so runs that do not disturb each other run at the same time.
"""

import datetime
import json
import os
import platform
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ENDED
from filelock import FileLock
from helpers import (
    FOLDERS,
    GLOBAL_BATCH,
    GROWN,
    PROOF,
    ROOT,
    after_a_step,
    command,
    disagreements,
    errors,
    finish,
    has_ended,
    largest_difference,
    last_saved,
    planted,
    read_run,
    start,
    states_equal,
    wait_for_step,
)
from test_data import data_dir, files  # noqa: F401  # fixtures: MNIST's files with synthetic digits in them
from test_exits import counting
from test_resume import DROPOUT, FLAGS, interrupted

WISH = os.environ.get("GPU_PRETEND")  # `make gpu` sets "no"
REAL = torch.cuda.is_available() and WISH != "cpu"
if WISH == "no" and not REAL:
    pytest.exit("there is no GPU here; make gpu GPU_PRETEND=cpu runs the same tests on CPUs", 2)

CARDS = torch.cuda.device_count() if REAL else 2
DEVICE = "cuda" if REAL else "cpu"
AT_ONCE = max(2, min(16, os.cpu_count() or 1)) if REAL else 2  # runs at a time; each has one thread
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(CARDS)))

pytestmark = [pytest.mark.gpu, *([] if WISH else [pytest.mark.sample(10, "make gpu, pretended")])]
two_cards = pytest.mark.skipif(CARDS < 2, reason=f"needs two GPUs; here: {CARDS}")

# Code that lists the cards on which this process has a context: each takes half a gigabyte.
CONTEXTS = "[i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)]"


def begin(words, folder, *flags, gpu=True, **extra):
    """Start a command in `folder` on the GPUs or, with `gpu=False`, on the CPU, where a fork is enough."""
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = gpu and REAL
    visible = {"CUDA_VISIBLE_DEVICES": VISIBLE} if on_gpu else {}
    return start([*words, f"--use-gpu={int(on_gpu)}", *flags], folder, on_gpu, **visible, **extra)


def train(step, folder, *flags, ranks=1, root=ROOT, gpu=True, timeout=300, **extra):
    """Like helpers.train, but on the GPU."""
    own = ["--snapshot-dir=snapshots", "--metrics=metrics.jsonl"]
    process = begin(command(step, ranks, root), folder, *own, *flags, gpu=gpu, **extra)
    status, out, err = finish(process, timeout)
    assert status == 0, f"ended with status {status}, not 0\n{process.story}"
    run = read_run(f"step {step} {' '.join(flags)}, ranks: {ranks}", folder, out, err)
    device = [event["device"] for event in run.events if event["event"] == "start"][-1]
    assert device == (DEVICE if gpu else "cpu")
    return run


def together(work, cases):
    """Do `work` for each of the cases, several at a time; raise one error that holds all errors."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(work, *case) for case in cases]
    failed = []
    for case, future in zip(cases, futures, strict=True):
        if error := future.exception():
            error.add_note(f"case: {case}")
            failed.append(error)
    if failed:
        raise ExceptionGroup(f"{len(failed)} of {len(cases)} cases", failed)
    return [future.result() for future in futures]


PROOF_HERE = [*PROOF, "--epochs=3", f"--batch-size={GLOBAL_BATCH}"]  # 159 steps


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of each step in each precision, made once for all tests that compare their runs with it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(step, precision="float64"):
        folder = base / f"gpu-{step}-{precision}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "done").exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a try that failed
                train(step, folder, *PROOF_HERE, f"--precision={precision}")
                (folder / "done").touch()
        return read_run(f"step {step}", folder)

    return get


@pytest.fixture(scope="session", autouse=True)
def record(request, tmp_path_factory):
    """What is measured, by name; it is written when the tests have ended."""
    name = torch.cuda.get_device_name(0) if REAL else "pretended"
    facts = {
        "card": name,
        "cards": CARDS if REAL else 0,
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9) if REAL else 0,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if REAL else "none",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}",
    }
    yield facts
    folder = ROOT / "benchmarks" / "results" if WISH == "no" else tmp_path_factory.mktemp("results")
    folder.mkdir(exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}.json"
    before = json.loads(path.read_text()) if path.exists() else {"tests": {}}
    ours = [item for item in request.session.items if item.path == Path(__file__)]
    facts["tests"] = before["tests"] | {item.name: item.stash[ENDED] for item in ours if ENDED in item.stash}
    path.write_text(json.dumps(before | facts, indent=1) + "\n")


def test_every_step_runs_in_every_precision(whole):
    cases = [(step, precision) for precision in ("float64", "float32", "bf16") for step in FOLDERS]
    for (step, precision), run in zip(cases, together(whole, cases), strict=True):
        first, last = run.losses[:10].mean().item(), run.losses[-10:].mean().item()
        print(f"step {step}, {precision}: loss {first:.3f}, then {last:.3f} (0.3 less)")
        assert last < first - 0.3
        assert run.test["total"] == 107


@pytest.mark.parametrize("step", GROWN)
def test_every_step_ends_where_step_01_ends(whole, record, step):
    run, reference = whole(step), whole("01")
    off = largest_difference(run.weights, reference.weights)
    record.setdefault("weights_off_by", {})[FOLDERS[step]] = off
    assert len(run.losses) >= 100
    assert disagreements(run, reference) == []


WAYS = [
    ("01", "--num-workers=2"),
    ("04", "--accumulate=2", f"--batch-size={GLOBAL_BATCH // 2}"),
    ("05", "--accumulate=2", f"--batch-size={GLOBAL_BATCH // 2}"),
    ("05", "--clip-norm=1000"),  # no norm reaches this: it is computed, and changes nothing
    ("05", "--no-reshard"),
    ("05", "--activation-checkpointing"),
    ("05", "--cpu-offload"),
    ("05", "--meta-init"),
]


def test_no_flag_changes_what_is_learned(whole, tmp_path):
    def work(step, *flags):
        return train(step, tmp_path / "".join([step, *flags]), *PROOF_HERE, *flags)

    for run in together(work, WAYS):
        assert disagreements(run, whole("01")) == [], run.name


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="compiling needs cc or gcc")
def test_compiled_it_learns_the_same(whole, tmp_path):
    def work(step):
        return train(step, tmp_path / step, *PROOF_HERE, "--compile", timeout=400)

    for run in together(work, [(step,) for step in (FOLDERS if REAL else ("05",))]):
        # Sums in another order, as in disagreements().
        assert disagreements(run, whole("01")) == [], run.name


def test_compare_steps_ends_with_a_table(tmp_path):
    """With two cards, also at two ranks. The script's own process leaves the cards to the ranks."""
    pytest.importorskip("matplotlib", reason="compare_steps.py draws with matplotlib, which is not installed")
    root = planted(tmp_path / "root", "01", steps=tuple(FOLDERS))
    script = Path(shutil.copy(ROOT / "compare_steps.py", root))
    script.write_text(f"{script.read_text()}    import torch\n\n    print('contexts', {CONTEXTS})\n")
    ranks = "1" if CARDS < 2 else "1,2" if REAL else "2"
    flags = ["--precision=float64", "--num-samples=301", "--batch-size=12", "--epochs=1"]
    process = begin([sys.executable, str(script), f"--ranks={ranks}", *flags], tmp_path)
    status, out, _ = finish(process, 400)
    print(process.story)
    assert status == 0 and "The steps agree (weights and losses within 1e-10" in out
    assert out.endswith("\ncontexts []\n")
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert {run["device"] for run in runs} == {DEVICE}
    assert {run["step"] for run in runs} == set(FOLDERS.values())


FOREVER = ["--num-samples=480", "--epochs=100000", "--save-every=4", "--snapshot-dir=snapshots"]
RAISES = after_a_step("if self.global_step == 3: raise ZeroDivisionError('planted')")
ENDS = {"SIGTERM": 143, "Ctrl-C": 130, "an exception": 1}  # for steps 01 and 02; torchrun's is 1


def test_however_it_is_ended_it_saves_and_leaves_nothing_behind(tmp_path):
    """Neither a thread of a process group, which could abort the process at its end, nor a process."""

    def work(step, end):
        folder = tmp_path / f"{step} {end}"
        edits = [RAISES] if end == "an exception" else []
        root = planted(folder / "root", step, *([counting(step)] if step > "01" else []), *edits)
        process = begin(command(step, 1, root), folder, *FOREVER)
        ranks = []
        try:
            if end != "an exception":
                wait_for_step(process, folder / "snapshots")
                ranks = process.ranks()
            if end == "SIGTERM":
                process.send_signal(signal.SIGTERM)
            elif end == "Ctrl-C":
                os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
            process.process.wait(120)
            left_over = [pid for pid in ranks if not has_ended(pid)]
        finally:
            status, out, err = finish(process)
        story = f"{step}, {end}: status {status}\n{process.story}"
        assert status == (ENDS[end] if step < "03" else 1), story
        assert left_over == [], story
        assert "terminate called" not in err and "SIGABRT" not in err, story
        threads = re.findall(r"left threads: (.*)", out)
        assert threads == (["[]"] if step > "01" else []), story
        if end == "an exception":
            assert "ZeroDivisionError: planted" in err, story
        else:
            saved = f"saved at step {last_saved(folder / 'snapshots')}; run the same command again"
            assert saved in out, story
            assert "Traceback" not in err or step > "02", story  # torchrun's own

    together(work, [(step, end) for end in ENDS for step in FOLDERS])


# cuDNN and cuBLAS may add in another order in each run. A variable makes cuBLAS keep to one order, and this
# call makes cuDNN do so. It only warns, because max pooling's backward pass does not count as deterministic.
# But here, its windows do not overlap: each gradient goes to one place, and nothing is added.
IN_ORDER = "from torch import nn\n\ntorch.use_deterministic_algorithms(True, warn_only=True)\n"
DETERMINISTIC = ("from torch import nn\n", IN_ORDER)


def test_resumed_with_dropout_it_is_bit_identical(tmp_path):
    def work(step):
        folder = tmp_path / step
        root = planted(folder, "common/models.py", *DROPOUT, DETERMINISTIC, steps=(step,))
        flags = [*FLAGS, f"--batch-size={GLOBAL_BATCH}"]
        both = {"root": root, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        uninterrupted = train(step, folder / "whole", *flags, **both)
        interrupted({step: uninterrupted}, folder / "resumed", step)
        run = train(step, folder / "resumed", *flags, **both)
        off = largest_difference(run.weights, uninterrupted.weights)
        assert len(run.losses) == 15 and off == 0.0, f"step {step}: {off}"
        assert states_equal(run.state["optimizer"], uninterrupted.state["optimizer"]), step

    together(work, [(step,) for step in FOLDERS])


def test_a_snapshot_moves_from_gpu_to_cpu_and_back(whole, tmp_path):
    """One epoch on the GPU, one on the CPU and one on the GPU end where three epochs on the GPU end."""

    def work(step):
        interrupted({step: whole(step)}, tmp_path / step, step, last=53)
        train(step, tmp_path / step, *PROOF_HERE, "--epochs=2", gpu=False)
        return train(step, tmp_path / step, *PROOF_HERE)

    for step, run in zip(FOLDERS, together(work, [(step,) for step in FOLDERS]), strict=True):
        off = largest_difference(run.weights, whole(step).weights)
        print(f"step {step}: {len(run.losses)} steps, weights off by {off:.1e} (1e-10, as in disagreements)")
        assert len(run.losses) == 2 * 53 and off <= 1e-10
        assert run.test["correct"] == whole(step).test["correct"]
        # The device decides which kernel AdamW uses, not the snapshot.
        assert run.state["optimizer"]["param_groups"][0]["fused"] == REAL, f"step {step}"


SYNC = "torch.cuda.set_sync_debug_mode" if REAL else "str"


def test_nothing_in_the_loop_waits_for_the_gpu(tmp_path):
    """Between two reports, from the third step on: in the second, DDP compares its buckets among the ranks.

    torch.cuda.set_sync_debug_mode sees what waits in torch's operators: it must see a planted .item().
    """
    step_begins = "            losses.append(self.run_batch("
    due = "            if stopping or self.report.is_due(self.global_step):\n"
    guards = [
        (step_begins, f"            {SYNC}('error' if self.global_step > 1 else 'default')\n{step_begins}"),
        (due, f"{due}                {SYNC}('default')\n"),
    ]
    steps = "        self.optimizer.step()\n"
    waits = (steps, f"{steps}        next(self.model.parameters()).sum().item()\n")

    def work(step, *edits):
        folder = tmp_path / f"{step} {len(edits)}"
        root = planted(folder / "root", step, *guards, *edits)
        process = begin(command(step, 1, root), folder, *PROOF_HERE)
        return *finish(process, 300), process.story

    *runs, (status, _, err, story) = together(work, [*((step,) for step in FOLDERS), ("01", waits)])
    for clean in runs:
        assert clean[0] == 0, clean[-1]
    assert (status != 0 and "called a synchronizing CUDA operation" in err) == REAL, story


def test_the_allocator_agrees_with_the_table_of_bytes(record, tmp_path):
    """Step 05 after its first step, when weights, gradients and AdamW's state are all there."""
    size = ["--vit-width=768", "--vit-depth=12"] if REAL else ["--vit-width=64", "--vit-depth=2"]
    flags = ["--model=vit", *size, "--num-samples=16", "--batch-size=8", "--epochs=1"]
    run = train("05", tmp_path, *flags)
    report = [event for event in run.events if event["event"] == "memory"][-1]
    row = report["ranks"][0]
    shards, peak, allocator = sum(row[:3]), row[4], row[-1]
    assert len(row) == (6 if REAL else 5)
    record["memory"] = {"model": f"vit {size}", "table": row, "ddp": report["ddp"]}
    # Beyond the table: 32 MiB of workspace each for cuBLAS and cuBLASLt on a Hopper, 512 bytes even for the
    # smallest tensor, and as much again for activations and the collectives' buffers, most of which are gone
    # when AdamW's state is created. One more copy of the weights, 227 MB, would be noticed.
    room = 128 * 2**20
    print(f"shards {shards:,}, the table's peak {peak:,}, the allocator's {allocator:,} bytes")
    assert shards <= allocator <= peak + room


def on_one_card(root, step, backend):
    """A copy of a step whose ranks all compute on the first card, which the scripts refuse."""
    refuses = ("    if local_world_size > gpus:\n", "    if False:\n")
    planted(root, "common/device.py", refuses, ("}:{local_rank}", "}:0"), steps=(step,))
    if backend == "gloo":  # it sends the tensors through the CPU
        nccl = ("backend=backends(device)", 'backend="gloo"')
        planted(root, step, nccl, ('device_id=device if device.type == "cuda" else None', "device_id=None"))
    return root


NEW = pytest.mark.xfail(strict=False, reason="NCCL has had this switch since about 2.30, and it may not work")


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=NEW)])
def test_two_ranks_on_one_card_end_where_step_01_ends(whole, tmp_path, backend):
    steps = GROWN if REAL and backend == "nccl" else ["02", "03", "04"] if backend == "gloo" else ["05"]

    def work(step):
        root = on_one_card(tmp_path / step / "root", step, backend)
        flags = [*PROOF_HERE, f"--batch-size={GLOBAL_BATCH // 2}"]
        more = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "timeout": 60}
        return train(step, tmp_path / step, *flags, ranks=2, root=root, **more)

    for run in together(work, [(step,) for step in steps]):
        assert disagreements(run, whole("01")) == [], run.name


def test_ranks_that_meet_and_cannot_talk_say_so_in_one_line(tmp_path):
    """NCCL refuses two ranks on one card. gloo, which is used without a GPU, does not."""
    root = on_one_card(tmp_path / "root", "03", "nccl")
    process = begin(command("03", 2, root), tmp_path, "--num-samples=128", "--epochs=1")
    status, _, err = finish(process)
    said = errors(err)
    print(status, said)
    if REAL:
        assert status == 1 and "exitcode  : 2" in err, process.story
        found = "error: the ranks found each other, but cannot communicate: .*GPU"
        assert len(said) == 1 and re.match(found, said[0]), said
    else:
        assert status == 0 and said == []


@two_cards
def test_two_ranks_on_two_cards_end_where_step_01_ends(whole, tmp_path):
    """With NCCL. No rank has a context on another rank's card, not even for its snapshots."""
    leaves = "        dist.destroy_process_group()\n"
    text = f"f\"contexts of {{os.environ['LOCAL_RANK']}}: {{{CONTEXTS}}}\\n\""
    told = (leaves, f"{leaves}        os.write(1, {text}.encode())\n")  # in one piece: the ranks share it
    imports = ("import sys\n", "import os\nimport sys\n")

    def work(step, *flags):
        folder = tmp_path / "".join([step, *flags])
        root = planted(folder / "root", step, told, imports)
        flags = [*PROOF_HERE, f"--batch-size={GLOBAL_BATCH // 2}", *flags]
        return train(step, folder, *flags, ranks=2, root=root)

    for run in together(work, [*((step,) for step in GROWN), ("05", "--replicas=2")]):
        assert disagreements(run, whole("01")) == [], run.name
        contexts = sorted(re.findall(r"contexts of \d: .*", run.out))
        assert contexts == [f"contexts of {rank}: {[rank] if REAL else []}" for rank in range(2)]


@two_cards
def test_a_rank_that_stops_is_told_before_nccl_ends_the_others(tmp_path):
    """The vote gives up first, after half of `seconds`, and its error waits for another five."""
    seconds = 20 if REAL else 5
    stops = after_a_step("if self.rank == 1 and self.global_step == 5: os.kill(os.getpid(), signal.SIGSTOP)")
    # An epoch has 150 steps: no report, which would wait for the GPU, comes before the vote.
    flags = ["--num-samples=1200", "--batch-size=4", "--epochs=1000", "--verbose", f"--timeout={seconds}"]

    def work(step):
        root = planted(tmp_path / step / "root", step, stops)
        process = begin(command(step, 2, root), tmp_path / step, *flags)
        ranks = []
        try:
            ranks = [int(process.wait_for(rf"\[rank {rank}\].* pid (\d+)")[1]) for rank in range(2)]
            process.process.wait(150)
            left_over = [pid for pid in ranks if not has_ended(pid)]
        finally:
            status, _, err = finish(process)
        story = f"{left_over}\n{process.story}"
        assert status == 1 and left_over == [], story
        assert "Seen by rank 0" in err and re.search(r"Timed out waiting \d+ms", err), story

    together(work, [(step,) for step in (GROWN if REAL else ("02", "05"))])
