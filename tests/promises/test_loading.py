"""Batches: any map-style dataset, nested batches, and workers that do not repeat random numbers.

Promise: a custom dataset works in place of `load_mnist`, with no other change.
"""

import contextlib
import inspect
import multiprocessing
import random
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from helpers import (
    after_a_step,
    command,
    disagreements,
    drawn,
    errors,
    finish,
    planted,
    ranks_of,
    start,
    traced,
    train,
)
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common.buckets import fix_bucket_order
from common.loading import (
    collate,
    fingerprint,
    group_batches,
    loader_options,
    seed_python_and_numpy,
    to_device,
)
from common.mnist import load_mnist
from common.reporting import Reporter
from common.run import Run
from common.sampler import ResumableSampler, ShuffledSampler
from common.snapshot import restore_rng, rng_states

CPU = torch.device("cpu")
RUN = Run("01", "cnn", "noise", "float32", 0)
META = torch.device("meta")  # a device that is not the CPU, and that every machine has


opened = []  # by the workers of this process


def note_worker(worker):
    opened.append(worker)


class Opened(Dataset):
    """Samples from a file that each worker opens for itself."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        assert opened == [0] and get_worker_info().num_workers == 1
        assert type(multiprocessing.current_process()).__name__ == "SpawnProcess"
        return torch.ones(2)


@pytest.mark.slow
def test_ddps_first_pass_has_samples_that_a_worker_makes_as_the_loaders_do():
    options = {"worker_init_fn": note_worker, "multiprocessing_context": "spawn"}
    loader = DataLoader(Opened(), 2, num_workers=2, **options)
    model = torch.nn.Linear(2, 1)
    fix_bucket_order(model, lambda batch: model(batch).sum(), contextlib.nullcontext(), loader, CPU)
    assert opened == [] and model.weight.grad is None


def test_a_sampler_gives_the_first_epoch_until_it_is_told_another():
    sampler = ResumableSampler(ShuffledSampler(range(7), seed=3))
    first = list(sampler)
    assert sorted(first) == list(range(7)) and len(sampler) == 7
    sampler.set_epoch(0, start=5)
    assert list(sampler) == first[5:] and len(sampler) == 2
    sampler.set_epoch(0)
    assert list(sampler) == first and len(sampler) == 7
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(7)) and list(sampler) != first


class Pair(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


def test_every_tensor_of_a_nested_batch_moves():
    one, two = torch.zeros(2), torch.ones(3)
    batch = {"text": [one, (two, "a name")], "pair": Pair(one, two), "number": 3}
    moved = to_device(batch, META)
    assert moved.keys() == batch.keys()
    assert isinstance(moved["text"], list) and isinstance(moved["text"][1], tuple)
    assert isinstance(moved["pair"], Pair)
    assert moved["text"][1][1] == "a name" and moved["number"] == 3
    tensors = [moved["text"][0], moved["text"][1][0], *moved["pair"]]
    assert [(tensor.device.type, len(tensor)) for tensor in tensors] == [("meta", n) for n in (2, 3, 2, 3)]
    assert to_device(batch, CPU)["text"][0] is one


def test_samples_are_stacked_and_a_whole_batch_is_left_alone():
    batch = collate([{"x": torch.zeros(2), "y": 1}, {"x": torch.ones(2), "y": 2}])
    assert batch["x"].shape == (2, 2) and batch["y"].tolist() == [1, 2]
    whole = (torch.zeros(4), torch.ones(4))
    assert collate(whole) is whole


def test_groups_are_drawn_one_batch_at_a_time():
    """An incomplete group at the end is left out."""
    drawn = []
    batches = (drawn.append(number) or number for number in range(7))
    found = group_batches(batches, 3)
    assert drawn == []
    assert next(found) == [0, 1, 2] and drawn == [0, 1, 2]
    assert [*found] == [[3, 4, 5]]


class Plain(Dataset):
    """Digits, one sample at a time, without any of the methods and names that `Digits` has."""

    def __init__(self, digits):
        self.digits = digits

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        images, labels = self.digits[index]
        return images, labels.item()


def test_nodes_compare_what_there_is_to_compare():
    digits, _ = load_mnist(None, 12)
    assert fingerprint(digits) == digits.checksum()
    assert fingerprint(Plain(digits)) == "Plain-12 of 12 samples"


# An edit of a train.py: its digits, one sample at a time.
OWN_DATA = f"""{inspect.getsource(Plain).replace("(Dataset)", "(torch.utils.data.Dataset)")}

def load_mnist(data_dir, num_samples, load=load_mnist):
    return [Plain(digits) for digits in load(data_dir, num_samples)]


