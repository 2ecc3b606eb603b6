"""Which lines do the tests guard? Take out one after another, and see whether a test turns red.

    make mutants                       what the report does not know yet; ARGS=--survivors: those, too
    make mutants ARGS="--only 02"      of one step's folder, of `common`, or of one file
    make mutants ARGS=--check          does each test still catch what it is known to catch? if not, forget it

A mutant is a copy of the repository in which one place is wrong:

    statement    a statement, or a decorator, is gone; of a `with`, the context
    keyword      a keyword argument is gone
    plus one     `x + 1` is `x`, and so on with `-` and other numbers
    condition    a comparison, or what an `if` asks, is turned around
    constant     a number is greater by one or doubled, True is False, a string that is data is another
    one rank     rank 1 skips a collective; that all skip it is a `statement`
    line         of a shell script: a command is gone

Strings with blanks and f-strings, which are messages, stay, and so do types. What Python does not compile, or
has a name that nothing defines, as without an import, is no mutant: nobody could overlook it (`make lint`).
No tool that exists would do: mutmut and cosmic-ray change functions that a test imports; ours run as
`__main__`, in ranks.

The tests that come to the line (`forks.trace`, measured once) run against the copy, those first that caught
most in this place, for their time, until one fails or `--limit` seconds of tests are over. A test that could
not plant its own bug in the mutant says nothing, and one that fails only once has failed by chance. A hang
is caught when a test says so by its own limit.

`mutants.jsonl` has each mutant with the test that catches it, docs/reference/mutants.md the survivors with
the reasons of `harmless.toml`. A mutant is known until its line changes. If `make mutants` is interrupted, it
continues where it was; with `--survivors`, at the first test not yet tried.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this folder, where `forks` is

import forks
from helpers import ROOT, finish, kill, start
from tqdm import tqdm

PYTHON = [f"{path.parent.name}/{path.name}" for path in sorted(ROOT.glob("0[1-9]_*/*.py"))]
PYTHON += [f"common/{path.name}" for path in sorted(ROOT.glob("common/*.py")) if path.name != "__init__.py"]
SHELL = {  # by lines; which tests come to one is not measured
    "launch_multinode.sh": ("test_launcher", "test_multinode", "test_slurm"),
    "04_multinode/slurm.sbatch": ("test_slurm",),
}
KNOWN = ROOT / "tests" / "harness" / "mutants.jsonl"
REPORT = ROOT / "docs" / "reference" / "mutants.md"
HARMLESS = ROOT / "tests" / "harness" / "harmless.toml"
TRACED = ROOT / ".mutants"  # what is measured once, and not committed; delete it to begin afresh
PASSED = TRACED / "passed.json"
COLLECTIVES = ("all_reduce", "broadcast", "all_gather_object", "barrier", "broadcast_object_list")

# --- The mutants


@dataclass(frozen=True)
class Mutant:
    """One place in a file, and what stands there instead."""

    file: str
    scope: str  # Trainer.run_batch
    kind: str
    was: str  # the text of the place; of a longer one, its first line
    on: str  # the first line of the place, without a comment
    twin: int  # of those that have all this in common: 0, 1, …
    line: int
    lines: tuple[str, ...]  # what the place's lines say, for finding the tests that come to it
    source: str  # of the whole file, wrong

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What it is known by while its line stays the same, wherever in its function the line moves to."""
        return self.file, self.scope, self.kind, self.was, self.on, self.twin

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kind}: {self.was}"


