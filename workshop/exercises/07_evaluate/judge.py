"""What exercise 07 promises."""

import torch
import torch.distributed as dist
from judging import Promise
from torch import nn

PAGE = "02_multigpu_spawn/README.md, The evaluation"
RIGHT = [True, True, False, True, False, False, True, True, True, False]  # of ten images


class Oracle(nn.Module):
    """Takes images that are their own numbers, and writes down which it has seen, and in which mode."""

    def __init__(self):
        super().__init__()
        self.seen, self.modes, self.gradients = [], set(), set()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        self.seen += [int(number) for number in images[:, 0]]
        self.modes.add("train" if self.training else "eval")
        outputs = torch.zeros(len(images), 3)
        for row, number in enumerate(int(number) for number in images[:, 0]):
            outputs[row, number % 3 if RIGHT[number] else (number + 1) % 3] = 1.0
        outputs = outputs * self.weight
        self.gradients.add(outputs.requires_grad)
        return outputs


def tried(answer, count=10, training=True):
    images = torch.arange(count, dtype=torch.float32).reshape(-1, 1)
    model = Oracle().train(training)
    found = answer.evaluate(model, images, torch.arange(count) % 3)
    return model, tuple(map(int, found))


def everywhere(mine, ranks):
    found = [None] * ranks
    dist.all_gather_object(found, mine)
    return found


def once(answer, rank, ranks):
    model, _ = tried(answer)
    seen = sorted(number for seen in everywhere(model.seen, ranks) for number in seen)
    return {"seen on all ranks together": list(range(10))}, {"seen on all ranks together": seen}


def counted(answer, rank, ranks):
    return {"right": sum(RIGHT), "images": 10}, dict(zip(("right", "images"), tried(answer)[1], strict=True))


def shares(answer, rank, ranks):
    model, _ = tried(answer)
    lengths = [len(seen) for seen in everywhere(model.seen, ranks)]
    told = f"images of each rank: {lengths}"
    return "one image apart at most", "one image apart at most" if max(lengths) - min(lengths) < 2 else told


def few(answer, rank, ranks):
    """Two images: at three ranks one rank has none."""
    return (sum(RIGHT[:2]), 2), tried(answer, count=2)[1]


def mode(answer, rank, ranks):
    return ["eval"], sorted(tried(answer)[0].modes)


def left(answer, rank, ranks):
    modes = [tried(answer, training=training)[0].training for training in (True, False)]
    return {"was training": True, "was not": False}, dict(
        zip(("was training", "was not"), modes, strict=True)
    )


def gradients(answer, rank, ranks):
    return "none", "none" if tried(answer)[0].gradients == {False} else "some are kept"


PROMISES = [
    Promise("all ranks together pass each image through the model once", once, PAGE),
    Promise("the two numbers are those of all images, on every rank", counted, PAGE),
    Promise("the shares are equally long, or one image apart", shares, PAGE),
    Promise("a rank without any image takes part", few, PAGE),
    Promise("the model is in eval mode while it is tested", mode, PAGE),
    Promise("the model is left in the mode that it was in", left, PAGE),
    Promise("no gradients are kept", gradients, PAGE),
]
