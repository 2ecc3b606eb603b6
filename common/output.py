"""Standard output and error, which may go away while a run trains."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def may_go_away(stream: TextIO) -> Iterator[None]:
    """Around writing to `stream`, which is sys.stdout or sys.stderr: an error there does not end the run.

    A terminal may be closed, and the disk of a log full. From then on, `stream` writes nowhere: else Python
    would try again as it ends, and end with status 120.
    """
    try:
        yield
        stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if stream is sys.stdout:
            with may_go_away(sys.stderr):
                reason = error.strerror
                print(
                    f"warning: cannot write to standard output: {reason}; nothing more is printed there",
                    file=sys.stderr,
                )
