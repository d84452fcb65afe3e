"""The Gymnasium adapter: its numbers are Gymnasium's, its episodes depend on their seeds, what cannot run says so."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any, cast

import numpy as np
import pytest
from one_process import unhosted
from simulator_toys import assert_same

from embodied_rl.errors import UserError
from embodied_rl.simulators import mujoco_gl
from embodied_rl.simulators.base import InitialState, Simulator
from embodied_rl.simulators.check import check
from embodied_rl.simulators.gymnasium.config import GymnasiumConfig, tasks
from embodied_rl.simulators.gymnasium.environment import GymnasiumEnvironment
from embodied_rl.simulators.gymnasium.registered import instruction
from embodied_rl.simulators.reset_schedule import RandomSchedule

mujoco_gl.configure()  # before anything here imports mujoco

TASKS = ("CartPole-v1", "Pendulum-v1", "HalfCheetah-v5", "FetchReachDense-v4")
SMALL = {"width": 48, "height": 32}


def build(config: GymnasiumConfig, hosted: bool) -> Simulator:
    schedule = RandomSchedule(3)
    if hosted:
        return config.build(schedule)
    _, kwargs = config.environment
    return unhosted(functools.partial(GymnasiumEnvironment, **kwargs), config.num_envs, schedule)


def random_actions(env: GymnasiumEnvironment | Simulator, *shape: int) -> np.ndarray:
    """float32 [*shape,A] within the bounds."""
    spec = env.action_spec
    actions = np.random.default_rng(0).uniform(spec.low, spec.high, (*shape, spec.dim))
    return (np.rint(actions) if spec.choices else actions).astype(np.float32)


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_contract(task: str, hosted: bool) -> None:
    with build(GymnasiumConfig(task, max_steps=40, num_envs=3), hosted) as simulator:
        check(simulator)


@pytest.mark.parametrize("hosted", [False, True])
def test_contract_with_images(hosted: bool) -> None:
    config = GymnasiumConfig("InvertedPendulum-v5", SMALL, "state+rgb", max_steps=5, num_envs=2, workers=1)
    with build(config, hosted) as simulator:
        check(simulator, steps=4)


@pytest.mark.parametrize("task", TASKS)
def test_numbers_are_gymnasiums_whatever_ran_before(task: str) -> None:
    import gymnasium
    import gymnasium_robotics  # noqa: F401 - importing registers

    theirs = gymnasium.make(task)
    env = GymnasiumEnvironment(task)
    for seed in (11, 5):  # the second after an episode of either
        obs, _ = theirs.reset(seed=seed)
        env.reset(InitialState(0, 123))
        for action in random_actions(env, 7):
            env.step(action)
        env.reset(InitialState(0, seed))
        for action in random_actions(env, 20):
            flat = cast(np.ndarray, gymnasium.spaces.flatten(theirs.observation_space, obs))
            assert np.array_equal(env.observe()["state"], flat.astype(np.float32))
            chosen = int(action[0]) if env.action_spec.choices else action
            obs, reward, terminated, truncated, info = theirs.step(chosen)
            success = bool(info["is_success"]) if "is_success" in info else None
            assert env.step(action) == (float(reward), terminated, truncated, success)
            if terminated:
                break
    theirs.close()
    env.close()


@pytest.mark.parametrize("task", ["CartPole-v1", "HalfCheetah-v5"])
def test_the_same_episodes_hosted_or_not_alone_or_not_in_chunks_or_not(task: str) -> None:
    def play(num_envs: int, chunk: int, hosted: bool) -> list[np.ndarray]:
        parts: list[list[np.ndarray]] = []
        with build(GymnasiumConfig(task, max_steps=16, num_envs=num_envs, workers=1), hosted) as simulator:
            actions = random_actions(simulator, 4, 16)
            for first in range(0, 4, num_envs):
                rows = slice(first, first + num_envs)
                simulator.reset(tickets=np.arange(4)[rows])
                for k in range(0, 16, chunk):
                    result = simulator.step(actions[rows, k : k + chunk], observe="all")
                    states = [each.state for each in result.intermediate or []]
                    parts.append([np.stack(states, 1), result.reward.copy(), result.valid.copy()])
        per_batch = 16 // chunk
        batches = [parts[i : i + per_batch] for i in range(0, len(parts), per_batch)]
        return [np.concatenate([np.concatenate([p[i] for p in batch], 1) for batch in batches]) for i in range(3)]

    once = play(4, 8, hosted=True)
    assert_same(play(1, 8, hosted=False), once)
    assert_same(play(4, 1, hosted=False), once)


def test_choices() -> None:
    env = GymnasiumEnvironment("CartPole-v1")
    spec = env.action_spec
    assert (spec.low, spec.high, spec.dim, spec.choices) == ((0.0,), (1.0,), 1, 2)
    moved = []
    for choice in (0.0, 1.0):
        env.reset(InitialState(0, 1))
        env.step(np.array([choice], np.float32))
        moved.append(env.observe()["state"][1])
    assert moved[0] < 0 < moved[1]


def test_continuous_actions_keep_their_bounds() -> None:
    assert GymnasiumEnvironment("Pendulum-v1").action_spec.high == (2.0,)
    spec = GymnasiumEnvironment("HalfCheetah-v5").action_spec
    assert (spec.dim, spec.low, spec.choices) == (6, (-1.0,) * 6, 0)


def test_goals_are_named_in_the_state() -> None:
    env = GymnasiumEnvironment("FetchReachDense-v4")
    names = env.observation_spec.state_names
    assert names[:4] == ("achieved_goal.0", "achieved_goal.1", "achieved_goal.2", "desired_goal.0")
    assert names[6:] == tuple(f"observation.{i}" for i in range(10))
    env.reset(InitialState(0, 2))
    state = env.observe()["state"]
    assert np.array_equal(state[3:6], env._env.unwrapped.goal.astype(np.float32))


def test_success_is_what_the_task_says() -> None:
    assert GymnasiumEnvironment("FetchReach-v4").tasks[0].has_success
    env = GymnasiumEnvironment("HalfCheetah-v5")
    assert not env.tasks[0].has_success
    env.reset(InitialState(0, 0))
    assert env.step(np.zeros(6, np.float32))[3] is None


def test_time_limits() -> None:
    env = GymnasiumEnvironment("Pendulum-v1")
    assert env.tasks[0].max_steps == 200
    longer = GymnasiumEnvironment("Pendulum-v1", max_steps=230)
    longer.reset(InitialState(0, 0))
    ends = [longer.step(np.zeros(1, np.float32))[2] for _ in range(230)]
    assert ends == [False] * 229 + [True]


def test_images_of_several_environments_are_their_own() -> None:
    """Equal to those of an environment that is alone; Gymnasium's get mixed up."""
    starts = [InitialState(0, seed) for seed in (1, 2, 3)]

    def first_image(env: GymnasiumEnvironment, start: InitialState) -> np.ndarray:
        env.reset(start)
        for _ in range(10):
            env.step(np.full(1, float(start.seed) - 2, np.float32))
        return env.observe()["image.render"]

    alone = []
    for start in starts:
        env = GymnasiumEnvironment("InvertedPendulum-v5", SMALL, "rgb")
        alone.append(first_image(env, start))
        env.close()
    envs = [GymnasiumEnvironment("InvertedPendulum-v5", SMALL, "rgb") for _ in starts]
    assert envs[0].observation_spec.state == 0
    assert envs[0].observe()["state"].shape == (0,)
    together = [first_image(env, start) for env, start in zip(envs, starts, strict=True)]
    assert_same(together, alone)
    assert len({image.tobytes() for image in together}) == 3
    for again in (2, 0, 1):
        assert np.array_equal(envs[again].observe()["image.render"], alone[again])
    for env in envs:
        env.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"task": "CartPoll-v1"}, "did you mean CartPole-v1"),
        ({"task": "nowhere_to_be_found:CartPole-v1"}, "module 'nowhere_to_be_found' cannot be imported"),
        ({"task": "LunarLander-v3"}, "Box2D"),
        ({"task": "phys2d/CartPole-v1"}, "jax"),
        ({"task": "HalfCheetah-v3"}, "mujoco_py"),
        ({"task": "FetchReach-v1"}, "mujoco_py"),
        ({"task": "Blackjack-v1", "max_steps": 9}, "observation space Tuple"),
        ({"task": "FrozenLake-v1"}, r"observation space Discrete\(16\)"),
        ({"task": "GridWorld-v1"}, "did you mean|valid"),
        ({"task": "Pendulum-v1", "kwargs": {"gravity": 9.8}}, "gravity"),
        ({"task": "CliffWalking-v1"}, "registers no time limit; set max_steps"),
    ],
)
def test_what_cannot_run_says_why(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        GymnasiumEnvironment(**arguments)
    assert "\n" not in str(error.value)


def test_an_error_in_a_worker_stays_one_line() -> None:
    with pytest.raises(UserError, match="Box2D"):
        GymnasiumConfig("LunarLander-v3", num_envs=1, workers=1).build(RandomSchedule(0))


def test_arguments_reach_the_constructor() -> None:
    env = GymnasiumEnvironment("Pendulum-v1", {"g": 5.0})
    assert env._env.unwrapped.g == 5.0
    assert GymnasiumConfig("Pendulum-v1", {"g": 5.0}).environment[1]["kwargs"] == {"g": 5.0}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"observation": "pixels"}, "rgb"), ({"num_envs": 0}, "num_envs is 0"), ({"max_steps": 0}, "max_steps is 0")],
)
def test_wrong_configurations(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        GymnasiumConfig(**wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GymnasiumConfig(), "no scripted demonstrator"),
        (GymnasiumConfig("FetchReach-v4", observation="rgb"), "needs the"),
    ],
)
def test_there_is_no_demonstrator(config: GymnasiumConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.demonstrator()


def test_the_scripted_hand_reaches_its_goal_in_spite_of_noise() -> None:
    config = GymnasiumConfig("FetchReach-v4", num_envs=8, workers=None)
    expert, noise = config.demonstrator(), np.random.default_rng(0)
    with config.build(RandomSchedule(3)) as simulator:
        assert simulator.observation_spec.state_names[:6] == tuple(
            f"{part}_goal.{axis}" for part in ("achieved", "desired") for axis in range(3)
        )
        state = simulator.reset(tickets=np.arange(8)).state.copy()
        expert.reset(np.arange(8), np.zeros(8, np.int64))
        for _ in range(20):
            actions = expert.actions(state) + 0.3 * noise.standard_normal((8, 4)).astype(np.float32)
            result = simulator.step(np.clip(actions, -1, 1)[:, None])
            state = result.observation.state.copy()
        assert result.success is not None and result.success.mean() >= 0.75
        assert np.linalg.norm(state[:, 3:6] - state[:, :3], axis=1).mean() < 0.04


def test_all_registered_tasks_are_listed_with_what_they_miss() -> None:
    listed = {listing.name: listing for listing in tasks()}
    assert set(TASKS) < set(listed)
    assert not any(listed[task].missing for task in TASKS)
    assert listed["CartPole-v1"].max_steps == 500
    assert "Box2D" in listed["LunarLander-v3"].missing
    assert "jax" in listed["phys2d/CartPole-v1"].missing
    for old in ("HalfCheetah-v3", "Ant-v2", "FetchReach-v1"):
        assert "use a later version" in listed[old].missing
    assert "GymV21Environment-v0" not in listed  # a name that only raises


def test_configuration_imports_no_simulator() -> None:
    code = (
        "import sys; from embodied_rl.simulators.gymnasium.config import GymnasiumConfig; GymnasiumConfig();"
        "sys.exit(any(m.split('.')[0] in ('gymnasium', 'mujoco', 'torch') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FetchReachDense-v4", "fetch reach dense"),
        ("phys2d/CartPole-v1", "cart pole"),
        ("HalfCheetah-v5", "half cheetah"),
        ("Walker2d-v5", "walker2d"),
    ],
)
def test_instructions_come_from_names(name: str, words: str) -> None:
    assert instruction(name) == words