def mutants_of(file: str, source: str | None = None) -> list[Mutant]:
    """All mutants of a file of the repository, in the order of their lines."""
    source = (ROOT / file).read_text() if source is None else source
    edits = python_edits(source) if file.endswith(".py") else shell_edits(source)
    content, found, counts = source.encode(), [], collections.Counter[tuple[str, ...]]()
    source_lines = source.splitlines()
    starts = [0]  # of the lines, in bytes, which is what ast counts
    for line in content.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for scope, kind, (line, column, last, end), text in sorted(edits, key=lambda edit: (edit[2], edit[1])):
        begin, stop = starts[line - 1] + column, starts[last - 1] + end
        was = content[begin:stop].decode()
        wrong = (content[:begin] + text.encode() + content[stop:]).decode()
        if file.endswith(".py") and was.startswith("elif "):  # a statement that `pass` cannot always replace
            try:
                ast.parse(wrong)
            except SyntaxError:
                continue
        lines = tuple(text.strip() for text in source_lines[line - 1 : last])
        on = re.sub("  # .*", "", lines[0])
        name = (scope, kind, was.splitlines()[0].rstrip(", "), on)
        found.append(Mutant(file, *name, counts[name], line, lines, wrong))
        counts[name] += 1
    if not file.endswith(".py"):
        return found
    before, *after = undefined_names([source, *(mutant.source for mutant in found)])
    return [mutant for mutant, count in zip(found, after, strict=True) if count <= before]


def undefined_names(sources: list[str]) -> list[int]:
    """How many names that nothing defines ruff finds in each of these Python sources."""
    with tempfile.TemporaryDirectory() as folder:
        for number, source in enumerate(sources):
            Path(folder, f"{number}.py").write_text(source)
        words = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--exit-zero"]
        words += ["--select", "F821,F823", "--output-format", "json", folder]
        findings = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    counts = collections.Counter(int(Path(finding["filename"]).stem) for finding in findings)
    return [counts[number] for number in range(len(sources))]


Edit = tuple[str, str, tuple[int, int, int, int], str]  # scope, kind, place, text


