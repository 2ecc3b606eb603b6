"""A text in place of the digits, and a small decoder that guesses each next character.

It holds what a train.py asks of its data and its model, and lies beside it:

    cp workshop/text_model.py 03_multigpu_torchrun
    git apply workshop/text_model.patch
    torchrun --standalone --nproc-per-node=2 03_multigpu_torchrun/train.py

text_model_01.patch and text_model_05.patch do the same to steps 01 and 05; `git apply -R` takes it back.
"""

import argparse
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.options import fail

LENGTH = 64  # characters of a piece, which is what the scripts call an image
PIECES = 10240  # to train on, unless flags say otherwise
CHARACTERS = 256  # a character is a byte, so that a model fits every text
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
SMALL += "sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


class Text(TensorDataset):
    """Pieces of a text, and for each character the one that follows: uint8 and int64, both (N, LENGTH)."""

    def __init__(self, text: bytes, name: str):
        # A piece begins with the last character of the one before it, so that each is guessed once.
        pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, LENGTH + 1, LENGTH)
        super().__init__(pieces[:, :-1], pieces[:, 1:].long())
        self.text, self.name, self.fallback = text, name, ""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """A whole batch: `fast` and `arrange_buckets`, which take tuples as they are, rely on it."""
        return self[torch.tensor(indices, dtype=torch.int64)]

    def checksum(self) -> str:
        """Of name and content, to compare nodes by."""
        return f"{self.name} {zlib.crc32(self.text):08x}"


def load_text(data_dir: Path | None, num_samples: int | None = None) -> tuple[Text, Text]:
    """A text to train on, and a sixth of it to test on: sums in words, or the *.txt and *.md in `data_dir`.

    With `num_samples` so many pieces of it to train on. `fail`s when the text cannot be read or is too short.
    """
    if data_dir is None:
        count = num_samples or PIECES
        name = f"sums-{count}"
        return Text(sums(count, 0), name), Text(sums(max(1, count // 6), 1), name)
    try:
        files = sorted(path for path in data_dir.iterdir() if path.suffix in (".txt", ".md"))
        text = b"\n".join(path.read_bytes() for path in files)
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}; point --data-dir at a folder with your text")
    pieces = max(0, len(text) - 1) // LENGTH
    count = num_samples or max(1, pieces * 6 // 7)
    wanted = count + max(1, count // 6)
    if wanted > pieces:
        have = f"the *.txt and *.md in {data_dir} make {pieces} pieces of {LENGTH} characters"
        fail(f"{have}, and {wanted} are wanted: add text, or lower --num-samples")
    name = f"text-{zlib.crc32(text):08x}"  # with another text it is another run
    return Text(text[: count * LENGTH + 1], name), Text(text[count * LENGTH : wanted * LENGTH + 1], name)


def sums(count: int, part: int) -> bytes:
    """A text of `count` pieces, the same everywhere: "two and forty is forty-two. …", in random order.

    Part 1, to test on, has 400 of the 2,500 sums of two numbers below 50; part 0 has the others.
    """
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(0)).tolist()
    numbers = [divmod(number, 50) for number in (order[:400] if part else order[400:])]
    sentences = [f"{in_words(a)} and {in_words(b)} is {in_words(a + b)}. " for a, b in numbers]
    size = count * LENGTH + 1
    generator = torch.Generator().manual_seed(part)
    drawn = torch.randint(len(sentences), (size // min(map(len, sentences)) + 1,), generator=generator)
    return "".join(sentences[i] for i in drawn.tolist()).encode()[:size]


def in_words(number: int) -> str:
    """A number below 100: `forty-two`."""
    tens, ones = divmod(number, 10)
    small = SMALL.split()
    return small[number] if tens < 2 else TENS.split()[tens - 2] + (f"-{small[ones]}" if ones else "")


class Block(nn.Module):
    """Attention to the characters so far, then two linear layers; each adds to what comes in."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(4, width // 64)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.linear = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attend(self.norm_1(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # what comes later is hidden
        x = x + self.merge(seen.transpose(1, 2).flatten(2))
        return x + self.linear(self.norm_2(x))


class Decoder(nn.Module):
    """Logits (batch, length, CHARACTERS) of what follows each character of a text (batch, length)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.characters(text.long()) + self.places(places))))
        return logits


def model_name(args: argparse.Namespace) -> str:
    """The model's name, with its size; `fail`s when the flags ask for a model of digits."""
    if args.model != "decoder":
        fail(f"--model {args.model} is for digits: leave it out; --vit-width, --vit-depth size the decoder")
    return f"decoder-{args.vit_width}x{args.vit_depth}"


def build_model(args: argparse.Namespace) -> nn.Module:
    """The decoder that the flags ask for, from the global random state."""
    model: nn.Module = Decoder(args.vit_width, args.vit_depth)
    if args.precision == "float64":
        model = model.double()
    if args.compile:
        model.compile()  # in place: the names of its parameters stay what they are
    return model
