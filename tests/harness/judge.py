"""Runs tests of the copy of the repository that it is in, for mutants.py, which starts it there in a fork.

python tests/harness/judge.py FOLDER       question: FOLDER/asked.json; answer: FOLDER/answer.json
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this folder, where `forks` is

import forks
import pytest

ROOT = Path(__file__).resolve().parents[2]


class Judge:
    """A pytest plugin: remembers which test failed, and stops in time; or traces and times each test."""

    def __init__(self, limit: float, traces: Path | None):
        self.end, self.traces = time.monotonic() + limit, traces
        self.killer, self.why = "", ""
        self.failed: set[str] = set()
        self.ran: list[str] = []
        self.skipped: list[str] = []  # because of what this machine lacks
        self.measured: list[tuple[str, float, str, bool]] = []  # test, seconds, trace, whether it failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if time.monotonic() > self.end:
            pytest.exit("out of time", 0)
        self.ran.append(item.nodeid)
        if self.traces:
            to = self.traces / f"{time.monotonic_ns()}-{os.getpid()}"
            begun = time.monotonic()
            os.environ[forks.TRACE] = str(to)
            forks.trace(str(to))
            try:
                return (yield)
            finally:
                sys.settrace(None)
                threading.settrace(None)  # type: ignore[arg-type]
                seconds = round(time.monotonic() - begun, 2)
                self.measured.append((item.nodeid, seconds, to.name, item.nodeid in self.failed))
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> Iterator[None]:
        report = yield
        if report.failed and call.excinfo and call.excinfo.typename == "CannotPlantError":
            report.outcome, report.longrepr = "skipped", ("", 0, "cannot be planted in this mutant")
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    def note(self, report: Any) -> None:
        if report.skipped and "cannot be planted" not in str(report.longrepr):
            self.skipped.append(report.nodeid)
        if report.failed:
            self.failed.add(report.nodeid)
        if report.failed and not self.killer:
            self.killer = report.nodeid
            crash = getattr(report.longrepr, "reprcrash", None)
            self.why = str(getattr(crash, "message", report.longrepr)).splitlines()[0][:200]


def judge(asked: dict[str, Any], answer: Path) -> None:
    """Run tests of the copy that this file is in. The answer, in JSON, appears when they are done."""
    own = [kind for kind in subprocess.Popen.__mro__ if kind.__module__ == "subprocess"]
    subprocess.Popen = own[0]  # type: ignore[misc, assignment]  # a fork of the server has the server's
    traces = Path(asked["traces"]) if asked["traces"] else None
    plugin = Judge(asked["limit"], traces)
    try:
        import helpers  # noqa: F401
    except (Exception, SystemExit) as error:  # the mutant's: no test can begin
        plugin.killer = "tests/harness/helpers.py"
        plugin.why = f"{type(error).__name__}: {error}".splitlines()[0]
    flags = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--all", f"--basetemp={ROOT.parent / 'tmp'}"]
    flags += [] if traces else ["-x"]
    flags += [f"--data-dir={asked['data_dir']}"] if asked["data_dir"] else []
    os.chdir(ROOT)
    # The first few run by themselves: they catch most mutants, and the other files need not be imported.
    status, tests = 0, asked["tests"]
    for part in [tests] if traces else [tests[:3], tests[3:]]:
        if part and not plugin.killer:
            status = pytest.main([*flags, *part], plugins=[plugin])
    result = {"killer": plugin.killer, "why": plugin.why, "ran": plugin.ran, "measured": plugin.measured}
    result |= {"status": int(status), "skipped": plugin.skipped}
    answer.with_suffix(".tmp").write_text(json.dumps(result))
    answer.with_suffix(".tmp").rename(answer)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    judge(json.loads((folder / "asked.json").read_text()), folder / "answer.json")
