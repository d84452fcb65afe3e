"""How fast is the MetaWorld adapter? Environment steps per second on states, in chunks of 8, against
`gymnasium.make_vec("Meta-World/custom-mt-envs")`, the vector environment that MetaWorld itself offers for given tasks,
with the same processes and tasks; and the time of one step against that of MuJoCo alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodied_rl.simulators.base import InitialState
from embodied_rl.simulators.metaworld.config import MetaWorldConfig
from embodied_rl.simulators.metaworld.environment import MetaWorldEnvironment
from embodied_rl.simulators.reset_schedule import RandomSchedule

TASKS = ("reach-v3", "pick-place-v3")
"""One with a cheap reward and one that also searches the contacts."""
PROCESSES = 2
ENVS_PER_PROCESS = 4
"""On our side; a process of gymnasium's runs one environment by design."""
CHUNK = 8


def measure(smoke: bool) -> dict[str, Any]:
    """Ratios > 1: how many times faster than MetaWorld's vector environments; metaworld_vs_mj_step: how many times the
    duration of the physics a step takes."""
    rounds, seconds = (3, 1.5) if smoke else (7, 5.0)
    print(f"{'against':24} {'ours':>8} {'theirs':>8}  steps/s   ratio (min-max)")
    results: dict[str, Any] = {}
    for strategy in ("async", "sync"):
        results[strategy] = _against_vector(strategy, rounds, seconds)
    floors = {name: _against_physics(name, rounds) for name in TASKS}
    return {
        "metaworld_vs_make_vec": results["async"],
        "metaworld_vs_make_vec_sync": results["sync"],
        "metaworld_vs_mj_step": round(statistics.geometric_mean(floors.values()), 2),
    }


def _against_vector(strategy: str, rounds: int, seconds: float) -> float:
    import gymnasium
    import metaworld  # noqa: F401 - importing registers

    processes = PROCESSES if strategy == "async" else 1
    config = MetaWorldConfig(
        TASKS, placements="random", end_on_success=False, num_envs=processes * ENVS_PER_PROCESS, workers=processes
    )
    simulator = config.build(RandomSchedule(0, config.num_tasks))
    vector = gymnasium.make_vec(
        "Meta-World/custom-mt-envs", vector_strategy=strategy, envs_list=list(TASKS), seed=1, num_envs=len(TASKS)
    )
    random = np.random.default_rng(0)
    ticket = config.num_envs

    def ours() -> int:
        nonlocal ticket
        actions = random.uniform(-1, 1, (config.num_envs, CHUNK, 4)).astype(np.float32)
        result = simulator.step(actions, next_tickets=np.arange(ticket, ticket + config.num_envs))
        ticket += config.num_envs
        return int(result.valid.sum())

    def theirs() -> int:
        for action in random.uniform(-1, 1, (CHUNK, len(TASKS), 4)).astype(np.float32):
            vector.step(action)
        return CHUNK * len(TASKS)

    try:
        simulator.reset(tickets=np.arange(config.num_envs))
        vector.reset()
        _rate(ours, seconds / 2)
        _rate(theirs, seconds / 2)
        pairs = [(_rate(ours, seconds), _rate(theirs, seconds)) for _ in range(rounds)]
    finally:
        vector.close()
        simulator.close()
    ratios = [a / b for a, b in pairs]
    ratio = statistics.median(ratios)
    rates = [statistics.median(side) for side in zip(*pairs, strict=True)]
    print(
        f"{f'make_vec {strategy}, {processes} proc.':24} {rates[0]:8.0f} {rates[1]:8.0f}  {'':7}"
        f"{ratio:7.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        flush=True,
    )
    return round(ratio, 3)


def _rate(run: Callable[[], int], seconds: float) -> float:
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        steps += run()
    return steps / elapsed


def _against_physics(name: str, rounds: int) -> float:
    """One step of our environment over its simulation steps alone, both from the same start with the same actions."""
    import mujoco

    mj_step: Any = getattr(mujoco, "mj_step")  # noqa: B009 - its stubs do not have it
    env = MetaWorldEnvironment([name])
    actions = np.random.default_rng(0).uniform(-1, 1, (400, 4)).astype(np.float32)
    ratios = []
    for _ in range(rounds):
        env.reset(InitialState(0, 1))
        ours = _duration(lambda: [env.step(action) for action in actions])
        env.reset(InitialState(0, 1))
        task = env._env
        model, data, nstep, scale = task.model, task.data, task.frame_skip, task.action_scale

        def bare(model: Any = model, data: Any = data, nstep: int = nstep, scale: float = scale) -> None:
            for action in actions:
                data.mocap_pos[0] += scale * action[:3]
                data.ctrl[0], data.ctrl[1] = action[3], -action[3]
                mj_step(model, data, nstep=nstep)

        ratios.append(ours / _duration(bare))
    env.close()
    ratio = statistics.median(ratios)
    milliseconds = 1e3 * ours / len(actions)
    print(f"{f'mj_step alone, {name}':24} {milliseconds:8.3f} ms per step, {ratio:.2f} times the physics", flush=True)
    return ratio


def _duration(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
