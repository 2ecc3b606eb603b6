"""The flags that all steps share, and how a script reports what went wrong."""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from common.output import print_line


def fail(message: str) -> NoReturn:
    """Print `error: message` and exit with status 2: for mistakes that the user can fix.

    Most mistakes are made on all ranks of a machine. Local rank 0 prints the message, and the others wait
    until the launcher ends them (SIGTERM). A rank that is not ended was the only one, and prints it itself.
    """
    tell_torchrun(f"error: {message}")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(2))
        time.sleep(10)
    print_line(f"error: {message}", sys.stderr)
    sys.exit(2)


def tell_torchrun(message: str) -> None:
    """Make `message` the last line of the summary that torchrun prints, if torchrun has started this process.

    torchrun reads it from a file. torch's own function, `ErrorHandler.record_exception`, would write the type
    of an exception and a traceback in front of it. The format is that of torch 2.11 to 2.14;
    test_bad_input.py shows it when that changes.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        try:
            Path(path).write_text(json.dumps({"message": content}))
        except OSError:  # its disk is full: torchrun cannot read half a file
            with contextlib.suppress(OSError):
                Path(path).unlink()


def warn(message: str) -> None:
    """Print `warning: message`, on local rank 0 only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_line(f"warning: {message}", sys.stderr)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a bad flag with one line and takes `--batch_size` for `--batch-size`."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = sys.argv[1:] if args is None else args
        # Only the flag's name: an underscore after "=" belongs to the value.
        words = [re.sub(r"^--[^=]*", lambda match: match[0].replace("_", "-"), word) for word in words]
        found, rest = super().parse_known_args(words, namespace)
        if getattr(found, "model", "") == "resnet18" and found.batch_size == 1:
            self.error("--model resnet18 needs a --batch-size of 2 or more: batch norm compares samples")
        if getattr(found, "compile", False) and not has_compiler():
            self.error("--compile needs a C++ compiler, such as g++, and none was found: install one")
        return found, rest


def has_compiler() -> bool:
    """Whether torch.compile finds a compiler for its code, for CPUs in C++ and for GPUs in C."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    names = (os.environ.get("CXX", default), os.environ.get("CC", "gcc"), "clang")
    return any(shutil.which(name) for name in names)


def whole_number(text: str, low: int = 1, high: int = 10**9, step: int = 1) -> int:
    """An integer from `low` to `high`, a multiple of `step`, for argparse.

    Of seconds, torch's timeouts can have 10**9: they count nanoseconds in 64 bits.
    """
    is_number = text.isascii() and text.isdigit()
    if not is_number or not low <= int(text) <= high or int(text) % step != 0:
        kind = f"multiple of {step}" if step > 1 else "whole number"
        raise argparse.ArgumentTypeError(f"must be a {kind} from {low} to {high}, not '{text}'")
    return int(text)


def positive_float(text: str) -> float:
    """A float above 0, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, not '{text}'")


def make_parser(
    script: str, description: str, launcher: str = "", without: Collection[str] = ()
) -> OneLineParser:
    """The flags that the steps share, for a train.py's `__file__` and docstring.

    With a `launcher`, `spawn` or `torchrun`, also those of a script with several ranks. `fail`s if that is
    torchrun and has not started this process. Flags in `without`, such as `--model`, are left out.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is ASCII only gets ? for ×
    if not {"-h", "--help"} & set(sys.argv):
        check_torchrun(expected=launcher == "torchrun")
    step = Path(script).resolve().parent.name
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(step=step)
    natural = functools.partial(whole_number, low=0, high=2**32 - 1)  # a seed: the epoch is added to it
    width = functools.partial(whole_number, low=64, high=2**14, step=64)
    workers = functools.partial(whole_number, low=0, high=1024)
    sample_count = functools.partial(whole_number, high=10**7)  # 8 GB of pixels

    def add(name: str, **settings: Any) -> None:
        if name not in without:
            parser.add_argument(name, **settings)

    add("--epochs", type=whole_number, default=3, metavar="N", help="in total, resumed runs included (3)")
    add("--batch-size", type=whole_number, default=64, metavar="N", help="per process (64)")
    add("--eval-batch-size", type=whole_number, default=1000, metavar="N", help="the same, for tests (1000)")
    add("--lr", type=positive_float, default=1e-3, metavar="X", help="AdamW's learning rate (0.001)")
    add("--schedule", choices=["constant", "one-cycle"], default="constant", help="constant by default")
    add("--seed", type=natural, default=0, metavar="N", help="the same on every rank (0)")
    add("--model", choices=["cnn", "resnet18", "vit"], default="cnn", help="cnn by default")
    add("--vit-width", type=width, default=64, metavar="N", help="width of vit's blocks (64)")
    add("--vit-depth", type=whole_number, default=4, metavar="N", help="how many blocks vit has (4)")
    add("--num-samples", type=sample_count, metavar="N", help="train on N synthetic digits, not MNIST")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is, or goes (data)")
    add("--num-workers", type=workers, default=0, metavar="N", help="processes that load the data (0: none)")
    add("--snapshot-dir", type=Path, metavar="DIR", help=f"where to save and resume (checkpoints/{step}/…)")
    add("--allow-changes", action="store_true", help="resume with flags that change what is trained")
    add("--save-every", type=whole_number, metavar="N", help="a snapshot every N steps, not only every epoch")
    add("--use-gpu", type=int, choices=[0, 1], help="1: GPU, 0: CPU; by default, a GPU if there is one")
    add("--precision", choices=["float32", "float64", "bf16"], default="float32", help="float32 by default")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--metrics", type=Path, metavar="FILE", help="append one JSON object per line to FILE")
    add("--profile", type=Path, metavar="DIR", help="write a trace of steps 8 to 10 on each rank to DIR")
    add("--verbose", action="store_true", help="every rank logs, not only rank 0")
    if launcher:
        # As long as NCCL's own default: a first step may compile the model, or wait for cold data. Saving and
        # loading may take longer, see process_group.keep_alive.
        seconds = "seconds until a silent rank counts as lost (600)"
        at_least_five = functools.partial(whole_number, low=5)  # keep_alive sends a message each second
        add("--timeout", type=at_least_five, default=600, metavar="N", help=seconds)
    return parser


def check_torchrun(expected: bool) -> None:
    """`fail` if a script that torchrun is to start was not started by it, or the other way round.

    torchrun's variables are those of docs.pytorch.org/docs/stable/elastic/run.html.
    """
    if not expected:
        started = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        if started:  # each process would train for itself, into the same folder
            fail(f"this script is not for torchrun; use: python {shlex.join(sys.argv)}")
        return
    if any(re.match("--local[-_]rank", word) for word in sys.argv):
        fail(f"torch.distributed.launch passes --local-rank, which is not accepted here: {use_torchrun()}")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        fail(f"not set: {', '.join(missing)}; {use_torchrun()}")


def use_torchrun() -> str:
    """The remedy: a command with this script and its flags."""
    words = [word for word in sys.argv if not re.match("--local[-_]rank", word)]
    return f"use torchrun: torchrun --standalone --nproc-per-node=2 {shlex.join(words)}"
