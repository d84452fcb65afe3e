"""The environments of one worker, stepped side by side (see `fast_rows.py`), where the task can do that exactly."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from embodied_rl.simulators.base import BatchedEnvironment, InitialState
from embodied_rl.simulators.maniskill import environment as single
from embodied_rl.simulators.maniskill import fast, fast_rows, tasks
from embodied_rl.simulators.maniskill.environment import LazyObservation, ManiSkillEnvironment
from embodied_rl.simulators.maniskill.physics import vary


class SideBySide(BatchedEnvironment):
    """`num_envs` >= 2 CPU scenes of a task, state observations only.

    A row that ended is frozen until it is reset: nothing of it moves, as if it were a process of its own.
    Whether the numbers of a task are those of its single environments is for `agrees` to say.
    """

    def __init__(
        self,
        task: str,
        num_envs: int,
        control_mode: str | None,
        reward: str,
        max_steps: int | None,
        physics: Mapping[str, float] | None = None,
    ) -> None:
        self.max_steps = tasks.check(task, reward, max_steps)
        self.num_envs = num_envs
        fast.install()
        with fast_rows.allowed(num_envs):
            self.env = single.make(
                task, control_mode, "state", reward, 0, num_envs, sim_backend="physx_cpu", reconfiguration_freq=0
            )
        vary(self.env, physics or {})
        self._steps = np.zeros(num_envs, np.int64)
        self._live = np.ones(num_envs, bool)
        info = self.env.get_info()
        self._info: dict[str, Any] | None = info
        self.observation_spec = single.observation_spec(self.env, "state", 0)
        self.action_spec = single.action_spec(self.env)
        self.tasks = (single.task_spec(self.env, task, self.max_steps, reward, info),)

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        for row, state in zip(rows, states, strict=True):
            single.seed_everything(state.seed)
            self._reset(int(row), state.seed)
        self._steps[rows] = 0
        self._live[rows] = True
        self._info = None  # computed when asked for, once for all rows

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        import torch

        env = self.env
        env.scene.px.active = np.flatnonzero(self._live).tolist()
        tensor = env._step_action(torch.from_numpy(np.array(actions, np.float32)))
        env._elapsed_steps += 1
        self._info = info = env.get_info()
        obs = LazyObservation(lambda: env.get_obs(info, unflattened=True))
        reward = env.get_reward(obs=obs, action=tensor, info=info).to(torch.float32).numpy()
        success = info["success"].to(torch.bool).numpy().copy() if "success" in info else None
        terminated = np.zeros(self.num_envs, bool) if success is None else success.copy()
        if "fail" in info:
            terminated |= info["fail"].to(torch.bool).numpy()
        self._steps += 1
        truncated = self._steps >= self.max_steps
        self._live &= ~(terminated | truncated)
        return reward, terminated, truncated, success

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if self._info is None:
            self._info = self.env.get_info()
        return single.to_numpy(self.env.get_obs(self._info), self.observation_spec, np.asarray(rows))

    def close(self) -> None:
        self.env.close()

    def _reset(self, row: int, seed: int) -> None:
        """ManiSkill's `BaseEnv.reset` for one row, with the random numbers that a single environment would draw."""
        import torch

        env = self.env
        random = np.random.RandomState(seed)
        env._episode_seed[row] = seed
        env._batched_episode_rng.rngs[row] = random
        env._episode_rng = random
        index = torch.tensor([row])
        env.scene._reset_mask = torch.zeros(self.num_envs, dtype=torch.bool)
        env.scene._reset_mask[row] = True
        env._elapsed_steps[row] = 0
        env._clear_sim_state()
        env.agent.reset()
        generator = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        # Tasks initialise under `with torch.device(...)`, which intercepts every call only to name the CPU once more.
        with torch._C.DisableTorchFunction():
            env._initialize_episode(index, {})
        torch.set_rng_state(generator)
        env.agent.controller.reset()
        env.scene._reset_mask = torch.ones(self.num_envs, dtype=torch.bool)


