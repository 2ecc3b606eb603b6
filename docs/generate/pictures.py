"""Draws the pictures of the pages from recorded runs, each for a light and for a dark page."""

import io
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from docs.generate import drawing
from docs.generate.colors import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, THEMES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"


def results(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def bench_rows() -> list[dict[str, Any]]:
    """The rows of `make bench` on the machine that these pages are about."""
    return list(results("intel-xeon-2-cores.json")["rows"])


def numbers(text: str) -> list[float]:
    """The numbers in a text like `5,368 and 5,917 samples/s`."""
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


def ladder(figure: Figure) -> None:
    """The speed-run: seconds of an epoch, and what is right after it, one idea a rung."""
    rungs = results("ladder.json")["rungs"]
    axes: Axes = figure.subplots()
    names = list(rungs)
    seconds = [statistics.median(rung["seconds"]) for rung in rungs.values()]
    right = [statistics.mean(rung["accuracies"]) for rung in rungs.values()]
    axes.barh(names, seconds, color=[GREEN if accuracy >= 99 else BLUE for accuracy in right])
    for place, (took, accuracy) in enumerate(zip(seconds, right, strict=True)):
        axes.text(took + 0.7, place, f"{took:.1f} s,  {accuracy:.2f} %", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(seconds) * 1.4)
    axes.set_xlabel("seconds of an epoch on two cores, and the accuracy after it")


def scaling(figure: Figure) -> None:
    """Two ranks against two processes that do not talk."""
    axes: Axes = figure.subplots()
    bars: list[tuple[str, float, str]] = []
    for size in (64, 512):
        apart = next(
            row for row in bench_rows() if row["name"].startswith(f"cnn, batch {size}: two ranks of step 03")
        )
        shard = next(
            row for row in bench_rows() if row["name"].startswith(f"cnn, batch {size}: two ranks of step 05")
        )
        ddp, alone = numbers(apart["figure"])[:2]
        fsdp = numbers(shard["figure"])[0]
        for name, rate, color in (("apart", alone, GREY), ("step 03", ddp, BLUE), ("step 05", fsdp, ORANGE)):
            bars.append((f"{name}\nbatch {size}", rate, color))
    places = [0, 1, 2, 3.6, 4.6, 5.6]
    axes.bar(places, [bar[1] for bar in bars], color=[bar[2] for bar in bars])
    for place, (_, rate, _) in zip(places, bars, strict=True):
        ideal = bars[0 if place < 3 else 3][1]
        axes.text(place, rate, f"{rate:,.0f}\n{rate / ideal:.0%}", ha="center", va="bottom")
    axes.set_xticks(places, [bar[0] for bar in bars])
    axes.set_ylim(0, max(bar[1] for bar in bars) * 1.25)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("samples/s of both together")


def memory(figure: Figure) -> None:
    """What a rank holds of weights, gradients and optimizer state, the more ranks there are."""
    rows = results("prediction.json")["bytes"]
    small, large = figure.subplots(1, 2)
    here = [row for row in rows if "measured" in row]
    ranks = [row["ranks"] for row in here]
    small.plot(ranks, [row["ddp"] / 1e6 for row in here], color=GREY, label="DDP: a copy on each rank")
    small.plot(ranks, [row["states"] / 1e6 for row in here], color=ORANGE, label="FSDP, predicted")
    small.plot(
        ranks, [row["measured"] / 1e6 for row in here], "o", color=BLUE, markersize=9, label="measured"
    )
    small.set_xticks(ranks)
    small.set_ylim(0, None)
    small.set_ylabel("MB on a rank")
    small.set_title("57 million parameters")
    there = [row for row in rows if "measured" not in row]
    places = range(len(there) + 1)
    held = [there[0]["ddp"] / 1e9, *(row["states"] / 1e9 for row in there)]
    large.bar(places, held, color=[GREY] + [ORANGE] * len(there))
    large.set_yscale("log")
    large.set_ylim(min(held) / 4, max(held) * 8)
    for place, gigabytes in zip(places, held, strict=True):
        large.text(place, gigabytes, f"{gigabytes:.3g}", ha="center", va="bottom")
    large.set_xticks(places, ["DDP", *(f"FSDP\n{row['ranks']:,}" for row in there)])
    large.set_ylabel("GB on a rank")
    large.set_title("a billion parameters, on paper")
    small.set_xlabel("ranks")
    small.legend()


def steps_of(row: dict[str, Any]) -> str:
    """What a prediction is about, in two lines."""
    where = "" if row["link"] == "this machine" else f"\n{row['link']}"
    return f"step {row['step']}, {row['model']}, {row['batch']}{where}"


def prediction(figure: Figure) -> None:
    """A step's time as it was predicted, in its two parts, and as it came."""
    rows = results("prediction.json")["steps"]
    axes: Axes = figure.subplots()
    places = range(len(rows))
    alone = [row["alone"] / row["measured"] for row in rows]
    talk = [(row["predicted"] - row["alone"]) / row["measured"] for row in rows]
    axes.barh(places, alone, height=0.6, color=BLUE, label="predicted: by itself")
    axes.barh(places, talk, left=alone, height=0.6, color=ORANGE, label="predicted: collectives")
    axes.axvline(1, color=GREY, label="measured")
    axes.axvspan(0.8, 1.2, color=GREY, alpha=0.2, zorder=0)
    axes.set_yticks(places, [f"{steps_of(row)}: {1e3 * row['measured']:,.0f} ms" for row in rows])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("of the measured time of a step; grey: within 20 %")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))


