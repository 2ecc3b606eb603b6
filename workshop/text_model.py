"""A text in place of the digits, and a small decoder that guesses each next character.

It holds what a train.py asks of its data and its model, and lies beside it:

    cp workshop/text_model.py 03_multigpu_torchrun
    git apply workshop/text_model.patch
    torchrun --standalone --nproc-per-node=2 03_multigpu_torchrun/train.py

text_model_01.patch and text_model_05.patch do the same to steps 01 and 05; `git apply -R` takes it back.
"""

import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.options import fail

LENGTH = 64  # characters of the longest piece of a text; a piece is one sample
IGNORED = -100  # the label of padding: F.cross_entropy leaves it out
PIECES = 10240  # to train on, unless flags say otherwise
CHARACTERS = 256  # a character is a byte, so that a model fits every text
SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
SMALL += "sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


class Text(TensorDataset):
    """Pieces of a text, and for each character the one that follows: both int64 (N, LENGTH).

    Pieces have different lengths. Behind the end of a piece its text is padded, and its labels are IGNORED.
    """

    def __init__(self, pieces: list[bytes], name: str):
        labels = torch.tensor([list(piece.ljust(LENGTH)) for piece in pieces])
        # Each character is guessed from those before it in its piece, and the last one of the piece before.
        first = torch.tensor([10, *(piece[-1] for piece in pieces[:-1])])  # 10 is the end of a line
        text = torch.cat([first.unsqueeze(1), labels[:, :-1]], dim=1)
        lengths = torch.tensor([len(piece) for piece in pieces])
        labels[torch.arange(LENGTH) >= lengths.unsqueeze(1)] = IGNORED
        super().__init__(text, labels)
        self.pieces = pieces
        self.name = name

    def checksum(self) -> str:
        """Of name and content, to compare nodes by."""
        return f"{self.name} {zlib.crc32(b''.join(self.pieces)):08x}"


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
    pieces = cut(text)
    count = num_samples or max(1, len(pieces) * 6 // 7)
    wanted = count + max(1, count // 6)
    if wanted > len(pieces):
        found = f"the *.txt and *.md in {data_dir} make {len(pieces)} pieces"
        fail(f"{found}, and {wanted} are wanted: add text, or lower --num-samples")
    name = f"text-{zlib.crc32(text):08x}"  # with another text it is another run
    return Text(pieces[:count], name), Text(pieces[count:wanted], name)


def cut(text: bytes) -> list[bytes]:
    """The lines of a text. Those that are longer than LENGTH make several pieces."""
    pieces = []
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), LENGTH):
            pieces.append(line[start : start + LENGTH])
    return pieces


def sums(count: int, part: int) -> list[bytes]:
    """`count` lines such as "two and forty is forty-two", the same everywhere, in random order.

    Part 1, to test on, has 400 of the 2,500 sums of two numbers below 50; part 0 has the others.
    """
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(0)).tolist()
    numbers = order[:400] if part == 1 else order[400:]
    generator = torch.Generator().manual_seed(part)
    lines = []
    for place in torch.randint(len(numbers), (count,), generator=generator).tolist():
        a, b = divmod(numbers[place], 50)
        lines.append(f"{in_words(a)} and {in_words(b)} is {in_words(a + b)}\n".encode())
    return lines


def in_words(number: int) -> str:
    """A number below 100: `forty-two`."""
    tens, ones = divmod(number, 10)
    small = SMALL.split()
    if tens < 2:
        return small[number]
    word = TENS.split()[tens - 2]
    return f"{word}-{small[ones]}" if ones > 0 else word


class Block(nn.Module):
    """Attention to the characters so far, then two linear layers; each adds to what comes in."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(4, width // 64)
        self.norm_1 = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.linear = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        # (batch, length, 3 × width) as (3, batch, heads, length, width of a head)
        projections = self.attend(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projections.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # what comes later is hidden
        x = x + self.merge(seen.transpose(1, 2).flatten(2))
        return x + self.linear(self.norm_2(x))


class Decoder(nn.Module):
    """Logits (batch, length, CHARACTERS) of what follows each character of a text (batch, length)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.name = f"decoder-{width}x{depth}"
        self.characters = nn.Embedding(CHARACTERS, width)
        self.places = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        x = self.characters(text) + self.places(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def build_model(name: str, precision: str = "float32", width: int = 64, depth: int = 4) -> nn.Module:
    """The decoder, from the global random state; `fail`s when the flags ask for a model of digits."""
    if name != "decoder":
        fail(f"--model {name} is for digits: leave it out; --vit-width, --vit-depth size the decoder")
    model = Decoder(width, depth)
    return model.double() if precision == "float64" else model
