"""Runs the commands whose output the pages show, and records it: `make record`.

    python benchmarks/record.py --data-dir data             # all commands
    python benchmarks/record.py --data-dir data --only vit  # only the commands that contain this text

The pages name the commands: `<!-- output: COMMAND`. Each command runs in a new folder with links to the
repository's files, and to MNIST as `data`. Its output, seconds, machine and date go to
benchmarks/results/outputs.json, from which `make docs` fills the pages; comparison.png goes to docs. This
takes half an hour. Run it as root, on an idle machine.
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
    """The commands in the pages, in the order of the pages, then those of the table of shards; each once."""
    found: list[str] = []
    for page in PAGES:
        found += re.findall(r"^<!-- (?:output|printed): (.*?)(?: -->)?$", page.read_text(), re.M)
    found += SHARDS.values()
    return list(dict.fromkeys(found))


def run(command: str, data: Path) -> dict[str, Any]:
    """Run a command, which must succeed: its entry in outputs.json."""
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            Path(folder, file).symlink_to(ROOT / file)
        Path(folder, "data").symlink_to(data.resolve())
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        start = time.monotonic()
        words = ["bash", "-c", command]
        process = subprocess.run(words, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True)
        seconds = round(time.monotonic() - start, 1)
        for picture in Path(folder).glob("comparison.png"):
            shutil.copy(picture, ROOT / "docs")
    return {
        "machine": speedrun.machine(),
        "torch": torch.__version__.partition("+")[0],
        "date": f"{datetime.date.today()}",
        "seconds": seconds,
        "output": process.stdout.splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where MNIST is")
    parser.add_argument("--only", default="", metavar="TEXT", help="only commands that contain this text")
    args = parser.parse_args()
    path = RESULTS / "outputs.json"
    old_record = json.loads(path.read_text()) if path.exists() else {}
    wanted = commands()
    # Forget the commands that are no longer in a page.
    record = {command: old_record[command] for command in wanted if command in old_record}
    for command in wanted:
        if args.only in command:
            print(command, flush=True)
            record[command] = run(command, args.data_dir)
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
