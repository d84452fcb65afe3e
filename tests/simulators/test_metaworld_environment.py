"""The MetaWorld adapter apart from its numbers: contract, episodes, images, experts, errors."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_process import unhosted
from simulator_toys import assert_same

from embodied_rl.errors import UserError
from embodied_rl.simulators import mujoco_gl
from embodied_rl.simulators.base import InitialState, Simulator
from embodied_rl.simulators.check import check
from embodied_rl.simulators.metaworld.config import MetaWorldConfig, tasks
from embodied_rl.simulators.metaworld.environment import MetaWorldEnvironment
from embodied_rl.simulators.metaworld.instructions import INSTRUCTIONS
from embodied_rl.simulators.reset_schedule import FixedSchedule, OrderedSchedule, RandomSchedule

mujoco_gl.configure()  # before anything here imports mujoco

PAIR = ("push-v3", "door-open-v3")


def build(config: MetaWorldConfig, hosted: bool, schedule: Any = None) -> Simulator:
    schedule = schedule or RandomSchedule(1, config.num_tasks, num_states=config.num_states)
    if hosted:
        return config.build(schedule)
    _, kwargs = config.environment
    return unhosted(functools.partial(MetaWorldEnvironment, **kwargs), config.num_envs, schedule)


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("placements", ["recorded", "random"])
def test_contract_with_states(hosted: bool, placements: Any) -> None:
    config = MetaWorldConfig(PAIR, placements=placements, max_steps=40, num_envs=3)
    with build(config, hosted) as simulator:
        check(simulator)


@pytest.mark.parametrize("hosted", [False, True])
def test_contract_with_images(hosted: bool) -> None:
    config = MetaWorldConfig(
        ("reach-v3",), "rgb", image_size=64, max_steps=2, rendering="plain", num_envs=1 + hosted, workers=1
    )
    with build(config, hosted) as simulator:
        check(simulator, steps=2)


def test_the_same_episodes_hosted_or_not_alone_or_not_in_chunks_or_not() -> None:
    """Tickets 0 to 3 with given actions, whatever ran before and beside."""
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 24, 4)).astype(np.float32)

    def play(num_envs: int, chunk: int, hosted: bool) -> list[Any]:
        parts: list[Any] = []
        with build(MetaWorldConfig(PAIR, max_steps=24, num_envs=num_envs, workers=1), hosted) as simulator:
            for first in range(0, 4, num_envs):
                rows = slice(first, first + num_envs)
                parts.append([simulator.reset(tickets=np.arange(4)[rows]).state.copy()])
                for k in range(0, 24, chunk):
                    result = simulator.step(actions[rows, k : k + chunk], observe="all")
                    states = [each.state for each in result.intermediate or []]
                    parts[-1] += [np.stack(states, 1), result.reward.copy(), result.success.copy()]
        return [np.concatenate([np.concatenate(part[i::3], 1) for part in parts]) for i in (1, 2, 3)]

    once = play(4, 8, hosted=True)
    assert_same(play(1, 8, hosted=False), once)
    assert_same(play(4, 1, hosted=False), once)


@pytest.mark.parametrize("name", ["reach-v3", "drawer-close-v3", "button-press-topdown-v3"])
def test_experts_solve_their_tasks(name: str) -> None:
    config = MetaWorldConfig((name,), placements="random", num_envs=5, workers=1)
    expert = config.demonstrator()
    with build(config, hosted=False) as simulator:
        observation = simulator.reset(tickets=np.arange(5))
        expert.reset(np.arange(5), observation.task)
        episodes = []
        for _ in range(100):
            result = simulator.step(expert.actions(observation.state)[:, None])
            observation, episodes = result.observation, episodes + result.episodes
    assert [episode.success_once for episode in episodes] == [True] * 5
    assert not any(episode.truncated for episode in episodes)


def test_each_row_has_the_expert_of_its_task() -> None:
    both = MetaWorldConfig(PAIR, num_envs=2).demonstrator()
    state = np.random.default_rng(0).uniform(-0.2, 0.2, (2, 39)).astype(np.float32)
    both.reset(np.arange(2), np.array([1, 0]))
    actions = both.actions(state)
    for row, name in enumerate(reversed(PAIR)):
        alone = MetaWorldConfig((name,), num_envs=1).demonstrator()
        assert np.array_equal(alone.actions(state[row : row + 1])[0], actions[row])
    assert not np.array_equal(both.actions(state[::-1])[::-1], actions)
    with pytest.raises(UserError, match=r"\[2,39\], got \[2, 4\]"):
        both.actions(state[:, :4])


def test_demonstrations_can_be_collected(tmp_path: Path) -> None:
    from embodied_rl.cli import main

    file = tmp_path / "demonstrations.h5"
    settings = ["--simulator", "metaworld", "--simulator.num_envs", "2", "--simulator.workers", "1"]
    assert main(["collect", "quickstart", "--episodes", "2", "--out", str(file), *settings]) == 0
    assert file.stat().st_size > 0


@pytest.mark.parametrize(("end_on_success", "length"), [(True, None), (False, 90)])
def test_success_ends_an_episode_or_does_not(end_on_success: bool, length: int | None) -> None:
    config = MetaWorldConfig(num_envs=1, workers=1, end_on_success=end_on_success, max_steps=90, reward="sparse")
    expert = config.demonstrator()
    with build(config, hosted=False) as simulator:
        observation, result = simulator.reset(tickets=np.array([0])), None
        rewards = []
        while result is None or not result.episodes:
            result = simulator.step(expert.actions(observation.state)[:, None])
            observation = result.observation
            rewards.append(float(result.reward[0, 0]))
    episode = result.episodes[0]
    assert episode.success_once
    assert episode.truncated == (not end_on_success)
    if end_on_success:
        assert episode.length < 90
        assert rewards == [0.0] * (episode.length - 1) + [1.0]
    else:
        assert episode.length == 90
        assert set(rewards) == {0.0, 1.0}


def test_images_of_several_environments_are_their_own() -> None:
    """Upright, of the right environment and task, equal to MetaWorld's own of an environment that is alone."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    size, tasks = 64, list(PAIR)
    envs = [MetaWorldEnvironment(tasks, "rgb", image_size=size) for _ in range(3)]
    starts = [InitialState(0, 3), InitialState(1, 4), InitialState(0, 5)]
    for env, start in zip(envs, starts, strict=True):
        env.reset(start)
        env.step(np.zeros(4, np.float32))
    first = [env.observe()["image.corner2"] for env in envs]
    for again in (2, 0, 1):
        assert np.array_equal(envs[again].observe()["image.corner2"], first[again])
    assert len({image.tobytes() for image in first}) == 3
    envs[0].close()  # with its renderers
    assert np.array_equal(envs[2].observe()["image.corner2"], first[2])
    for image, start in zip(first, starts, strict=True):
        theirs = ALL_V3_ENVIRONMENTS[tasks[start.task]](
            render_mode="rgb_array", camera_name="corner2", width=size, height=size
        )
        theirs.model.camera("corner2").pos = (0.75, 0.075, 0.7)  # as in lerobot
        theirs._set_task_called, theirs._freeze_rand_vec, theirs.seeded_rand_vec = True, False, True
        theirs.seed(start.seed)
        theirs.reset()
        theirs.step(np.zeros(4, np.float32))
        assert np.array_equal(np.rot90(theirs.render(), 2), image)
        theirs.close()
    for env in envs:
        env.close()


