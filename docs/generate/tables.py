"""The tables of the pages: from recorded runs, from the scripts, and from the tests.

A table is made anew from what stands in its place, because some columns are prose, which stays as it is.
"""

import argparse
import ast
import functools
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from docs.generate.pictures import RESULTS, results, steps_of
from docs.generate.pieces import FOLDERS, ROOT, script


def cells(row: str) -> list[str]:
    """The cells of a table's line; `\\|` is no border."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def row_of(line: list[str]) -> str:
    """A table's line; the one below its head, of dashes, without spaces."""
    if all(cell.strip("-:") == "" and cell for cell in line):
        return f"|{'|'.join(line)}|\n"
    return f"| {' | '.join(line)} |\n".replace("|  |", "| |")


def load(path: Path) -> Any:
    """A file of Python as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    return "".join(map(row_of, [head, ["---", *["---:"] * (len(head) - 1)], *rows]))


def paper_table(_: str) -> str:
    """A step on many GPUs that nobody here has."""
    rows = []
    for row in results("prediction.json")["paper"]:
        for way in ("ddp", "fsdp", "hybrid"):
            if way in row:
                compute, talk = 1e3 * row["compute"], 1e3 * row[way]
                name = {"ddp": "step 04", "fsdp": "step 05", "hybrid": "step 05, `--replicas`"}[way]
                worst, best = compute / (compute + talk), min(1.0, compute / max(compute, talk))
                share = f"{worst:.0%} to {best:.0%}"
                own = f"{row['model']}, batch {row['batch']}, {name}"
                rows.append([own, f"{row['ranks']:,}", f"{compute:.3g} ms", f"{talk:.3g} ms", share])
    return rows_of(["model and step", "GPUs", "computing", "collectives", "of the ideal"], rows)


def links_table(_: str) -> str:
    """α and β of each collective, on this machine and over the slow links."""
    predict, rows = load(ROOT / "benchmarks" / "predict.py"), []
    for where, collectives in results("prediction.json")["collectives"].items():
        for name, points in collectives.items():
            alpha, beta = predict.fit(points)
            rows.append(
                [f"{where}, {name.replace('_', '-')}", f"{1e3 * alpha:.2f} ms", f"{1e-6 / beta:,.1f} MB/s"]
            )
    return rows_of(["link and collective", "α", "1/β"], rows)


def steps_table(_: str) -> str:
    """Predictions, and what came."""
    rows = []
    for row in results("prediction.json")["steps"]:
        milliseconds = [f"{1e3 * row[name]:,.1f} ms" for name in ("alone", "predicted", "measured")]
        off = f"{100 * (row['predicted'] / row['measured'] - 1):+.1f} %"
        rows.append([steps_of(row).replace("\n", ", "), *milliseconds, off.replace("-", "−")])
    return rows_of(["step, model, batch", "by itself", "predicted", "measured", "off by"], rows)


def bytes_table(_: str) -> str:
    """What a rank holds."""
    rows = []
    for row in results("prediction.json")["bytes"]:
        name = f"vit {row['vit_width']}×{row['vit_depth']}"
        found = f"{row['measured'] / 1e6:,.1f} MB" if "measured" in row else "–"
        cells = [f"{row[kind] / 1e6:,.1f} MB" for kind in ("ddp", "states")]
        rows.append([name, f"{row['ranks']:,}", *cells, found])
    return rows_of(["model", "ranks", "DDP", "FSDP, predicted", "FSDP, measured"], rows)


def bench_table(_: str) -> str:
    """What `make bench` has found, without its first line."""
    return "\n".join((RESULTS / "intel-xeon-2-cores.md").read_text().splitlines()[2:]) + "\n"


def speedrun_table(_: str) -> str:
    """The speed-run at one rank and at two."""
    rows = []
    for line in (RESULTS / "speedrun.jsonl").read_text().splitlines():
        run = json.loads(line)
        seconds = [f"{run[name]:.1f} s" for name in ("train_seconds", "wall_seconds")]
        rows.append([f"{run['ranks']}", f"{run['n']}", f"{run['mean']:.2f}%", f"{run['sd']:.2f}", *seconds])
    head = ["ranks", "seeds", "mean accuracy", "standard deviation", "training", "from start to result"]
    return rows_of(head, rows)


def rungs_table(_: str) -> str:
    """An epoch's seconds, and what is right after it, one idea a rung."""
    rows = []
    for idea, found in results("ladder.json")["rungs"].items():
        seconds = found["seconds"]
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        rows.append([idea, spread, f"{statistics.mean(found['accuracies']):.2f}%"])
    return rows_of(["one idea a rung", "s an epoch", "accuracy after it"], rows)


