"""The MetaWorld adapter's numbers are MetaWorld's own, bit for bit, whatever ran before."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.metaworld.environment import MetaWorldEnvironment, recorded_placements
from embodied_rl.simulators.metaworld.instructions import BENCHMARKS, INSTRUCTIONS
from embodied_rl.simulators.metaworld.lean import MatrixRotation, norm

STEPS = 20


def original(name: str, state: InitialState) -> Any:
    """MetaWorld's own environment, just constructed, the goal visible as in its multi-task benchmarks."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[name]()
    env._partially_observable = False
    del env.sawyer_observation_space
    env._set_task_called = True
    if state.index is None:
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env.seed(state.seed)
    else:
        env._last_rand_vec = recorded_placements(name)[state.index].copy()
    return env


def follow(name: str, env: MetaWorldEnvironment, state: InitialState) -> None:
    """Play the expert's actions, the first ones disturbed and out of bounds, in `env` and in MetaWorld, comparing every
    number."""
    from metaworld.policies import ENV_POLICY_MAP

    random, expert, theirs = np.random.default_rng(state.seed), ENV_POLICY_MAP[name](), original(name, state)
    env.reset(state)
    obs, _ = theirs.reset()
    assert np.array_equal(env.observe()["state"], obs.astype(np.float32))
    assert env._state.tobytes() == obs.tobytes()
    for k in range(STEPS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            noise = random.normal(0, 1.5, 4) if k < STEPS // 2 else 0.0
            action = (expert.get_action(obs) + noise).astype(np.float32)
        reward, terminated, truncated, success = env.step(action)
        obs, their_reward, _, _, info = theirs.step(action)
        assert env._state.tobytes() == obs.tobytes(), f"{name}: step {k}"
        assert (reward, success) == (float(their_reward), bool(info["success"])), f"{name}: step {k}"
        assert (terminated, truncated) == (success, k + 1 == STEPS)


def test_every_task_equals_metaworlds_own() -> None:
    env = MetaWorldEnvironment(list(INSTRUCTIONS), max_steps=STEPS)
    for task, name in enumerate(INSTRUCTIONS):
        env.reset(InitialState(task, 4))
        for action in np.random.default_rng(task).uniform(-1, 1, (10, 4)).astype(np.float32):
            env.step(action)
        follow(name, env, InitialState(task, 3))
    env.close()


@pytest.mark.parametrize("name", ["reach-v3", "drawer-open-v3"])
def test_recorded_placements_are_the_benchmarks(name: str) -> None:
    from metaworld import MT1

    env, theirs = MetaWorldEnvironment([name]), original(name, InitialState(0, 0))
    benchmark = MT1(name, seed=42)
    for index in (0, 7, 49):
        theirs.set_task(benchmark.train_tasks[index])
        obs, _ = theirs.reset()
        env.reset(InitialState(0, 0, index))
        assert np.array_equal(theirs._last_rand_vec, env._env._last_rand_vec)
        if index == 0:  # MetaWorld's later resets depend on its earlier ones
            assert env._state.tobytes() == obs.tobytes()
    env.close()


def test_where_success_depends_on_contact() -> None:
    """In stick-push alone; the push must get as far as success."""
    from metaworld.policies import ENV_POLICY_MAP

    name, state = "stick-push-v3", InitialState(0, 9)
    env, theirs, expert = MetaWorldEnvironment([name]), original(name, state), ENV_POLICY_MAP[name]()
    env.reset(state)
    obs, _ = theirs.reset()
    for _ in range(150):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action = expert.get_action(obs)
        _, _, _, success = env.step(action)
        obs, _, _, _, info = theirs.step(action)
        assert success == bool(info["success"])
        if success:
            return
    pytest.fail("the expert never succeeded")


def test_tables_are_metaworlds() -> None:
    from metaworld import env_dict

    for name, tasks in BENCHMARKS.items():
        assert tasks == tuple(getattr(env_dict, f"{name}_V3"))
    assert all(words.strip() for words in INSTRUCTIONS.values())
    assert len(set(INSTRUCTIONS.values())) == 50


def test_fast_helpers_equal_their_originals() -> None:
    from metaworld.utils import reward_utils
    from scipy.spatial.transform import Rotation

    from embodied_rl.simulators.metaworld.lean import _tolerance

    random = np.random.default_rng(0)
    for quaternion in [*np.eye(4), *random.normal(size=(500, 4))]:
        matrix = Rotation.from_quat(quaternion).as_matrix()
        expected = Rotation.from_matrix(matrix).as_quat()
        assert MatrixRotation.from_matrix(matrix).as_quat().tobytes() == expected.tobytes()
    fast = _tolerance(reward_utils)
    for x, margin, upper in random.uniform(-0.2, 1, (500, 3)):
        for sigmoid in ("long_tail", "gaussian"):
            options = {"bounds": (0, abs(upper)), "margin": abs(margin), "sigmoid": sigmoid}
            assert fast(x, **options) == reward_utils.tolerance(x, **options)
    assert fast(0.5, bounds=(0, 0.4)) == reward_utils.tolerance(0.5, bounds=(0, 0.4)) == 0
    with pytest.raises(ValueError, match="Lower bound"):
        fast(0.5, bounds=(1, 0), margin=1.0, sigmoid="long_tail")
    for x in (*random.normal(size=(100, 3)), np.eye(3), np.array([1, 2]), [3.0, 4.0]):
        assert norm(x) == np.linalg.norm(x)
        assert np.array_equal(norm(x, axis=0), np.linalg.norm(x, axis=0))
    assert norm(np.ones(3), 1) == norm(np.ones(3), ord=1) == 3
