"""Many environments of one ManiSkill3 task stepped together: the GPU backend.

The GPU path has never been executed by its authors' tests, which have no GPU simulator: it is written against
ManiSkill 3.0.1's source. The same code runs on the CPU with one environment, and that is tested.
"""

from __future__ import annotations

import numpy as np

from embodied_rl.errors import UserError
from embodied_rl.simulators.base import BatchedEnvironment, InitialState
from embodied_rl.simulators.maniskill import environment as single
from embodied_rl.simulators.maniskill import tasks


class ManiSkillBatchedEnvironment(BatchedEnvironment):
    """`num_envs` environments in one PhysX scene on the GPU (`device="gpu"`), or one on the CPU (`device="cpu"`).

    Automatic reset is off: rows go on past their end until they are reset. Raises `UserError` as `ManiSkillEnvironment`
    does, and when there is no CUDA device.
    """

    def __init__(
        self,
        task: str,
        num_envs: int,
        control_mode: str | None = None,
        observation: str = "state",
        reward: str = "sparse",
        image_size: int = 128,
        max_steps: int | None = None,
        device: str = "gpu",
    ) -> None:
        import torch

        if device == "gpu" and not torch.cuda.is_available():
            raise UserError("ManiSkill backend 'gpu' needs a CUDA device, and torch finds none; use backend 'cpu'")
        if device == "cpu" and num_envs != 1:
            raise UserError(f"ManiSkill steps one environment per CPU scene, not {num_envs}")
        self.num_envs = num_envs
        self.max_steps = tasks.check(task, reward, max_steps)
        backend = "physx_cuda" if device == "gpu" else "physx_cpu"
        self.env = single.make(
            task, control_mode, observation, reward, image_size, num_envs, sim_backend=backend, reconfiguration_freq=0
        )
        self._steps = np.zeros(num_envs, np.int64)
        self._info = self.env.get_info()
        self.observation_spec = single.observation_spec(self.env, observation, image_size)
        self.action_spec = single.action_spec(self.env)
        self.tasks = (single.task_spec(self.env, task, self.max_steps, reward, self._info),)

    def reset(self, rows: np.ndarray, states: list[InitialState]) -> None:
        """One row after another: ManiSkill draws a joint sample for all rows that it resets together, in which an
        episode's start would depend on its neighbours. What a task builds once (shapes, sizes) stays as it is."""
        import torch

        for row, state in zip(rows, states, strict=True):
            torch.manual_seed(state.seed)
            index = torch.tensor([int(row)], device=self.env.device)
            _, self._info = self.env.reset(seed=[state.seed] * self.num_envs, options={"env_idx": index})
        self._steps[rows] = 0

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(actions, dtype=np.float32)).to(self.env.device)
        _, reward, terminated, _, self._info = self.env.step(tensor)
        self._steps += 1
        success = self._info["success"].bool().cpu().numpy() if "success" in self._info else None
        truncated = self._steps >= self.max_steps
        return reward.float().cpu().numpy(), terminated.bool().cpu().numpy(), truncated, success

    def observe(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return single.to_numpy(self.env.get_obs(self._info), self.observation_spec, np.asarray(rows))

    def close(self) -> None:
        self.env.close()
