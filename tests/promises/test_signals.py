"""How a process reacts to signals, without a training run around it."""

import errno
import os
import signal
import sys
import time

import pytest
from helpers import ROOT, errors, finish, start
from torch.utils.data import DataLoader, Dataset

from common.stopping import PROBLEM, GracefulStop, start_workers, worker_has_died

STUCK = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from common.stopping import GracefulStop
GracefulStop()
print("ready", flush=True)
said, end = set(), time.monotonic() + 60
while time.monotonic() < end:
    if GracefulStop.received and GracefulStop.received not in said:
        said.add(GracefulStop.received)
        print("noted", GracefulStop.received, flush=True)
    time.sleep(0.01)
"""
APART = 1.2  # more than the second in which several signals count as one


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_those_that_come_together_are_one_and_a_later_one_ends_the_process(tmp_path, number):
    process = start([sys.executable, "-c", STUCK], tmp_path)
    process.wait_for("ready")
    process.send_signal(signal.SIGTERM)
    process.wait_for("noted 15")
    process.send_signal(number)
    time.sleep(APART)
    assert process.poll() is None
    process.send_signal(number)
    status, out, err = finish(process)
    print(out, err)
    assert status == 128 + number
    lost = "ending at once, and what was trained after the last snapshot is lost"
    assert errors(err) == [f"error: {number.name} for the second time: {lost}"]


def test_a_closed_terminal_is_no_second_signal(tmp_path):
    process = start([sys.executable, "-c", STUCK], tmp_path)
    process.wait_for("ready")
    process.send_signal(signal.SIGTERM)
    process.wait_for("noted 15")
    time.sleep(APART)
    process.send_signal(signal.SIGHUP)
    process.wait_for("noted 1\n")
    time.sleep(0.2)  # in this time, a thread would end it
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert status == 143 and "SIGTERM for the second time" in err


ALONE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from common.stopping import GracefulStop, ask_to_stop
stop = GracefulStop()
print(stop.requested(), stop.stopping)
os.kill(os.getpid(), signal.SIGTERM)
print(stop.requested(), stop.stopping)
ask_to_stop("one")
ask_to_stop("two")
print(stop.requested(), stop.stopping, GracefulStop.problem)
stop.exit(None, 7)
"""


def test_a_process_without_others_decides_alone(tmp_path):
    """A problem counts for more than a signal, and the first problem is reported."""
    status, out, err = finish(start([sys.executable, "-c", ALONE], tmp_path))
    assert out.splitlines() == ["False 0", "True 15", f"True {PROBLEM} one"]
    assert errors(err) == ["error: one; saved at step 7: run the same command again to resume"]
    assert status == 2


def test_where_nothing_can_be_printed_a_second_signal_ends_it_too(tmp_path):
    closed = STUCK.replace('print("ready"', 'import os; os.close(2); print("ready"')
    process = start([sys.executable, "-c", closed], tmp_path)
    process.wait_for("ready")
    process.send_signal(signal.SIGTERM)
    process.wait_for("noted 15")
    time.sleep(APART)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143


@pytest.mark.parametrize("waits", [True, False])
def test_only_a_process_that_waits_for_a_batch_is_ended_after_one_signal(tmp_path, waits):
    since = "time.monotonic()" if waits else "None"
    edit = "import common.stopping; common.stopping.SECONDS_FOR_A_BATCH = 1.0\n"
    edit += f"GracefulStop.waiting_since = {since}\n"
    process = start([sys.executable, "-c", STUCK.replace("said, end", f"{edit}said, end")], tmp_path)
    process.wait_for("ready")
    time.sleep(APART)  # it has waited longer than the limit, but there was no signal
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait_for("noted 15")
    if waits:
        status, _, err = finish(process)
        assert status == 143 and "error: SIGTERM, and no batch has come for 1 s: ending at once" in err
        return
    time.sleep(2 * APART)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143


class Seen(Dataset):
    """A sample says whether its process was waiting while the sample was made."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            raise ZeroDivisionError("planted")
        return GracefulStop.waiting_since is not None


def test_a_process_waits_while_its_batch_is_made_and_not_while_it_trains(monkeypatch):
    monkeypatch.setattr(GracefulStop, "waiting_since", None)
    stop = object.__new__(GracefulStop)  # without handlers in the process of the tests
    before = signal.getsignal(signal.SIGCHLD)
    try:
        batches = stop.batches(DataLoader(Seen(), 1))
        seen = [(next(batches).item(), GracefulStop.waiting_since) for _ in range(3)]
        with pytest.raises(ZeroDivisionError, match="planted"):
            next(batches)
        assert seen == [(True, None)] * 3 and GracefulStop.waiting_since is None
        for _ in stop.batches(DataLoader(range(2), 1, num_workers=1)):  # torch's handler would raise anywhere
            assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
        assert GracefulStop.waiting_since is None
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    ("error", "workers", "died"),
    [
        (RuntimeError("DataLoader worker (pid 1) is killed by signal"), 1, True),
        (RuntimeError("Pin memory thread exited unexpectedly"), 1, True),
        (RuntimeError("of the dataset"), 1, False),
        (EOFError(), 1, True),
        (ConnectionResetError(), 2, True),
        (FileNotFoundError("a socket"), 1, True),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0"), 1, False),
        (FileNotFoundError("a picture"), 0, False),
        (OSError("another"), 1, False),
    ],
)
def test_which_errors_are_those_of_a_lost_worker(error, workers, died):
    assert worker_has_died(DataLoader(range(4), num_workers=workers), error) is died


class NoMoreProcesses(DataLoader):
    """A loader on a system that starts no more processes. For root, Linux has no such limit."""

    def __iter__(self):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_workers_that_cannot_be_started_are_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        start_workers(NoMoreProcesses([1, 2], num_workers=2))
    why = "Resource temporarily unavailable; use fewer"
    line = f"error: cannot start the processes of --num-workers 2: {why}\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, line)
