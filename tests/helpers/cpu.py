"""CPU seconds of each test, with those of the processes that it started: `--cpu` prints them by file.

Wall times say little beside other work, and less of a test that waits. A process that is gone without having been waited for
takes with it what it had been seen to have: the test at whose end that shows has less, if need be less than nothing.
"""

import contextlib
import os
from collections import defaultdict

import pytest

MOST = 300
"""Tests that are listed."""
_FILES: dict[str, float] = defaultdict(float)
_TESTS: dict[str, float] = defaultdict(float)


def spent() -> float:
    """Seconds that this process, those that it has waited for, and those below it that still run have taken so far."""
    import psutil

    total = sum(os.times()[:4])
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


class Spent:
    """Measures where the tests run, and adds up where the reports come together."""

    def __init__(self) -> None:
        self._before = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        now = spent()
        report.cpu_s, self._before = now - self._before, now
        return report

    def pytest_runtest_logreport(self, report):
        taken = getattr(report, "cpu_s", 0.0)  # xdist itself reports a test whose worker died
        _FILES[report.nodeid.split("::")[0]] += taken
        _TESTS[report.nodeid] += taken

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("CPU seconds, children included")
        for spent_s, names in (
            (sum(_FILES.values()), "all"),
            *((s, name) for name, s in sorted(_FILES.items(), key=lambda row: -row[1])),
            *((s, name) for name, s in sorted(_TESTS.items(), key=lambda row: -row[1])[:MOST]),
        ):
            terminalreporter.write_line(f"{spent_s:8.1f} {names}")
