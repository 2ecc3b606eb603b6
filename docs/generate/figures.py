"""Figures in the pages' sentences: each follows a record, or has a reason why there is none.

`FIGURES` has, for a page, sentences with `{}` in the place of a number, and a function that returns these
numbers. `KNOWN` has the other numbers that look measured, by the words around them. A number with a unit that
is in neither turns the tests red.
"""

import re
import statistics
from collections.abc import Callable
from pathlib import Path

from docs.generate.pictures import results
from docs.generate.pieces import ROOT

Figures = tuple[str, str, Callable[[], list[str]]]


def took(command: str) -> Callable[[], list[str]]:
    """The machine, torch's version and the seconds of a command that `make record` has run."""

    def found() -> list[str]:
        run = results("outputs.json")[command]
        machine, cores = run["machine"].replace("(R)", "").replace(" Processor", "").rsplit(", ", 1)
        return [f"{machine} ({cores})", run["torch"], f"{run['seconds']:.0f}"]

    return found


def ran_on(command: str) -> Callable[[], list[str]]:
    """The machine and torch's version of a command that `make record` has run."""
    return lambda: took(command)()[:2]


def mutants() -> list[str]:
    """How many places of the code `make mutants` spoils, how many are known, and the share that is caught."""
    text = (ROOT / "docs" / "reference" / "mutants.md").read_text()
    row = r"^\| scripts and `common` \| (\d+) \| (\d+) \| \d+ \| (\S+) \|$"
    [(count, known, score)] = re.findall(row, text, re.M)
    return [f"{int(count):,}", f"{int(known):,}", score]


def memory_on_gpu() -> list[str]:
    *_, peak, allocator = results("NVIDIA-H200.json")["memory"]["table"]
    return [f"{peak / 1e6:.0f}", f"{allocator / 1e6:.0f}"]


def bench(begin: str) -> list[str]:
    """The figures of a row of `make bench`, on the machine that the pages are about."""
    [row] = [row for row in results("intel-xeon-2-cores.json")["rows"] if row["name"].startswith(begin)]
    return re.findall(r"\d[\d,]*\.?\d*", row["figure"])


def loops() -> list[str]:
    """The slowest and the fastest of our loops beside a bare one."""
    rows = results("intel-xeon-2-cores.json")["rows"]
    ratios = [statistics.median(row["ratios"]) for row in rows if row["name"].endswith("the bare loop")]
    return [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]


def on_a_gpu() -> list[str]:
    """The loop of step 01 on the H200, and as one CUDA graph; then the speed-run."""
    record = results("nvidia-h200-speed.json")
    loop = record["loop"]
    ours, graph = (statistics.median(side) for side in zip(*loop["pairs"], strict=True))  # 100 steps
    kernels, share = f"{loop['kernels']}", f"{100 * graph / ours:.0f}"
    return [f"{10 * ours:.2f}", f"{6400 / ours:,.0f}", kernels, f"{10 * graph:.2f}", share]


def speedrun_on_a_gpu() -> list[str]:
    (first, training, wall), (second, _, longer) = results("nvidia-h200-speed.json")["speedrun"]["runs"]
    return [f"{first}", f"{second}", f"{training}", f"{wall}", f"{longer}"]


def first_step_on_a_gpu() -> list[str]:
    steps = results("nvidia-h200-speed.json")["steps_of_a_speedrun"]
    return [f"{steps['first'] / 1e3:.2f}", f"{steps['median']:.1f}"]


def slow_links() -> list[str]:
    """Milliseconds that step 04 computes, and that it was predicted to talk over both slow links."""
    quick, slow = (row for row in results("prediction.json")["steps"] if row["step"] == "04")
    talk = [f"{1e3 * (row['predicted'] - row['alone']):.0f}" for row in (quick, slow)]
    return [f"{1e3 * quick['alone']:.0f}", *talk]


def worst_prediction() -> list[str]:
    off = [100 * (1 - row["predicted"] / row["measured"]) for row in results("prediction.json")["steps"]]
    return [f"{max(off):.1f}"]


