"""What exercise 10 promises."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it: once here, not in every rank
from judging import Promise, load

PAGE = "01_single_gpu/README.md, How it works"
START = load(Path(__file__).with_name("start.py"))  # whose Training a learner cannot have changed by mistake


class Plain(START.Training):
    """Without dropout, so that random numbers play no part."""

    def __init__(self, seed):
        super().__init__(seed)
        self.model[1].p = 0.0


def weights(training):
    return {name: tensor.tolist() for name, tensor in training.model.state_dict().items()}


def stopped(answer, kind: Callable, before: int, after: int):
    """A run that was saved to a file after `before` steps and went on for `after` in a new object."""
    training = kind(seed=5)
    for _ in range(before):
        training.step()
    file = io.BytesIO()
    torch.save(answer.state(training), file)
    for _ in range(2):
        training.step()  # the first run continues for a while: what was saved must not change with it
    torch.manual_seed(123)
    resumed = kind(seed=5)
    answer.resume(resumed, torch.load(io.BytesIO(file.getvalue())))
    for _ in range(after):
        resumed.step()
    return resumed


def through(kind, steps):
    training = kind(seed=5)
    for _ in range(steps):
        training.step()
    return training


def place(training):
    return {"epoch": training.epoch, "samples seen in it": training.samples_seen}


def at_once(answer, rank, ranks):
    return weights(through(Plain, 3)), weights(stopped(answer, Plain, 3, 0))


def where(answer, rank, ranks):
    return place(through(Plain, 9)), place(stopped(answer, Plain, 9, 0))


def one_more(answer, rank, ranks):
    return weights(through(Plain, 4)), weights(stopped(answer, Plain, 3, 1))


def next_epoch(answer, rank, ranks):
    return weights(through(Plain, 14)), weights(stopped(answer, Plain, 8, 6))


def dropout(answer, rank, ranks):
    return weights(through(START.Training, 8)), weights(stopped(answer, START.Training, 3, 5))


def kept(answer, rank, ranks):
    """state() must not hand out the very tensors that the next step changes."""
    training = through(Plain, 3)
    saved = answer.state(training)
    with tempfile.TemporaryFile() as file:
        torch.save(saved, file)
    return place(through(Plain, 3)), place(training)


ALONE = (1,)  # a training of one process
PROMISES = [
    Promise("the weights are those that were saved", at_once, PAGE, ALONE),
    Promise("it resumes in the same epoch, after the same sample", where, PAGE, ALONE),
    Promise("the next step is that of a run without a stop: the optimizer remembers", one_more, PAGE, ALONE),
    Promise("six steps more are the same, too, into the next epoch", next_epoch, PAGE, ALONE),
    Promise("also with dropout: random numbers resume, too", dropout, PAGE, ALONE),
    Promise("saving changes nothing in the training", kept, PAGE, ALONE),
]
