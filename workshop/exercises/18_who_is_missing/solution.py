"""Exercise 18: find the rank that hangs."""

import time
from datetime import timedelta

import torch.distributed as dist


class RollCall:
    """Tells the ranks who is missing. Every rank makes one, with the same store."""

    def __init__(self, store: dist.Store, rank: int, ranks: int):
        self.store, self.rank, self.ranks = store, rank, ranks
        self.calls = 0

    def missing(self, seconds: float) -> list[int]:
        """The ranks that do not call this within `seconds`, in order; the same on all ranks that do."""
        self.calls += 1
        self.store.set(f"{self.calls}: {self.rank} is here", "yes")
        answer = f"{self.calls}: missing"
        if self.rank == 0:
            absent, end = list(range(self.ranks)), time.monotonic() + seconds
            while absent and time.monotonic() < end:
                absent = [rank for rank in absent if not self.store.check([f"{self.calls}: {rank} is here"])]
                time.sleep(0.01)
            self.store.set(answer, " ".join(map(str, absent)))
        self.store.wait([answer], timedelta(seconds=seconds + 0.5))
        return [int(rank) for rank in self.store.get(answer).decode().split()]
