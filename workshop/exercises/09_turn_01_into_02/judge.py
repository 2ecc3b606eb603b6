"""What exercise 09 promises."""

from judging import about
from turning import judge_script

TODO = about(__file__)["todo"]


def judge(file):
    return judge_script("02", TODO, file)