def python_edits(source: str) -> list[Edit]:
    """The mutants of Python source, as what to put in which place."""
    found: list[Edit] = []
    lines = source.splitlines()
    encoded = [line.encode() for line in lines]  # ast counts bytes

    def text_of(node: Any) -> str:  # as ast.get_source_segment, which splits all of the source each time
        first, last = node.lineno - 1, node.end_lineno - 1
        if first == last:
            return encoded[first][node.col_offset : node.end_col_offset].decode()
        whole = [
            encoded[first][node.col_offset :],
            *encoded[first + 1 : last],
            encoded[last][: node.end_col_offset],
        ]
        return b"\n".join(whole).decode()

    def add(scope: str, kind: str, node: Any, text: str) -> None:
        place = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
        found.append((scope, kind, place, text))

    def turned(scope: str, node: ast.expr) -> None:
        add(scope, "condition", node, f"(not ({text_of(node)}))")

    def visit(node: ast.AST, scope: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for decorator in node.decorator_list:
                place = (decorator.lineno, 0, decorator.lineno, len(lines[decorator.lineno - 1].encode()))
                found.append((scope, "statement", place, ""))
            scope = f"{scope}.{node.name}".lstrip(".")
        elif isinstance(node, ast.stmt) and not isinstance(node, ast.Pass) and not is_text(node):
            add(scope, "statement", node, "pass")
            if isinstance(node, ast.Expr) and is_collective(node.value):
                add(scope, "one rank", node, f"if dist.get_rank() != 1: {text_of(node)}")
        if isinstance(node, ast.With):
            for item in node.items:
                if item.optional_vars is None:
                    add(scope, "statement", item.context_expr, "__import__('contextlib').nullcontext()")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                found.append((scope, "keyword", with_comma(lines, keyword), ""))
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            for number, other in ((node.right, node.left), (node.left, node.right)):
                if isinstance(number, ast.Constant) and isinstance(number.value, int):
                    add(scope, "plus one", node, f"({text_of(other)})")
        if isinstance(node, ast.Compare):
            turned(scope, node)
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            asked(node.test, scope)
        if isinstance(node, ast.comprehension):
            for test in node.ifs:
                asked(test, scope)
        if isinstance(node, ast.Constant) and (text := another(node.value)):
            add(scope, "constant", node, text)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns") or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not is_text(child):
                    visit(child, scope)

    def asked(test: ast.expr, scope: str) -> None:
        for part in test.values if isinstance(test, ast.BoolOp) else [test]:
            if not isinstance(part, ast.Compare):
                turned(scope, part)

    visit(ast.parse(source), "")
    return found


def is_text(node: ast.AST) -> bool:
    """A docstring, or another string that is a statement."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is not ...


def is_collective(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and re.match(r"dist\.(\w+)", ast.unparse(node)) is not None
        and (ast.unparse(node.func).removeprefix("dist.") in COLLECTIVES)
    )


def with_comma(lines: list[str], node: ast.keyword) -> tuple[int, int, int, int]:
    """The place of an argument, with the comma behind it; one that is left before it does no harm."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    comma = re.match(rb"\s*,\s*", lines[node.end_lineno - 1].encode()[node.end_col_offset :])
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset + (comma.end() if comma else 0)


def another(value: Any) -> str:
    """Another constant in the place of `value`; nothing for one that is text for people."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return str(2 * value or 1.0)
    if isinstance(value, (str, bytes)) and value and not re.search(r"\s", str(value)):
        return repr(value[:1] + value)
    return ""


def shell_edits(source: str) -> list[Edit]:
    """The mutants of a shell script: `:` in the place of a line, and of what cannot be there without it."""
    found: list[Edit] = []
    lines, text_until = source.splitlines(), -1
    for first, line in enumerate(lines):
        structure = r"\s*(#|(fi|done|esac|then|do|[});&|]+)(\s|$))"
        if first <= text_until or not line.strip() or re.match(structure, line):
            continue
        nearest, farthest = first, first
        if document := re.search(r"<<'?(\w+)", line):
            nearest = farthest = text_until = lines.index(document[1], first)
        elif re.match(r"\s*(if|for|while|case|\w+\(\))\s", line) or re.search(r"(\\|[({|&'\"])$", line):
            farthest = min(first + 40, len(lines) - 1)
        indent = len(line) - len(line.lstrip())
        for last in range(nearest, farthest + 1):
            if complete([*lines[:first], " " * indent + ":", *lines[last + 1 :]]):
                found.append(("", "line", (first + 1, indent, last + 1, len(lines[last].encode())), ":"))
                break
    return found


def complete(lines: list[str]) -> bool:
    """Whether lines are a shell script of their own."""
    return (
        subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, capture_output=True).returncode == 0
    )


# --- In a copy of the repository: its tests, until one fails


class Lane:
    """A copy of the repository, with its name, and in it one mutant after another."""

    def __init__(self, base: Path, number: int, data_dir: str):
        self.folder, self.data_dir, self.edits = base / f"lane-{number}", data_dir, 0
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        for name in names:
            if (ROOT / name).exists():
                (self.folder / ROOT.name / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / ROOT.name / name)

    def run(
        self, tests: list[str], limit: float, mutant: Mutant | None = None, traces: str = ""
    ) -> dict[str, Any]:
        """What judge.py says of these tests; with a `mutant`, in its copy."""
        answer = self.folder / "answer.json"
        for path in (answer, self.folder / "tmp"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        asked = {"tests": tests, "limit": limit, "traces": traces, "data_dir": self.data_dir}
        (self.folder / "asked.json").write_text(json.dumps(asked))
        place = self.folder / ROOT.name / (mutant.file if mutant else "README.md")
        right = place.read_bytes()
        try:
            if mutant:
                place.write_text(mutant.source)
                self.edits += 1
                os.utime(place, 2 * (self.edits,))  # seconds: or an old .pyc could be taken for its own
            judge = self.folder / ROOT.name / "tests" / "harness" / "judge.py"
            words = [sys.executable, str(judge), str(self.folder)]
            # Every test ends by its own limit, at most 600 s. Whatever does not is no work of a test.
            _, out, err = finish(start(words, self.folder, TMPDIR=str(self.folder)), limit + 900)
            if not answer.exists():
                raise RuntimeError(f"the tests ended without an answer:\n{out[-2000:]}\n{err[-2000:]}")
            found = dict(json.loads(answer.read_text()))
            if found["status"] not in (0, 1) and not found["killer"]:
                raise RuntimeError(
                    f"pytest ended with status {found['status']}:\n{out[-2000:]}\n{err[-2000:]}"
                )
            return found
        except AssertionError as error:
            why = str(error).splitlines()[0]
            return {"killer": "", "why": why, "ran": [], "measured": [], "skipped": [], "status": -1}
        finally:
            place.write_bytes(right)
            self.delete_old()

    def catches(self, mutant: Mutant, test: str) -> dict[str, Any]:
        """What judge.py says of the test that is known to catch a mutant; asked up to three times.

        A collective that is gone may let a race be won now and then.
        """
        for _ in range(3):
            if (found := self.run([test], 600, mutant))["killer"]:
                break
        return found

    def first_that_catches(self, tests: list[str], limit: float, mutant: Mutant) -> dict[str, Any]:
        """What judge.py says of the first test that fails twice.

        One that fails once, and not when it is asked again, has failed by chance. Those after it are asked.
        """
        ran: list[str] = []
        while True:
            found = self.run(tests, limit, mutant)
            ran += found["ran"]
            killer = found["killer"]
            if killer not in tests or self.run([killer], limit, mutant)["killer"]:
                return {**found, "ran": ran}
            tests = tests[tests.index(killer) + 1 :]
            if not tests:
                return {**found, "ran": ran, "killer": "", "why": f"{killer} failed once, and not again"}

    def delete_old(self) -> None:
        """End what a test in a mutant has left: whatever stands in this lane's folder."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str((path / "cwd").readlink()).startswith(str(self.folder)):
                    kill([int(path.name)])


# --- Which tests, in which order


class Tests:
    """What `measure` has found: how long each test takes, and which lines it comes to."""

    def __init__(self, measured: dict[str, Any]):
        self.seconds: dict[str, float] = measured["seconds"]
        self.seen: dict[str, list[str]] = measured["seen"]  # by "folder/file, a tab, the line's text"
        self.tried: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.caught: collections.Counter[tuple[str, ...]] = collections.Counter()
        self.passed: dict[str, list[str]] = {}  # by a mutant's key, as JSON: the tests that it has survived

    def that_see(self, mutant: Mutant) -> set[str]:
        """The tests that come to a mutant's lines, or to those that use a name which it gives."""
        if mutant.file in SHELL:
            return {
                name for name in self.seconds if Path(name.partition(".py")[0]).name in SHELL[mutant.file]
            }
        seen = {test for line in mutant.lines for test in self.seen.get(f"{mutant.file}\t{line}", ())}
        if not mutant.scope and (names := names_given(" ".join(mutant.lines))):
            word, seen = re.compile("|".join(rf"\b{name}\b" for name in names)), set()
            for line, tests in self.seen.items():
                file, _, text = line.partition("\t")
                own = file == mutant.file or "import" not in mutant.lines[0]  # where the name can be seen
                seen |= set(tests) if own and word.search(text) and text not in mutant.lines else set()
        step = mutant.file[:2]
        real = {name for name in self.seconds if "test_real_start" in name}  # whose ranks are not traced
        return seen | {name for name in real if step == "co" or f"[{step}" in name}

    def order(self, mutant: Mutant) -> list[str]:
        """Those tests, first the one that is likely to catch most for its time; not all of one kind."""

        def worth(test: str) -> float:
            caught, tried = 0.05, 1.0
            for weight, place in zip((3, 1, 0.1), self.places(test, mutant), strict=True):
                caught += weight * self.caught[place]
                tried += weight * self.tried[place]
            return caught / tried / (self.seconds[test] + 0.3)

        alike: collections.Counter[str] = collections.Counter()
        ordered = []
        left = self.that_see(mutant) - {*self.passed.get(json.dumps(mutant.key), ())}
        for test in sorted(left, key=lambda test: (-worth(test), test)):
            function = test.partition("[")[0]
            alike[function] += 1
            ordered.append((worth(test) / alike[function] ** 2, test))
        return [test for _, test in sorted(ordered, reverse=True)]

    def learn(self, mutant: Mutant, tests: list[str], killer: str) -> None:
        for test in tests[: tests.index(killer) + 1] if killer in tests else tests:
            for place in self.places(test, mutant):
                self.tried[place] += 1
                self.caught[place] += test == killer

    def places(self, test: str, mutant: Mutant) -> tuple[tuple[str, ...], ...]:
        """Where what a test has caught counts: at this line of any step, in this function, everywhere."""
        function, name = test.partition("[")[0], mutant.file.rpartition("/")[2]
        here = function, name, mutant.scope
        return (*here, mutant.kind, mutant.was), here, (test,)


def names_given(statement: str) -> list[str]:
    """The names that a statement of a module, in one line, imports or assigns to."""
    line, _, _ = statement.partition("  #")
    if match := re.match(r"(?:from \S+ )?import (.+)", line):
        names = [name.strip() for name in match[1].strip("( ),").split(",")]
        return [re.split(r" as |\.", name)[-1 if " as " in name else 0].strip() for name in names]
    match = re.match(r"([\w, ]+?)(?:: .*)? \|?= ", line)
    return match[1].split(", ") if match else []


def measure(lanes: list[Lane], bar: Any, quick: bool, files: list[str]) -> dict[str, Any]:
    """Run each test once, and see which lines it comes to; those that fail so are not asked later.

    A test that `TRACED` knows is not measured again. With `quick`, those that `make test` leaves out are not
    measured either; with `files`, only those of these files are.
    """
    lines = TRACED / "lines.json"
    found = json.loads(lines.read_text()) if lines.exists() else {"seconds": {}, "seen": {}, "failed": []}
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-q",
        "--collect-only",
        "--ignore=tests/harness/test_mutants.py",
    ]
    words += [] if quick else ["--all", "--long", "-m", "not long and not other"]
    words += files
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = [line for line in listed.splitlines() if line.startswith("tests/")]
    names = [name for name in names if name not in found["seconds"] and name not in found["failed"]]
    parts = [names[i : i + 8] for i in range(0, len(names), 8)]
    bar.reset(len(parts))
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as traces:

        def run(lane: Lane, part: list[str]) -> None:
            measured = lane.run(part, 3600, traces=traces)["measured"]
            with lock:
                for name, took, trace, failed in measured:
                    path = Path(traces, trace)
                    if failed:
                        bar.write(f"fails without a mutant, and is not asked: {name}")
                        found["failed"].append(name)
                        continue
                    found["seconds"][name] = took
                    for line in sorted(set(path.read_text().splitlines())) if path.exists() else []:
                        found["seen"].setdefault(line, []).append(name)
                write(lines, json.dumps(found))

        in_lanes(lanes, run, parts, bar)
    return found


