"""What exercise 19 promises."""

import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401  # imported once, not in every rank
from judging import about
from turning import TESTED, Extra, judge_script, like_step_01

FACTS = about(__file__)
PAGE_ACCUMULATE = "05_fsdp/README.md, The training loop"
PAGE_EVALUATION = "05_fsdp/README.md, Evaluation"


def whole_test(reference, runs):
    """All images of the test set are counted."""
    test = runs[0].run.test
    if test["total"] == TESTED:
        return []
    return [f"with 2 ranks and {TESTED} images to test on: {test['total']} counted"]


def judge(file):
    accumulate = ["--accumulate=3", "--batch-size=2", "--epochs=1"]
    says = "--accumulate 3 with batches of 2 is like batches of 6, also when the run is resumed"
    accumulated = Extra(says, PAGE_ACCUMULATE, accumulate, like_step_01, resumes=True)
    # Of 7 images, 4 are rank 0's and 3 rank 1's. In batches of 3, that is one batch more.
    small = ["--eval-batch-size=3", "--batch-size=6", "--epochs=1"]
    says = "ranks with unequally many images to test on end, too"
    uneven = Extra(says, PAGE_EVALUATION, small, whole_test)
    return judge_script(FACTS, file, accumulated, uneven)
