"""What a process makes of its signals, without a training around it."""

import signal
import sys
import time

import pytest
from helpers import ROOT, errors, finish, start

from common.stopping import PROBLEM

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
    lost = "ends at once, and what was trained after the last snapshot is lost"
    assert errors(err) == [f"error: {number.name} for the second time: {lost}"]


def test_a_closed_terminal_is_no_second_signal(tmp_path):
    process = start([sys.executable, "-c", STUCK], tmp_path)
    process.wait_for("ready")
    process.send_signal(signal.SIGTERM)
    process.wait_for("noted 15")
    time.sleep(APART)
    process.send_signal(signal.SIGHUP)
    process.wait_for("noted 1\n")
    time.sleep(0.2)  # in which a thread would end it
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
    """And a problem counts for more than a signal; the first one is reported."""
    status, out, err = finish(start([sys.executable, "-c", ALONE], tmp_path))
    assert out.splitlines() == ["False 0", "True 15", f"True {PROBLEM} one"]
    assert errors(err) == ["error: one; saved at step 7: run the same command again to resume"]
    assert status == 2
