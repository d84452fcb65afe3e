"""Variants of a task's physics."""

import numpy as np
import pytest

from embodied_rl.config import from_dict, override, to_dict
from embodied_rl.errors import UserError
from embodied_rl.recipes.quickstart import quickstart
from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.maniskill.config import ManiSkillConfig
from embodied_rl.simulators.maniskill.environment import ManiSkillEnvironment
from embodied_rl.simulators.maniskill.physics import Physics
from embodied_rl.simulators.maniskill.rows import ManiSkillRows

ROBOT = {"friction": 0.5, "mass": 8.0, "stiffness": 0.7}


def bodies(env):
    """{name: (mass, inertia, static and sliding friction of its shapes)}."""
    system = env.scene.sub_scenes[0].physx_system
    moving = [*system.rigid_dynamic_components, *system.articulation_link_components]
    found = {}
    for body in [*moving, *system.rigid_static_components]:
        materials = [shape.physical_material for shape in body.collision_shapes]
        friction = [(material.static_friction, material.dynamic_friction) for material in materials]
        found[body.entity.name] = (getattr(body, "mass", 0.0), np.array(getattr(body, "inertia", 0.0)), friction)
    return found


def drives(env):
    return np.array([(o.stiffness, o.damping, o.force_limit) for j in env.agent.robot.active_joints for o in j._objs])


@pytest.mark.parametrize("task", ["PickCube-v1", "PegInsertionSide-v1"])  # the second builds a scene at every reset
def test_a_variant_has_other_friction_masses_and_drives_and_keeps_them(task):
    normal, varied = ManiSkillEnvironment(task), ManiSkillEnvironment(task, physics=ROBOT)
    for _ in range(2):
        before, after = bodies(normal.env), bodies(varied.env)
        assert before.keys() == after.keys() and len(before) > 10
        free = [name for name in before if "cube" in name or "peg" in name]
        assert free
        for name, (mass, inertia, friction) in before.items():
            factor = 8 if name in free else 1
            np.testing.assert_allclose(after[name][0], factor * mass, rtol=1e-5)
            np.testing.assert_allclose(after[name][1], factor * inertia, rtol=1e-5)
            np.testing.assert_allclose(after[name][2], 0.5 * np.array(friction), rtol=1e-5)
        np.testing.assert_allclose(drives(varied.env), drives(normal.env) * [0.7, 1, 1], rtol=1e-5)
        for environment in (normal, varied):
            environment.reset(InitialState(0, 3))
    for environment in (normal, varied):
        environment.close()


def test_environments_side_by_side_are_varied_too():
    kwargs = {"task": "PickCube-v1", "control_mode": "pd_ee_delta_pos"}
    seen = []
    for physics in (None, ROBOT):
        rows = ManiSkillRows(num_envs=2, physics=physics, **kwargs)
        assert rows.side_by_side, "every bit is that of a single environment of the same variant"
        rows.reset(np.arange(2), [InitialState(0, 1), InitialState(0, 2)])
        start = rows.observe(np.arange(2))["state"]
        rows.step(np.full((2, 4), 0.5, np.float32))
        seen.append((start, rows.observe(np.arange(2))["state"]))
        rows.close()
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    moved = [np.linalg.norm((after - start)[:, 19:22], axis=1) for start, after in seen]  # the tool centre point
    assert (moved[1] < 0.9 * moved[0]).all(), "a softer arm is slower"


def test_a_variant_is_a_setting_like_any_other():
    config = override(quickstart(), ["--simulator.physics.mass", "8", "--simulator.physics.friction=0.5"])
    assert config.simulator.physics == Physics(friction=0.5, mass=8.0)
    assert from_dict(to_dict(config)) == config
    with pytest.raises(UserError, match="stiffness is a factor above 0, not 0"):
        Physics(stiffness=0)
    with pytest.raises(UserError, match="on backend 'cpu' only"):
        ManiSkillConfig(backend="gpu", physics=Physics(mass=2))
