"""Standard output and error, which may go away while a run trains."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def may_go_away(stream: TextIO) -> Iterator[None]:
    """Around writing to `stream`, which is sys.stdout or sys.stderr: an error there does not end the run.

    A terminal may be closed, or the disk of a log may be full. From then on, `stream` writes nowhere.
    Otherwise, Python would try again at its exit, and exit with status 120.
    """
    try:
        yield
        stream.flush()
    except OSError as error:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        if stream is sys.stdout:
            reason = f"cannot write to standard output: {error.strerror}"
            print_line(f"warning: {reason}; nothing more is printed there", sys.stderr)


def print_line(line: str, stream: TextIO) -> None:
    """Print `line` to sys.stdout or sys.stderr, which may go away."""
    with may_go_away(stream):
        print(line, file=stream)
