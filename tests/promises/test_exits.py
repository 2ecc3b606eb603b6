"""However a rank exits, all exit, with the correct status, and no thread of gloo survives.

Such a thread releases what it holds while Python ends, and sometimes aborts the process there ("terminate
called without an active exception"). So here, the ranks end as interpreters do: see forks.REAL_END. `make
test` exits once in each way; with EXITS=50 in the environment, it exits fifty times.

Promise: however a rank exits, no thread of its process groups survives, and the exit status is correct.
"""

import json
import os
import re
import signal
import sys
from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist
from helpers import GROWN, command, errors, finish, has_ended, planted, start, wait_until

from common.process_group import release_process_group, rendezvous
from common.stopping import GracefulStop

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds threads in /proc: Linux only"
)

TIMES = int(os.environ.get("EXITS", "1"))

# After the group's end: the threads of gloo or NCCL that are left. None should outlive the group.
COUNT = """
    finally:
        names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
        rank = os.environ["TESTS_RANK"]
        left = [name for name in names if "gloo" in name or "nccl" in name]
        os.write(1, f"rank {rank} left threads: {left}\\n".encode())  # in one go: the ranks share it
"""


def counting(step):
    """An edit of a train.py: a rank that is out of its groups prints which of their threads are left."""
    arguments = "rank, port, args" if step == "02" else "args"
    head, inner = (f"def {name}({arguments}):\n" for name in ("worker", "inner"))
    me = "str(rank)" if step == "02" else 'os.environ["RANK"]'
    set_up = f'    import os\n\n    os.environ["TESTS_RANK"] = {me}\n'
    return head, f"{head}{set_up}    try:\n        inner({arguments}){COUNT}\n\n{inner}"


def on_rank_1(code):
    """An edit of a train.py: rank 1 runs `code` after its third step, while the others wait for it."""
    counts = "            self.global_step += 1\n"
    does = f"            if self.rank == 1 and self.global_step == 3:\n                {code}\n"
    return counts, counts + does


FAILS = "from common.options import fail; fail('planted')"
# What is planted, step 02's status, and whether every rank must leave its groups by itself.
KINDS = {
    "end": ([], 0, True),
    "SIGTERM": ([], 143, True),
    "Ctrl-C": ([], 130, True),
    "exception": ([on_rank_1("raise ZeroDivisionError('planted')")], 1, False),
    "fail": ([on_rank_1(FAILS)], 2, False),
}


# Steps 03 and 04 begin and end in the same way.
QUICK = (
    [("02", kind) for kind in KINDS] + [("05", kind) for kind in KINDS] + [("03", "SIGTERM"), ("04", "fail")]
)


@pytest.mark.sample(5)
@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        pytest.param(step, kind, marks=[] if (step, kind) in QUICK else pytest.mark.slow)
        for step in GROWN
        for kind in KINDS
    ],
)
def test_a_rank_leaves_nothing_behind(tmp_path, step, kind):
    edits, status_of_02, all_leave = KINDS[kind]
    root = planted(tmp_path / "root", step, counting(step), *edits)
    flags = [
        "--num-samples=480",
        "--batch-size=8",
        "--use-gpu=0",
        "--save-every=4",
        "--snapshot-dir=snapshots",
    ]
    for number in range(TIMES):
        folder = tmp_path / str(number)
        folder.mkdir()
        epochs = f"--epochs={1 if kind == 'end' else 1000}"
        process = start([*command(step, 2, root), *flags, epochs], folder, **{forks.REAL_END: "1"})
        ranks = []
        try:
            if kind in ("SIGTERM", "Ctrl-C"):
                wait_until(lambda: list((folder / "snapshots").glob("snapshot-*")), "a snapshot")  # noqa: B023
                ranks = process.ranks()
                if kind == "SIGTERM":
                    process.send_signal(signal.SIGTERM)
                else:  # a terminal sends it to the whole group; torchrun's ranks have their own
                    os.killpg(process.pid, signal.SIGINT)
            status = process.process.wait(60)
        finally:
            _, out, err = finish(process)
        print(f"{number}: status {status}")
        story = f"{number}: status {status}\n{process.story}"
        expected = status_of_02 if step == "02" else int(status_of_02 > 0)
        assert status == expected, story
        assert "terminate called" not in err and "Signal 6" not in err and "SIGABRT" not in err, story
        left = re.findall(r"rank (\d) left threads: (.*)", out)
        assert [names for _, names in left] == ["[]"] * len(left), story
        if all_leave:
            assert sorted(rank for rank, _ in left) == ["0", "1"], story
        else:
            assert "1" in [rank for rank, _ in left], story
        assert errors(err) == (["error: planted"] if kind == "fail" else []), story
        assert ("ZeroDivisionError: planted" in err) == (kind == "exception"), story
        # torchrun prints this for a rank that has not reported what went wrong.
        assert kind != "exception" or "To enable traceback see" not in err, story
        assert all(map(has_ended, ranks)), story


