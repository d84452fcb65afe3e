"""How fast is the LIBERO adapter? With two cameras of 128 pixels and chunks of 8 actions: environment steps per second
against lerobot's `LiberoEnv` in gymnasium's `AsyncVectorEnv` with as many processes, and against one plain
`OffScreenRenderEnv`; a reset to a recorded state up to the first observation, against the way it is otherwise done; and
the time of one step without images against that of MuJoCo alone."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied_rl.simulators.base import InitialState, Simulator
from embodied_rl.simulators.libero import init_states, installed, suites
from embodied_rl.simulators.libero.config import LiberoConfig
from embodied_rl.simulators.libero.environment import LiberoEnvironment, placement_seed
from embodied_rl.simulators.reset_schedule import RandomSchedule

SUITE, TASK = "libero_spatial", 0
"""The scene with the most to draw: its stove mirrors."""
SIZE = 128
CHUNK = 8
PROCESSES = 2
NO_OP = [0, 0, 0, 0, 0, 0, -1]
PATIENCE = 600.0
"""Seconds before the other side is given up."""


def measure(smoke: bool) -> dict[str, Any]:
    """Ratios > 1: how many times faster; libero_vs_mj_step: how many times the duration of the physics a step takes.
    libero_reset_kept_vs_full: for a state that this process has started from before."""
    rounds, seconds = (3, 4.0) if smoke else (7, 10.0)
    print(f"{'':34} {'ours':>9} {'theirs':>9}   ratio (min-max)")
    with multiprocessing.get_context("spawn").Pool(1) as other:
        lerobot = _against_lerobot(rounds, seconds)
        bare = _against_bare(rounds, seconds, other)
        reset, kept = _resets(rounds, other)
    return {
        "libero_vs_lerobot": lerobot,
        "libero_vs_bare": bare,
        "libero_reset_vs_full": reset,
        "libero_reset_kept_vs_full": kept,
        "libero_vs_mj_step": _against_physics(rounds),
    }


class LeRobot:
    """Makes lerobot's environment, in whichever process calls it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> Any:
        installed.problems()
        from lerobot.envs import libero

        return libero.LiberoEnv(
            libero._get_suite(SUITE),
            TASK,
            SUITE,
            obs_type="pixels_agent_pos",
            observation_width=SIZE,
            observation_height=SIZE,
            episode_index=self.number,
        )


def _against_lerobot(rounds: int, seconds: float) -> float:
    from gymnasium.vector import AsyncVectorEnv

    # Each of their processes runs one environment.
    vector = AsyncVectorEnv([LeRobot(number) for number in range(PROCESSES)], context="spawn")
    random = np.random.default_rng(0)

    def theirs() -> int:
        for action in random.uniform(-1, 1, (CHUNK, PROCESSES, 7)).astype(np.float32):
            vector.step_async(action)
            vector.step_wait(timeout=PATIENCE)
        return CHUNK * PROCESSES

    with _simulator(PROCESSES) as simulator:
        try:
            vector.reset_async()
            vector.reset_wait(timeout=PATIENCE)
            ours = _stepping(simulator)
            for side in (ours, theirs):
                _rate(side, seconds / 2)
            pairs = [(_rate(ours, seconds), _rate(theirs, seconds)) for _ in range(rounds)]
        finally:
            vector.close()
    return _report(f"lerobot, {PROCESSES} processes, steps/s", pairs)


def _against_bare(rounds: int, seconds: float, other: multiprocessing.pool.Pool) -> float:
    with _simulator(1) as simulator:
        ours = _stepping(simulator)
        _rate(ours, seconds / 2)
        pairs = [
            (_rate(ours, seconds), other.apply_async(_step_plain, (seconds,)).get(timeout=PATIENCE))
            for _ in range(rounds)
        ]
    return _report("OffScreenRenderEnv, steps/s", pairs)


