"""What exercise 19 promises."""

import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401  # imported once, not in every rank
from judging import about
from turning import judge_script

TODO = about(__file__)["todo"]


def judge(file):
    flags = ["--accumulate=3", "--batch-size=2"]
    told = "05_fsdp/README.md, The training loop"
    return judge_script(
        "05", TODO, file, ("--accumulate 3 with batches of 2 ends like batches of 6", told, flags)
    )
