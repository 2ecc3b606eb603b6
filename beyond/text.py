"""A text in pieces, as a dataset: sums in words, which this file generates, or a text of your own."""

import zlib
from pathlib import Path

import torch
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

    Pieces have different lengths. After the end of a piece its text is padded, and its labels are IGNORED.
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
    for index in torch.randint(len(numbers), (count,), generator=generator).tolist():
        a, b = divmod(numbers[index], 50)
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
