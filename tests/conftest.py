"""Settings that all tests share, and the rule that in CI no test may pass by not running."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forked_python import forked_python
from stand_in_s3 import relay, s3_server  # noqa: F401

# Threads that spin while they wait make the suite several times slower on two busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PYTHONS = pytest.StashKey[dict[tuple[str, ...], str]]()
RUNNING = pytest.StashKey[ExitStack]()
IMPORTED = pytest.StashKey[int]()  # modules, when the collector was last told
REQUIRE_ALL = "ADAPTER_MERGE_REQUIRE_ALL"
ALLOWED = ("mounting a tmpfs is not allowed here",)  # what a machine may forbid; the same fault is tested otherwise too

_skipped: list[str] = []


@pytest.fixture(scope="session")
def smollm2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model, made once for all workers."""
    from filelock import FileLock  # huggingface_hub depends on it

    from adapter_merge.demo.smollm2 import obtain_base

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "smollm2.lock"):
        return obtain_base(folder / "smollm2")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PYTHONS], config.stash[RUNNING], config.stash[IMPORTED] = {}, ExitStack(), 0


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[RUNNING].close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked preloaded("torch") starts Pythons that have imported torch already, see forked_python.py."""
    marker = item.get_closest_marker("preloaded")
    if marker is None or not marker.args:
        return (yield)
    pythons = item.config.stash[PYTHONS]
    if marker.args not in pythons:
        pythons[marker.args] = item.config.stash[RUNNING].enter_context(forked_python(*marker.args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", pythons[marker.args])
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a slow test with many cases the first is not slow; what takes minutes comes first: workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("model") is None)
    seen: set[str] = set()
    for item in items:
        marker = item.get_closest_marker("slow")
        name = item.nodeid.partition("[")[0]
        if marker is not None and name not in seen and "[" in item.nodeid and marker.kwargs.get("first", True):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
        seen.add(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep the garbage collector off what libraries have made at their import: `verify` calls it after every part."""
    if len(sys.modules) > item.config.stash[IMPORTED] + 100:
        item.config.stash[IMPORTED] = len(sys.modules)
        gc.collect()
        gc.freeze()


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
