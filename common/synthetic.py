"""Handwritten-looking digits drawn from a seed: a stand-in for MNIST that needs no files and no download."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 28
POINTS_PER_STROKE = 48  # close enough for neighboring dots of the pen to merge into a line
CHUNK = 512  # digits drawn at once: keeps the intermediates near 100 MB, however many digits are asked for

# The ways to write each digit: the points "xy" that a pen visits on a ten-by-ten grid, y pointing down; "/"
# lifts the pen, and a point given twice makes a corner where one makes a curve.
GLYPHS = {
    0: ["50 31 25 38 59 78 85 71 50"],
    1: ["50 54 59", "32 50 50 54 59"],
    2: ["22 40 70 82 74 46 19 19 59 89"],
    3: ["21 50 82 74 44 44 75 87 59 18"],
    4: ["30 23 16 16 56 86 / 62 65 69", "60 60 33 06 06 46 86 / 60 65 69"],
    5: ["80 50 20 20 24 24 63 86 69 18"],
    6: ["70 41 24 27 49 79 87 65 35 27"],
    7: ["00 40 80 80 64 49", "00 40 80 80 64 49 / 35 75"],
    8: ["71 50 31 33 54 76 78 59 38 36 54 73 71"],
    9: ["81 50 22 34 55 74 81 81 85 79", "81 50 22 34 55 74 81 81 85 78 59 28"],
}


def synthetic_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` labeled digits, white on black; the same arguments always give the same bytes.

    Returns `images`, uint8 (count, 28, 28) from 0 (black) to 255 (white), and shuffled `labels`, int64
    (count,), equally many of each to within one. The global random state is neither read nor changed.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % 10
    images = torch.empty(count, SIDE, SIDE, dtype=torch.uint8)
    for digit, glyphs in GLYPHS.items():
        rows = torch.where(labels == digit)[0]
        for i, glyph in enumerate(glyphs):
            for chunk in rows[i :: len(glyphs)].split(CHUNK):
                images[chunk] = _draw(glyph, len(chunk), generator)
    return images, labels


def _draw(glyph: str, n: int, generator: torch.Generator) -> Tensor:
    """Draw one glyph `n` times, each in its own handwriting: uint8 of shape (n, 28, 28)."""

    # float64, so that a last-bit difference between two CPUs or thread counts does not survive the rounding.
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, dtype=torch.float64, generator=generator)

    strokes = []
    for stroke in glyph.split("/"):
        points = torch.tensor([[float(x) for x in point] for point in stroke.split()])
        row = (points + uniform(-0.45, 0.45, *points.shape)).mT.unsqueeze(2)
        # Bicubic resizing of the control points, as an image one pixel high, is a smooth curve through them.
        curve = F.interpolate(row, (1, POINTS_PER_STROKE), mode="bicubic", align_corners=True)
        strokes.append(curve.squeeze(2).mT)
    path = torch.stack(strokes, dim=1)  # (n, strokes, points, xy)
    width = uniform(0.7, 1.0, 1, 1)
    slant = uniform(-0.1, 0.4, 1, 1)
    angle = uniform(-0.2, 0.2, 1, 1)
    x, y = path.unbind(-1)
    x = width * x - slant * y
    path = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)
    pen = uniform(0.65, 1.0, 1, 1, 1)
    size = uniform(14.0, 18.5, 1, 1, 1)
    low = path.amin((1, 2), keepdim=True)
    high = path.amax((1, 2), keepdim=True)
    path = (path - (low + high) / 2) * size / (high - low).amax(-1, keepdim=True)
    # A Gaussian pen has faded out three widths from the path: within this room no digit is cut off.
    room = (SIDE - 1) / 2 - size / 2 - 3 * pen
    path = path + room * uniform(-1.0, 1.0, 1, 1, 2)
    # More ink than white can show: the core of a stroke saturates and only its edge stays soft.
    ink = (1.6 * _ink(path, pen.squeeze(1))).clamp(max=1.0)
    return (255 * ink * uniform(0.8, 1.0, SIDE, SIDE)).round().to(torch.uint8)  # grainy


def _ink(path: Tensor, pen: Tensor) -> Tensor:
    """Draw a Gaussian pen along each path: (n, strokes, points, 2) to (n, 28, 28), 1 on a straight line."""
    middle = ((path[:, :, 1:] + path[:, :, :-1]) / 2).flatten(1, 2)
    length = path.diff(dim=2).norm(dim=-1).flatten(1, 2).unsqueeze(-1)
    pixel = torch.arange(SIDE) - (SIDE - 1) / 2
    offset = pixel - middle.unsqueeze(-1)  # (n, segments, xy, 28)
    across, down = torch.exp(-((offset / pen.unsqueeze(-1)) ** 2) / 2).unbind(2)
    # A 2-D Gaussian is an outer product of two 1-D ones, so summing along the path is a matrix product.
    return torch.bmm((down * length / (pen * math.sqrt(2 * math.pi))).mT, across)
