"""After FSDP: each script in `beyond` ends where one process ends that trains the same decoder.

Promise: in [beyond](../../beyond/), tensor and context parallelism end with the weights, the losses and the
evaluation of one process, within 1e-10: in float64, after 22 training steps, at 2 and 4 ranks.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from helpers import ROOT, errors, finish, largest_difference, planted, start

from beyond.decoder import Decoder
from beyond.text import IGNORED, load_text

TENSOR = "beyond/tensor_parallel.py"
CONTEXT = "beyond/context_parallel.py"
RING = "beyond/ring.py"
LAYERS = "beyond/parallel_layers.py"
SHARDS = "beyond/shards.py"
# An epoch has 11 steps of 8 pieces; 3 pieces are left over. 15 test pieces are not divisible by 4.
BATCH = 8
PIECES = 91
WIDTH = 32
DEPTH = 2
FLAGS = [f"--num-samples={PIECES}", f"--batch-size={BATCH}", "--eval-batch-size=4", "--epochs=2"]
FLAGS += [f"--width={WIDTH}", f"--depth={DEPTH}", "--heads=4", "--precision=float64", "--use-gpu=0"]
CLIP_NORM = 0.5  # smaller than the norm in every step: test_the_norm_is_clipped_in_every_step
# name: (script, its own flags)
WAYS = {
    "tensor": (TENSOR, []),
    "tensor-library": (TENSOR, ["--library"]),
    "context": (CONTEXT, []),
    "context-ring": (CONTEXT, ["--ring"]),
}
TIED_AND_CLIPPED = ["--tie-weights", f"--clip-norm={CLIP_NORM}"]
# Why 1e-10: see `disagreements` in helpers.py.
TOLERANCE = 1e-10


@dataclass
class Result:
    """What a training has computed."""

    weights: dict[str, torch.Tensor]
    losses: list[float]
    test: dict[str, Any]
    events: list[dict[str, Any]]


def torchrun(script: str, ranks: int, *flags: str, root: Path = ROOT) -> list[str]:
    """The command that starts one of the scripts."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*words, str(root / script), *flags]


def train(script: str, ranks: int, folder: Path, *flags: str, root: Path = ROOT) -> Result:
    """Run a script with FLAGS to its end in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = ["--metrics=metrics.jsonl", "--output=weights.pt"]
    process = start(torchrun(script, ranks, *FLAGS, *files, *flags, root=root), folder)
    status, _, _ = finish(process, 300)
    assert status == 0, f"ended with status {status}, not 0\n{process.story}"
    return read(folder)


def read(folder: Path) -> Result:
    """What a run has left in `folder`."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = torch.load(folder / "weights.pt", weights_only=True)
    reports = [event["losses"] for event in events if event["event"] == "train"]
    losses = [loss for report in reports for loss in report]
    test = [event for event in events if event["event"] == "eval"][-1]
    return Result(weights, losses, test, events)


