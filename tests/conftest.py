"""Settings that all tests share, and the rule that in CI no test may pass by not running."""

from __future__ import annotations

import os

import pytest

# Threads that spin while they wait make the suite several times slower on two busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REQUIRE_ALL = "ADAPTER_MERGE_REQUIRE_ALL"
ALLOWED = ("mounting a tmpfs is not allowed here",)  # what a machine may forbid; the same fault is tested otherwise too

_skipped: list[str] = []


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(text in reason for text in ALLOWED):
            _skipped.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skip is a failure where everything must run."""
    if _skipped and os.environ.get(REQUIRE_ALL) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped and os.environ.get(REQUIRE_ALL):
        terminalreporter.section(f"skipped although {REQUIRE_ALL} is set", red=True)
        for line in _skipped:
            terminalreporter.line(line)
