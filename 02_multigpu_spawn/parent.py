"""The parent of the ranks: it waits for them, and forwards the signals that it receives."""

import os
import signal
import sys

import torch.multiprocessing as mp

from common.stopping import SIGNALS


def join(context):
    """In the parent of `mp.spawn(…, join=False)`: forward signals to the ranks, exit with their status."""
    received = []

    def forward(number, frame):
        received.append(number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup lets SIGHUP be ignored
            signal.signal(number, forward)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        if -error.exit_code in received:  # a signal before the ranks were ready to save
            sys.exit(128 - error.exit_code)
        if error.exit_code < 0:  # it was killed
            raise
        sys.exit(error.exit_code)  # the rank has said why
    if received:  # mp.spawn makes a rank's KeyboardInterrupt, before training, a status of 0
        sys.exit(128 + received[0])
