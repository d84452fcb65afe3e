"""Environments side by side: every row has the bits of an environment of its own."""

from __future__ import annotations

import numpy as np
import pytest

from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.chunk import BatchedSimulator
from embodied_rl.simulators.maniskill.config import ManiSkillConfig
from embodied_rl.simulators.maniskill.demonstrator import ScriptedPickCube
from embodied_rl.simulators.maniskill.environment import ManiSkillEnvironment
from embodied_rl.simulators.maniskill.rows import ManiSkillRows, SideBySide, agrees


@pytest.mark.parametrize(
    ("task", "control", "reward", "together"),
    [
        ("PushCube-v1", None, "normalized_dense", True),
        ("StackCube-v1", "pd_ee_delta_pose", "dense", True),
        ("PokeCube-v1", "pd_joint_vel", "normalized_dense", True),
        ("PullCubeTool-v1", "pd_ee_target_delta_pos", "normalized_dense", True),
        ("PickCubeSO100-v1", None, "normalized_dense", True),
        ("PegInsertionSide-v1", None, "normalized_dense", False),  # builds another scene at every reset
        ("MS-CartpoleBalance-v1", None, "normalized_dense", False),  # reads joints in a way that knows one scene
        ("SO100GraspCube-v1", None, "normalized_dense", False),  # runs, but with other numbers: the trial notices
    ],
)
def test_rows_equal_single_environments(task: str, control: str | None, reward: str, together: bool) -> None:
    kwargs = {"task": task, "control_mode": control, "reward": reward, "max_steps": 15}
    rows = ManiSkillRows(num_envs=3, **kwargs)
    assert rows.side_by_side == together
    alone = ManiSkillEnvironment(**kwargs)
    assert (rows.observation_spec, rows.action_spec, rows.tasks) == (
        alone.observation_spec, alone.action_spec, alone.tasks
    )  # fmt: skip
    spec = rows.action_spec
    low, high = np.maximum(spec.low, -3), np.minimum(spec.high, 3)
    actions = np.random.default_rng(0).uniform(low, high, (25, 3, spec.dim)).astype(np.float32)
    everything = np.arange(3)
    seen = [[] for _ in everything]
    rows.reset(everything, [InitialState(0, seed) for seed in (5, 6, 7)])
    for step, action in enumerate(actions):
        if step in (4, 9):  # a row in the middle of its episode, others undisturbed
            rows.reset(np.array([step % 2]), [InitialState(0, step)])
        result = rows.step(action)
        states = rows.observe(everything)["state"]
        for row in everything:
            seen[row].append((states[row].tobytes(), *(None if x is None else x[row].item() for x in result)))
    for row in everything:
        alone.reset(InitialState(0, 5 + int(row)))
        for step, action in enumerate(actions):
            if step in (4, 9) and step % 2 == row:
                alone.reset(InitialState(0, step))
            earned, terminated, truncated, success = alone.step(action[row])
            ours = (alone.observe()["state"].tobytes(), np.float32(earned).item(), terminated, truncated, success)
            assert ours == seen[row][step], (row, step)
            if terminated or truncated:
                break
    rows.close()


def test_grasping_rows_equal_single_environments_and_ended_rows_do_not_move() -> None:
    kwargs = {"task": "PickCube-v1", "control_mode": "pd_ee_delta_pos", "reward": "dense", "max_steps": None}
    rows = SideBySide(num_envs=4, **kwargs)
    everything = np.arange(4)
    script, noise = ScriptedPickCube(num_envs=4), np.random.default_rng(0)
    rows.reset(everything, [InitialState(0, int(seed)) for seed in everything])
    live, last = np.ones(4, bool), {}
    done: list[list[tuple]] = [[] for _ in everything]
    for _ in range(50):
        states = rows.observe(everything)["state"]
        for row, state in last.items():
            np.testing.assert_array_equal(states[row], state)
        action = np.clip(script.actions(states) + noise.normal(0, 0.05, (4, 4)), -1, 1).astype(np.float32)
        result = rows.step(action)
        states = rows.observe(everything)["state"]
        for row in np.flatnonzero(live):
            done[row].append((action[row], states[row], *(x[row].item() for x in result if x is not None)))
            if done[row][-1][3]:
                live[row] = False
                last[row] = states[row]
    assert not live.any()  # all four succeeded
    assert len({len(episode) for episode in done}) > 1  # at different times
    alone = ManiSkillEnvironment(**kwargs)
    for row in everything:
        alone.reset(InitialState(0, int(row)))
        for action, state, *outcome in done[row]:
            reward, *flags = alone.step(action)
            assert [np.float32(reward).item(), *flags] == outcome
            assert alone.observe()["state"].tobytes() == state.tobytes()
    assert agrees(rows, alone)
    rows.close()


def test_trial_notices_a_wrong_row(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {"task": "PushCube-v1", "control_mode": None, "reward": "sparse", "max_steps": None}
    alone, rows = ManiSkillEnvironment(**kwargs), SideBySide(num_envs=3, **kwargs)
    assert agrees(rows, alone)
    step = rows.step

    def one_ulp_off(actions: np.ndarray) -> tuple:
        reward, *rest = step(actions)
        reward = reward.copy()
        reward[-1] = np.nextafter(reward[-1], np.float32(2))
        return (reward, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(rows, "step", one_ulp_off)
        assert not agrees(rows, alone)

    def drawing(actions: np.ndarray) -> tuple:
        import torch

        torch.rand(1)
        return step(actions)

    monkeypatch.setattr(rows, "step", drawing)
    assert not agrees(rows, alone)


class Tickets:
    def state(self, ticket: int) -> InitialState:
        return InitialState(0, ticket)


def test_workers_give_what_this_process_gives() -> None:
    """Three rows here side by side; there one alone in the first worker and two side by side in the second."""
    config = {"task": "PickCube-v1", "control_mode": "pd_ee_delta_pos", "reward": "normalized_dense", "max_steps": 20}
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 3, 8, 4)).astype(np.float32)
    here = BatchedSimulator(ManiSkillRows(num_envs=3, **config), Tickets())
    there = ManiSkillConfig(num_envs=3, workers=2, **config).build(Tickets())
    runs = []
    for simulator in (here, there):
        found = [simulator.reset(tickets=np.array([1, 2, 3])).state.copy()]
        for k, chunk in enumerate(actions):
            result = simulator.step(chunk, next_tickets=np.arange(3) + 10 * k)
            found += [result.observation.state.copy(), result.reward.copy(), result.valid.copy()]
            found += [np.array([e.length for e in result.episodes])]
        simulator.close()
        runs.append(found)
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)
