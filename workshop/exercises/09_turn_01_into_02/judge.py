"""What exercise 09 promises."""

from judging import about
from turning import judge_script

FACTS = about(__file__)


def judge(file):
    return judge_script(FACTS, file)