def in_lanes(lanes: list[Lane], run: Any, work: list[Any], bar: Any = None) -> None:
    """Call `run(lane, each)` for all the `work`, in as many threads as there are lanes."""
    left = collections.deque(work)

    def one(lane: Lane) -> None:
        while True:
            try:
                each = left.popleft()
            except IndexError:
                return
            run(lane, each)
            if bar:
                bar.update()

    with concurrent.futures.ThreadPoolExecutor(len(lanes)) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(one, lane) for lane in lanes]):
                future.result()
        except BaseException:  # in a lane, or Ctrl-C here: all end
            left.clear()
            for lane in lanes:
                lane.delete_old()
            raise


# --- What is known


def known() -> dict[tuple[Any, ...], str]:
    """By a mutant's key, the test that catches it, or an empty string."""
    lines = KNOWN.read_text().splitlines() if KNOWN.exists() else []
    return {tuple(key): by for *key, by in map(json.loads, lines)}


def write_known(results: dict[tuple[Any, ...], str]) -> None:
    text = "".join(json.dumps([*key, by], ensure_ascii=False) + "\n" for key, by in results.items())
    write(KNOWN, text)


def write(path: Path, text: str) -> None:
    """In one go: whoever ends this at any moment finds the file whole."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


@functools.cache
def excuses_given() -> list[dict[str, Any]]:
    return list(tomllib.loads(HARMLESS.read_text())["harmless"])


def excuse(mutant: Mutant) -> dict[str, Any]:
    """The entry of harmless.toml that says why nobody needs to notice this mutant; or an empty one."""
    return next((entry for entry in excuses_given() if excuses(entry, mutant)), {})


def reason(mutant: Mutant) -> str:
    """Why nobody needs to notice this mutant, as harmless.toml has it; or nothing."""
    return str(excuse(mutant).get("why", ""))


def excuses(entry: dict[str, Any], mutant: Mutant) -> bool:
    parts = {"file": mutant.file, "scope": mutant.scope, "kind": mutant.kind, "was": mutant.was}
    parts |= {"on": mutant.on, "twin": str(mutant.twin)}
    return all(re.fullmatch(entry[name], text) for name, text in parts.items() if name in entry)


def main(args: argparse.Namespace) -> None:
    files = [file for file in (*PYTHON, *SHELL) if file.startswith(args.only)]
    everything = [mutant for file in (*PYTHON, *SHELL) for mutant in mutants_of(file)]
    results = {mutant.key: by for mutant in everything if (by := known().get(mutant.key)) is not None}
    for mutant in everything:
        if reason(mutant):  # is not tried unless `--again` asks for it, and counts as one that survives
            results.setdefault(mutant.key, "")
    asked = [mutant for mutant in everything if mutant.file in files]
    work = [
        mutant
        for mutant in asked
        if args.again
        or mutant.key not in results
        or (args.survivors and not results[mutant.key] and not reason(mutant))
    ]
    # Not file by file: what is learned of one place orders the tests for all, and an early end is a sample.
    random.Random(0).shuffle(work)
    lock = threading.Lock()
    TRACED.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # by way of the sweeps
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        (base / "forks").mkdir()
        os.environ[forks.IMPORTS] = "pytest xdist.plugin filelock"  # what each judge needs
        stack.enter_context(forks.server(base / "forks"))
        lanes = [Lane(base, number, args.data_dir) for number in range(args.lanes)]
        bar = stack.enter_context(tqdm(unit=" mutants", smoothing=0.05))
        if args.check:
            work = [mutant for mutant in asked if results.get(mutant.key)]
            random.Random(0).shuffle(work)
            bar.reset(len(work))

            def check(lane: Lane, mutant: Mutant) -> None:
                by = results[mutant.key]
                try:
                    if lane.catches(mutant, by)["killer"]:
                        return
                except RuntimeError as error:  # such as a test that is not there any more
                    bar.write(str(error))
                with lock:
                    bar.write(f"{mutant}\n    not caught by {by}")
                    del results[mutant.key]
                    write_known({m.key: results[m.key] for m in everything if m.key in results})

            in_lanes(lanes, check, work, bar)
            REPORT.write_text(report(everything, results))
            return
        tests = Tests(measure(lanes, bar, args.quick, args.tests))
        if PASSED.exists() and not args.again:
            tests.passed = json.loads(PASSED.read_text())
        for mutant in everything:
            if by := results.get(mutant.key):
                tests.learn(mutant, [by], by)
        bar.reset(len(work))

        def run(lane: Lane, mutant: Mutant) -> None:
            order, time_left = [], args.limit
            with lock:
                for test in tests.order(mutant):
                    if time_left > 0 and test in tests.seconds:
                        order.append(test)
                        time_left -= tests.seconds[test]
            found = {"killer": "", "why": "no other test comes here", "ran": []}
            if order:
                try:
                    found = lane.first_that_catches(order, 3 * args.limit + 60, mutant)
                except RuntimeError as error:  # is tried again when this is started again
                    bar.write(f"{mutant}\n    {error}")
                    return
            with lock:
                tests.learn(mutant, order, found["killer"])
                results[mutant.key] = found["killer"]
                if not found["killer"]:
                    tests.passed.setdefault(json.dumps(mutant.key), []).extend(found["ran"])
                    write(PASSED, json.dumps(tests.passed))
                write_known({m.key: results[m.key] for m in everything if m.key in results})
                if args.verbose or not found["killer"]:
                    bar.write(
                        f"{mutant}\n    {found['killer'] or f'SURVIVES {len(order)} tests'}: {found['why']}"
                    )

        in_lanes(lanes, run, work, bar)
    REPORT.write_text(report(everything, results))
    print(f"{REPORT.relative_to(ROOT)} is written")


INTRODUCTION = """# Which lines the tests guard

