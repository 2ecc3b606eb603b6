"""What each rank of step 05 reads, writes and holds in memory while a snapshot is saved and loaded.

Promise: the bytes that each rank reads, writes and holds for a snapshot fall as ranks are added, as
05_fsdp/REFERENCE.md says for 70 billion parameters.
"""

import json
import re

import pytest
from helpers import FOLDERS, ROOT, SHARDED, command, finish, planted, start

PARAMETERS = 12_682_762  # of the model below
BYTES = 12  # a parameter and AdamW's two moments, in float32

# Writes down what Linux counts for this process: bytes read and written, and the peak of its memory.
COUNTS = """
def counts():
    io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    memory = dict(re.findall(r"(\\w+):\\s+(\\d+) kB", open("/proc/self/status").read()))
    return int(io["rchar"]), int(io["wchar"]), 1024 * int(memory["VmRSS"]), 1024 * int(memory["VmHWM"])


@contextlib.contextmanager
def counted(what):
    dist.barrier()
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = counts()
    yield
    after = counts()
    row = {"reads": after[0] - before[0], "writes": after[1] - before[1], "holds": after[3] - before[2]}
    with open(f"{what}-{dist.get_rank()}", "w") as file:
        json.dump(row, file)
    dist.barrier()


class Trainer:
"""
SAVES = [
    ("import math\n", "import contextlib\nimport gc\nimport json\nimport math\nimport re\n"),
    ("class Trainer:\n", COUNTS.lstrip()),
    (
        "            self.save_snapshot()\n            self.evaluate()\n",
        "            with counted('saves'):\n"
        "                self.save_snapshot()\n"
        "                self.saver.wait()\n",
    ),
    (
        "    state = snapshots.load_newest()  #",
        "    with counted('checks'):\n        state = snapshots.load_newest()  #",
    ),
    (
        "        with sharded.reader(state) as reader:\n",
        "        with counted('loads'), sharded.reader(state) as reader:\n",
    ),
]
FLAGS = ["--model=vit", "--vit-width=512", "--vit-depth=6", "--num-samples=24", "--batch-size=2"]


def on_paper(parameters, ranks):
    """Bytes that each rank writes, reads and also holds, without a few that do not depend on the model."""
    shard = BYTES * parameters / ranks
    return {
        "saves": (
            shard,
            shard,
            shard,
        ),  # a copy is written while training continues, and read for its checksum
        "checks": (0, shard, 0),  # in chunks
        "loads": (0, shard, 0),  # into the shards, which exist already
    }


# Two chunks of 16 MB, and what Python, torch and the allocator add to them.
SLACK = 45e6


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_of_a_snapshot_are_those_on_paper(tmp_path, ranks):
    """12.7 million parameters. A rank that did another rank's work, too, would have twice the bytes."""
    root = planted(tmp_path / "root", SHARDED, *SAVES)
    for epochs in (1, 2):
        flags = [*FLAGS, f"--epochs={epochs}", "--use-gpu=0", "--snapshot-dir=s"]
        status, out, err = finish(start([*command(SHARDED, ranks, root), *flags], tmp_path))
        print(out, err[-2000:])
        assert status == 0
    for when, expected in on_paper(PARAMETERS, ranks).items():
        for rank in range(ranks):
            found = json.loads((tmp_path / f"{when}-{rank}").read_text())
            print(f"rank {rank} {when}: {found}; on paper {[round(number) for number in expected]}")
            writes, reads, holds = expected
            assert abs(found["writes"] - writes) < 5e6
            assert abs(found["reads"] - reads) < 5e6
            assert found["holds"] < holds + SLACK < BYTES * PARAMETERS


def test_the_page_says_the_same_of_70_billion_parameters():
    page = (ROOT / FOLDERS[SHARDED] / "REFERENCE.md").read_text()
    rows = re.findall(r"^\| (saves|checks|loads)\b.*? \| (\S+) GB \| (\S+) GB \| (\S+) GB \|$", page, re.M)
    expected = on_paper(70e9, 64)
    assert len(rows) == 3
    for when, *numbers in rows:
        assert numbers == [f"{number / 1e9:.1f}" for number in expected[when]]
