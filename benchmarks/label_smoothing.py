"""A step with a loss and an optimizer of your own: label smoothing, and AdamW with other betas.

    python benchmarks/label_smoothing.py 01 --epochs 1 --batch-size 256 --lr 0.01 --schedule one-cycle
    torchrun --standalone --nproc-per-node=2 benchmarks/label_smoothing.py 03 --epochs 1 --batch-size 128 …

The first word is the step, and the rest are its flags. The step's train.py stays as it is: this program loads
it, and puts a Trainer in its place that differs in two points. The test loss has no label smoothing.
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

STEPS = ["01", "03", "04", "05"]  # the processes that step 02 starts would load its train.py again, unchanged
SMOOTHING = 0.1
BETAS = (0.7, 0.9)  # averages over fewer steps than with 0.9 and 0.999: an epoch has only 234


def main(step: str) -> None:
    script: Any = load(step)

    class Trainer(script.Trainer):
        def __init__(self, args: Any, device: Any, model: Any, optimizer: Any, *others: Any):
            for group in optimizer.param_groups:
                group["betas"] = BETAS
            super().__init__(args, device, model, optimizer, *others)

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
        fail(f"the first word must be a step: {', '.join(STEPS)}")
    main(sys.argv.pop(1))
