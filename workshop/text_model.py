"""A text in place of the digits, and a small decoder that guesses each next character.

It holds what a train.py asks of its data and its model, and lies beside it:

    cp workshop/text_model.py 03_multigpu_torchrun
    git apply workshop/text_model.patch
    torchrun --standalone --nproc-per-node=2 03_multigpu_torchrun/train.py

text_model_01.patch and text_model_05.patch do the same to steps 01 and 05; `git apply -R` takes it back. The
text and the decoder are those of the folder `beyond`: beyond/text.py and beyond/decoder.py.
"""

from torch import nn

from beyond.decoder import Decoder
from beyond.text import IGNORED, load_text
from common.options import fail

__all__ = ["IGNORED", "build_model", "load_text"]


def build_model(name: str, precision: str = "float32", width: int = 64, depth: int = 4) -> nn.Module:
    """The decoder, from the global random state; `fail`s when the flags ask for a model of digits."""
    if name != "decoder":
        fail(f"--model {name} is for digits: leave it out; --vit-width, --vit-depth size the decoder")
    model = Decoder(width, depth, heads=max(4, width // 64))
    return model.double() if precision == "float64" else model
