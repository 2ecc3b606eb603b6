"""What exercise 11 promises."""

from judging import about
from turning import Extra, judge_script

FACTS = about(__file__)


def devices(reference, runs):
    """`--use-gpu 1` without a GPU is told once on each node: by the rank that has the first device."""
    said = [run.err.count("there is no GPU here") for run in runs]
    if said == [1, 1]:
        return []
    return [
        f"with 2 nodes of 2 ranks each, so many ranks take the first device of node 0 and of node 1: {said}",
        "  expected: [1, 1]; ranks 2 and 3 are number 0 and 1 on their node",
    ]


def judge(file):
    told = "03_multigpu_torchrun/README.md, torchrun's variables"
    flags = ["--use-gpu=1", "--batch-size=3", "--epochs=1"]
    dealt = Extra("on each of two nodes, devices are dealt out from 0", told, flags, devices, nodes=2)
    return judge_script(FACTS, file, dealt)
