"""One ManiSkill3 task on CPU PhysX, with ManiSkill's own numbers, without most of its overhead (see `fast.py`)."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from embodied_rl.errors import UserError, unknown
from embodied_rl.simulators import vulkan
from embodied_rl.simulators.base import Environment, InitialState
from embodied_rl.simulators.maniskill import fast, headless, tasks
from embodied_rl.simulators.maniskill.config import instruction
from embodied_rl.simulators.maniskill.physics import vary
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec


class LazyObservation(Mapping[str, Any]):
    """Handed to the task's reward in place of the observation, which few rewards read: computed when first used."""

    def __init__(self, compute: Any) -> None:
        self._compute = compute
        self._value: dict[str, Any] | None = None

    def _get(self) -> dict[str, Any]:
        value = self._value
        if value is None:
            value = self._value = self._compute()
        return value

    def __getitem__(self, key: str) -> Any:
        return self._get()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._get())

    def __len__(self) -> int:
        return len(self._get())


class ManiSkillEnvironment(Environment):
    """One environment; rewards, states and terminations equal those of ManiSkill's `CPUGymWrapper` bit for bit, unless
    `physics` (the fields of `Physics`) says otherwise.

    A reset gives the same start for the same seed. What follows is nearly always the same, too: where several parts of
    the robot press on one body, PhysX solves these contacts in an order that depends on earlier episodes, whatever its
    flag of enhanced determinism (PickCube, random actions: 1 of 120 episodes of 60 steps). ManiSkill's humanoid tasks
    (UnitreeG1-*, MS-Humanoid*) differ more: their own reset leaves something of the last episode in the physics. With
    `rebuild` every episode begins in a new scene, and nothing is left of earlier ones.

    Raises `UserError` for an unknown task, control or reward mode, missing assets, or images without a renderer.
    """

    def __init__(
        self,
        task: str,
        control_mode: str | None = None,
        observation: str = "state",
        reward: str = "sparse",
        image_size: int = 128,
        max_steps: int | None = None,
        physics: Mapping[str, float] | None = None,
        rebuild: bool = False,
    ) -> None:
        import torch

        torch.set_num_threads(1)  # a step is hundreds of operations on a handful of numbers
        self.max_steps = tasks.check(task, reward, max_steps)
        fast.install()
        options = {"reconfiguration_freq": 1} if rebuild else {}
        self.env = make(task, control_mode, observation, reward, image_size, **options)
        vary(self.env, physics or {})
        self._steps = 0
        self._info: dict[str, Any] = self.env.get_info()
        self.observation_spec = observation_spec(self.env, observation, image_size)
        self.action_spec = action_spec(self.env)
        self.tasks = (task_spec(self.env, task, self.max_steps, reward, self._info),)

    def reset(self, state: InitialState) -> None:
        """Everything random restarts from `state.seed`: ManiSkill seeds the episode, and draws made while stepping come
        from global generators, which forked processes would otherwise share."""
        seed_everything(state.seed)
        with tasks.no_prompts(self.tasks[0].name):
            _, self._info = self.env.reset(seed=state.seed)
        self._steps = 0

    def step(self, action: np.ndarray) -> tuple[float, bool, bool, bool | None]:
        """The sequence of ManiSkill's `BaseEnv.step`, except that nobody is handed an observation."""
        env = self.env
        tensor = env._step_action(action)
        env._elapsed_steps += 1
        self._info = info = env.get_info()
        obs = LazyObservation(lambda: env.get_obs(info, unflattened=True))
        reward = float(env.get_reward(obs=obs, action=tensor, info=info))
        success = bool(info["success"]) if "success" in info else None
        terminated = bool(success) or ("fail" in info and bool(info["fail"]))
        self._steps += 1
        return reward, terminated, self._steps >= self.max_steps, success

    def observe(self) -> dict[str, np.ndarray]:
        return to_numpy(self.env.get_obs(self._info), self.observation_spec, row=0)

    def close(self) -> None:
        self.env.close()


def seed_everything(seed: int) -> None:
    """Seed the global CPU generators that ManiSkill and its tasks draw from."""
    import torch

    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also visits every accelerator, which takes longer
    np.random.seed(seed)  # noqa: NPY002 - the generator ManiSkill's tasks draw from
    random.seed(seed)


def generator_states() -> tuple[Any, ...]:
    """The states of those generators, comparable."""
    import torch

    numpys = np.random.get_state()  # noqa: NPY002
    return bytes(torch.get_rng_state().numpy()), repr([np.asarray(x).tobytes() for x in numpys]), random.getstate()


