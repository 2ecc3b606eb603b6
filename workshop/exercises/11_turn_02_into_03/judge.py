"""What exercise 11 promises."""

from judging import about
from turning import judge_script

TODO = about(__file__)["todo"]


def judge(file):
    return judge_script("03", TODO, file)
