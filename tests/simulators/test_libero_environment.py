"""The LIBERO adapter apart from its numbers: contract, rows that share a process, images, limits."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from one_process import unhosted
from simulator_toys import assert_same

from embodied_rl.errors import UserError
from embodied_rl.simulators.base import InitialState, Simulator
from embodied_rl.simulators.check import check
from embodied_rl.simulators.libero import assets
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.libero.environment import LiberoEnvironment, placement_seed
from embodied_rl.simulators.reset_schedule import RandomSchedule

try:
    assets.folder()
except UserError as error:
    pytestmark = pytest.mark.skip(reason=str(error))

PAIR = (0, 3)


def build(config: LiberoConfig, hosted: bool) -> Simulator:
    schedule = RandomSchedule(1, config.num_tasks, num_states=config.num_states)
    if hosted:
        return config.build(schedule)
    _, kwargs = config.environment
    return unhosted(functools.partial(LiberoEnvironment, **kwargs), config.num_envs, schedule)


@pytest.mark.parametrize("hosted", [False, True])
def test_contract_with_states(hosted: bool) -> None:
    config = LiberoConfig(tasks=PAIR, observation="state", max_steps=9, settle_steps=2, num_envs=2, workers=1)
    with build(config, hosted) as simulator:
        check(simulator, steps=9)


@pytest.mark.parametrize("hosted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_contract_with_images(hosted: bool) -> None:
    config = LiberoConfig(
        "libero_object", PAIR, image_size=64, max_steps=3, settle_steps=1, num_envs=1 + hosted, workers=1
    )
    with build(config, hosted) as simulator:
        check(simulator, steps=3)


def test_the_same_episodes_hosted_or_not_alone_or_not_in_chunks_or_not() -> None:
    """Tickets 0 to 3 with given actions, whatever ran before and beside."""
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 8, 7)).astype(np.float32)

    def play(num_envs: int, chunk: int, hosted: bool) -> list[Any]:
        parts: list[Any] = []
        config = LiberoConfig(tasks=PAIR, observation="state", max_steps=8, num_envs=num_envs, workers=1)
        with build(config, hosted) as simulator:
            for first in range(0, 4, num_envs):
                rows = slice(first, first + num_envs)
                parts.append([simulator.reset(tickets=np.arange(4)[rows]).state.copy()])
                for k in range(0, 8, chunk):
                    result = simulator.step(actions[rows, k : k + chunk], observe="all")
                    states = [each.state for each in result.intermediate or []]
                    parts[-1] += [np.stack(states, 1), result.reward.copy(), result.success.copy()]
        return [np.concatenate([np.concatenate(part[i::3], 1) for part in parts]) for i in (1, 2, 3)]

    once = play(4, 8, hosted=True)
    assert_same(play(1, 8, hosted=False), once)
    assert_same(play(4, 1, hosted=False), once)


def test_images_of_several_environments_are_their_own() -> None:
    options = {"suite": "libero_object", "tasks": PAIR, "image_size": 64, "settle_steps": 0}
    envs = [LiberoEnvironment(**options)]
    starts = [InitialState(0, 0, 3), InitialState(1, 0, 3), InitialState(0, 0, 4)]
    envs[0].reset(starts[0])
    first = [envs[0].observe()]  # alone in the process
    for start in starts[1:]:
        envs.append(LiberoEnvironment(**options))
        envs[-1].reset(start)
        first.append(envs[-1].observe())
    for again in (2, 0, 1):
        assert_same(envs[again].observe(), first[again])
    assert len({frame["image.agentview"].tobytes() for frame in first}) == 3
    envs[1].close()
    del envs[1]
    gc.collect()
    assert_same(envs[0].observe(), first[0])
    assert_same(envs[1].observe(), first[2])
    extra = LiberoEnvironment(**options | {"reflections": False})  # a scene built after others were closed
    extra.reset(starts[0])
    assert_same(extra.observe(), first[0])
    for env in (*envs, extra):
        env.close()


def test_recorded_states_place_fixtures_by_themselves_and_others_by_the_seed() -> None:
    env = LiberoEnvironment(tasks=(0,), observation="state", settle_steps=0)
    names = env.observation_spec.state_names
    assert len(names) == env.observation_spec.state

    def start(index: int | None, seed: int) -> np.ndarray:
        env.reset(InitialState(0, seed, index))
        return env.observe()["state"]

    assert np.array_equal(start(3, 1), start(3, 2))
    cabinet = [names.index(f"wooden_cabinet_1.pos.{axis}") for axis in "xy"]
    bowl = [names.index(f"akita_black_bowl_1.pos.{axis}") for axis in "xy"]
    assert not np.array_equal(start(3, 1)[cabinet], start(4, 1)[cabinet])
    assert not np.array_equal(start(None, 1)[bowl], start(None, 2)[bowl])
    assert np.array_equal(start(None, 1), start(None, 1))
    assert placement_seed(env._chosen[0], 3) != placement_seed(env._chosen[0], 4)
    for at in env.observation_spec.quaternion_at:
        assert names[at].endswith("quat.x")
        assert np.isclose(np.linalg.norm(start(3, 1)[at : at + 4]), 1, atol=1e-6)
    env.close()


def test_the_gripper_opens_holds_and_an_episode_is_as_long_as_its_limit() -> None:
    env = LiberoEnvironment(tasks=(0,), observation="state", max_steps=12)
    env.reset(InitialState(0, 0, 0))
    opening = [env.observe()["state"][6:8]]
    hold = np.array(env.action_spec.hold, np.float32)
    close, ends = hold.copy(), []
    close[env.action_spec.gripper] = -env.action_spec.gripper_open
    for k in range(12):
        reward, terminated, truncated, success = env.step(close if k < 6 else hold)
        opening.append(env.observe()["state"][6:8])
        assert (reward, terminated, success) == (0.0, False, False)
        ends.append(truncated)
    width = [fingers[0] - fingers[1] for fingers in opening]
    assert width[0] > 0.07 > 0.05 > width[7]
    assert width[12] < width[7] + 0.001, "hold does not open the fingers"
    assert ends == [False] * 11 + [True]
    env.close()


def test_success_is_liberos_and_ends_the_episode() -> None:
    """The bowl is put on the plate by hand."""
    env = LiberoEnvironment(tasks=(0,), observation="state")
    env.reset(InitialState(0, 0, 0))
    data, model = env._world.data, env._scene.model
    bowl, plate = (model.jnt_qposadr[model.joint(f"{name}_1_joint0").id] for name in ("akita_black_bowl", "plate"))
    data.qpos[bowl : bowl + 3] = data.qpos[plate : plate + 3] + np.array([0, 0, 0.03])
    results = [env.step(np.array([0, 0, 0, 0, 0, 0, -1], np.float32)) for _ in range(15)]
    assert (1.0, True, False, True) in results
    assert all((reward == 1.0) == terminated == success for reward, terminated, _, success in results)
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.observe()


RENDER = """
from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.libero.environment import LiberoEnvironment
env = LiberoEnvironment(suite="libero_object", tasks=[3], image_size=64, settle_steps=0)
env.reset(InitialState(0, 0, 3))
print(env.observe()["image.agentview"].std() > 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("library", ["egl", "osmesa"])
def test_a_process_renders_on_the_device_it_was_given_and_ends_without_a_word(library: str) -> None:
    """robosuite itself refuses a device that CUDA_VISIBLE_DEVICES lacks, and complains when the interpreter ends."""
    variables = {"MUJOCO_GL": library, "CUDA_VISIBLE_DEVICES": "7", "MUJOCO_EGL_DEVICE_ID": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RENDER],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, env=os.environ | variables,
    )  # fmt: skip
    assert done.stdout.split() == ["True"], done.stderr
    for word in ("Traceback", "Exception ignored", "Error"):
        assert word not in done.stderr, done.stderr
