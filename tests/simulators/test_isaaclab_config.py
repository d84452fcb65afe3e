"""The configuration of an Isaac Lab simulator, without starting one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from isaaclab_case import needs_isaaclab
from isaaclab_reference import Seeds

from embodied_rl.errors import UserError
from embodied_rl.registry import simulators
from embodied_rl.simulators.isaaclab.config import IsaacLabConfig, tasks
from embodied_rl.simulators.isaaclab.tasks import ASSETS, SHIPPED, quaternions


def test_the_configuration_is_registered() -> None:
    assert simulators.load("isaaclab") is IsaacLabConfig


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"observation": "rgbd"}, "unknown Isaac Lab observation"),
        ({"reward": "dense"}, "unknown Isaac Lab reward"),
        ({"device": "gpu"}, "neither 'cpu' nor a CUDA device"),
        ({"max_steps": 0}, "must be at least 1"),
    ],
)
def test_wrong_values_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        IsaacLabConfig(**wrong)


def test_without_its_environment_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBODIED_RL_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(UserError, match="run `embodied-rl install isaaclab`"):
        IsaacLabConfig().build(Seeds())
    assert {line.name for line in tasks()} == set(SHIPPED)
    assert all("embodied-rl install isaaclab" in line.missing for line in tasks())


@needs_isaaclab
def test_an_unknown_task_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match="did you mean Isaac-Reach-Franka"):
        IsaacLabConfig("Isaac-Reach-Frank").build(Seeds())


@needs_isaaclab
def test_all_tasks_of_isaac_lab_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISAACSIM_ASSET_ROOT", raising=False)
    listed = {line.name: line for line in tasks()}
    assert len(listed) >= 140
    assert all((listed[name].missing == "") == (name in SHIPPED) for name in listed)
    assert "ISAACSIM_ASSET_ROOT" in listed["Isaac-Ant-Direct"].missing
    monkeypatch.setenv("ISAACSIM_ASSET_ROOT", "/somewhere")
    assert not any(line.missing for line in tasks())


def test_scenes_are_those_that_the_script_writes() -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_isaaclab_scenes.py"))
    for name, make in script["FILES"].items():
        assert (ASSETS / "Isaac" / name).read_text() == make(), name


def test_the_frankas_hand_is_where_its_kinematics_put_it() -> None:
    text = (ASSETS / "Isaac" / "IsaacLab" / "Robots" / "FrankaEmika" / "franka_panda.usda").read_text()
    hand = text[text.index('def Xform "panda_hand"') :]
    found = re.search(r"xformOp:translate = \((.*?)\)", hand)
    assert found is not None
    # With all joints at zero the flange is 0.088 m in front of the base, at 0.333 + 0.316 + 0.384 - 0.107 m.
    assert np.allclose([float(each) for each in found[1].split(",")], [0.088, 0.0, 0.926], atol=1e-6)


def test_quaternions_are_found_by_the_names_of_terms() -> None:
    assert quaternions("policy.eef_quat", 4) == [0]
    assert quaternions("policy.cube_orientations", 12) == [0, 4, 8]
    assert quaternions("policy.pose_command", 7) == [3]
    assert quaternions("policy.pose_command", 4) == []  # a place in the plane and a heading
    assert quaternions("policy.object", 39) == [3, 10, 17]
    assert quaternions("policy.joint_pos", 8) == []
