"""The flags that every step shares, and the one way of telling a user what went wrong.

Nothing here imports torch at the top, so `--help` and a mistyped flag are answered at once.
"""

import argparse
import math
import os
import re
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch


def fail(message: str) -> NoReturn:
    """Print `error: message` and exit with status 2: for what the user can put right.

    The ranks of a machine mostly meet the same mistake, and one of them is to say it: local rank 0.
    Its end makes the launcher end the others while they wait; if they do not, they were alone with it.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # It ends them with SIGTERM.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(2))
        time.sleep(10)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def warn(message: str) -> None:
    """Print `warning: message`, on local rank 0 only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a bad flag with one line and takes `--batch_size` for `--batch-size`.

    It fills in the default of `--snapshot-dir`, which depends on other flags.
    """

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = sys.argv[1:] if args is None else args
        # Only the flag's name: an underscore behind "=" belongs to the value.
        words = [re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), word) for word in words]
        parsed, rest = super().parse_known_args(words, namespace)
        if "snapshot_dir" in parsed and parsed.snapshot_dir is None:
            # Runs with another model or data set cannot go on from each other's snapshots.
            data = f"synthetic-{parsed.num_samples}" if parsed.num_samples else "mnist"
            size = f"-{parsed.vit_width}x{parsed.vit_depth}" if parsed.model == "vit" else ""
            parsed.snapshot_dir = Path("checkpoints", parsed.step, f"{parsed.model}{size}-{data}")
        return parsed, rest


def whole_number(text: str) -> int:
    """An integer from 1 to a billion, for argparse; more overflows where torch counts nanoseconds."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more (to a billion), not '{text}'")
    return int(text)


def multiple_of_64(text: str) -> int:
    """64, 128, 192 … 16384, for argparse."""
    if whole_number(text) % 64 or int(text) > 16384:
        raise argparse.ArgumentTypeError(f"must be a multiple of 64, 16384 at most, not '{text}'")
    return int(text)


def seed_number(text: str) -> int:
    """An integer from 0 to 2³² − 1, for argparse; the epoch is added to it, and torch takes 64 bits."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**32 - 1}, not '{text}'")
    return int(text)


def positive_float(text: str) -> float:
    """A finite float above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not '{text}'")
    return value


def make_parser(script: str, description: str) -> OneLineParser:
    """The parser with the flags of all five steps.

    Args:
        script: `__file__` of the calling `train.py`; its folder names the step.
        description: what `--help` shows first; the script's docstring.
    """
    step = Path(script).resolve().parent.name
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(step=step, accumulate=1)  # which steps 04 and 05 make a flag
    add = parser.add_argument
    add("--epochs", type=whole_number, default=3, metavar="N", help="in total, resumed runs included (3)")
    add("--batch-size", type=whole_number, default=64, metavar="N", help="per process (64)")
    add("--lr", type=positive_float, default=1e-3, metavar="X", help="AdamW's learning rate (0.001)")
    add("--seed", type=seed_number, default=0, metavar="N", help="the same on every rank (0)")
    add("--model", choices=["cnn", "resnet18", "vit"], default="cnn", help="cnn unless given")
    add("--vit-width", type=multiple_of_64, default=64, metavar="N", help="of each of vit's blocks (64)")
    add("--vit-depth", type=whole_number, default=4, metavar="N", help="how many blocks vit has (4)")
    add("--num-samples", type=whole_number, metavar="N", help="train on N synthetic digits, not MNIST")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is, or goes (data)")
    add(
        "--snapshot-dir",
        type=Path,
        metavar="DIR",
        help=f"a run resumes from the newest snapshot in here (checkpoints/{step}/MODEL-DATA)",
    )
    add("--save-every", type=whole_number, metavar="N", help="a snapshot every N steps, not only every epoch")
    add("--use-gpu", type=int, choices=[0, 1], help="1: GPU, 0: CPU; unless given, a GPU if there is one")
    add("--precision", choices=["float32", "float64", "bf16"], default="float32", help="float32 unless given")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--metrics", type=Path, metavar="FILE", help="append one JSON object per line to FILE")
    add("--verbose", action="store_true", help="every rank logs, not rank 0 alone")
    return parser


def check_torchrun() -> None:
    """`fail` unless the environment is one that torchrun makes for the processes that it starts.

    https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    """
    how = f"use torchrun: torchrun --standalone --nproc-per-node=2 {shlex.join(sys.argv)}"
    numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
    missing = [name for name in (*numbers, "MASTER_ADDR") if name not in os.environ]
    if missing:
        fail(f"not set: {', '.join(missing)}; {how}")
    for name in numbers:
        if not re.fullmatch(r"\d{1,9}", os.environ[name]):
            fail(f"{name} is '{os.environ[name]}', and no number; {how}")
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if int(os.environ[name]) >= int(os.environ[size]):
            fail(f"{name} is {os.environ[name]}, and must be below {size}, {os.environ[size]}; {how}")
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if int(port) > 65535:
        fail(f"MASTER_PORT is {port}, and must be below 65536; {how}")
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        fail(f"MASTER_ADDR is '{address}', which leads nowhere ({error.strerror}): give rank 0's address")


def pick_device(use_gpu: int | None, local_rank: int = 0, local_world_size: int = 1) -> "torch.device":
    """The device of one of this machine's processes: GPU number `local_rank`, or the CPU.

    Args:
        use_gpu: `--use-gpu`; None takes GPUs if there are any, 1 falls back to the CPU with a warning.
        local_rank: this process's number on this machine.
        local_world_size: how many processes run on this machine; `fail`s when there are fewer GPUs.
    """
    import torch

    if use_gpu == 0 or not torch.cuda.is_available():
        if use_gpu == 1:
            warn("--use-gpu 1, but CUDA is not available here: training on the CPU instead")
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_world_size > gpus:
        fail(f"{local_world_size} processes, but GPUs: {gpus}; start as many, or add --use-gpu 0")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
