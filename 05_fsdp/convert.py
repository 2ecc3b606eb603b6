"""Convert a sharded snapshot to a plain one, or back, to move a run between step 05 and the other steps.

    python 05_fsdp/convert.py checkpoints/05_fsdp/cnn-mnist/snapshot-00000937        # writes ….pt beside it
    python 05_fsdp/convert.py checkpoints/04_multinode/cnn-mnist/snapshot-00000937.pt     # writes a folder

One process, on the CPU, however many ranks there were or will be. It needs memory for the whole model and
optimizer state.
"""

import argparse
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, where `common` is
sys.path.insert(0, str(Path(__file__).resolve().parent))  # and this folder, where `sharded` is

import sharded
from common import snapshot
from common.options import OneLineParser, fail

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be: one process


def parameter_names(param_groups):
    """The name of each parameter, by the number that the optimizer's state has for it.

    Raises ValueError if the optimizer does not know the names.
    """
    if not all("param_names" in group for group in param_groups):
        raise ValueError("its optimizer has no names: build it from model.named_parameters()")
    return {
        number: name
        for group in param_groups
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }


def gather(state):
    """The plain snapshot's dictionary, from the sharded one `state`, as sharded.read returns it."""
    saved = state["metadata"].state_dict_metadata
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in saved.items()}
    with sharded.reader(state) as reader:
        dcp.load(tensors, storage_reader=reader)
    numbers = {name: number for number, name in parameter_names(state["param_groups"]).items()}
    only_sharded = ("checksum", "checksums", "param_groups", "path", "writer")
    plain = {key: value for key, value in state.items() if key not in only_sharded}
    slots = {number: {} for number in numbers.values()}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if not name:
            raise ValueError(f"{part} is a tensor, not a dictionary of tensors")
        if part == "optimizer":
            name, _, slot = name.rpartition(".")
            slots[numbers[name]][slot] = tensor
        else:  # the model, and what else a script of the reader's own saves as shards
            plain.setdefault(part, {})[name] = tensor
    plain["optimizer"] = {"state": slots, "param_groups": state["param_groups"]}
    return plain


def holds_tensors(value):
    """Whether it is a dictionary of tensors: the model's, or another that is saved as shards."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(part, torch.Tensor) for part in value.values())
    )


def scatter(folder, state):
    """Write the sharded snapshot of the plain one `state` in `folder`."""
    names = parameter_names(state["optimizer"]["param_groups"])
    slots = {names[number]: slots for number, slots in state["optimizer"]["state"].items()}
    shards = {key: value for key, value in state.items() if holds_tensors(value)}
    shards |= {"model": state["model"], "optimizer": slots}
    unfinished = sharded.unfinished(folder, state["global_step"])
    if unfinished.exists():
        shutil.rmtree(unfinished)
    writer = sharded.Writer(folder, state["global_step"])
    dcp.save(shards, storage_writer=writer)
    rest = {key: value for key, value in state.items() if key not in (*shards, "checksum", "writer")}
    rest["param_groups"] = state["optimizer"]["param_groups"]
    sharded.commit(folder, writer.layout(), writer.checksums, rest)


def main(args):
    path = args.snapshot
    if not re.fullmatch(r"snapshot-\d{8,}(\.pt)?", path.name) or not path.exists():
        fail(f"{path} is not a snapshot: give a file snapshot-….pt, or a folder snapshot-…")
    is_folder = path.is_dir()
    other = path.with_suffix(".pt" if is_folder else "")
    if other.exists():
        fail(f"{other} already exists: delete it first")
    state, problem = sharded.read(path) if is_folder else snapshot.read(path)
    if problem:
        fail(f"{path} is damaged ({problem}): use the one before it")
    if state["format"] != snapshot.FORMAT:
        formats = f"has format {state['format']}, and this code has {snapshot.FORMAT}"
        fail(f"{path} {formats} ({snapshot.written_by(state)}): convert it with the code that wrote it")
    try:
        if is_folder:
            snapshot.write(other, gather(state))
        else:
            scatter(path.parent, state)
    except OSError as error:
        fail(f"cannot write {other}: {error.strerror}; make room")
    except dcp.CheckpointException as error:
        fail(f"cannot write {other}: {sharded.reason_of(error)}; make room")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        versions = snapshot.written_by(state)
        fail(f"{path} cannot be converted: {reason} ({versions})")
    print(f"wrote {other}")


def parse_args():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot", type=Path, help="snapshot-….pt, or a folder snapshot-…")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