@pytest.fixture(scope="session")
def run(tmp_path_factory, worker_id):
    """A run of a script as it is, made once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def get(script, ranks, *flags):
        folder = shared / f"beyond-{Path(script).stem}-{ranks}{''.join(flags)}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "weights.pt").exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a try that failed
                train(script, ranks, folder, *flags)
        return read(folder)

    return get


def build(tie_weights: bool = False) -> Decoder:
    torch.manual_seed(0)
    return Decoder(WIDTH, DEPTH, heads=4, tie_weights=tie_weights).double()


def loss_of(model, text, labels):
    return F.cross_entropy(model(text).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


@cache
def one_process(tied_and_clipped: bool = False) -> Result:
    """The same training in this process, as one would write it for one GPU. `test` has also the norms."""
    model = build(tie_weights=tied_and_clipped)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_data, test_data = load_text(None, PIECES)
    losses, norms = [], []
    for epoch in range(2):
        order = torch.randperm(PIECES, generator=torch.Generator().manual_seed(epoch))
        for indices in order.split(BATCH)[: PIECES // BATCH]:
            loss = loss_of(model, *train_data[indices])
            optimizer.zero_grad()
            loss.backward()
            if tied_and_clipped:
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
            optimizer.step()
            losses.append(loss.item())
    text, labels = test_data[:]
    with torch.no_grad():
        correct = (model(text).argmax(dim=2) == labels).sum().item()
        loss = loss_of(model, text, labels).item()
    test = {"loss": loss, "correct": correct, "total": (labels != IGNORED).sum().item(), "norms": norms}
    return Result(model.state_dict(), losses, test, [])


def disagreements(result: Result, tied_and_clipped: bool = False) -> list[str]:
    """What a run and one process disagree in; prints what it compares."""
    reference = one_process(tied_and_clipped)
    weights = largest_difference(result.weights, reference.weights)
    pairs = zip(result.losses, reference.losses, strict=True)
    losses = max(abs(one - other) for one, other in pairs)
    tests = [(test["correct"], test["total"]) for test in (result.test, reference.test)]
    test_loss = abs(result.test["loss"] - reference.test["loss"])
    print(
        f"{len(result.losses)} steps: weights {weights:.1e}, losses {losses:.1e}, test loss {test_loss:.1e} "
        f"(at most {TOLERANCE}), correct {tests}"
    )
    found = {
        "weights": not weights <= TOLERANCE,
        "losses": not losses <= TOLERANCE,
        "evaluation": tests[0] != tests[1] or not test_loss <= TOLERANCE,
    }
    return [name for name, differs in found.items() if differs]


# `make test` draws a case of each of these: of tensor parallelism, of gathered keys and values, of the ring.
DRAWN = [
    pytest.param("tensor", marks=pytest.mark.few(1, "tensor parallelism")),
    pytest.param("tensor-library", marks=pytest.mark.few(1, "tensor parallelism")),
    pytest.param("context", marks=pytest.mark.few(1, "context parallelism")),
    pytest.param("context-ring", marks=pytest.mark.few(1, "the ring")),
]


@pytest.mark.parametrize("flags", [[], TIED_AND_CLIPPED], ids=["plain", "tied-and-clipped"])
@pytest.mark.parametrize("way", DRAWN)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_end_where_one_process_ends(run, ranks, way, flags):
    """Also with tied weights, and with a norm that has parts of shards and of whole parameters."""
    script, own_flags = WAYS[way]
    result = run(script, ranks, *own_flags, *flags)
    assert len(result.losses) == 22
    assert disagreements(result, tied_and_clipped=bool(flags)) == []


def test_the_norm_is_clipped_in_every_step():
    """Otherwise, the runs above would not show that the norm is right."""
    norms = one_process(tied_and_clipped=True).test["norms"]
    print([round(norm, 2) for norm in norms])
    assert len(norms) == 22 and min(norms) > CLIP_NORM


def numbers_of_a_rank(ranks: int, tied: bool, width: int, depth: int) -> tuple[int, int]:
    """How many numbers the parameters have that a rank holds, and those of one process."""
    per_block_divided = 4 * width * width + 3 * width  # query, key, value and output, and three biases
    per_block_divided += 8 * width * width + 4 * width  # up, its bias, and down
    per_block_whole = 2 * width + 4 * width  # the biases after the sums, and two norms
    rest = 256 * width + 64 * width + 2 * width  # characters, positions, and the last norm
    rest += 0 if tied else 256 * width
    whole = depth * (per_block_divided + per_block_whole) + rest
    rank = depth * (per_block_divided // ranks + per_block_whole) + rest
    assert per_block_divided % ranks == 0
    return rank, whole


@pytest.mark.few(1)
@pytest.mark.parametrize("flags", [[], TIED_AND_CLIPPED], ids=["plain", "tied-and-clipped"])
@pytest.mark.parametrize("way", ["tensor", "tensor-library"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_its_part_of_every_block(run, ranks, way, flags):
    """And nothing more: the bytes of parameters, gradients and AdamW's averages are those of a formula."""
    script, own_flags = WAYS[way]
    result = run(script, ranks, *own_flags, *flags)
    [memory] = [event for event in result.events if event["event"] == "memory"]
    numbers = numbers_of_a_rank(ranks, bool(flags), WIDTH, DEPTH)
    rank, whole = (8 * count for count in numbers)  # float64
    print(memory, rank, whole)
    assert memory["ranks"] == [[rank, rank, 2 * rank]] * ranks
    assert memory["whole"] == [whole, whole, 2 * whole]
    assert whole == sum(parameter.nbytes for parameter in build(bool(flags)).parameters())


