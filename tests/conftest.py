"""pytest's options, and the fixtures that several files use."""

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

pytest.register_assert_rewrite("helpers", "soak")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch in this process: the tests share two cores
# torch asks the name server about its own connections. Without this, a lost answer costs five seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1")

import forks  # noqa: E402
import torch  # noqa: E402
from helpers import GLOBAL_BATCH, PROOF, PROOF_OF_VIT, ROOT, Run, read_run, train  # noqa: E402

MARKS = {
    "slow": "repeats what a quicker test does, or takes a minute: make test-all",
    "root": "needs root, for its own hosts, disks or Slurm: make test-all as root",
    "long": "takes several minutes: make test-all ARGS=--long",
    "gpu": "needs a GPU: make gpu on a machine that has one; make test-all uses CPUs instead",
    "other": "needs a second Python with torch: --other-python=<its path>",
    "few": "few(n): make test draws n of its cases; make test-all runs all",
    "sample": "sample(n): n of its cases are drawn each time; make test-all ARGS=--long runs all",
}
SEED = "SEED"  # the environment variable that decides what is drawn at random; the same value repeats a run
ENDED = pytest.StashKey[str]()  # how a test ended, and after how many seconds
# The processes that tests start handle signals in the default way, however `make test` was started: in the
# background, it would ignore Ctrl-C, and under `nohup` a closed terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-dir", type=Path, help="a folder with MNIST in it, for the tests that need it")
    parser.addoption("--all", action="store_true", help="also run tests that are marked slow, root or gpu")
    parser.addoption("--long", action="store_true", help="with --all: also run tests that are marked long")
    parser.addoption("--other-python", help="a second Python with torch: each resumes the other's runs")
    parser.addoption("--no-skips", action="store_true", help="count a skipped test as failed")


def pytest_report_header() -> str:
    """Say what the tests run on, and how to draw the same samples again."""
    gpus = "GPUs: " + str(torch.cuda.device_count() or "none; tests/clusters/test_gpu.py uses CPUs instead")
    return f"{gpus}; SEED={os.environ[SEED]} draws the same samples"


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(SEED, str(random.randrange(10**6)))  # the same for all workers
    for name, why in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {why}")
    if not config.option.collectonly and forks.SOCKET not in os.environ:  # one server for all workers
        stack = ExitStack()
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="forks-"))
        stack.enter_context(forks.server(Path(folder)))
        config.add_cleanup(stack.close)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the marked tests that were not asked for, and all but a few of the sampled ones.

    If the command line names a test with `::`, nothing is left out.
    """
    if any("::" in argument for argument in config.args):
        return
    marks = {*MARKS} - {"few", "sample"}
    if config.getoption("--all"):
        marks = {"long", "other"}
    if config.getoption("--long"):
        marks = {"other"}
    if config.getoption("--other-python"):
        marks.discard("other")
    rest = [item for item in items if any(map(item.get_closest_marker, marks))]
    if not config.getoption("--long"):
        rest += not_drawn("sample", [item for item in items if item not in rest])
    if not config.getoption("--all"):
        rest += not_drawn("few", [item for item in items if item not in rest])
    config.hook.pytest_deselected(items=rest)
    items[:] = [item for item in items if item not in rest]
    # Slow tests come first: at the end, the other workers would wait for the last of them.
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("slow", "root", "gpu"))))


def not_drawn(kind: str, items: list[pytest.Item]) -> list[pytest.Item]:
    """For each test marked `sample(n)` or `few(n)`, all its cases except the n that SEED draws.

    A mark on some cases counts only for these cases, unless the test itself has a mark, which counts for all.
    With `sample(n, name)`, n are drawn from all the tests that give this name.
    """
    cases: dict[str, list[pytest.Item]] = {}
    numbers: dict[str, int] = {}
    for item in items:
        if marks := [*item.iter_markers(kind)]:
            mark = marks[-1]  # the one that is closest to the case comes first
            name = mark.args[1] if len(mark.args) > 1 else item.nodeid.partition("[")[0]
            cases.setdefault(name, []).append(item)
            numbers[name] = mark.args[0]
    rest = []
    for name, group in cases.items():
        drawn = random.Random(f"{os.environ[SEED]} {name}").sample(group, min(numbers[name], len(group)))
        rest += [item for item in group if item not in drawn]
    return rest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say which promise a failing test is about. With --no-skips, count a skipped test as failed."""
    report = yield
    if report.when == "call" or not report.passed:
        how = report.outcome
        if hasattr(report, "wasxfail"):
            how = "failed as expected" if report.skipped else "passed, which was not expected"
        item.stash[ENDED] = f"{how}, {report.duration:.0f} s"
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome, report.longrepr = "failed", f"skipped, with --no-skips: {report.longrepr}"
    if report.failed:
        said = [item.name.partition("[")[0].replace("_", " ").removeprefix("test ")]
        for part in (getattr(item, "obj", None), getattr(item, "module", None)):
            said += [part.__doc__.strip().splitlines()[0]] if getattr(part, "__doc__", None) else []
        report.sections.insert(0, ("the promise that broke", "\n".join(said)))
    return report


@pytest.fixture
def mnist_dir(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--data-dir")
    if folder is None or not (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
        pytest.skip("needs MNIST: make test DATA_DIR=<the folder that holds MNIST/raw>")
    return folder.resolve()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Run]:
    """A run of a step, which several tests compare their own runs with; made once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def get(step: str, ranks: int, *flags: str, root: Path = ROOT) -> Run:
        where = "" if root == ROOT else f"{root.name}-"  # a copy has the same name in all processes
        folder = shared / f"run-{where}{step}-{ranks}{''.join(flags).replace('/', '_')}"
        with FileLock(f"{folder}.lock"):
            if forks.TRACE in os.environ or not (folder / "out").exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a try that failed
                (folder / "out").write_text(train(step, ranks, folder, *flags, root=root).out)
        return read_run(f"step {step} at {ranks} ranks", folder, (folder / "out").read_text())

    return get


@pytest.fixture(scope="session")
def proof(once: Callable[..., Run]) -> Callable[..., Run]:
    """A step's run with the flags PROOF or PROOF_OF_VIT, which show that all steps learn the same."""

    def get(step: str, ranks: int = 1, model: str = "cnn") -> Run:
        flags, batch = (PROOF_OF_VIT, 4 * GLOBAL_BATCH) if model == "vit" else (PROOF, GLOBAL_BATCH)
        return once(step, ranks, *flags, f"--batch-size={batch // ranks}")

    return get