`make mutants` takes out one place of the code after another, or turns it around, and runs the tests that come
to it until one fails. [mutants.py](../../tests/harness/mutants.py) says which places, and how. It wrote this
page. [mutants.jsonl](../../tests/harness/mutants.jsonl) names for each mutant the test that catches it. Known
are those that were tried since their line was last changed, and those that
[harmless.toml](../../tests/harness/harmless.toml) excuses: most of these were not tried, and do not count as
caught. The score is of those that are known. The last line leaves out those that only a GPU can show.
"""


def report(everything: list[Mutant], results: dict[tuple[Any, ...], str]) -> str:
    """The page: of each file how many mutants there are, tried and caught; which tests; what survives."""
    rows = ["| file | mutants | known | caught | |", "|---|---:|---:|---:|---:|"]
    groups = {file: [mutant for mutant in everything if mutant.file == file] for file in (*PYTHON, *SHELL)}
    for kind in dict.fromkeys(mutant.kind for mutant in everything):
        groups[f"kind: {kind}"] = [mutant for mutant in everything if mutant.kind == kind]
    groups["scripts and `common`"] = [mutant for mutant in everything if mutant.file in PYTHON]
    groups["of these, what a CPU can show"] = [
        mutant
        for mutant in groups["scripts and `common`"]
        if results.get(mutant.key) or not excuse(mutant).get("gpu")
    ]
    for name, mutants in groups.items():
        tried = [results[mutant.key] for mutant in mutants if mutant.key in results]
        caught = sum(map(bool, tried))
        score = f"{caught / max(1, len(tried)):.1%}"
        rows.append(f"| {name} | {len(mutants)} | {len(tried)} | {caught} | {score} |")
    by = collections.Counter(re.sub(r"\[.*", "", test) for test in results.values() if test)
    rows += ["", "## By which tests", "", "| test | catches |", "|---|---:|"]
    rows += [f"| `{test.removeprefix('tests/')}` | {count} |" for test, count in by.most_common()]
    rows += ["", "## What no test notices"]
    for file in (*PYTHON, *SHELL):
        found = collections.defaultdict(list)
        for mutant in everything:
            if mutant.file == file and results.get(mutant.key) == "":
                found[reason(mutant) or "NO REASON YET"].append(mutant)
        rows += ["", f"### {file}"] if found else []
        for why, mutants in found.items():
            rows += ["", f"{why}:", ""]
            rows += [f"- {m.scope or 'module'}, line {m.line}, {m.kind}: `{m.was}`" for m in mutants]
    return f"{INTRODUCTION}\n" + "\n".join(rows) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="FILE", help="how the files' names begin: 02, common")
    parser.add_argument("--survivors", action="store_true", help="also those that no test has caught")
    parser.add_argument("--check", action="store_true", help="whether what is known to be caught still is")
    parser.add_argument("--again", action="store_true", help="also those that a test has caught")
    parser.add_argument("--quick", action="store_true", help="leave out the tests that make test leaves out")
    parser.add_argument(
        "--tests", nargs="*", default=[], metavar="FILE", help="ask the tests of these files alone"
    )
    parser.add_argument(
        "--limit", type=int, default=60, metavar="SECONDS", help="of tests, for a mutant (60)"
    )
    parser.add_argument(
        "--lanes", type=int, default=4, metavar="N", help="copies that are tested at a time (4)"
    )
    parser.add_argument(
        "--data-dir", default="", metavar="DIR", help="a folder with MNIST, for tests that need it"
    )
    parser.add_argument("--verbose", action="store_true", help="say which test catches each, and how")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