def test_the_bytes_on_the_page_are_those_of_the_formula():
    """For the flags that the page's command leaves as they are: in float32, width 64, four blocks."""
    page = (ROOT / "beyond" / "README.md").read_text()
    numbers = numbers_of_a_rank(2, tied=False, width=64, depth=4)
    expected = []
    for name, count in zip(("rank 0", "rank 1", "one process"), (numbers[0], *numbers), strict=True):
        megabytes = 4 * count / 1e6
        expected.append((name, *(f"{factor * megabytes:.2f}" for factor in (1, 1, 2))))
    found = re.findall(r"^(rank \d|one process) +([\d.]+) MB +([\d.]+) MB +([\d.]+) MB$", page, re.M)
    print(found, expected)
    assert found == expected


FORWARD = "total = partial.clone(memory_format=torch.contiguous_format)\n"
SUM_OF_WHOLE_PARAMETERS = (
    "loss.backward()\n",
    "loss.backward()\n"
    "        for parameter in self.model.parameters():\n"
    "            if not hasattr(parameter, 'sharded_dim'):\n"
    "                dist.all_reduce(parameter.grad)\n",
)
# name: (flags, file, edit of the file, what must be found to disagree)
BUGS_OF_TENSOR = {
    "no all-reduce in backward": (
        [],
        LAYERS,
        ("belongs to autograd\n        dist.all_reduce(total)\n", "belongs to autograd\n"),
        "weights",
    ),
    "no all-reduce in forward": (
        [],
        LAYERS,
        (f"{FORWARD}        dist.all_reduce(total)\n", FORWARD),
        "losses",
    ),
    "the gradient of the sum is summed again": (
        [],
        LAYERS,
        ("return grad\n", "dist.all_reduce(grad)\n        return grad\n"),
        "weights",
    ),
    "gradients of whole parameters are summed": (
        TIED_AND_CLIPPED,
        TENSOR,
        SUM_OF_WHOLE_PARAMETERS,
        "weights",
    ),
    "the same without clipping: AdamW hides nearly all of it": (
        [],
        TENSOR,
        SUM_OF_WHOLE_PARAMETERS,
        "weights",
    ),
    "a norm over a rank's shards": (
        TIED_AND_CLIPPED,
        SHARDS,
        ("    dist.all_reduce(of_shards)\n", ""),
        "weights",
    ),
    "a norm that counts whole parameters more than once": (
        TIED_AND_CLIPPED,
        SHARDS,
        (
            "        if is_sharded(parameter):\n            of_shards",
            "        if True:\n            of_shards",
        ),
        "weights",
    ),
    "a bias for each rank": (
        [],
        LAYERS,
        (
            "partial = F.linear(x, self.weight)\n",
            "partial = F.linear(x, self.weight, self.bias)\n        return SumOverRanks.apply(partial)\n",
        ),
        "losses",
    ),
    "all ranks keep the first part": ([], LAYERS, ("parts[dist.get_rank()]", "parts[0]"), "losses"),
    "another model on each rank": (
        [],
        TENSOR,
        ("torch.manual_seed(args.seed)", "torch.manual_seed(args.seed + dist.get_rank())"),
        "losses",
    ),
    "another batch on each rank": (
        [],
        TENSOR,
        ("(train_data, args.seed)", "(train_data, args.seed + dist.get_rank())"),
        "losses",
    ),
    "every epoch in the same order": ([], TENSOR, ("set_epoch(self.epoch)", "set_epoch(0)"), "losses"),
    "padding counts as targets": (
        [],
        TENSOR,
        ("return (labels != IGNORED).sum().item()", "return labels.numel()"),
        "losses",
    ),
    "the mean of the batches' means": (
        [],
        TENSOR,
        ("metric.double().sum()", "metric.double().mean()"),
        "evaluation",
    ),
}


