"""What exercise 14 promises."""

from judging import about
from turning import Extra, judge_script, like_step_01

from common.snapshot import snapshots

FACTS = about(__file__)
PAGE_ACCUMULATE = "04_multinode/README.md, A slow network: several batches in one step"
PAGE_DISKS = "04_multinode/README.md, The idea"


def saved_on_each_node(reference, runs):
    """Each node has a folder of its own, as on a disk of its own."""
    found = {
        f"node {node}": sorted(path.name for path in snapshots(run.folder / "snapshots"))
        for node, run in enumerate(runs)
    }
    if all(names == ["snapshot-00000002.pt", "snapshot-00000003.pt"] for names in found.values()):
        return []
    return [
        f"with 2 nodes of 2 ranks each, and a folder for each node: {found}",
        "  expected: on both nodes, the snapshots of steps 2 and 3",
    ]


def judge(file):
    accumulate = ["--accumulate=3", "--batch-size=2", "--epochs=1"]
    says = "--accumulate 3 with batches of 2 is like batches of 6, also when the run is resumed"
    accumulated = Extra(says, PAGE_ACCUMULATE, accumulate, like_step_01, resumes=True)
    says = "with a disk in each node, each node has the snapshots"
    disks = Extra(says, PAGE_DISKS, ["--batch-size=3", "--epochs=1"], saved_on_each_node, nodes=2)
    return judge_script(FACTS, file, accumulated, disks)