def timeline(step: str) -> Callable[[Figure], None]:
    """One step on two ranks, from recorded traces."""
    colors = {"forward": BLUE, "backward": PURPLE, "optimizer": GREEN, "waiting": RED, "collective": ORANGE}
    colors["vote"] = GREY

    def draw(figure: Figure) -> None:
        record = results(f"timeline-{step}.json")
        axes: Axes = figure.subplots()
        lanes: list[str] = []
        for rank, parts in enumerate(record["ranks"]):
            for lane in ("does", "collectives"):
                lanes.append(f"rank {rank}" if lane == "does" else "its collectives")
                for kind, begin, end in parts:
                    if (kind in ("collective", "vote")) == (lane == "collectives"):
                        axes.barh(len(lanes) - 1, end - begin, left=begin, height=0.7, color=colors[kind])
        axes.set_yticks(range(len(lanes)), lanes)
        axes.invert_yaxis()
        axes.set_xlim(0, record["milliseconds"])
        axes.set_xlabel("milliseconds")
        for kind, color in colors.items():
            axes.barh(0, 0, color=color, label=kind)
        axes.legend(ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)

    return draw


DRAWN: dict[str, tuple[Callable[[Figure], None], float]] = {  # and the height in inches
    "steps": (drawing.steps, 5.6),
    "ladder": (ladder, 4.5),
    "scaling": (scaling, 4.5),
    "memory": (memory, 4.5),
    "prediction": (prediction, 5.5),
    "timeline-02": (timeline("02"), 3.2),
    "timeline-04": (timeline("04"), 3.2),
    "timeline-05": (timeline("05"), 3.2),
}


def draw_all(folder: Path = PICTURES) -> None:
    """Draw each picture in each theme."""
    folder.mkdir(exist_ok=True)
    for theme, colors in THEMES.items():
        style: Any = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colors["ink"])
        style |= {
            "axes.edgecolor": colors["faint"],
            "legend.frameon": False,
            "figure.facecolor": colors["ground"],
        }
        style |= {"axes.facecolor": colors["ground"], "lines.linewidth": 3}
        for name, (draw, height) in DRAWN.items():
            with plt.rc_context(style):
                figure = plt.figure(figsize=(11, height), layout="constrained")
                draw(figure)
                drawn = io.BytesIO()
                figure.savefig(drawn, dpi=110, metadata={"Software": None})
                plt.close(figure)
            # index.html holds all pictures. With 64 colors they have a third of the bytes, and look the same.
            picture = Image.open(drawn).convert("RGB").quantize(64, method=Image.Quantize.MEDIANCUT)
            picture.save(folder / f"{name}-{theme}.png", optimize=True)