def _resets(rounds: int, other: multiprocessing.pool.Pool) -> tuple[float, float]:
    """Both ways begin each round from the same state, and their first images must be the same."""
    task = suites.suite_tasks(SUITE)[TASK]
    env = LiberoEnvironment(suite=SUITE, tasks=(TASK,), image_size=SIZE)
    env.reset(InitialState(0, 0, 0))
    env.observe()
    fresh, kept = [], []
    for index in range(1, rounds + 1):
        theirs, images = other.apply_async(_reset_plain, (index, placement_seed(task, index))).get(timeout=PATIENCE)
        for pairs in (fresh, kept):
            start = time.perf_counter()
            env.reset(InitialState(0, 0, index))
            seen = env.observe()
            pairs.append((1 / (time.perf_counter() - start), 1 / theirs))
            for name, image in images.items():
                if not np.array_equal(seen[f"image.{name}"], image):
                    raise RuntimeError(f"the first image of {name} from state {index} differs from LIBERO's own")
    env.close()
    return _report("full reset, 1/s", fresh), _report("full reset, our state kept, 1/s", kept)


def _against_physics(rounds: int) -> float:
    """One step of our environment over its 25 physics steps alone, both from the same start."""
    mujoco = installed.mujoco()
    env = LiberoEnvironment(suite=SUITE, tasks=(TASK,), observation="state", max_steps=10**6)
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 7)).astype(np.float32)
    pairs = []
    for _ in range(rounds):
        env.reset(InitialState(0, 0, 0))
        start = time.perf_counter()
        for action in actions:
            env.step(action)
        ours = (time.perf_counter() - start) / len(actions)
        env.reset(InitialState(0, 0, 0))
        scene, world = env._running()
        start = time.perf_counter()
        mujoco.mj_step(scene.model, world.data, nstep=25 * len(actions))
        pairs.append((1e3 * ours, 1e3 * (time.perf_counter() - start) / len(actions)))
    env.close()
    return _report("25 mj_step, ms", pairs)


def _simulator(num_envs: int) -> Simulator:
    config = LiberoConfig(SUITE, (TASK,), image_size=SIZE, max_steps=10**6, num_envs=num_envs, workers=num_envs)
    return config.build(RandomSchedule(0, 1, num_states=config.num_states))


def _stepping(simulator: Simulator) -> Callable[[], int]:
    random = np.random.default_rng(0)
    simulator.reset(tickets=np.arange(simulator.num_envs))

    def step() -> int:
        actions = random.uniform(-1, 1, (simulator.num_envs, CHUNK, 7)).astype(np.float32)
        return int(simulator.step(actions).valid.sum())

    return step


def _rate(run: Callable[[], int], seconds: float) -> float:
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        steps += run()
    return steps / elapsed


def _report(name: str, pairs: list[tuple[float, float]]) -> float:
    ratios = [a / b for a, b in pairs]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ratios)
    print(f"{name:34} {ours:9.2f} {theirs:9.2f}  {ratio:6.2f} ({min(ratios):.2f}-{max(ratios):.2f})", flush=True)
    return round(ratio, 3)


# In the other process, where it draws undisturbed: LIBERO's environment as its authors use it.

_plain: list[Any] = []


def _plain_env() -> Any:
    if not _plain:
        installed.problems()
        from libero.libero.envs import OffScreenRenderEnv

        bddl = suites.suite_tasks(SUITE)[TASK].bddl
        _plain.append(OffScreenRenderEnv(bddl_file_name=str(bddl), camera_heights=SIZE, camera_widths=SIZE))
        _plain[0].reset()
    return _plain[0]


def _step_plain(seconds: float) -> float:
    """Steps per second."""
    env = _plain_env()
    env.reset()
    random = np.random.default_rng(0)

    def step() -> int:
        env.step(random.uniform(-1, 1, 7))
        return 1

    return _rate(step, seconds)


def _reset_plain(index: int, seed: int) -> tuple[float, dict[str, np.ndarray]]:
    """Seconds of a reset as lerobot and OpenVLA do it, and its first images."""
    env = _plain_env()
    states = init_states.read(suites.suite_tasks(SUITE)[TASK].init_states)
    start = time.perf_counter()
    env.seed(seed)
    env.reset()
    env.set_init_state(states[index])
    for _ in range(10):
        seen, _, _, _ = env.step(NO_OP)
    took = time.perf_counter() - start
    return took, {name: seen[f"{name}_image"][::-1, ::-1].copy() for name in suites.CAMERAS}
