"""Software Vulkan: how it is found, what is said without it, and a real image where it is set up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embodied_rl.simulators import vulkan
from embodied_rl.simulators.maniskill.config import ManiSkillConfig
from embodied_rl.simulators.reset_schedule import RandomSchedule

NAMES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder and no driver chosen by the caller."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    vulkan.problem.cache_clear()
    yield tmp_path
    vulkan.problem.cache_clear()


def install(cache: Path) -> Path:
    icd = cache / "embodied_rl" / "vulkan" / "lvp_icd.json"
    icd.parent.mkdir(parents=True)
    icd.write_text("{}")
    return icd


def test_nothing_is_set_without_the_software_driver(cache: Path) -> None:
    assert vulkan.software_icd() is None
    assert vulkan.environment() == {}


def test_the_software_driver_is_found(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    icd = install(cache)
    monkeypatch.setattr(vulkan, "GPU", cache / "no_gpu")
    assert vulkan.environment() == {"VK_DRIVER_FILES": str(icd), "VK_ICD_FILENAMES": str(icd), "LP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", NAMES)
def test_the_user_s_own_driver_wins(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(cache)
    monkeypatch.setattr(vulkan, "GPU", cache / "no_gpu")
    monkeypatch.setenv(name, "/elsewhere.json")
    assert vulkan.environment() == {}


def test_a_gpu_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(cache)
    monkeypatch.setattr(vulkan, "GPU", cache)
    assert vulkan.environment() == {}


def test_a_driver_that_cannot_render_is_reported_on_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = cache / "broken.json"
    broken.write_text("{}")
    for name in NAMES:
        monkeypatch.setenv(name, str(broken))
    problem = vulkan.problem()
    assert problem is not None
    assert "\n" not in problem
    assert vulkan.SETUP in problem


def test_the_probe_has_a_deadline(cache: Path) -> None:
    assert "longer than 0 s" in str(vulkan.problem(deadline=0.01))


def test_a_worker_renders_maniskill(tmp_path: Path) -> None:
    if problem := vulkan.problem():
        pytest.skip(problem)
    config = ManiSkillConfig(observation="rgb", num_envs=1, workers=1)
    with config.build(RandomSchedule(0), log_dir=tmp_path) as simulator:
        (camera,) = simulator.reset(tickets=np.arange(1)).images.values()
    assert camera.shape == (1, 128, 128, 3)
    assert camera.dtype == np.uint8
    red, green, blue = camera[0].astype(int).transpose(2, 0, 1)
    cube = (red > 150) & (green < 80) & (blue < 80)
    table = (red > green) & (green > blue) & (red - blue > 40)
    assert cube.sum() > 10
    assert table.mean() > 0.3