def make(
    task: str,
    control_mode: str | None,
    observation: str,
    reward: str,
    image_size: int,
    num_envs: int = 1,
    **kwargs: Any,
) -> Any:
    """ManiSkill's bare environment, without wrappers: no time limit and no automatic reset."""
    render = observation != "state"
    if not render:
        headless.install()
    elif headless.installed():
        raise UserError("this process runs ManiSkill without a renderer; images need a process of their own")
    else:
        os.environ.update(vulkan.environment())  # before SAPIEN loads Vulkan, which it does when first asked to render
    if render and not headless.can_render():
        raise UserError(
            f"ManiSkill images (observation '{observation}') need a Vulkan device, and SAPIEN finds none: install a "
            f"GPU driver, or software Vulkan with {vulkan.SETUP}, or use observation 'state'"
        )
    import gymnasium
    import torch

    renderer = "gpu" if torch.cuda.is_available() else "cpu"
    sensors = {"sensor_configs": {"width": image_size, "height": image_size}} if render else {}
    with tasks.no_prompts(task):
        try:
            env = gymnasium.make(
                task,
                num_envs=num_envs,
                obs_mode=observation,
                reward_mode=reward,
                control_mode=control_mode,
                render_backend=renderer if render else "none",
                **sensors,
                **kwargs,
            ).unwrapped
        except AssertionError as error:
            if control_mode is None or "not in supported modes" not in str(error):
                raise
            known = re.findall(r"'(\w+)'", str(error))
            raise unknown(f"control mode of '{task}'", control_mode, known) from error
    return env


def observation_spec(env: Any, observation: str, image_size: int) -> ObservationSpec:
    """The specification of what `to_numpy` returns."""
    names = tuple(state_names(env._get_obs_state_dict(env.get_info()), env.num_envs))
    views = () if observation == "state" else env.single_observation_space["sensor_data"]
    return ObservationSpec(len(names), names, {name: CameraSpec(image_size, image_size) for name in views})


def state_names(parts: Mapping[str, Any], num_envs: int, prefix: str = "") -> Iterator[str]:
    """A name for each number of the flattened state, e.g. "extra.obj_pose.2", in ManiSkill's order."""
    for name, part in parts.items():
        if isinstance(part, Mapping):
            yield from state_names(part, num_envs, f"{prefix}{name}.")
        else:
            yield from (f"{prefix}{name}.{i}" for i in range(part.numel() // num_envs))


def to_numpy(obs: Any, spec: ObservationSpec, row: int | np.ndarray) -> dict[str, np.ndarray]:
    """ManiSkill's observation of `row` (an index or rows) in the keys of `Environment.observe`."""
    if not isinstance(obs, dict):
        return {"state": np.array(obs.cpu().numpy()[row], dtype=np.float32)}
    state = obs["state"] if "state" in obs else _flatten({name: obs[name] for name in ("agent", "extra")})
    images = {f"image.{name}": np.array(obs["sensor_data"][name]["rgb"].cpu().numpy()[row]) for name in spec.cameras}
    return {"state": np.array(state.cpu().numpy()[row], dtype=np.float32), **images}


def _flatten(state: dict[str, Any]) -> Any:
    from mani_skill.utils import common

    return common.flatten_state_dict(state, use_torch=True)


def action_spec(env: Any) -> ActionSpec:
    """Bounds and names of the robot's action. `hold` is 0 for controllers of changes and velocities; for controllers of
    absolute joint positions it is where the joints are after a reset; grippers stay half open."""
    import gymnasium

    space = env.single_action_space
    if not isinstance(space, gymnasium.spaces.Box):
        raise UserError(
            f"ManiSkill task '{env.spec.id}' has a {type(space).__name__} action space (several robots); only one "
            "robot with a Box action space is supported"
        )
    hold = np.zeros(space.shape, np.float32)
    controller = env.agent.controller
    mapping = getattr(controller, "action_mapping", {"": (0, len(hold))})
    for name, (start, end) in mapping.items():
        part = controller.controllers[name] if name else controller
        absolute = not getattr(part.config, "use_delta", True) and not getattr(part.config, "normalize_action", True)
        joints = part.qpos[0].cpu().numpy()
        if absolute and len(joints) == end - start:
            hold[start:end] = joints
    panda = str(env.agent.uid).startswith("panda") and "gripper" in mapping
    return ActionSpec(
        low=tuple(map(float, space.low)),
        high=tuple(map(float, space.high)),
        hold=tuple(map(float, np.clip(hold, space.low, space.high))),
        control=env.agent.control_mode,
        gripper=mapping["gripper"][0] if panda else None,
        gripper_open=1,
    )


def task_spec(env: Any, task: str, max_steps: int, reward: str, info: dict[str, Any]) -> TaskSpec:
    """The task in force; it has success only where its own `evaluate` says so."""
    spoken = getattr(env, "get_language_instruction", None)
    words = spoken()[0] if spoken else instruction(task)
    return TaskSpec(task, words, max_steps, has_success="success" in info, reward=reward)