class OneByOne(BatchedEnvironment):
    """`num_envs` single environments behind the batched interface: always exact, and able to render."""

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        self.num_envs = num_envs
        self._environments = [ManiSkillEnvironment(**kwargs) for _ in range(num_envs)]
        first = self._environments[0]
        self.observation_spec, self.action_spec, self.tasks = first.observation_spec, first.action_spec, first.tasks
        self._live = np.ones(num_envs, bool)

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        for row, state in zip(rows, states, strict=True):
            self._environments[row].reset(state)
        self._live[rows] = True

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated, success = np.zeros((3, self.num_envs), bool)
        for row in np.flatnonzero(self._live):
            reward[row], terminated[row], truncated[row], good = self._environments[row].step(actions[row])
            success[row] = bool(good)
        self._live &= ~(terminated | truncated)
        return reward, terminated, truncated, success if self.tasks[0].has_success else None

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        seen = [self._environments[row].observe() for row in rows]
        return {name: np.stack([each[name] for each in seen]) for name in seen[0]}

    def close(self) -> None:
        for environment in self._environments:
            environment.close()


class ManiSkillRows(BatchedEnvironment):
    """The environments of a worker: side by side when that gives, in a trial, the bits of single environments, else one
    by one. `kwargs` are those of `ManiSkillEnvironment`; raises `UserError` as it does."""

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        self._rows: BatchedEnvironment = _side_by_side(num_envs, kwargs) or OneByOne(num_envs, **kwargs)
        self.num_envs = num_envs
        self.observation_spec = self._rows.observation_spec
        self.action_spec = self._rows.action_spec
        self.tasks = self._rows.tasks

    @property
    def side_by_side(self) -> bool:
        """Which of the two it became."""
        return isinstance(self._rows, SideBySide)

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        self._rows.reset(rows, states)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        return self._rows.step(actions)

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self._rows.observe(rows)

    def close(self) -> None:
        self._rows.close()


def _side_by_side(num_envs: int, kwargs: dict[str, Any]) -> SideBySide | None:
    if num_envs == 1 or kwargs.get("observation", "state") != "state":
        return None
    alone = ManiSkillEnvironment(**kwargs)
    rows = None
    try:
        if alone.env.reconfiguration_freq == 0:  # a task that builds a new scene at every reset cannot do so for a row
            arguments: dict[str, Any] = {
                name: kwargs.get(name) for name in ("task", "control_mode", "max_steps", "physics")
            }
            rows = SideBySide(num_envs=num_envs, reward=kwargs.get("reward", "sparse"), **arguments)
            if agrees(rows, alone):
                return rows
    except Exception as error:  # a task that assumes one scene on the CPU may fail in any way
        print(f"{kwargs['task']}: its environments run one by one ({type(error).__name__}: {error})", file=sys.stderr)
    finally:
        alone.close()
    if rows is not None:
        rows.close()
    return None


def agrees(rows: SideBySide, alone: ManiSkillEnvironment, steps: int = 10) -> bool:
    """Whether the first and the last row have, in `steps` random steps with a reset of the last one in between, every
    bit of a single environment, and no step draws from a global generator, which rows would share."""
    spec, last = rows.action_spec, rows.num_envs - 1
    random = np.random.default_rng(0)
    shape = (steps, rows.num_envs, spec.dim)
    actions = random.uniform(np.maximum(spec.low, -3), np.minimum(spec.high, 3), shape).astype(np.float32)
    seeds = np.arange(rows.num_envs)
    again = InitialState(0, rows.num_envs)
    rows.reset(seeds, [InitialState(0, int(seed)) for seed in seeds])
    seen: dict[int, list[Any]] = {0: [], last: []}
    for step, action in enumerate(actions):
        if step == steps // 2:
            rows.reset(np.array([last]), [again])
        before = single.generator_states()
        result = rows.step(action)
        if before != single.generator_states():
            return False
        states = rows.observe(seeds)["state"]
        for row, record in seen.items():
            record.append([states[row].tobytes(), *(None if x is None else x[row].tobytes() for x in result)])
    for row, record in seen.items():
        alone.reset(InitialState(0, row))
        for step, action in enumerate(actions):
            if step == steps // 2 and row == last:
                alone.reset(again)
            reward, terminated, truncated, success = alone.step(action[row])
            flags = [np.bool_(terminated).tobytes(), np.bool_(truncated).tobytes()]
            good = None if success is None else np.bool_(success).tobytes()
            if [alone.observe()["state"].tobytes(), np.float32(reward).tobytes(), *flags, good] != record[step]:
                return False
            if (terminated or truncated) and (row != last or step >= steps // 2):
                break
            if terminated or truncated:
                alone.reset(again)
    return True
