"""Several hosts on one machine: each is a process in its own namespaces, on a network that can be cut.

A host has its own hostname, processes, `/etc/hosts`, address and disk. One process keeps it alive. When that
process ends, everything that runs on the host ends too, and its network disappears: nothing outlives a test,
however the test ends.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ["--net", "--uts", "--mount", "--pid"]
WHY = "needs root, and the commands unshare, nsenter (util-linux) and ip (iproute2): sudo make test-all"


def possible() -> bool:
    """Whether this user may create namespaces here."""
    trial = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"]
    try:
        return subprocess.run(trial, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def hold_up(*namespaces: str) -> tuple[subprocess.Popen[str], str]:
    """A process that keeps namespaces alive until it is killed or this process ends, and their PID 1."""
    words = ["setpriv", "--pdeathsig=KILL", "unshare", *namespaces, "--fork", "--kill-child", "--mount-proc"]
    # As PID 1 it inherits the processes whose parent was killed; bash reaps them.
    script = "echo ready; while :; do sleep infinity & wait -n; done"
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen([*words, "bash", "-c", script], stdout=pipe, stderr=nothing, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, children[0]


class Host:
    """A host of a `Network`; `disk` is its own folder, which it sees as `network.disk`."""

    def __init__(self, network: "Network", number: int):
        self.name, self.address = f"node{number}", f"10.77.0.{number}"
        self.network = network
        self.disk = network.folder / self.name
        self.disk.mkdir()
        self.process, self.pid = hold_up(*NAMESPACES)

    def set_up(self) -> None:
        """Give the host its name, its disk and everything else that a host needs."""
        self.run(
            f"hostname {self.name}",
            "ip link set lo up",
            f"mount --bind {self.network.folder}/hosts /etc/hosts",
            f"mount --bind {self.disk} {self.network.disk}",
            "mount -t tmpfs none /run",
        )

    def words(self, *command: str) -> list[str]:
        """The words that run a command on this host."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, "--wd=" + str(self.network.disk), *command]

    def run(self, *lines: str) -> str:
        """Run shell commands here, and return what they print."""
        script = "set -e\n" + "\n".join(lines)
        enter = ["nsenter", f"--target={self.pid}", *NAMESPACES]
        return subprocess.run(
            [*enter, "bash", "-c", script], capture_output=True, text=True, check=True
        ).stdout

    def start(self, script: str, **extra: str) -> subprocess.Popen[str]:
        """Start a shell script on this host's disk, with `extra` variables; both outputs go to one pipe."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # torchrun's folder first
        return subprocess.Popen(
            self.words("bash", "-c", script),
            env={**os.environ, **extra, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[str]:
        """What runs here, without the process that keeps the host alive."""
        lines = self.run("ps -ewwo pid=,stat=,args=").splitlines()
        ours = [line for line in lines if " sleep infinity" not in line and "ps -ewwo" not in line]
        return [line for line in ours if line.split()[0] != "1" and not line.split()[1].startswith("Z")]

    def kill_all(self) -> None:
        """Kill every process here at once, as a crash does. The host can be used again."""
        self.run("kill -KILL -1 || true")

    def cable(self, state: str) -> None:
        """Pull this host's cable out (`down`), or plug it in (`up`)."""
        self.network.switch(f"ip link set {self.name} {state}")

    def sent(self) -> int:
        """Bytes that this host has sent to others so far."""
        return int(json.loads(self.run("ip -json -stats link show eth0"))[0]["stats64"]["tx"]["bytes"])


class Network:
    """Hosts and what connects them; made by `network`."""

    def __init__(self, folder: Path):
        self.folder, self.disk = folder, folder / "disk"
        self.hosts: list[Host] = []
        self.relay: subprocess.Popen[str] | None = None
        self.process, self.pid = hold_up("--net", "--pid")

    def set_up(self, count: int) -> None:
        """Add hosts, which are not connected yet."""
        self.disk.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"10.77.0.{i} node{i}" for i in range(1, count + 1))]
        # An IPv4 address written as an IPv6 one: torch looks up both kinds, and warns if one is missing.
        lines += [f"::ffff:10.77.0.{i} node{i}" for i in range(1, count + 1)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        for number in range(1, count + 1):
            self.hosts.append(Host(self, number))
            self.hosts[-1].set_up()

    def switch(self, *lines: str) -> None:
        """Run commands in the network namespace of the switch."""
        enter = ["nsenter", f"--target={self.pid}", "--net"]
        subprocess.run([*enter, "bash", "-ec", "\n".join(lines)], check=True, capture_output=True)

    def connect(self) -> None:
        """Plug all hosts into one switch."""
        self.switch("ip link add bridge type bridge", "ip link set bridge up")
        for host in self.hosts:
            self.switch(
                f"ip link add {host.name} type veth peer name eth0 netns {host.pid}",
                f"ip link set {host.name} master bridge up",
            )
            host.run(f"ip addr add {host.address}/24 dev eth0", "ip link set eth0 up")

    def connect_slowly(self, delay_ms: float, mbit: float) -> None:
        """Connect the two hosts with a slow cable."""
        first, second = self.hosts
        words = ["setpriv", "--pdeathsig=KILL", sys.executable, str(Path(__file__).with_name("relay.py"))]
        words += [first.pid, first.address, second.pid, second.address, str(delay_ms), str(mbit)]
        self.relay = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.relay.stdout is not None and self.relay.stdout.readline() == "ready\n"

    def down(self) -> None:
        """End all hosts, and everything that runs on them."""
        for holder in [*(host.process for host in self.hosts), self.process, self.relay]:
            if holder:
                holder.kill()
                holder.wait()


@contextlib.contextmanager
def network(folder: Path, count: int, slow: tuple[float, float] | None = None) -> Iterator[Network]:
    """`count` hosts on a switch, or two with a slow cable of (delay in ms, Mbit/s); gone after the `with`."""
    made = Network(folder)
    try:
        made.set_up(count)
        if slow:
            made.connect_slowly(*slow)
        else:
            made.connect()
        yield made
    finally:
        made.down()


def commands_for(nodes: list[str], *options: str, root: Path = ROOT) -> dict[str, str]:
    """The command that `launch_multinode.sh` prints for each node, to be typed there."""
    words = [str(root / "launch_multinode.sh"), f"--hosts={','.join(nodes)}", *options]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    blocks = printed.split("\n# --- on ")[1:]
    commands = {}
    for block in blocks:
        name, _, rest = block.partition("\n")
        commands[name] = rest.partition("\n# --- ")[0]
    return commands