BUGS_OF_CONTEXT = {
    "a rank keeps its own gradients of keys and values": (
        [],
        CONTEXT,
        ("dist.reduce_scatter(total, grads)", "total.copy_(grads[dist.get_rank()])"),
        "weights",
    ),
    "positions from 0 on each rank": (
        [],
        CONTEXT,
        ("self.ddp_model(text, self.start)", "self.ddp_model(text)"),
        "losses",
    ),
    "the mask of rank 0": (
        [],
        CONTEXT,
        ("get_world_size())[dist.get_rank()]", "get_world_size())[0]"),
        "losses",
    ),
    "no mask": ([], CONTEXT, (", attn_mask=is_visible", ""), "losses"),
    "a rank sees its own part only": (
        [],
        CONTEXT,
        ("else gathered_attention", "else block.attention.attend"),
        "losses",
    ),
    "divided by a rank's own targets": (
        [],
        CONTEXT,
        (
            "max(1, self.count_targets(batch)) / self.world_size",
            "max(1, self.count_targets(self.part_of(batch)))",
        ),
        "losses",
    ),
    "gradients not averaged": (
        [],
        CONTEXT,
        ("self.ddp_model(text, self.start)", "self.model(text, self.start)"),
        "weights",
    ),
    "the logged loss is rank 0's": (
        [],
        CONTEXT,
        ("dist.all_reduce(means)", "means *= self.world_size"),
        "losses",
    ),
    "evaluation is rank 0's": ([], CONTEXT, ("dist.all_reduce(totals)", "pass"), "evaluation"),
}
BUGS_OF_RING = {
    "gradients end one rank too early": (
        RING,
        (
            "            traveling = pass_on(traveling)  #",
            "            if step == 0:\n                traveling = pass_on(traveling)  #",
        ),
        "weights",
    ),
    "what later ranks have is visible": (RING, ("return step > dist.get_rank()", "return False"), "losses"),
    "what this rank has is all visible": (
        RING,
        ("    if step > 0:\n        return scores", "    if True:\n        return scores"),
        "losses",
    ),
    "the output is not scaled down": (
        RING,
        ("output = output * (log_sum - new_log_sum).exp()", "pass"),
        "losses",
    ),
    "a part of softmax's gradient": (RING, (".mT - shared)", ".mT)"), "weights"),
}
BUGS = {
    **{f"ring: {name}": (CONTEXT, ["--ring"], *bug) for name, bug in BUGS_OF_RING.items()},
    **{f"tensor: {name}": (TENSOR, *bug) for name, bug in BUGS_OF_TENSOR.items()},
    **{f"context: {name}": (CONTEXT, *bug) for name, bug in BUGS_OF_CONTEXT.items()},
}


@pytest.mark.few(2)
@pytest.mark.sample(10)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(tmp_path, bug):
    script, flags, file, edit, found = BUGS[bug]
    root = planted(tmp_path / "root", file, edit)
    result = train(script, 2, tmp_path / "run", *flags, root=root)
    assert found in disagreements(result, tied_and_clipped="--tie-weights" in flags)


