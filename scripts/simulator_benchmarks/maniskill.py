"""How fast, and how exact, is the ManiSkill adapter?

Environment steps per second of `WorkerSimulator` over our adapter against `gymnasium.vector.AsyncVectorEnv` over
ManiSkill's own CPU wrapper, with the same number of processes; and the largest difference between the two in state,
reward, termination and success for equal seeds and actions.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.simulators.base import InitialState, Simulator
from embodied_rl.simulators.maniskill.config import ManiSkillConfig

TASKS = ("PickCube-v1", "PushCube-v1", "StackCube-v1", "PegInsertionSide-v1")
CHUNK = 8
WORKERS = 2
"""Processes on either side."""
ENVS_PER_WORKER = 8
"""On our side; the other side has one by design."""
REWARD = "normalized_dense"


class Seeds:
    """A reset schedule whose tickets are seeds."""

    def state(self, ticket: int) -> InitialState:
        return InitialState(task=0, seed=ticket)


class PlainEnvironment:
    """Makes ManiSkill's own CPU wrapper, in whichever process calls it; nothing of it is patched but the renderer."""

    def __init__(self, task: str, control: str | None) -> None:
        self.task, self.control = task, control

    def __call__(self) -> Any:
        import torch

        from embodied_rl.simulators.maniskill import headless

        torch.set_num_threads(1)
        headless.install()
        import gymnasium
        from mani_skill.utils.wrappers import CPUGymWrapper

        return CPUGymWrapper(
            gymnasium.make(
                self.task, obs_mode="state", control_mode=self.control, reward_mode=REWARD, render_backend="none"
            )
        )


def reference(make: PlainEnvironment, seed: int, actions: np.ndarray) -> list[tuple[Any, ...]]:
    """(state, reward, terminated, truncated, success) of every executed action of the chunks [C,K,A], in episodes
    seeded seed, seed + 1, ...; the rest of a chunk in which an episode ends is not executed."""
    env = make()
    env.reset(seed=seed)
    rows = []
    for chunk in actions:
        for action in chunk:
            state, reward, terminated, truncated, info = env.step(action)
            rows.append((state, float(reward), bool(terminated), bool(truncated), bool(info.get("success", False))))
            if terminated or truncated:
                seed += 1
                env.reset(seed=seed)
                break
    return rows


