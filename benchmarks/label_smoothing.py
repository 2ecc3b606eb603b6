"""Runs a step with another loss and another optimizer: label smoothing, and AdamW with other betas.

    python benchmarks/label_smoothing.py 01 --epochs 1 --batch-size 256 --lr 0.01 --schedule one-cycle
    torchrun --standalone --nproc-per-node=2 benchmarks/label_smoothing.py 03 --epochs 1 --batch-size 128 …

The first argument is the step, the others are its flags. The step's train.py stays as it is: this program
loads it, and replaces its Trainer with one that differs in two points. The test loss has no label smoothing.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks.in_rank import load  # noqa: E402
from common.options import fail  # noqa: E402

STEPS = ["01", "03", "04", "05"]  # not 02: the processes that it starts would load the unchanged train.py
SMOOTHING = 0.1
BETAS = (0.7, 0.9)  # shorter averages than with the default, 0.9 and 0.999: an epoch has only 234 steps


def main(step: str) -> None:
    script: Any = load(step)

    class Trainer(script.Trainer):
        def __init__(self, args: Any, device: Any, model: Any, optimizer: Any, *more_args: Any):
            for group in optimizer.param_groups:
                group["betas"] = BETAS
            super().__init__(args, device, model, optimizer, *more_args)

        def loss(self, batch: Any) -> torch.Tensor:
            images, labels = batch
            model: Any = getattr(self, "ddp_model", self.model)  # steps 02 to 04 have one
            logits = model(images)
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=SMOOTHING)

    script.Trainer = Trainer
    if step == "01":
        script.main(script.parse_args())
    else:
        script.worker(script.parse_args())


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in STEPS:
        fail(f"the first argument must be a step: {', '.join(STEPS)}")
    main(sys.argv.pop(1))
