"""Runs the commands whose output the pages show, and records it: `make record`.

    python benchmarks/record.py --data-dir data             # all of them
    python benchmarks/record.py --data-dir data --only vit  # those with these words in them

The pages say which: `<!-- output: COMMAND`. Each runs in a folder of its own that has the repository's files,
and MNIST as `data`. The output, seconds, machine and date go to benchmarks/results/outputs.json, from
which `make docs` fills the pages; comparison.png goes to docs. Half an hour, as root, on an idle machine.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import speedrun  # noqa: E402
from docs.generate.pages import PAGES  # noqa: E402
from docs.generate.pictures import RESULTS  # noqa: E402
from docs.generate.pieces import FOLDERS  # noqa: E402
from docs.generate.tables import SHARDS  # noqa: E402

FILES = ["benchmarks", "common", "compare_steps.py", "launch_multinode.sh", ".venv", *FOLDERS.values()]


def commands() -> list[str]:
    """What the pages ask for, in their order."""
    asked = [
        re.findall(r"^<!-- (?:output|printed): (.*?)(?: -->)?$", page.read_text(), re.M) for page in PAGES
    ]
    return list(dict.fromkeys([*(command for found in asked for command in found), *SHARDS.values()]))


def recorded(command: str, data: Path) -> dict[str, Any]:
    """Run one, which must end well: the lines that it has printed, its seconds, the machine and the day."""
    with tempfile.TemporaryDirectory() as name:
        for file in FILES:
            Path(name, file).symlink_to(ROOT / file)
        Path(name, "data").symlink_to(data.resolve())
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        begun = time.monotonic()
        words = ["bash", "-c", command]
        done = subprocess.run(words, cwd=name, env=env, stdout=subprocess.PIPE, text=True, check=True)
        seconds = round(time.monotonic() - begun, 1)
        for picture in Path(name).glob("comparison.png"):
            shutil.copy(picture, ROOT / "docs")
    facts = {"machine": speedrun.machine(), "torch": torch.__version__.partition("+")[0]}
    return {
        **facts,
        "date": f"{datetime.date.today()}",
        "seconds": seconds,
        "output": done.stdout.splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where MNIST is")
    parser.add_argument("--only", default="", metavar="WORDS", help="commands with these words in them")
    args = parser.parse_args()
    file = RESULTS / "outputs.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    wanted = commands()
    record = {command: record[command] for command in wanted if command in record}  # and no page's of before
    for command in wanted:
        if args.only in command:
            print(command, flush=True)
            record[command] = recorded(command, args.data_dir)
            file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
