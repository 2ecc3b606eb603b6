"""A small decoder: a transformer that guesses each next character of a text from those before it.

B is the number of texts in a batch, L their length, and W the width of the model. Each head of attention
has W / heads numbers of a query, a key and a value.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyond.text import CHARACTERS, LENGTH


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of each position to itself and to those before it; all are (B, heads, L, W / heads)."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Attention(nn.Module):
    """Causal self-attention, (B, L, W) to (B, L, W).

    Query, key and value have a linear layer each. One layer for all three would be a little faster, but
    ranks could not divide it by heads: its first half has the queries of all heads, and keys of some.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_size = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.attend = causal_attention

    def forward(self, x: Tensor) -> Tensor:
        query = self.split_heads(self.query(x))
        key = self.split_heads(self.key(x))
        value = self.split_heads(self.value(x))
        seen = self.attend(query, key, value)
        output: Tensor = self.output(seen.transpose(1, 2).flatten(2))
        return output

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, heads × W / heads) to (B, heads, L, W / heads), for as many heads as there are in `x`."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers, (B, L, W) to (B, L, W), with 4 × W numbers between them."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(x)))
        return output


class Block(nn.Module):
    """Attention, then an MLP; each of them adds to what comes in, (B, L, W)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        x = x + self.mlp(self.norm_2(x))
        return x


class Decoder(nn.Module):
    """Logits (B, L, CHARACTERS) for a text, int64 (B, L), whose L is at most LENGTH.

    With `tie_weights`, the last layer has the weight of the first one: the embedding of the characters.
    """

    def __init__(self, width: int, depth: int, heads: int, tie_weights: bool = False):
        super().__init__()
        self.name = f"decoder-{width}x{depth}"
        self.characters = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Embedding(LENGTH, width)
        blocks = [Block(width, heads) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        if tie_weights:
            # The head's initial weight, because that of an embedding would make the logits too large.
            self.characters.weight = self.head.weight

    def forward(self, text: Tensor, start: int = 0) -> Tensor:
        """`start` is the position of the first character of `text`, where that is a part of a longer one."""
        positions = torch.arange(start, start + text.shape[1], device=text.device)
        x = self.characters(text) + self.positions(positions)
        x = self.blocks(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