FIGURES: list[Figures] = [
    (
        "README.md",
        "On an {} with torch {}, training takes {} s",
        took(".venv/bin/python compare_steps.py --data-dir data"),
    ),
    (
        "docs/reference/promises.md",
        "On an {} with torch {}, it takes {} s",
        took(
            "python compare_steps.py --precision float64 --ranks 1,2,3 --num-samples 20480 --epochs 1 "
            "--output proof"
        ),
    ),
    (
        "docs/reference/promises.md",
        "gives {} samples/s; the usual way (a PIL image and two transforms for each sample) gives {}. "
        "The training",
        lambda: bench("loading, batch 64"),
    ),
    ("docs/reference/promises.md", "run at {} to {} of the speed of a bare loop", loops),
    (
        "docs/reference/speed.md",
        "A step of `cnn` at batch 64 takes {} ms ({} samples/s). The same {} kernels and copies as one CUDA "
        "graph, which the CPU starts all at once, take {} ms. So the loop reaches {} % of",
        on_a_gpu,
    ),
    (
        "docs/reference/speed.md",
        "reached {} % and {} %, with {} s of training each, and {} s and {} s from start",
        speedrun_on_a_gpu,
    ),
    (
        "docs/reference/speed.md",
        "the first step took {} s, because CUDA's libraries are loaded when they are first used. Each of the "
        "other 233 took {} ms.",
        first_step_on_a_gpu,
    ),
    (
        "docs/reference/prediction.md",
        "Step 04 computes for {} ms and talks for {} ms at 100 Mbit/s, and for {} ms at 10 Mbit/s.",
        slow_links,
    ),
    ("docs/reference/prediction.md", "Step 05 at batch 512 is {} % too low.", worst_prediction),
    (
        "docs/reference/promises.md",
        "of {} such places, {} have been tried or excused since they last changed, "
        "and the tests notice {} of those.",
        mutants,
    ),
    ("docs/reference/gpus.md", "its table says {} MB, the allocator's peak was {} MB", memory_on_gpu),
    (
        "01_single_gpu/README.md",
        "On an {} with torch {}, it takes {} s",
        took("python 01_single_gpu/train.py"),
    ),
    (
        "02_multigpu_spawn/README.md",
        "On an {} with torch {}, this takes {} s",
        took("python 02_multigpu_spawn/train.py --world-size 2"),
    ),
    (
        "03_multigpu_torchrun/README.md",
        "On an {} with torch {}, the command takes {} s",
        took("torchrun --standalone --nproc-per-node=2 03_multigpu_torchrun/train.py"),
    ),
    (
        "04_multinode/README.md",
        "On an {} with torch {}, it takes {} s",
        took("./launch_multinode.sh --local 2 -- --num-samples 10240 --epochs 1"),
    ),
    (
        "05_fsdp/README.md",
        "On an {} with torch {}, the command above takes {} s",
        took(
            "torchrun --standalone --nproc-per-node=2 05_fsdp/train.py --use-gpu 0 --num-samples 10240 "
            "--batch-size 32 --epochs 3"
        ),
    ),
    (
        "04_multinode/README.md",
        "measures this table, here on an {} with torch {}. The",
        ran_on("python benchmarks/slow_link.py"),
    ),
    (
        "05_fsdp/REFERENCE.md",
        "without a GPU, on an {} with torch {}. The table",
        ran_on("python benchmarks/fsdp_flags.py"),
    ),
]


