"""The flags that the scripts in this folder share."""

import functools
from pathlib import Path

from common.options import OneLineParser, fail, make_parser, positive_float, whole_number

WITHOUT = {
    *("--model", "--vit-width", "--vit-depth", "--num-samples", "--data-dir"),  # digits: see below for text
    *("--snapshot-dir", "--save-every", "--allow-changes", "--epochs"),  # no snapshots, no resumed runs
    "--batch-size",  # not for each process: all ranks have the same batch
    "--compile",
}


def make_text_parser(script: str, description: str) -> OneLineParser:
    """The steps' flags, without those for digits and snapshots, and those for a text and a decoder."""
    parser = make_parser(script, description, launcher="torchrun", without=WITHOUT)
    parser.set_defaults(step=Path(script).stem)
    sample_count = functools.partial(whole_number, high=10**7)
    add = parser.add_argument
    add("--epochs", type=whole_number, default=3, metavar="N", help="how often to go through the text (3)")
    add("--batch-size", type=whole_number, default=64, metavar="N", help="pieces of text in a step (64)")
    add("--num-samples", type=sample_count, metavar="N", help="train on N pieces of the text")
    add("--data-dir", type=Path, metavar="DIR", help="train on its *.txt and *.md, not on generated sums")
    add("--width", type=whole_number, default=64, metavar="N", help="width of the decoder's blocks (64)")
    add("--depth", type=whole_number, default=4, metavar="N", help="how many blocks it has (4)")
    add("--heads", type=whole_number, default=4, metavar="N", help="heads of attention in each block (4)")
    add("--tie-weights", action="store_true", help="one weight for the first and the last layer")
    add("--clip-norm", type=positive_float, metavar="X", help="shrink gradients to this norm")
    add("--output", type=Path, metavar="FILE", help="write the trained weights to FILE")
    return parser


def check_heads(width: int, heads: int) -> None:
    """`fail` unless each head gets the same part of the width."""
    if width % heads != 0:
        fail(f"--width {width} is not a multiple of --heads {heads}: choose other numbers")