# What step 05 prints of its bytes, at several numbers of ranks.
SHARDS = {
    ranks: f"torchrun --standalone --nproc-per-node={ranks} 05_fsdp/train.py --use-gpu 0 --model vit "
    "--vit-width 768 --vit-depth 12 --num-samples 64 --batch-size 8 --epochs 1"
    for ranks in (1, 2, 4)
}


def shards_table(_: str) -> str:
    """What rank 0 holds after a step, the more ranks there are."""
    rows = []
    for ranks, command in SHARDS.items():
        lines = iter(results("outputs.json")[command]["output"])
        names = re.split(r"  +", next(line for line in lines if line.startswith("after one step")))[1:]
        held, whole = (
            re.findall(r"[\d.]+ MB", next(line for line in lines if line.startswith(begin)))
            for begin in ("rank 0", "each under DDP")
        )
        rows.append([f"{ranks}", *held, whole[-1]])
    return "".join(map(row_of, [["ranks", *names, "under DDP"], ["---"] * (len(names) + 2), *rows]))


def sizes() -> dict[str, str]:
    """How long step 01's script is, and what the `diff` to each later one adds and takes away."""
    found = {"01": f"{len(script('01').splitlines())}"}
    for before, after in itertools.pairwise(FOLDERS):
        words = ["diff", *(str(ROOT / FOLDERS[step] / "train.py") for step in (before, after))]
        lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
        plus, minus = (sum(line.startswith(sign) for line in lines) for sign in "><")
        found[after] = f"+{plus} −{minus}"
    return found


def ladder_table(old: str) -> str:
    """The steps; all columns but the third are prose."""
    head, line, *rows = old.splitlines()
    found = sizes()
    made = [[*cells(row)[:2], found[cells(row)[0][1:3]], *cells(row)[3:]] for row in rows]
    return "".join([f"{head}\n", f"{line}\n", *map(row_of, made)])


def parser_of(step: str) -> argparse.ArgumentParser:
    """The parser that a script makes; with --help, it does not ask for torchrun."""
    folder = str(ROOT / FOLDERS[step])
    with (
        mock.patch.object(sys, "path", [folder, *sys.path]),
        mock.patch.object(sys, "argv", ["train.py", "--help"]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True) as parse_args,
    ):
        load(ROOT / folder / "train.py").parse_args()
    parser: argparse.ArgumentParser = parse_args.call_args.args[0]
    return parser