def test_a_rank_that_was_killed_is_told(tmp_path):
    """It has no status of its own. Under torchrun, the summary reports it."""
    root = planted(
        tmp_path / "root",
        "02",
        on_rank_1("os.kill(os.getpid(), 9)"),
        ("import sys\n", "import os\nimport sys\n"),
    )
    status, _, err = finish(start([*command("02", 3, root), "--num-samples=480", "--batch-size=8"], tmp_path))
    print(err)
    assert status == 1 and "process 1 terminated with signal SIGKILL" in err


@pytest.mark.parametrize("error", [ZeroDivisionError("planted"), SystemExit(143)], ids=["error", "exit"])
def test_after_an_error_all_groups_end_at_once(error):
    """Not only the default group: a stuck collective may be in another, and destroying that would wait."""

    def threads():
        return [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]

    before = threads()  # from other tests in this process
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.new_group(backend="gloo")
        # A thread names itself, perhaps a moment after the group exists.
        wait_until(lambda: len(threads()) > len(before), "a thread of gloo")
        raise error
    except (ZeroDivisionError, SystemExit):
        release_process_group()
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():  # only if the test fails: the next test must not fail, too
            dist.destroy_process_group()
    assert threads() == before


@pytest.mark.parametrize("seconds", [12, 60, 120, 600])
def test_the_vote_gives_up_before_the_group_does(seconds):
    """Earlier by more than the 5 s that the error waits, or NCCL's watchdog would end the process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = GracefulStop(seconds).group
        first = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        print(f"--timeout {seconds}: the vote gives up after {first} s")
        assert seconds / 2 <= first <= seconds - 6
    finally:
        dist.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler)


BACKEND = "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error\nncclUnhandledCudaError\nno device"
CLOSED = "Gloo connectFullMesh failed with [pair.cc:561] Connection closed by peer [127.0.0.1]:48310."
NEW = "Failed to initialize NCCL communicator for 2 ranks\nno device"  # from torch 2.15's backend, nccl2


def test_what_stops_the_start_is_told_by_its_own_name(capsys):
    """A backend's error is not reported as a missing rank. Its last line has the cause."""
    silent = "the ranks found each other, but cannot communicate"
    apart = "the ranks did not find each other"
    for error, said in (
        (dist.DistBackendError(BACKEND), f"{silent}: no device; NCCL_DEBUG=INFO shows"),
        (RuntimeError(NEW), f"{silent}: no device; NCCL_DEBUG=INFO shows"),
        (dist.DistNetworkError("in use\nmore"), f"{apart}: in use; is the port free, and has every rank"),
        (dist.DistStoreError("late\nmore"), f"{apart}: late; is the port free, and has every rank"),
        (RuntimeError(CLOSED), "another rank ended while this one connected to it: the first error says why"),
    ):
        with pytest.raises(SystemExit), rendezvous():
            raise error
        assert capsys.readouterr().err.startswith(f"error: {said}")
    with pytest.raises(RuntimeError, match="a bug of ours"), rendezvous():  # it keeps its traceback
        raise RuntimeError("a bug of ours")


BEGINS = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import torch.distributed as dist
from common.stopping import GracefulStop

