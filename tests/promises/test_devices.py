"""What the scripts would ask of a GPU, on a machine without one; test_gpu.py is for machines with GPUs.

Promise: if there are GPUs, each rank of steps 02 to 05 selects its own GPU before it joins the others.
Batches are copied without waiting, sums stay on the device, and with `bf16`, layers compute in bfloat16.
"""

import json
import re

import pytest
import torch
from helpers import FOLDERS, GROWN, NORMED, command, finish, planted, start

from common.process_group import backends

FLAGS = ["--num-samples=24", "--batch-size=4", "--epochs=2", "--use-gpu=0"]
GPU = ('return torch.device("cpu")', 'return torch.device("cuda", local_rank)')
CHOOSES = "torch.accelerator.set_device_index(device)"

# Writes down which of torch's functions a train.py calls, how batches are copied, and in which type layers
# compute. It does not replace any function.
ASKED = """
class Asked(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), keywords=None):
        keywords = keywords or {}
        result = function(*args, **keywords)
        caller, name = sys._getframe(1).f_code, getattr(function, "__name__", "")
        found = {"batch_norm": keywords.get("weight")}
        computes = found.get(name, result if name in ("conv2d", "linear", "cross_entropy") else None)
        if computes is not None or caller.co_filename.endswith(("train.py", "common/loading.py")):
            words = {word: str(value) for word, value in keywords.items()}
            row = [caller.co_qualname, name, words, str(getattr(computes, "dtype", ""))]
            with open(f"asked-{os.getpid()}", "a") as file:
                print(json.dumps(row), file=file)
        return result


class Reporter:
"""
KEPT = [("bfloat16", "conv2d"), ("bfloat16", "linear"), ("float32", "cross_entropy")]
KEPT += [("float32", "batch_norm")]  # the type of its weights, and of its averages
BEGINS = "        self.run = run\n"


@pytest.mark.few(2)
@pytest.mark.parametrize("step", GROWN)
def test_a_rank_takes_its_own_gpu_before_anything_else(tmp_path, step):
    """There is no GPU here, and torch reports this at the first line that needs one: it must be CHOOSES."""
    root = planted(tmp_path / "root", "common/device.py", GPU, steps=(step,))
    words = [*command(step, 2, root), *FLAGS]
    status, _, err = finish(start(words, tmp_path))
    print(err)
    assert status == 1 and re.search(rf"in worker\n *{re.escape(CHOOSES)}", err)

    # The next line that needs a GPU binds the process group to the same one.
    planted(root, step, (CHOOSES, "pass"))
    status, _, err = finish(start(words, tmp_path))
    print(err)
    said = r"device_id cuda:[01] (is out of range|does not match)"  # either rank may be first
    assert status == 1 and re.search(said, err)


@pytest.mark.few(2)
@pytest.mark.parametrize("step", FOLDERS)
def test_in_bf16_layers_compute_in_it_and_no_copy_is_waited_for(tmp_path, step):
    edits = [("class Reporter:\n", ASKED.lstrip()), (BEGINS, f"{BEGINS}        Asked().__enter__()\n")]
    root = planted(tmp_path / "root", "common/reporting.py", *edits, steps=(step,))
    planted(root, "common/models.py", NORMED)
    ranks = 1 if step == "01" else 2
    status, out, err = finish(start([*command(step, ranks, root), *FLAGS, "--precision=bf16"], tmp_path))
    print(out, err)
    assert status == 0
    files = [*tmp_path.glob("asked-*")]
    assert len(files) == ranks
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        print(*rows, sep="\n")
        copies = [(scope, words) for scope, name, words, _ in rows if name == "to"]
        steps = 24 // 4 // ranks
        before = ["False"] if step in ("02", "03", "04") else []  # fix_bucket_order
        batches = len(before) + 2 * (steps + 1)  # in two epochs, each with one batch of the test set
        assert copies == [("to_device", {"non_blocking": "True"})] * 2 * batches  # images, and labels
        sums = [(name, words["device"]) for _, name, words, _ in rows if name in ("zeros", "full")]
        counts = [] if step == "01" else [("full", "cpu")] * steps  # all ranks' targets
        assert sums == [*counts, ("zeros", "cpu")] * 2
        trains = [words["training"] for _, name, words, _ in rows if name == "batch_norm"]
        assert trains == before + (["True"] * steps + ["False"]) * 2
        types = {name: {of for _, other, _, of in rows if other == name and of} for *_, name in KEPT}
        assert types == {name: {f"torch.{of}"} for of, name in KEPT}


@pytest.mark.few(2)
@pytest.mark.parametrize("step", FOLDERS)
def test_unless_asked_nothing_is_computed_in_bf16(tmp_path, step):
    ends = '        return F.cross_entropy(logits, labels, reduction="sum")\n'
    root = planted(tmp_path / "root", step, (ends, f"        assert logits.dtype == torch.float32\n{ends}"))
    ranks = 1 if step == "01" else 2
    status, out, err = finish(start([*command(step, ranks, root), *FLAGS], tmp_path))
    assert status == 0, out + err


def test_objects_never_go_through_a_gpu():
    """With NCCL alone, step 04's pickled snapshot would be copied to every GPU."""
    for device, expected in (
        ("cpu", "cpu:gloo"),
        ("cuda:3", "cpu:gloo,cuda:nccl"),
        ("xpu", "cpu:gloo,xpu:xccl"),
    ):
        assert backends(torch.device(device)) == expected