@functools.cache
def flags() -> dict[str, dict[str, tuple[str, str]]]:
    """Of each step and each of its flags: how it is written, and what --help says of it."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for step in FOLDERS:
        found[step] = {}
        for action in parser_of(step)._actions:
            flag = next(word for word in reversed(action.option_strings) if word.startswith("--"))
            if flag == "--help":
                continue
            words = [flag]
            if action.choices:
                words.append("\\|".join(map(str, action.choices)))
            elif action.nargs != 0:
                words.append(action.metavar if isinstance(action.metavar, str) else action.dest.upper())
            found[step][flag] = (f"`{' '.join(words)}`", (action.help or "").replace(FOLDERS[step], "STEP"))
    return found


def flags_table(old: str, shared: bool) -> str:
    """The flags that all steps have, or those that only some have; the last column is prose."""
    more = {cells(row)[0].split()[0].strip("`"): cells(row)[-1] for row in old.splitlines()[2:]}
    by_step = flags()
    common = [flag for flag in by_step["01"] if all(flag in own for own in by_step.values())]
    if shared:
        rows = [[*by_step["01"][flag], more.get(flag, "")] for flag in common]
        return "".join(map(row_of, [["flag", "`--help` says", "more"], ["---"] * 3, *rows]))
    rows = []
    for flag in dict.fromkeys(flag for own in by_step.values() for flag in own if flag not in common):
        steps = [step for step in by_step if flag in by_step[step]]
        written, says = by_step[steps[0]][flag]
        rows.append([written, ", ".join(steps), says, more.get(flag, "")])
    return "".join(map(row_of, [["flag", "steps", "`--help` says", "more"], ["---"] * 4, *rows]))


def promises_table(old: str) -> str:
    """The paragraphs of the tests' docstrings that begin with `Promise:`, the files in their old order."""
    files = re.findall(r"tests/(\w+/test_\w+\.py)\)", old)
    files += sorted(str(path.relative_to(ROOT / "tests")) for path in ROOT.glob("tests/*/test_*.py"))
    rows = []
    for file in dict.fromkeys(files):
        text = ast.get_docstring(ast.parse((ROOT / "tests" / file).read_text())) or ""
        for paragraph in text.split("\n\n"):
            if paragraph.startswith("Promise: "):
                name = Path(file).name
                rows.append([" ".join(paragraph.split()[1:]).rstrip("."), f"[{name}](../../tests/{file})"])
    return "".join(map(row_of, [["promise", "test"], ["---"] * 2, *rows]))


def first_sentence(text: str) -> str:
    """The first sentence of a cell, without its links."""
    text = re.sub(r",? see \[[^\]]+\]\([^)]+\)", "", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    return re.split(r"(?<=[^.])\. (?=[A-Z`])", text)[0].rstrip(".")


Row = tuple[str, str, str]


def what_people_see() -> list[Row]:
    """From the pages of the steps and the cards: what one sees, the answer in a sentence, and a link."""
    found = []
    for step, folder in FOLDERS.items():
        page = (ROOT / folder / "README.md").read_text()
        section = page.split("## When it goes wrong\n")[1].split("\n## ")[0]
        rows = [cells(line) for line in section.splitlines() if line.startswith("| ")]
        link = f"[step {step}](../../{folder}/README.md#when-it-goes-wrong)"
        found += [(seen, first_sentence(why), link) for seen, why in rows[1:]]
    for card in sorted((ROOT / "workshop" / "break_it").glob("*/card.md")):
        text = card.read_text()
        number, title = text.splitlines()[0].removeprefix("# ").split(" · ")
        fix = " ".join(text.split("**Fix.**")[1].split("\n\n")[0].split())
        link = f"[card {number}](../../workshop/break_it/{card.parent.name}/card.md)"
        found.append((title, first_sentence(fix), link))
    return found


def alphabetical(rows: list[Row]) -> str:
    """These rows as a table, without regard to quotes and to `error:`."""

    def words(row: Row) -> str:
        return re.sub(r"^\W*(error|warning):|[^a-z ]", "", row[0].lower()).strip()

    lines = [["you see", "why, or what helps", "more"], ["---"] * 3, *map(list, sorted(rows, key=words))]
    return "".join(map(row_of, lines))


def messages_table(_: str) -> str:
    """What begins with a message."""
    return alphabetical([row for row in what_people_see() if row[0].startswith("`")])


def symptoms_table(_: str) -> str:
    """What does not."""
    return alphabetical([row for row in what_people_see() if not row[0].startswith("`")])


TABLES: dict[str, Callable[[str], str]] = {
    "messages": messages_table,
    "symptoms": symptoms_table,
    "paper": paper_table,
    "bytes": bytes_table,
    "links": links_table,
    "steps": steps_table,
    "bench": bench_table,
    "speedrun": speedrun_table,
    "rungs": rungs_table,
    "shards": shards_table,
    "ladder": ladder_table,
    "flags": functools.partial(flags_table, shared=True),
    "own-flags": functools.partial(flags_table, shared=False),
    "promises": promises_table,
}
