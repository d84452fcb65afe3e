"""What all tests share: no network, one thread per process, and no silent skip in CI."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent
NO_SKIP = (HERE / "simulators", HERE / "parity", HERE / "matrix")
"""With EMBODIED_RL_CI set, a skipped test in these folders fails: CI has what they need."""

# Before any test imports torch or a Hugging Face package.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# A machine shared with other programs makes single examples slow; pytest-timeout bounds whole tests.
settings.register_profile("embodied_rl", deadline=None)
settings.load_profile("embodied_rl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest go first, so that no core is idle at the end."""
    items.sort(key=lambda item: (item.path.name != "test_maniskill_run.py", item.path.parent.name != "simulators"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not Path("/dev/nvidiactl").exists():
        pytest.skip("needs an NVIDIA GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        _forbid_skip(report, item.path)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report, collector.path)
    return report


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport, path: Path) -> None:
    strict = os.environ.get("EMBODIED_RL_CI") and any(path.is_relative_to(folder) for folder in NO_SKIP)
    if strict and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"must not be skipped in CI: {str(reason).removeprefix('Skipped: ')}"
