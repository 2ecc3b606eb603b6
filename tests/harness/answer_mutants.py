"""Which lines of our solutions does the checker guard? Break a solution in one place, and judge it.

    python tests/harness/answer_mutants.py          all exercises, except those that are whole scripts
    python tests/harness/answer_mutants.py 05 13    some of them

The mutants are those of mutants.py. One that passes is a survivor: the judge lacks a promise, the line is not
needed, or the mutant is as right as our solution. tests/workshop/equivalent_answers.toml gives the reason for
each survivor of the last kind. Exit status: 1 if a survivor has no reason, or a reason no survivor; else 0.
"""

import collections
import contextlib
import re
import sys
import tempfile
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import mutants
from helpers import ROOT

sys.path.insert(0, str(ROOT / "workshop"))

import check
import judging

REASONS = ROOT / "tests" / "workshop" / "equivalent_answers.toml"
mutants.COLLECTIVES = (*judging.COMMUNICATION,)


def answers(folder: Path) -> list[mutants.Mutant]:
    """The mutants of an exercise's solution, without those in code that a learner does not write."""
    source = check.text_of(folder, "solution")
    given = re.findall(r'^(?:class|def) (\w+)(?:\(.*)?:\n    """.*Nothing to write in here', source, re.M)
    found = mutants.mutants_of(f"{folder.name}.py", source)
    return [mutant for mutant in found if mutant.scope.partition(".")[0] not in given]


def passes(folder: Path, source: str) -> bool:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "answer.py")
        file.write_text(source)
        return judging.judge(folder, file).passed


def main(numbers: list[str]) -> int:
    reasons = tomllib.loads(REASONS.read_text())["equivalent"]
    used = collections.Counter[int]()
    unexplained = 0
    for number, folder in check.exercises().items():
        if "todo" in check.about(folder) or (numbers and number not in numbers):
            continue
        tried = answers(folder)
        survivors = [mutant for mutant in tried if passes(folder, mutant.source)]
        print(f"{number}: {len(tried)} tried, {len(tried) - len(survivors)} failed", flush=True)
        for mutant in survivors:
            why = ""
            for place, reason in enumerate(reasons):
                same = reason["exercise"] == number and reason.get("kind", mutant.kind) == mutant.kind
                if same and re.fullmatch(reason["was"], mutant.was):
                    used[place] += 1
                    why = reason["why"]
            unexplained += not why
            print(
                f"    line {mutant.line}, {mutant.kind}: {mutant.was}: {why or 'NO REASON YET'}", flush=True
            )
    for place, reason in enumerate(reasons):
        if used[place] == 0 and (not numbers or reason["exercise"] in numbers):
            unexplained += 1
            print(f"{reason['exercise']}: no survivor has this reason: {reason['was']}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    judging.prepare()
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(1)