def test_the_first_image_shows_the_goal_where_it_is() -> None:
    """Not where the last episode had it, as MetaWorld's does before the first step."""
    env = MetaWorldEnvironment(["reach-v3"], "rgb", image_size=64)
    env.reset(InitialState(0, 1))
    before = env.observe()["image.corner2"]
    env.reset(InitialState(0, 2))
    assert not np.array_equal(env.observe()["image.corner2"], before)
    assert np.array_equal(env._env.data.site("goal").xpos, env._env._target_pos)
    env.close()


def test_plain_images_and_images_larger_than_mujocos_buffer() -> None:
    lit, flat = (
        MetaWorldEnvironment(["reach-v3"], "state+rgb", image_size=500, rendering=how) for how in ("full", "plain")
    )
    images = []
    for env in (lit, flat):
        env.reset(InitialState(0, 1))
        frame = env.observe()
        assert frame["state"].shape == (39,)
        images.append(frame["image.corner2"])
    assert images[0].shape == (500, 500, 3)
    assert not np.array_equal(*images)
    assert np.array_equal(lit.observe()["image.corner2"], images[0])
    lit.close()
    flat.close()


def test_observations() -> None:
    env = MetaWorldEnvironment(["push-v3"])
    names = env.observation_spec.state_names
    env.reset(InitialState(0, 0, 3))
    state = dict(zip(names, env.observe()["state"], strict=True))
    assert len(names) == len(set(names)) == 39
    assert [state[f"goal.{i}"] for i in range(3)] == list(env._env._target_pos.astype(np.float32))
    env.step(np.array([0, 0, 0, 1], np.float32))  # closes the gripper
    for _ in range(10):
        env.step(np.array([0, 0, 0, 1], np.float32))
    after = dict(zip(names, env.observe()["state"], strict=True))
    assert after["gripper.0"] < state["gripper.0"] == 1
    assert after["previous.gripper.0"] > after["gripper.0"]
    hand = MetaWorldEnvironment(["push-v3"], "rgb").observation_spec
    assert hand.state_names == ("hand.0", "hand.1", "hand.2", "gripper.0")


