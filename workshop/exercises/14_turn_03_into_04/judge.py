"""What exercise 14 promises."""

from judging import about
from turning import judge_script

TODO = about(__file__)["todo"]
TOLD = "04_multinode/README.md, "


def judge(file):
    slow = "A slow network: several batches in one step"
    cut = "A link that is cut: --timeout"
    return judge_script(
        "04",
        TODO,
        file,
        (
            "--accumulate 3 with batches of 2 ends like batches of 6",
            TOLD + slow,
            ["--accumulate=3", "--batch-size=2"],
        ),
        ("--timeout is taken, and changes nothing", TOLD + cut, ["--timeout=60", "--batch-size=6"]),
    )
