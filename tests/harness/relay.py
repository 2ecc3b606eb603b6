"""A slow network cable between two hosts of `hosts.py`: this process passes packets on, late.

    python relay.py PID_A ADDRESS_A PID_B ADDRESS_B DELAY_MS MBIT

It creates a network interface, eth0, in the network namespace of each PID, with the address after that PID. A
packet that one sends arrives at the other DELAY_MS later, and no faster than MBIT million bits a second. In
each direction, up to 2 MB wait; a packet that comes when these are full is lost. Some kernels can do this
themselves (`tc qdisc … netem`), but not all.
"""

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time

CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = (
    0x40000000,
    0x400454CA,
    0x0001,
    0x1000,
)  # <sched.h>, <linux/if_tun.h>
QUEUE = 2_000_000  # bytes


def interface(pid: str, address: str, peer: str) -> int:
    """A new eth0 in a process's network namespace; the file descriptor that its packets are read from."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as home, open(f"/proc/{pid}/ns/net") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network of process {pid}")
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", b"eth0", IFF_TUN | IFF_NO_PI))
        subprocess.run(["ip", "addr", "add", address, "peer", peer, "dev", "eth0"], check=True)
        subprocess.run(["ip", "link", "set", "eth0", "up"], check=True)
        libc.setns(home.fileno(), CLONE_NEWNET)
    return tun


def relay(tuns: tuple[int, int], delay: float, bytes_per_s: float) -> None:
    """Pass packets on, forever."""
    underway: list[
        tuple[float, int, int, bytes]
    ] = []  # when it is due, a number to keep the order, the receiver, the packet
    free = [0.0, 0.0]  # when the last byte of each direction's queue will be on its way
    count = 0
    while True:
        wait = max(0.0, underway[0][0] - time.monotonic()) if underway else None
        ready, _, _ = select.select(tuns, [], [], wait)
        for tun in ready:
            packet = os.read(tun, 65536)
            sender, now = tuns.index(tun), time.monotonic()
            free[sender] = max(free[sender], now)
            if (free[sender] - now) * bytes_per_s < QUEUE:
                free[sender] += len(packet) / bytes_per_s
                count += 1
                heapq.heappush(underway, (free[sender] + delay, count, tuns[1 - sender], packet))
        while underway and underway[0][0] <= time.monotonic():
            _, _, receiver, packet = heapq.heappop(underway)
            os.write(receiver, packet)


def main() -> None:
    pid_a, address_a, pid_b, address_b, delay, mbit = sys.argv[1:]
    tuns = interface(pid_a, address_a, address_b), interface(pid_b, address_b, address_a)
    print("ready", flush=True)
    relay(tuns, float(delay) / 1e3, float(mbit) * 1e6 / 8)


if __name__ == "__main__":
    main()
