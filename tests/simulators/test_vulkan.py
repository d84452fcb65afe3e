"""Software Vulkan: how it is found, what is said without it, and a real image where it is set up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embodied_rl.simulators import vulkan

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


PICK_CUBE = """
import gymnasium, numpy, mani_skill.envs
environment = gymnasium.make(
    "PickCube-v1", obs_mode="rgb", render_backend="cpu", sim_backend="physx_cpu",
    sensor_configs=dict(width=128, height=128, shader_pack="minimal"),
)
(camera,) = environment.reset(seed=0)[0]["sensor_data"].values()
image = camera["rgb"][0].numpy()
assert image.shape == (128, 128, 3) and image.dtype == numpy.uint8
red, green, blue = image.astype(int).transpose(2, 0, 1)
assert ((red > 150) & (green < 80) & (blue < 80)).sum() > 10, "the red cube is not in the picture"
assert ((red - blue > 40) & (red > green)).mean() > 0.3, "the wooden table is not in the picture"
"""


@pytest.mark.slow
def test_maniskill_renders_the_scene() -> None:
    if problem := vulkan.problem():
        pytest.skip(problem)
    command = [sys.executable, "-c", PICK_CUBE]
    environment = os.environ | vulkan.environment()
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert child.returncode == 0, child.stderr
