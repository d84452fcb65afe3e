"""Every number of the adapter equals ManiSkill's own CPU wrapper, bit for bit."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.maniskill import fast, headless
from embodied_rl.simulators.maniskill.demonstrator import ScriptedPickCube
from embodied_rl.simulators.maniskill.environment import ManiSkillEnvironment
from embodied_rl.simulators.maniskill.patch import Patch, Patches

SEEDS = [11, 5, 11, 123456789]


def rollout_of_wrapper(
    task: str, control: str | None, reward: str, actions: np.ndarray, limit: int | None
) -> list[tuple[Any, ...]]:
    """ManiSkill unpatched, through `gymnasium.make` and its own wrapper; resets itself with SEEDS in turn."""
    headless.install()
    import gymnasium
    from mani_skill.utils.wrappers import CPUGymWrapper

    with fast.disabled():
        made = gymnasium.make(
            task,
            obs_mode="state",
            control_mode=control,
            reward_mode=reward,
            render_backend="none",
            **({"max_episode_steps": limit} if limit else {}),
        )
        env = CPUGymWrapper(made)
        seeds = iter(SEEDS)
        out: list[tuple[Any, ...]] = [(env.reset(seed=next(seeds))[0],)]
        for action in actions:
            obs, r, terminated, truncated, info = env.step(action)
            success = bool(info["success"]) if "success" in info else None
            out.append((obs, np.float32(r), bool(terminated), bool(truncated), success))
            if terminated or truncated:
                out.append((env.reset(seed=next(seeds))[0],))
        env.close()
    return out


def rollout(
    task: str, control: str | None, reward: str, actions: np.ndarray, limit: int | None, observe_every: int = 1
) -> list[tuple[Any, ...]]:
    env = ManiSkillEnvironment(task, control, reward=reward, max_steps=limit)
    seeds = iter(SEEDS)
    env.reset(InitialState(0, next(seeds)))
    out: list[tuple[Any, ...]] = [(env.observe()["state"],)]
    for k, action in enumerate(actions, 1):
        r, terminated, truncated, success = env.step(action)
        obs = env.observe()["state"] if k % observe_every == 0 else None
        out.append((obs, np.float32(r), terminated, truncated, success))
        if terminated or truncated:
            env.reset(InitialState(0, next(seeds)))
            out.append((env.observe()["state"],))
    env.close()
    return out


def assert_same(ours: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]]) -> None:
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert len(a) == len(b), step
        if a[0] is not None:
            np.testing.assert_array_equal(a[0].view(np.int32), b[0].view(np.int32), err_msg=f"state, step {step}")
        assert [np.asarray(x).tobytes() for x in a[1:]] == [np.asarray(x).tobytes() for x in b[1:]], step


def random_actions(dim: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.2, 1.2, (count, dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("task", "control", "reward", "dim"),
    [
        ("PushCube-v1", None, "normalized_dense", 8),
        ("StackCube-v1", "pd_ee_delta_pose", "dense", 7),
        ("PegInsertionSide-v1", None, "normalized_dense", 8),
        ("PullCubeTool-v1", "pd_ee_target_delta_pos", "normalized_dense", 4),
        ("PlugCharger-v1", "pd_joint_vel", "sparse", 8),
        ("RollBall-v1", "pd_joint_target_delta_pos", "normalized_dense", 8),
        ("MS-HopperHop-v1", None, "normalized_dense", 4),  # neither success nor fail
        ("MS-CartpoleBalance-v1", None, "normalized_dense", 1),  # fail, no success
        ("PickCubeSO100-v1", None, "normalized_dense", 6),
    ],
)
def test_random_actions_give_the_wrapper_s_bits(task: str, control: str | None, reward: str, dim: int) -> None:
    actions = random_actions(dim, 48)
    theirs = rollout_of_wrapper(task, control, reward, actions, 20)
    assert_same(rollout(task, control, reward, actions, 20), theirs)
    assert_same(rollout(task, control, reward, actions, 20, observe_every=8), [
        (None if len(entry) == 5 and k % 8 else entry[0], *entry[1:]) for k, entry in numbered(theirs)
    ])  # fmt: skip


def numbered(out: list[tuple[Any, ...]]) -> list[tuple[int, tuple[Any, ...]]]:
    """Steps with their number; resets with 0."""
    k, result = 0, []
    for entry in out:
        k += len(entry) == 5
        result.append((k if len(entry) == 5 else 0, entry))
    return result


def test_grasping_and_success_give_the_wrapper_s_bits() -> None:
    """Contacts, the end of an episode by success, and resets after it, which a random policy never sees."""
    env = ManiSkillEnvironment("PickCube-v1", "pd_ee_delta_pos", reward="dense")
    script, noise = ScriptedPickCube(), np.random.default_rng(0)
    actions, seeds, rewards = [], iter(SEEDS), []
    env.reset(InitialState(0, next(seeds)))
    for _ in range(45):
        action = script.actions(env.observe()["state"][None])[0] + noise.normal(0, 0.05, 4)
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        reward, terminated, truncated, success = env.step(actions[-1])
        rewards.append(reward)
        if terminated or truncated:
            assert success
            env.reset(InitialState(0, next(seeds)))
            script.reset(np.array([0]), np.array([0]))
    assert max(rewards) == 5  # at least one success
    ours = rollout("PickCube-v1", "pd_ee_delta_pos", "dense", np.array(actions), None)
    assert_same(ours, rollout_of_wrapper("PickCube-v1", "pd_ee_delta_pos", "dense", np.array(actions), None))


def test_every_rewritten_function_agrees_on_this_machine() -> None:
    assert fast.install() == []


def test_a_function_that_differs_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module, importer = types.ModuleType("somewhere.module"), types.ModuleType("somewhere.importer")
    module.__dict__.update(good=abs, bad=len)
    importer.__dict__.update(copied=abs)
    for each in (module, importer):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    patches = Patches([Patch(module, "good", max, lambda: True), Patch(module, "bad", min, lambda: False)])
    assert patches.rejected == ["somewhere.module.bad"]
    patches.on()
    assert (vars(module)["good"], vars(module)["bad"], vars(importer)["copied"]) == (max, len, max)
    patches.off()
    assert (vars(module)["good"], vars(importer)["copied"]) == (abs, abs)