dist.init_process_group("gloo")
stop = GracefulStop(60)
Path(f"rank-{dist.get_rank()}-goes-on").touch()
dist.barrier()
dist.destroy_process_group()
"""


def test_a_rank_goes_on_when_all_have_connected(tmp_path):
    """With nothing left to train, a rank exited while others were still connecting: 1 run in 25 failed."""
    connects = 'self.group = dist.new_group(backend="gloo", timeout=earlier)\n'
    slowly = (
        "            if dist.get_rank() == 1:\n"
        "                time.sleep(2)  # in which nobody is to go on\n"
        "                print('gone on:', *__import__('glob').glob('rank-*-goes-on'), flush=True)\n"
    )
    root = planted(tmp_path / "root", "common/stopping.py", (connects, connects + slowly))
    (root / "begins.py").write_text(BEGINS)
    status, out, err = finish(start([*command("03", 3)[:-1], str(root / "begins.py")], tmp_path))
    print(out, err[-2000:])
    assert status == 0 and len([*tmp_path.glob("rank-*-goes-on")]) == 3
    assert out == "gone on:\n"


VOTES = """
import json
import os
import signal
import sys
import time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import torch.distributed as dist
from common.stopping import GracefulStop

dist.init_process_group("gloo")
rank, clock, begun = dist.get_rank(), 0.0, {}
time.perf_counter = lambda: clock  # or a busy machine would decide how long a step takes
for took in (0.0, 0.001, 0.03, 0.06, 0.25):
    stop, begun[took] = GracefulStop(60), []
    for step in range(1, 14):
        clock += took if rank == 1 else 0.0  # the others have to wait for it in any case
        if stop.requested():
            begun[took].append("stop")
        if stop.vote:
            begun[took].append(step)
stop, stops = GracefulStop(60), []
for step in range(1, 8):
    clock += 0.06
    if step == 3 and rank > 0:
        os.kill(os.getpid(), signal.SIGINT if rank == 1 else signal.SIGTERM)
    stop.requested()
    stops.append(stop.stopping)
    if stops[-1]:
        break
Path(f"rank-{rank}.json").write_text(json.dumps([begun, stops, stop.vote is None]))
dist.barrier()
dist.destroy_process_group()
"""


def test_votes_are_a_tenth_of_a_second_or_five_steps_apart(tmp_path):
    """By the slowest rank's clock, and in the same steps on all ranks. The next step has a vote's result."""
    root = planted(tmp_path / "root", "common/stopping.py", steps=("03",))
    (root / "votes.py").write_text(VOTES)
    status, out, err = finish(start([*command("03", 3)[:-1], str(root / "votes.py")], tmp_path))
    print(out, err[-2000:])
    assert status == 0
    fast, slow = [1, 6, 11], [*range(1, 14)]
    begun = {"0.0": fast, "0.001": fast, "0.03": [1, 4, 7, 10, 13], "0.06": slow, "0.25": slow}
    for rank in range(3):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found == [begun, [0, 0, 0, signal.SIGTERM], True]


LOST = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import torch.distributed as dist
from common.process_group import release_process_group
from common.stopping import GracefulStop

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
GracefulStop.received = int(sys.argv[1])
try:
    raise RuntimeError(sys.argv[2])
finally:
    release_process_group()
"""


def test_a_connection_lost_after_a_signal_is_the_signals_doing(tmp_path):
    """Others have exited for the same signal. Without one, or after another error, the error is reported."""
    root = planted(tmp_path, "common/stopping.py")
    (root / "lost.py").write_text(LOST)
    lost = "Connection closed by peer"
    cases = [("15", lost, 143), ("2", lost, 130), ("0", lost, 1), ("15", "planted", 1)]
    words = [sys.executable, str(root / "lost.py")]
    started = [start([*words, number, text], tmp_path) for number, text, _ in cases]
    for process, (_, text, expected) in zip(started, cases, strict=True):
        status, _, err = finish(process)
        print(process.story)
        assert status == expected
        told = re.search(rf"RuntimeError: {text}\n(\[rank0\]: )?Seen by rank 0 on ", err)
        assert bool(told) == (status == 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_step_02_that_is_stopped_before_it_trains_has_the_signals_status(tmp_path, number):
    """In torch, a rank that gets Ctrl-C ends as if it had finished its work, and SIGTERM kills it."""
    gets_there = "        self.stop = GracefulStop(self.args.timeout)\n"
    says = "print('here\\n', end='', flush=True)"  # in one piece: the ranks may print at the same time
    waits = f"        [{says}, __import__('time').sleep(60)]\n"
    root = planted(tmp_path / "root", "02", (gets_there, waits + gets_there))
    process = start([*command("02", 2, root), "--num-samples=24", "--batch-size=6"], tmp_path)
    process.wait_for("here\n(.|\n)*here\n")
    process.send_signal(number)
    status, out, err = finish(process)
    print(status, out, err)
    assert status == 128 + number and "done" not in out and "Traceback" not in err
