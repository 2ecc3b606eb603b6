"""What exercise 19 promises."""

import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401  # imported once, not in every rank
from judging import about
from turning import Extra, judge_script, like_step_01

TODO = about(__file__)["todo"]
TESTED = 2001  # images: 1001 are rank 0's, 1000 rank 1's; in batches of 1000 that is one batch more
SMALL = ["--model=vit", "--vit-depth=1"]  # or a step of 6004 images would be silent for long


def whole_test(reference, runs):
    """All images of the test set are counted."""
    test = runs[0].run.test
    if test["total"] == TESTED:
        return []
    return [f"with 2 ranks and {TESTED} images to test on: {test['total']} counted"]


def judge(file):
    page = "05_fsdp/README.md, "
    return judge_script(
        "05",
        TODO,
        file,
        Extra(
            "--accumulate 3 with batches of 2 ends like batches of 6",
            page + "The training loop",
            ["--accumulate=3", "--batch-size=2", "--epochs=2"],
            like_step_01,
        ),
        Extra(
            "ranks with unequally many images to test on end, too",
            page + "Evaluation",
            [f"--num-samples={6 * TESTED}", "--batch-size=3002", "--epochs=1", "--precision=float32", *SMALL],
            whole_test,
        ),
    )
