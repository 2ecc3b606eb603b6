"""The flags that every step shares, and the one way of telling a user what went wrong."""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import shlex
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist


def fail(message: str) -> NoReturn:
    """Print `error: message` and exit with status 2: for what the user can put right.

    Ranks mostly meet the same mistake. Local rank 0 says it while the others wait to be ended (SIGTERM) by
    the launcher: one that is not was alone with its mistake.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # from which torchrun's summary has it
        said = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": said}))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(2))
        time.sleep(10)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def warn(message: str) -> None:
    """Print `warning: message`, on local rank 0 only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a bad flag with one line and takes `--batch_size` for `--batch-size`."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        words = sys.argv[1:] if args is None else args
        # Only the flag's name: an underscore behind "=" belongs to the value.
        words = [re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), word) for word in words]
        return super().parse_known_args(words, namespace)


def whole_number(text: str, low: int = 1, high: int = 10**9, step: int = 1) -> int:
    """An integer from `low` to `high` (torch counts nanoseconds), a multiple of `step`, for argparse."""
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high and int(text) % step == 0):
        kind = f"multiple of {step}" if step > 1 else "whole number"
        raise argparse.ArgumentTypeError(f"must be a {kind} from {low} to {high}, not '{text}'")
    return int(text)


def positive_float(text: str, limit: float = math.inf) -> float:
    """A float above 0 and below `limit`, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < limit:
            return float(text)
    below = f" and below {limit}" if limit < math.inf else ""
    raise argparse.ArgumentTypeError(f"must be a number above 0{below}, not '{text}'")


def make_parser(script: str, description: str, torchrun: bool = False) -> OneLineParser:
    """The flags of all steps, for a train.py's `__file__` and docstring; `fail`s without its `torchrun`."""
    if torchrun and not {"-h", "--help"} & set(sys.argv):
        check_torchrun()
    step = Path(script).resolve().parent.name
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(step=step, accumulate=1)  # which steps 04 and 05 make a flag
    natural = functools.partial(whole_number, low=0, high=2**32 - 1)  # a seed: the epoch is added to it
    width = functools.partial(whole_number, low=64, high=2**14, step=64)
    workers = functools.partial(whole_number, low=0, high=1024)
    share = functools.partial(positive_float, limit=1)
    digits = functools.partial(whole_number, high=10**7)  # 8 GB of pixels
    add = parser.add_argument
    add("--epochs", type=whole_number, default=3, metavar="N", help="in total, resumed runs included (3)")
    add("--batch-size", type=whole_number, default=64, metavar="N", help="per process (64)")
    add("--lr", type=positive_float, default=1e-3, metavar="X", help="AdamW's learning rate (0.001)")
    add("--schedule", choices=["constant", "one-cycle"], default="constant", help="constant unless given")
    add("--smoothing", type=share, default=0.0, metavar="X", help="label smoothing while training (0.0)")
    add("--seed", type=natural, default=0, metavar="N", help="the same on every rank (0)")
    add("--model", choices=["cnn", "resnet18", "vit"], default="cnn", help="cnn unless given")
    add("--vit-width", type=width, default=64, metavar="N", help="of each of vit's blocks (64)")
    add("--vit-depth", type=whole_number, default=4, metavar="N", help="how many blocks vit has (4)")
    add("--num-samples", type=digits, metavar="N", help="train on N synthetic digits, not MNIST")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is, or goes (data)")
    add("--num-workers", type=workers, default=0, metavar="N", help="processes that load the data (0: none)")
    add("--snapshot-dir", type=Path, metavar="DIR", help=f"where to save and resume (checkpoints/{step}/…)")
    add("--save-every", type=whole_number, metavar="N", help="a snapshot every N steps, not only every epoch")
    add("--use-gpu", type=int, choices=[0, 1], help="1: GPU, 0: CPU; unless given, a GPU if there is one")
    add("--precision", choices=["float32", "float64", "bf16"], default="float32", help="float32 unless given")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--metrics", type=Path, metavar="FILE", help="append one JSON object per line to FILE")
    add("--profile", type=Path, metavar="DIR", help="write a trace of steps 8 to 10 on each rank to DIR")
    add("--verbose", action="store_true", help="every rank logs, not rank 0 alone")
    return parser


def check_torchrun() -> None:
    """`fail` unless the environment is torchrun's (docs.pytorch.org/docs/stable/elastic/run.html)."""
    how = f"use torchrun: torchrun --standalone --nproc-per-node=2 {shlex.join(sys.argv)}"
    numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
    if missing := [name for name in (*numbers, "MASTER_ADDR") if name not in os.environ]:
        fail(f"not set: {', '.join(missing)}; {how}")
    for name in numbers:
        if not re.fullmatch(r"\d{1,9}", os.environ[name]):
            fail(f"{name} is '{os.environ[name]}', and no number; {how}")
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("MASTER_PORT", "65536")):
        if int(os.environ[name]) >= int(os.environ.get(limit, limit)):
            size = f", {os.environ[limit]}" if limit in os.environ else ""
            fail(f"{name} is {os.environ[name]}, and must be below {limit}{size}; {how}")
    try:
        socket.getaddrinfo(address := os.environ["MASTER_ADDR"], None)
    except OSError as error:
        fail(f"MASTER_ADDR is '{address}', which leads nowhere ({error.strerror}): give rank 0's address")


def name_run(args: argparse.Namespace, model: str, dataset: str, caveat: str = "") -> None:
    """Add `run`, which snapshots must share, `dataset`, the last line's `caveat`, and `--snapshot-dir`."""
    args.run, args.dataset, args.caveat = f"{model}-{dataset}", dataset, caveat
    args.snapshot_dir = args.snapshot_dir or Path("checkpoints", args.step, args.run)


def count_gpus() -> int:
    """This machine's GPUs with a library of their own for collectives, NCCL or its like: not Apple's."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    own = gpu and dist.Backend.default_device_backend_map.get(gpu.type, "gloo") != "gloo"
    return torch.accelerator.device_count() if own else 0


def pick_device(use_gpu: int | None, local_rank: int = 0, local_world_size: int = 0) -> torch.device:
    """The device of one of this machine's processes: GPU number `local_rank`, or its share of the cores.

    `use_gpu` 1 without a GPU is a warning. `fail`s with more processes (by default torchrun's) than GPUs.
    """
    os.environ["LOCAL_RANK"] = str(local_rank)
    local_world_size = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    if use_gpu == 0 or not (gpus := count_gpus()):
        if use_gpu == 1:
            warn("--use-gpu 1, but there is no GPU here that ranks can use: training on the CPU instead")
        return torch.device("cpu")
    if local_world_size > gpus:
        fail(f"{local_world_size} processes, but GPUs: {gpus}; start as many, or add --use-gpu 0")
    torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have it by default
    return torch.device(f"{torch.accelerator.current_accelerator()}:{local_rank}")
