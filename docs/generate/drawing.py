"""The drawing on the first page: of each step, the machines, the processes, what they hold and send."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from docs.generate.colors import BLUE, GREEN, GREY, ORANGE

LAYERS = 4  # of the model, as drawn


@dataclass
class Step:
    """One of the five steps."""

    title: str
    launcher: str
    machines: int
    ranks: int  # on each machine
    sharded: bool
    sends: str


STEPS = [
    Step("01 single GPU", "python", 1, 1, False, "sends nothing"),
    Step("02 spawn", "the script itself", 1, 2, False, "gradients"),
    Step("03 torchrun", "torchrun", 1, 2, False, "gradients"),
    Step("04 many machines", "torchrun on each", 2, 2, False, "gradients,\nover the network"),
    Step("05 FSDP", "torchrun", 1, 2, True, "weights and gradients,\nlayer by layer"),
]
WIDTH = 10.0  # of a step's column
HEIGHT = 8.0  # of a machine


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    """A frame with round corners, whose lower left corner is at `x`, `y`."""
    style = "round,pad=0,rounding_size=0.4"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, fill=False, edgecolor=color, linewidth=1.5)
    )


def rank(axes: Axes, x: float, y: float, number: int, step: Step, world_size: int) -> None:
    """A process: the layers that it holds, and its part of the batch."""
    box(axes, x, y, 3.4, 6.2, GREY)
    axes.text(x + 1.7, y + 5.55, f"rank {number}", ha="center", va="center", fontsize=9)
    parts = world_size if step.sharded else 1  # into which a layer is cut
    for layer in range(LAYERS):
        part_of(axes, x + 0.4, y + 4.2 - 0.85 * layer, number % parts, parts, BLUE)
    part_of(axes, x + 0.4, y + 0.4, number, world_size, GREEN)


def part_of(axes: Axes, x: float, y: float, number: int, parts: int, color: str) -> None:
    """A bar, of which one of `parts` equal parts is filled."""
    width = 2.6
    axes.add_patch(Rectangle((x, y), width, 0.65, facecolor="none", edgecolor=color))
    axes.add_patch(Rectangle((x + number * width / parts, y), width / parts, 0.65, facecolor=color))


def column(axes: Axes, place: int, step: Step) -> None:
    """One step, at a place from 0 to 4."""
    left = place * WIDTH + 0.3
    middle = left + (WIDTH - 0.6) / 2
    axes.text(middle, 20.6, step.title, ha="center", va="center", fontsize=13, fontweight="bold")
    axes.text(middle, 19.2, f"started by {step.launcher}", ha="center", va="center", fontsize=9)
    world_size = step.machines * step.ranks
    middle_y = 9.6
    for machine in range(step.machines):
        y = middle_y - HEIGHT / 2 + (0 if step.machines == 1 else (0.5 - machine) * (HEIGHT + 1.4))
        box(axes, left, y, WIDTH - 0.6, HEIGHT, GREY)
        axes.text(left + 0.3, y + HEIGHT - 0.7, "machine", va="center", fontsize=8, color=GREY)
        for local_rank in range(step.ranks):
            x = middle - 1.7 if step.ranks == 1 else left + 0.6 + local_rank * 4.8
            rank(axes, x, y + 0.6, machine * step.ranks + local_rank, step, world_size)
        if step.ranks > 1:
            arrow(axes, (left + 4.0, y + 3.4), (left + 5.4, y + 3.4))
    if step.machines > 1:
        arrow(axes, (middle, middle_y - 0.9), (middle, middle_y + 0.9))
    bottom = -0.4 if step.machines > 1 else 3.6
    axes.text(middle, bottom, step.sends, ha="center", va="top", fontsize=10, color=ORANGE)


def arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """What goes both ways."""
    axes.add_patch(
        FancyArrowPatch(begin, end, arrowstyle="<->", mutation_scale=12, color=ORANGE, linewidth=2)
    )


def steps(figure: Figure) -> None:
    """The five steps side by side, and what the colors mean."""
    axes: Axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, 5 * WIDTH)
    axes.set_ylim(-5.2, 21.6)
    for place, step in enumerate(STEPS):
        column(axes, place, step)
    for x, color, meaning in (
        (1.0, BLUE, "a layer: weights, gradients and optimizer state"),
        (20.5, GREEN, "the part of each batch that a rank trains on"),
        (39.5, ORANGE, "sent in each step"),
    ):
        axes.add_patch(Rectangle((x, -5.0), 1.2, 0.8, facecolor=color))
        axes.text(x + 1.6, -4.6, meaning, va="center", fontsize=10)