def test_tasks_cost_nothing_to_list() -> None:
    code = (
        "import sys; from embodied_rl.simulators.metaworld.config import tasks; print(len(tasks()));"
        "sys.exit(any(m.split('.')[0] in ('metaworld', 'mujoco', 'gymnasium', 'torch') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "50\n")
    assert all(listing.instruction == INSTRUCTIONS[listing.name] and not listing.missing for listing in tasks())


def test_benchmarks_stand_for_their_tasks() -> None:
    assert MetaWorldConfig(("MT10",)).num_tasks == 10
    assert MetaWorldConfig(("MT50",)).num_tasks == 50
    assert MetaWorldConfig(("push-v3", "MT10")).names[:2] == ("push-v3", "reach-v3")
    assert MetaWorldConfig(("push-v3", "MT10")).num_tasks == 10
    assert MetaWorldConfig().num_states == 50
    assert MetaWorldConfig(placements="random").num_states == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"tasks": ("reach-v2",)}, "did you mean reach-v3"),
        ({"tasks": ("mt10",)}, "MT10"),
        ({"tasks": ()}, "name at least one"),
        ({"observation": "rbg"}, "rgb"),
        ({"reward": "densse"}, "dense"),
        ({"placements": "randm"}, "random"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_wrong_configurations(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        MetaWorldConfig(**wrong)


def test_what_cannot_be_asked_of_a_running_one() -> None:
    with pytest.raises(UserError, match="need the full state"):
        MetaWorldConfig(observation="rgb").demonstrator()
    beyond = FixedSchedule([InitialState(0, 0, 50)])
    with (
        build(MetaWorldConfig(num_envs=1, workers=1), True, beyond) as simulator,
        pytest.raises(UserError, match="no 50"),
    ):
        simulator.reset(tickets=np.array([0]))


def test_evaluation_goes_through_the_recorded_placements() -> None:
    config = MetaWorldConfig(PAIR, num_envs=4, workers=1)
    schedule = OrderedSchedule.draw("test", 4, config.num_tasks, num_states=config.num_states)
    with build(config, False, schedule) as simulator:
        observation = simulator.reset(tickets=np.arange(4))
        assert observation.task.tolist() == [0, 1, 0, 1]
        goals = observation.state[:, -3:]
    assert len({goal.tobytes() for goal in goals}) == 4
