"""What the process does that has started the ranks: it waits, and hands on the signals that it gets."""

import os
import signal
import sys

import torch.multiprocessing as mp


def join(context):
    """In the parent of `mp.spawn(…, join=False)`: hand signals on to the ranks, and end as they do."""

    def hand_on(number, frame):
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        if error.exit_code < 0:  # it was killed
            raise
        sys.exit(error.exit_code)  # the rank has said why
