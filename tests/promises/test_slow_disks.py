"""Disks that are slower than a time-out: planted pauses stand in for large snapshots.

Promise: a save or a load that takes longer than `--timeout` does not end the run. In step 05, no rank
repeats what another rank reads or checks.
"""

import re
import threading

import pytest
from helpers import ROOT, SHARDED, command, finish, last_saved, planted, saved, start

from common.process_group import keep_alive

SECONDS = 5  # the time-out
PAUSE = f"import time; time.sleep({SECONDS + 2})"
FLAGS = ["--num-samples=144", "--batch-size=12", "--precision=float64", "--use-gpu=0", "--snapshot-dir=s"]


def run(step, ranks, root, folder, *flags):
    status, out, err = finish(start([*command(step, ranks, root), *flags], folder))
    print(out, err[-3000:])
    assert status == 0 and "done: " in out
    return out


@pytest.mark.few(1)
@pytest.mark.parametrize(("step", "ranks"), [("02", 2), ("03", 3), ("04", 2)])
def test_a_save_longer_than_the_timeout_ends_no_run(tmp_path, step, ranks):
    line = "            torch.save(state, checked)"
    slow = (line, f"            {PAUSE}\n{line}")
    root = planted(tmp_path / "root", "common/snapshot.py", slow, steps=(step,))
    run(step, ranks, root, tmp_path, *FLAGS, f"--timeout={SECONDS}", "--epochs=2")
    assert len(saved(tmp_path / "s")) == 2


SLOW = {  # lines of sharded.py, and the rank that is slow there
    "            written = super().write_data(": 1,
    "                    path = commit(folder, ": 0,
    "        state, problem = read_state(": 2,
    "            return super().read_data(": 1,
}


@pytest.mark.slow
def test_step_05_waits_for_a_slow_disk_wherever_it_uses_one(tmp_path):
    root = planted(tmp_path / "root", SHARDED)
    flags = [*FLAGS, f"--timeout={SECONDS}"]
    for line, rank in SLOW.items():
        indent = re.match(" *", line)[0]
        slowly = f"{indent}if dist.get_rank() == {rank}:\n{indent}    {PAUSE}\n{line}"
        planted(root, "05_fsdp/sharded.py", (line, slowly))
    run(SHARDED, 3, root, tmp_path, *flags, "--epochs=1")
    out = run(SHARDED, 3, root, tmp_path, *flags, "--epochs=2")
    assert "resumed from s: epoch 1, step 4\n" in out
    assert last_saved(tmp_path / "s") == 8


TELLS = "os.write(1, f'{os.path.basename(path)} checked by {dist.get_rank()}\\n'.encode())"


@pytest.mark.few(1)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_rank_checks_its_own_files_and_a_part_of_those_it_finds(tmp_path, ranks):
    opens = '    with open(path, "rb") as file:\n        return snapshot.checksum('
    root = planted(tmp_path / "root", "05_fsdp/sharded.py", (opens, f"    {TELLS}\n{opens}"))
    out = run(SHARDED, ranks, root, tmp_path, *FLAGS, "--epochs=1")
    own = {f"__{rank}_0.distcp": str(rank) for rank in range(ranks)} | {".metadata": "0"}
    assert sorted(re.findall(r"(\S+) checked by (\d)", out)) == sorted(own.items())
    out = run(SHARDED, ranks, root, tmp_path, *FLAGS, "--epochs=2")
    found = re.findall(r"(\S+) checked by (\d)", out.split("resumed from")[0])
    print(found)
    assert sorted(name for name, _ in found) == sorted(own)
    assert {rank for _, rank in found} == set(own.values())


def test_what_one_rank_finds_damaged_no_rank_loads(tmp_path):
    """Each shard of the newest snapshot is checked by a different rank."""
    flags = [*FLAGS, "--save-every=2"]
    run(SHARDED, 3, planted(tmp_path / "root", SHARDED), tmp_path, *flags, "--epochs=1")
    assert sorted(saved(tmp_path / "s")) == [2, 4]
    shard = tmp_path / "s" / "snapshot-00000004" / "__2_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    status, out, err = finish(start([*command(SHARDED, 3), *flags, "--epochs=1"], tmp_path))
    print(out, err)
    assert status == 0 and "resumed from s: epoch 0, step 2\n" in out
    assert err.count("snapshot-00000004 is damaged (wrong checksum in __2_0.distcp)") == 1


ALIVE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from common.process_group import keep_alive
dist.init_process_group("gloo")
try:
    with keep_alive():
        if dist.get_rank() == 1:
            os._exit(0)
        deadline = time.monotonic() + 60
        while threads_of_beat() and time.monotonic() < deadline:
            time.sleep(0.05)
    print("nothing was raised", flush=True)
except RuntimeError as error:
    print("raised:", str(error).splitlines()[0], flush=True)
os._exit(0)
"""
THREADS = """
import threading
def threads_of_beat():
    return [thread for thread in threading.enumerate() if "beat" in thread.name]
"""


def test_a_rank_that_ends_while_another_saves_is_noticed(tmp_path):
    """The other one has an error then, after its save: it would wait for that rank later."""
    script = tmp_path / "script.py"
    script.write_text(THREADS + ALIVE)
    process = start([*command("03", 2)[:-1], str(script)], tmp_path)
    status, out, err = finish(process)
    print(out, err)
    assert status == 0 and re.fullmatch(r"raised: .*\n", out)


def test_without_a_group_there_is_nobody_to_keep_alive():
    before = threading.active_count()
    with keep_alive():
        assert threading.active_count() == before