def difference(
    simulator: Simulator, make: PlainEnvironment, steps: int, rows: list[int], pool: multiprocessing.pool.Pool
) -> float:
    """The largest absolute difference over `steps` steps in the environments `rows`; infinity when episodes differ."""
    count, dim = simulator.num_envs, simulator.action_spec.dim
    random = np.random.default_rng(0)
    shape = (count, steps // CHUNK, CHUNK, dim)
    actions = random.uniform(simulator.action_spec.low, simulator.action_spec.high, shape).astype(np.float32)
    tickets = 1000 * np.arange(count, dtype=np.int64)
    theirs = [pool.apply_async(reference, (make, int(tickets[n]), actions[n])) for n in rows]
    simulator.reset(tickets=tickets)
    ours: list[list[tuple[Any, ...]]] = [[] for _ in range(count)]
    for c in range(actions.shape[1]):
        result = simulator.step(actions[:, c], observe="all", next_tickets=tickets + 1)
        states = [each.state for each in result.intermediate or []]
        for n, k in np.argwhere(result.valid):
            success = False if result.success is None else bool(result.success[n, k])
            ended = (bool(result.terminated[n, k]), bool(result.truncated[n, k]))
            ours[n].append((states[k][n].copy(), float(result.reward[n, k]), *ended, success))
        tickets = result.tickets
    worst = 0.0
    for n, pending in zip(rows, theirs, strict=True):
        plain = pending.get(timeout=600)
        if [row[2:] for row in plain] != [row[2:] for row in ours[n]]:
            return float("inf")
        for a, b in zip(ours[n], plain, strict=True):
            worst = max(worst, float(np.abs(a[0] - b[0]).max()), abs(a[1] - b[1]))
    return worst


def peak_memory(pid: int) -> float:
    """Peak resident memory of a process, MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def children() -> set[int]:
    """Process ids of this process's children."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def compare(
    config: ManiSkillConfig,
    make: PlainEnvironment,
    rounds: int,
    seconds: float,
    compared: list[int],
    pool: multiprocessing.pool.Pool,
) -> tuple[float, list[float], list[float], float, float]:
    """(difference, ours and theirs: environment steps per second in each round, the sides alternating, ours and theirs:
    peak memory of a worker in MB)."""
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode

    before = children()
    simulator = config.build(Seeds())
    workers = children() - before
    off = difference(simulator, make, 200, compared, pool)
    # Spawned: a child that was forked would inherit whatever this process has patched or imported.
    vector = AsyncVectorEnv([make] * config.workers, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
    random = np.random.default_rng(0)
    low, high = np.array(simulator.action_spec.low), np.array(simulator.action_spec.high)
    ticket = config.num_envs

    def run_ours(duration: float) -> float:
        nonlocal ticket
        steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < duration:
            actions = random.uniform(low, high, (config.num_envs, CHUNK, len(low))).astype(np.float32)
            result = simulator.step(actions, next_tickets=np.arange(ticket, ticket + config.num_envs))
            ticket += config.num_envs
            steps += int(result.valid.sum())
        return steps / elapsed

    def run_theirs(duration: float) -> float:
        steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < duration:
            actions = random.uniform(low, high, (CHUNK, config.workers, len(low))).astype(np.float32)
            for action in actions:
                vector.step(action)
            steps += CHUNK * config.workers
        return steps / elapsed

    simulator.reset(tickets=np.arange(config.num_envs))
    vector.reset(seed=list(range(config.workers)))
    run_ours(seconds / 2)
    run_theirs(seconds / 2)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(run_ours(seconds))
        theirs.append(run_theirs(seconds))
    memory_ours = max(peak_memory(pid) for pid in workers)
    memory_theirs = max(peak_memory(process.pid or 0) for process in vector.processes)
    vector.close()
    simulator.close()
    return off, ours, theirs, memory_ours, memory_theirs


def measure(smoke: bool) -> dict[str, Any]:
    """{"maniskill_vs_async_vector_env": {task: ratio, "geometric_mean": ..., "max_difference": ...}}."""
    rounds, seconds = (3, 3.0) if smoke else (7, 8.0)
    ratios: dict[str, float] = {}
    worst = 0.0
    print(f"{'task':22} {'ours':>8} {'theirs':>8}  steps/s   ratio (min-max)    difference  peak MB per worker")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for task in TASKS:
            make = PlainEnvironment(task, None)
            num_envs = WORKERS * ENVS_PER_WORKER
            compared = [0, num_envs - 1] if smoke else list(range(num_envs))
            config = ManiSkillConfig(task, reward=REWARD, num_envs=num_envs, workers=WORKERS)
            off, ours, theirs, memory_ours, memory_theirs = compare(config, make, rounds, seconds, compared, pool)
            each = [a / b for a, b in zip(ours, theirs, strict=True)]
            ratios[task] = round(statistics.median(each), 3)
            worst = max(worst, off)
            print(
                f"{task:22} {statistics.median(ours):8.0f} {statistics.median(theirs):8.0f}  {'':7}"
                f"{ratios[task]:7.2f} ({min(each):.2f}-{max(each):.2f})  {off:10.1e}"
                f"  {memory_ours:.0f} ({ENVS_PER_WORKER} envs), {memory_theirs:.0f} (1 env)",
                flush=True,
            )
    summary: dict[str, Any] = dict(ratios)
    summary["geometric_mean"] = round(statistics.geometric_mean(ratios.values()), 3)
    summary["max_difference"] = worst
    return {"maniskill_vs_async_vector_env": summary}
