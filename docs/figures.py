"""Figures in the pages' sentences: each follows a record, or has a reason why there is none.

`FIGURES` has, for a page, sentences with `{}` in the place of a number, and a function that returns these
numbers. `KNOWN` has the other numbers that look measured, by the words around them. A number with a unit that
is in neither turns the tests red.
"""

import re
from collections.abc import Callable
from pathlib import Path

from docs.pictures import results
from docs.pieces import ROOT

Figures = tuple[str, str, Callable[[], list[str]]]


def took(command: str) -> Callable[[], list[str]]:
    """The machine, torch's version and the seconds of a command that `make record` has run."""

    def found() -> list[str]:
        record = results("outputs.json")
        machine, cores = record["machine"].rsplit(", ", 1)
        seconds = record["commands"][command]["seconds"]
        return [
            f"{machine.replace('(R)', '').replace(' Processor', '')} ({cores})",
            record["torch"],
            f"{seconds:.0f}",
        ]

    return found


def mutants() -> list[str]:
    """How many places of the code `make mutants` spoils, and how many of them a test notices."""
    text = (ROOT / "docs" / "mutants.md").read_text()
    [(count, score)] = re.findall(r"^\| scripts and `common` \| (\d+) .* (\S+) \|$", text, re.M)
    return [f"{int(count):,}", score]


def memory_on_gpu() -> list[str]:
    *_, peak, allocator = results("NVIDIA-H200.json")["memory"]["table"]
    return [f"{peak / 1e6:.0f}", f"{allocator / 1e6:.0f}"]


FIGURES: list[Figures] = [
    (
        "README.md",
        "On {} with torch {}, training takes {} s",
        took(".venv/bin/python compare_steps.py --data-dir data"),
    ),
    (
        "README.md",
        "On {} with torch {}, it takes {} s",
        took(
            "python compare_steps.py --precision float64 --ranks 1,2,3 --num-samples 20480 --epochs 1 "
            "--output proof"
        ),
    ),
    ("README.md", "of {} such places, the tests notice {}.", mutants),
    ("README.md", "its table says {} MB, the allocator's peak was {} MB", memory_on_gpu),
    ("01_single_gpu/README.md", "On {} with torch {}, it takes {} s", took("python 01_single_gpu/train.py")),
    (
        "02_multigpu_spawn/README.md",
        "On {} with torch {}, this takes {} s",
        took("python 02_multigpu_spawn/train.py --world-size 2"),
    ),
    (
        "03_multigpu_torchrun/README.md",
        "On {} with torch {}, the command takes {} s",
        took("torchrun --standalone --nproc-per-node=2 03_multigpu_torchrun/train.py"),
    ),
    (
        "04_multinode/README.md",
        "On {} with torch {}, it takes {} s",
        took("./launch_multinode.sh --local 2 -- --num-samples 10240 --epochs 1"),
    ),
    (
        "05_fsdp/README.md",
        "On {} with torch {}, the command above takes {} s",
        took(
            "torchrun --standalone --nproc-per-node=2 05_fsdp/train.py --use-gpu 0 --num-samples 10240 "
            "--batch-size 32 --epochs 3"
        ),
    ),
]


def sentence(words: str, number: str) -> re.Pattern[str]:
    """A pattern for a sentence that may be wrapped anywhere; `number` stands for each `{}`."""
    parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in words.split("{}")]
    return re.compile(number.join(parts), re.S)


def with_figures(page: Path, text: str) -> str:
    """A page with its figures as the records have them.

    Raises ValueError when a sentence does not stand in its page, or more than once.
    """
    for name, words, figures in FIGURES:
        if ROOT / name != page:
            continue
        pattern = sentence(words, r"(.{1,60}?)")
        found = list(pattern.finditer(text))
        if len(found) != 1:
            raise ValueError(f"{name} has the sentence '{words}' {len(found)} times, not once")
        place = found[0]
        for group, figure in reversed(list(enumerate(figures(), start=1))):
            begin, end = place.span(group)
            text = text[:begin] + figure + text[end:]
    return text