PUBLISHED = "published, the page says where"
SETTING = "a flag or a setting"
ARITHMETIC = "arithmetic"
DEFAULT = "a default of torch's"
GOAL = "a goal"
BY_HAND = "measured by hand, without a record"
KNOWN: dict[str, dict[str, str]] = {
    "README.md": {
        "the installation takes 80 s. It needs about 5 GB": BY_HAND,
        "has plans for 90 minutes": SETTING,
        "a GPU with 24 GB | a GPU with 80 GB": SETTING,
        "| 0.2 billion | 3.2 GB |": ARITHMETIC,
        "| 1 billion | 16 GB |": ARITHMETIC,
        "| 7 billion | 112 GB |": ARITHMETIC,
        "| 70 billion | 1,120 GB |": ARITHMETIC,
    },
    "docs/reference/terms.md": {"up to about 25 MB by default": DEFAULT},
    "docs/reference/promises.md": {"How soon is 99 % accuracy reached?": GOAL},
    "docs/reference/your-own-model.md": {"character gives 12 %": BY_HAND},
    "CONTRIBUTING.md": {
        "A training step of `05_fsdp` takes 50 ms on a CPU": BY_HAND,
        "`make bench` (20 minutes)": "benchmarks/results/intel-xeon-2-cores.json",
        "are about 99 %": GOAL,
    },
    "01_single_gpu/README.md": {"(0.16 ms instead of 0.6 ms for `cnn`": BY_HAND},
    "02_multigpu_spawn/README.md": {
        "gloo's is 30 minutes": DEFAULT,
        "takes a rank about 5 µs": BY_HAND,
    },
    "03_multigpu_torchrun/README.md": {
        "Their speed together is 100 %": ARITHMETIC,
        "the gap to 100 %": ARITHMETIC,
    },
    "04_multinode/README.md": {
        "The gradients of `cnn` in float32 are 0.83 MB": ARITHMETIC,
        "need 0.66 s on the wire": ARITHMETIC,
        "alone again after 16 s, together again 14 s": BY_HAND,
        "2 s until the others": BY_HAND,
        "14 s with `--timeout 5`": BY_HAND,
        "within about 0.2 s when steps are short": "tests/promises/test_interruptions.py",
        "torchrun's 30 s": DEFAULT,
        "Tried with 512 kB": SETTING,
        "The default is 600 seconds": SETTING,
        "for longer than 600 s": SETTING,
        "60 seconds before": SETTING,
    },
    "05_fsdp/README.md": {
        "7 billion parameters × 16 bytes = 112 GB, too much for a GPU of 80 GB": ARITHMETIC,
        "holds 56 GB of shards. On each, 24 GB remain": ARITHMETIC,
        "within 2 %": "tests/promises/test_fsdp.py",
        "torchrun's is 30 s": DEFAULT,
    },
    "05_fsdp/REFERENCE.md": {
        "(P = 227 MB)": ARITHMETIC,
        "For DDP this half is 227 MB": ARITHMETIC,
        "For step 05 it is 341 MB": ARITHMETIC,
        "but 455 MB were measured": "the table above it",
        "The other 114 MB": ARITHMETIC,
        "send 341 MB instead of 227 MB": "the table above it",
        "all parameters are 0.83 MB": ARITHMETIC,
        "are 840 GB. (Gradients are not saved.) With 64 ranks, each rank has a shard of 13.1 GB.": ARITHMETIC,
        "for the checksum | 13.1 GB | 13.1 GB | 13.1 GB |": "tests/promises/test_big_models.py",
        "read them in chunks | 0.0 GB | 13.1 GB | 0.0 GB |": "tests/promises/test_big_models.py",
        "| loads its shard | 0.0 GB | 13.1 GB | 0.0 GB |": "tests/promises/test_big_models.py",
    },
    "docs/reference/prediction.md": {
        "80 to 95 %": "the picture beside it",
        "Seven of eight are within 20 %": "tests/pages/test_benchmarks.py",
        "from 1 kB to 67 MB (over the slow cables from 2 kB to 1 MB)": SETTING,
        "about 40 %": PUBLISHED,
        "(38 to 43 %)": PUBLISHED,
        "450 GB/s": PUBLISHED,
        "900 GB/s": PUBLISHED,
        "400 GB/s": PUBLISHED,
        "1.9 µs in a node, 4.0 µs between nodes, 10 µs (ring); 1.2, 8.5 and 4.4 µs (tree)": PUBLISHED,
        "computes for 10 µs": "the table above it",
        "takes 2 ms before": ARITHMETIC,
    },
    "docs/reference/speed.md": {
        "# 99 % in one epoch": GOAL,
        "fall from 57 to 8, and accuracy rises to 99.05 %": "the table below it",
        "98.96 % on average": BY_HAND,
        "| 98.77% |": BY_HAND,
        "| 98.89% |": BY_HAND,
        "| 98.95% |": BY_HAND,
        "15 % of the run, not 30 % | 98.96% |": BY_HAND,
        "twice the steps | 98.99% |": BY_HAND,
        "not 0.01 | 98.99% |": BY_HAND,
        "it took 20 minutes": "benchmarks/results/intel-xeon-2-cores.json",
        "takes 2.0 s here": "benchmarks/results/intel-xeon-2-cores.json",
        "where the goal is 97 %: for 1.5 ms": GOAL,
        "- **99 %**": GOAL,
    },
}


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
        for group, figure in reversed(list(enumerate(figures(), start=1))):
            begin, end = found[0].span(group)
            text = text[:begin] + figure + text[end:]
    return text


UNITS = r"%|s\b|ms|µs|MB|GB|KB|kB|samples/s|images/s|minutes|seconds|points|hours"
LOOKS_MEASURED = re.compile(rf"(?<![\w.#/−-])(?:\d[\d,.]*\d|\d)(?:e-?\d+)?\s(?:{UNITS})|(?<![\w.])\d[\d.]*%")


def loose_numbers(page: Path, text: str) -> list[str]:
    """Numbers with a unit in the sentences of a page, with the words around them, that nobody vouches for."""
    text = re.sub(
        r"^```.*?^```$|<!-- table.*?<!-- end -->|<!-- printed.*?<!-- end -->", "", text, flags=re.M | re.S
    )
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    name = str(page.relative_to(ROOT))
    for where, words, _ in FIGURES:
        if where == name:
            text = sentence(words, r".{1,60}?").sub("figures", text)
    for words in KNOWN.get(name, {}):
        if not sentence(words, "").search(text):
            raise ValueError(f"{name} does not say '{words}' any more")
        text = sentence(words, "").sub("known", text)
    return [text[max(0, found.start() - 60) : found.end() + 20] for found in LOOKS_MEASURED.finditer(text)]
