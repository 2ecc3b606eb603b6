"""What exercise 14 promises."""

from judging import about
from turning import Extra, judge_script, like_step_01

TODO = about(__file__)["todo"]


def judge(file):
    page = "04_multinode/README.md, "
    return judge_script(
        "04",
        TODO,
        file,
        Extra(
            "--accumulate 3 with batches of 2 ends like batches of 6",
            page + "A slow network: several batches in one step",
            ["--accumulate=3", "--batch-size=2", "--epochs=2"],
            like_step_01,
        ),
        Extra(
            "--timeout is taken, and changes nothing",
            page + "A link that is cut: --timeout",
            ["--timeout=60", "--batch-size=6", "--epochs=2"],
            like_step_01,
        ),
    )