class Trainer:
"""
TUPLES = ("class Trainer:\n", OWN_DATA)
DICTIONARIES = [
    (TUPLES[0], OWN_DATA.replace("images, labels.item()", '{"pixels": images, "digit": labels}')),
    ("        _, labels = batch\n", '        labels = batch["digit"]\n'),
]


@pytest.mark.few(1)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("step", ["03", "05"])
def test_a_dataset_of_ones_own_takes_the_place_of_mnist(once, tmp_path, step, ranks):
    """It gives the same digits, so the run must end with the same weights, to the last bit."""
    flags = ["--num-samples=91", f"--batch-size={12 // ranks}", "--epochs=2", "--precision=float64"]
    root = planted(tmp_path / "root", step, TUPLES)
    run = train(step, ranks, tmp_path, *flags, root=root)
    usual = once(step, ranks, *flags)
    assert run.events[0]["dataset"] == "Plain-91"
    assert disagreements(run, usual) == [] and run.losses.equal(usual.losses)


@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["01", "03", "05"])
def test_batches_may_be_dictionaries(once, tmp_path, step):
    ranks = ranks_of(step)
    flags = ["--num-samples=91", f"--batch-size={12 // ranks}", "--epochs=1", "--precision=float64"]
    root = planted(tmp_path / "root", step, *DICTIONARIES)
    script = next(root.glob("0*/train.py"))
    unpacks = "        images, labels = batch\n"
    source = script.read_text()
    assert source.count(unpacks) == 2  # in the two methods that a user replaces
    script.write_text(source.replace(unpacks, '        images, labels = batch["pixels"], batch["digit"]\n'))
    run = train(step, ranks, tmp_path, *flags, root=root)
    assert run.losses.equal(once(step, ranks, *flags).losses)


@pytest.mark.sample(4)
@pytest.mark.few(1)
@pytest.mark.parametrize("count", [2, 1, 0])
@pytest.mark.parametrize("step", ["01", "03", "05"])
def test_there_may_be_fewer_test_samples_than_ranks(tmp_path, step, count):
    ranks = 3 if step != "01" else 1
    loads = "    return [Plain(digits) for digits in load(data_dir, num_samples)]\n"
    cuts = f"    training, test = load(data_dir, num_samples)\n    few = range({count})\n"
    cuts += "    return Plain(training), torch.utils.data.Subset(Plain(test), few)\n"
    root = planted(tmp_path / "root", step, (TUPLES[0], OWN_DATA.replace(loads, cuts)))
    flags = ["--num-samples=48", "--batch-size=4", "--epochs=2"]
    run = train(step, ranks, tmp_path, *flags, root=root)
    tested = [event["total"] for event in run.events if event["event"] == "eval"]
    assert tested == ([count, count] if count else [])
    assert ("no test: the test set has no targets" in run.out) == (count == 0)


class Noisy(Dataset):
    """Random numbers, drawn in the worker, as an augmentation draws them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(())


def noise(global_step, epochs):
    """What two workers draw in `epochs` epochs of a run that began, or resumed, at `global_step`."""
    options = loader_options(2, CPU)
    if global_step > 0:
        state = {"rng": rng_states(CPU), "path": Path("s/snapshot"), "epoch": 0, "global_step": global_step}
        restore_rng(state, CPU, options["generator"], Reporter(RUN, CPU))
    loader = DataLoader(Noisy(), 4, **options)
    return torch.cat([batch for _ in range(epochs) for batch in loader]).tolist()


def test_workers_draw_other_numbers_in_each_epoch_and_after_a_resume():
    torch.manual_seed(5)
    first = noise(0, 2)
    assert noise(0, 2) == first  # the same run draws the same numbers
    later = noise(4, 2)
    assert len({*first, *later}) == 32


@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["04", "05"])
def test_accumulating_asks_the_loader_for_small_batches(tmp_path, step):
    """Not for batches that are `--accumulate` times as large."""
    root = traced(planted(tmp_path / "root", step))
    flags = ["--num-samples=91", "--batch-size=4", "--accumulate=3", "--epochs=1"]
    train(step, 2, tmp_path, *flags, root=root)
    processes = drawn(tmp_path, 91)
    assert len(processes) == 2
    # 45 samples for each rank: 11 batches of four. The last two are too few for a step of three.
    assert [[len(batch) for batch in batches] for batches in processes] == [[4] * 11] * 2


STORAGES = "len({p.grad.untyped_storage().data_ptr() for p in self.model.parameters()})"


@pytest.mark.few(1)
@pytest.mark.parametrize("step", ["02", "03", "04"])
def test_gradients_are_views_of_ddps_buckets(tmp_path, step):
    """Here, all are in one bucket. There is no second copy of them in memory, even after micro-batches."""
    says = after_a_step(f"self.report.say(f'storages {{{STORAGES}}}', self.rank)")
    root = planted(tmp_path / "root", step, says)
    flags = [
        "--num-samples=48",
        "--batch-size=4",
        "--epochs=1",
        *(["--accumulate=2"] if step == "04" else []),
    ]
    run = train(step, 2, tmp_path, *flags, root=root)
    found = [line for line in run.out.splitlines() if line.startswith("storages")]
    assert found and set(found) == {"storages 1"}


@pytest.mark.slow
@pytest.mark.parametrize("step", ["01", "03"])
def test_a_temporary_folder_with_too_long_a_name_is_told(tmp_path, step):
    """Workers send tensors through sockets in it. They would fail to, and the run would wait forever."""
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    flags = ["--num-samples=48", "--batch-size=4", "--epochs=1", "--use-gpu=0", "--num-workers=1"]
    status, out, err = finish(
        start([*command(step, ranks_of(step)), *flags], tmp_path, real=True, TMPDIR=str(deep))
    )
    print(status, out, err)
    said = f"error: the path {deep} is too long for the sockets of --num-workers: set TMPDIR to a shorter one"
    assert status != 0 and errors(err) == [said]


def test_numpys_and_pythons_random_numbers_are_seeded(tmp_path):
    """The numbers that a dataset draws in the rank's process. After a resume, it draws others."""
    drawn = []
    for steps in (0, 0, 7):
        torch.manual_seed(3)
        loader_options(0, CPU)
        if steps:
            state = {"rng": rng_states(CPU), "path": Path("s/snapshot"), "epoch": 0, "global_step": steps}
            restore_rng(state, CPU, None, Reporter(RUN, CPU))
        drawn.append((random.random(), numpy.random.rand()))
    seed_python_and_numpy(2**40 + 3)  # numpy takes 32 bits
    state = numpy.random.get_state()[1]
    numpy.random.seed(3)
    assert (numpy.random.get_state()[1] == state).all()
    first, again, resumed = drawn
    assert first == again and first[0] != resumed[0] and first[1] != resumed[1]
