"""Train on two hosts, pull the cable of one, and see what they say: for card 16, in its copy of the project.

Needs root: the hosts are processes in Linux namespaces, see tests/harness/hosts.py.
"""

import sys
import tempfile
import time
from pathlib import Path

from hosts import WHY, commands_for, network, possible

SECONDS = 30  # in which both nodes must have noticed, with a timeout of five
FLAGS = ["--num-samples=480", "--batch-size=12", "--epochs=100000", "--save-every=1", "--use-gpu=0"]


def newest(host):
    """The step of the newest snapshot on a host's disk, 0 without one."""
    paths = (host.disk / "snapshots").glob("snapshot-*.pt")
    return max((int(path.stem.removeprefix("snapshot-")) for path in paths), default=0)


def wait_for(condition, seconds):
    """Wait for a condition, so many seconds at most; whether it came."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def main():
    with tempfile.TemporaryDirectory() as scratch, network(Path(scratch, "net"), 2) as net:
        second = net.hosts[1]
        flags = [*FLAGS, "--timeout=5", f"--snapshot-dir={net.disk}/snapshots"]
        words = ["--nproc-per-node=1", "--", *flags]
        commands = commands_for(["node1", "node2"], *words, root=Path(__file__).parent)
        running = {host: host.start(commands[host.name]) for host in net.hosts}
        if not wait_for(lambda: newest(second) >= 20, 90):
            sys.exit(f"error: node2 is at step {newest(second)} after 90 s, and not at step 20")
        print("both nodes train", flush=True)
        second.cable("down")
        print("node2's cable is pulled", flush=True)
        wait_for(lambda: all(process.poll() is not None for process in running.values()), SECONDS)
        for host, process in running.items():
            if process.poll() is None:
                print(f"{host.name}: no word for {SECONDS} s, and it has not ended")
                host.kill_all()
            out, _ = process.communicate()
            for line in out.splitlines():
                if "RuntimeError: " in line or "Seen by " in line:
                    print(f"{host.name}: {line}")
            print(f"{host.name} ended with status {process.returncode}", flush=True)


if __name__ == "__main__":
    if not possible():
        sys.exit(f"error: {WHY}")
    main()
