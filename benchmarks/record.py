"""Runs the commands whose output the pages show, and records it: `make record`.

The pages say which: `<!-- output: COMMAND`. Each runs in a folder of its own that has the repository's files,
and MNIST as `data`. What came, and how long it took, goes to benchmarks/results/outputs.json, from which
`make docs` fills the pages. Twenty minutes, as root, with no other work on the machine.
"""

import argparse
import datetime
import json
import os
import re
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
from docs.pages import PAGES  # noqa: E402
from docs.pictures import RESULTS  # noqa: E402
from docs.pieces import FOLDERS  # noqa: E402
from docs.tables import SHARDS  # noqa: E402

FILES = ["benchmarks", "common", "compare_steps.py", "launch_multinode.sh", ".venv", *FOLDERS.values()]


def commands() -> list[str]:
    """What the pages ask for, in their order."""
    asked = [
        re.findall(r"^<!-- (?:output|printed): (.*?)(?: -->)?$", page.read_text(), re.M) for page in PAGES
    ]
    return list(dict.fromkeys([*(command for found in asked for command in found), *SHARDS.values()]))


def recorded(command: str, data: Path) -> dict[str, Any]:
    """Run one, which must end well: its seconds, and the lines that it has printed."""
    with tempfile.TemporaryDirectory() as name:
        for file in FILES:
            Path(name, file).symlink_to(ROOT / file)
        Path(name, "data").symlink_to(data.resolve())
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        begun = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command], cwd=name, env=env, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.monotonic() - begun
    return {"seconds": round(seconds, 1), "output": done.stdout.splitlines()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where MNIST is")
    args = parser.parse_args()
    found = {}
    for command in commands():
        print(command, flush=True)
        found[command] = recorded(command, args.data_dir)
    record = {
        "machine": speedrun.machine(),
        "torch": torch.__version__,
        "date": f"{datetime.date.today()}",
        "commands": found,
    }
    (RESULTS / "outputs.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