ATTENTION = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from beyond.context_parallel import gathered_attention
from beyond.decoder import causal_attention
from beyond.ring import ring_attention

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
whole = [torch.randn(2, 3, 5 * ranks, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
grad = torch.randn(2, 3, 5 * ranks, 4, dtype=torch.float64)
expected = causal_attention(*whole)
expected.backward(grad)
expected = [expected.detach(), *(tensor.grad for tensor in whole)]
for attention in (gathered_attention, ring_attention):
    parts = [tensor.detach().chunk(ranks, 2)[rank].clone().requires_grad_() for tensor in whole]
    output = attention(*parts)
    output.backward(grad.chunk(ranks, 2)[rank])
    found = [output, *(tensor.grad for tensor in parts)]
    for name, tensor, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        difference = (tensor - other.chunk(ranks, 2)[rank]).abs().max().item()
        print(f"rank {rank} {attention.__name__} {name} {difference}\\n", end="", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("ranks", [2, 3])
def test_divided_attention_is_attention(tmp_path, ranks):
    """Also with 3 ranks, by which the texts of the scripts cannot be divided: outputs and gradients."""
    (tmp_path / "attention.py").write_text(ATTENTION)
    words = torchrun("attention.py", ranks, str(ROOT), root=tmp_path)
    status, out, err = finish(start(words, tmp_path))
    print(out, err)
    assert status == 0
    differences = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("rank ")]
    assert len(differences) == 8 * ranks
    # Sums in another order: the numbers are near 1, and a last bit of float64 is 2e-16.
    assert max(differences) < 1e-13


COUNT = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from beyond.decoder import Decoder
from beyond.tensor_parallel import split_by_hand, split_by_library
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

dist.init_process_group("gloo")
for way in ("by hand", "by library"):
    model = Decoder(width=32, depth=3, heads=4)
    if way == "by hand":
        split_by_hand(model)
    else:
        split_by_library(model, init_device_mesh("cpu", (2,)))
    with CommDebugMode() as forward:
        output = model(torch.zeros(2, 64, dtype=torch.int64)).sum()
    with CommDebugMode() as backward:
        output.backward()
    if dist.get_rank() == 0:
        print(way, forward.get_total_counts(), backward.get_total_counts(), flush=True)
dist.destroy_process_group()
"""


def test_a_block_needs_two_all_reduces_forward_and_two_backward(tmp_path):
    """By hand and by library: query, key and value share one."""
    (tmp_path / "count.py").write_text(COUNT)
    status, out, err = finish(start(torchrun("count.py", 2, str(ROOT), root=tmp_path), tmp_path))
    print(out, err)
    assert status == 0
    assert out.splitlines() == ["by hand 6 6", "by library 6 6"]


def test_the_page_shows_the_code_as_it_is():
    page = (ROOT / "beyond" / "README.md").read_text()
    code = "".join(path.read_text() for path in sorted((ROOT / "beyond").glob("*.py")))
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    print(f"{len(blocks)} blocks")
    assert len(blocks) >= 4
    for block in blocks:
        assert block in code, block


@pytest.mark.parametrize("script", [TENSOR, CONTEXT])
def test_a_script_stays_small(script):
    lines = (ROOT / script).read_text().splitlines()
    print(f"{script} has {len(lines)} lines, the longest {max(map(len, lines))} columns")
    assert len(lines) <= 230 and max(map(len, lines)) <= 100


# name: (script, ranks, flags, how the one line begins after "error: ")
WRONG = {
    "one rank": (TENSOR, 1, [], "one rank cannot divide a model: start two or more with --nproc-per-node"),
    "one rank, a text": (CONTEXT, 1, [], "one rank cannot divide a text: start two or more with --nproc-"),
    "heads and ranks": (TENSOR, 2, ["--heads=1"], "--heads 1 is not a multiple of 2, the number of ranks"),
    "heads and width": (TENSOR, 2, ["--heads=6"], "--width 32 is not a multiple of --heads 6: choose other"),
    "three ranks": (CONTEXT, 3, [], "64 characters do not divide by 3 ranks: start another number"),
    "a flag of the steps": (TENSOR, 2, ["--save-every=9"], "unrecognized arguments: --save-every=9 (--help"),
    "a model of digits": (CONTEXT, 2, ["--model=cnn"], "unrecognized arguments: --model=cnn (--help lists"),
    "a file as a folder": (TENSOR, 2, ["--output=file/out"], "cannot write file/out: "),
    "a folder as a file": (TENSOR, 2, ["--output=folder"], "folder is a folder: --output is the name of a"),
    "no text": (CONTEXT, 2, ["--data-dir=nowhere"], "cannot read nowhere: No such file or directory; point"),
    "few pieces": (TENSOR, 2, ["--num-samples=7"], "a step takes 8 samples, sums-7 has 7: lower --batch-"),
    "no finite loss": (CONTEXT, 2, ["--lr=1e300"], "the loss is nan by step 11: nothing more is saved; try"),
}


@pytest.mark.few(2)
@pytest.mark.sample(5)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_is_said_in_one_line(tmp_path, wrong):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    script, ranks, flags, message = WRONG[wrong]
    status, out, err = finish(start(torchrun(script, ranks, *FLAGS, *flags), tmp_path))
    print(out, err)
    assert status == 1 and "exitcode  : 2 " in err
    assert err.count("Traceback") == 1  # torchrun's own
    [line] = errors(err)
    assert line.startswith(f"error: {message}")
    assert "snapshot" not in line  # there are none, so no advice is about them
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
