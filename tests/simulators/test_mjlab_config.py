"""What the configuration of mjlab refuses, and what it lists, without starting anything."""

import subprocess
import sys

import pytest

from embodied_rl.errors import UserError
from embodied_rl.registry import simulators
from embodied_rl.simulators.mjlab import config
from embodied_rl.simulators.mjlab.config import MjlabConfig
from embodied_rl.simulators.reset_schedule import RandomSchedule


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("EMBODIED_RL_ENVIRONMENTS", str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "Mjlab-Cartpole-Balanse"}, r"unknown mjlab task .* did you mean Mjlab-Cartpole-Balance"),
        ({"task": "Mjlab-Tracking-Flat-Unitree-G1"}, r"needs a recorded motion file"),
        ({"task": "Mjlab-Lift-Cube-Yam-Depth", "observation": "rgb"}, r"no RGB camera .* Mjlab-Lift-Cube-Yam-Rgb"),
        ({"task": "Mjlab-Cartpole-Balance", "reward": "success"}, r"no reward 'success'; it has: task"),
        ({}, r"run `embodied-rl install mjlab`"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(nothing_installed, fields, message):
    with pytest.raises(UserError, match=message):
        MjlabConfig(**fields).build(RandomSchedule(0))


@pytest.mark.parametrize(
    "fields", [{"observation": "depth"}, {"reward": "dense"}, {"num_envs": 0}, {"max_steps": 0}, {"device": "gpu"}]
)
def test_impossible_values_are_refused_at_once(fields):
    with pytest.raises(UserError, match="mjlab"):
        MjlabConfig(**fields)


def test_all_tasks_are_listed_with_what_they_lack(nothing_installed):
    listed = {each.name: each for each in config.tasks()}
    assert len(listed) == 12
    assert listed["Mjlab-Cartpole-Balance"].missing.endswith("run `embodied-rl install mjlab`")
    assert "motion" in listed["Mjlab-Tracking-Flat-Unitree-G1"].missing
    assert listed["Mjlab-Lift-Cube-Yam-Rgb"].reward == "task, success"


def test_listing_imports_no_simulator():
    code = "import sys; from embodied_rl.simulators.mjlab import config; config.tasks(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


def test_mjlab_is_registered():
    assert simulators.load("mjlab") is MjlabConfig
