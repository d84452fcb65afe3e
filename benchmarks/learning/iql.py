"""Does our implicit Q-learning learn from recorded episodes as well as d3rlpy's?

    uv run python benchmarks/learning/iql.py --data runs/iql/mixed.h5 --results benchmarks/results/learning_iql.json

Records episodes of mixed quality with our soft actor-critic on FetchReachDense-v4: as many in the weights after
800, 1600 and 2400 steps, from hardly trained to good, those that fail included. Then both sides learn from that file
with the same networks, batches, rates and number of updates, in turns, each in a process of its own with one thread,
and are judged by our evaluation on the same 20 episodes. d3rlpy wants an older Gymnasium, so `uv run --with` gives it
an environment on top of ours; that needs the network once. The file of results is added to after every run, and what
it holds is not run again. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from comparison import TOLERATED, lower_bound
from peers import Peer

from embodied_rl.algorithms.iql import IQLConfig
from embodied_rl.config import DemonstrationsConfig, EvaluationConfig, LoggingConfig, RunConfig
from embodied_rl.data.demonstrations import DemonstrationEpisode, read, write
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketList
from embodied_rl.policies.gaussian_mlp import GaussianMLPConfig
from embodied_rl.recipes.learning import fetch_reach_sac
from embodied_rl.specs import connect
from embodied_rl.training import checkpoint
from embodied_rl.training.evaluation import EvaluationResult, run_episodes
from embodied_rl.training.report import versions
from embodied_rl.training.run import train
from embodied_rl.training.streams import Streams
from embodied_rl.types import ActionSample

D3RLPY = "d3rlpy==2.8.1"
STAGES, STAGE_STEPS, STAGE_EPISODES = 3, 800, 80
BATCH, HIDDEN, RATE = 256, (64, 64), 3e-4
GAMMA, EXPECTILE, INVERSE_TEMPERATURE, REWARD_SCALE = 0.9, 0.7, 3.0, 10.0
EPISODES = 20
LIMIT = 1200
"""Seconds; a run that takes longer has failed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="HDF5 file; recorded when it does not exist")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sides", nargs="+", default=["ours", "peer"], choices=["ours", "peer"])
    parser.add_argument("--one", nargs=3, metavar=("SIDE", "SEED", "FILE"), help="used by this script itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        side, seed, file = arguments.one
        found = {"ours": ours, "peer": peer}[side](arguments.data, int(seed), arguments.updates)
        Path(file).write_text(json.dumps(found))
        return
    if not arguments.data.exists():
        record(arguments.data)
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"runs": {}}
    if known.get("updates", arguments.updates) != arguments.updates:
        parser.error(f"{arguments.results} is of {known['updates']} updates: give --updates or another file")
    runs = known["runs"]
    for seed, side in product(map(str, arguments.seeds), arguments.sides):
        if side not in runs.setdefault(seed, {}):
            runs[seed][side] = run(arguments, side, seed)
            settings = f"--data {arguments.data} --results {arguments.results} --updates {arguments.updates}"
            content = {"command": f"uv run python benchmarks/learning/iql.py {settings}", **summary(runs, arguments)}
            arguments.results.write_text(json.dumps(content | {"runs": runs}, indent=1) + "\n")
    print(json.dumps(summary(runs, arguments)))


def run(arguments: argparse.Namespace, side: str, seed: str) -> dict[str, Any]:
    """One run of one side, in its own process."""
    python = ["uv", "run", "--no-sync", "--with", D3RLPY, "python"] if side == "peer" else [sys.executable]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.json"
        settings = ["--data", str(arguments.data), "--results", str(file), "--updates", str(arguments.updates)]
        command = [*python, __file__, *settings, "--one", side, seed, str(file)]
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, timeout=LIMIT, env=os.environ | threads)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads(file.read_text())
    found["cpu_seconds"] = round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1)
    found["wall_seconds"] = round(time.monotonic() - began, 1)
    print(seed, side, found["final"], f"{found['cpu_seconds']} CPU seconds", flush=True)
    return found


def summary(runs: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns of all seeds, and how much worse ours can be, as far as both sides have run."""
    machine = f"{os.cpu_count()} CPU cores, one thread for each run, {platform.machine()}"
    found: dict[str, Any] = {"peer_is": D3RLPY, "machine": machine, "updates": arguments.updates}
    episodes = read(arguments.data)
    returns = [float(np.sum(episode.rewards)) for episode in episodes if episode.rewards is not None]
    found["data"] = {
        "episodes": len(episodes),
        "steps": sum(len(episode) for episode in episodes),
        "success_at_end": mean(float(episode.success[-1]) for episode in episodes if episode.success is not None),
        "mean_return": mean(returns),
        "returns_of_stages": [mean(returns[i : i + STAGE_EPISODES]) for i in range(0, len(returns), STAGE_EPISODES)],
    }
    for measure in ("mean_return", "success_at_end"):
        found[measure] = {
            side: {seed: sides[side]["final"][measure] for seed, sides in runs.items() if side in sides}
            for side in ("ours", "peer")
        }
    both = [sides for sides in runs.values() if {"ours", "peer"} <= sides.keys()]
    if len(both) > 1:
        differences = [sides["ours"]["final"]["mean_return"] - sides["peer"]["final"]["mean_return"] for sides in both]
        gained = mean(sides["peer"]["final"]["mean_return"] - sides["peer"]["initial"]["mean_return"] for sides in both)
        bound, allowed = lower_bound(differences), -TOLERATED * gained
        assert bound is not None
        found |= {
            "mean_difference": mean(differences),
            "lower_bound": bound,
            "at_least": allowed,
            "as_good": bound >= allowed,
            "mean_cpu_seconds": {side: mean(sides[side]["cpu_seconds"] for sides in both) for side in ("ours", "peer")},
        }
    return found


def ours(data: Path, seed: int, updates: int) -> dict[str, Any]:
    """`embodied-rl train` with the settings of both sides."""
    algorithm = IQLConfig(
        steps=updates,
        batch_size=BATCH,
        gamma=GAMMA,
        reward_scale=REWARD_SCALE,
        expectile=EXPECTILE,
        inverse_temperature=INVERSE_TEMPERATURE,
        learning_rate=RATE,
        critic_learning_rate=RATE,
        critic_hidden=HIDDEN,
        schedule="constant",
    )
    recipe = fetch_reach_sac()
    config = RunConfig(
        recipe="fetch_reach_iql",
        simulator=recipe.simulator,
        policy=GaussianMLPConfig(hidden=HIDDEN, activation="relu", value_hidden=(8,)),
        algorithm=algorithm,
        demonstrations=DemonstrationsConfig(episodes=None, path=str(data)),
        evaluation=replace(recipe.evaluation, episodes=EPISODES),
        logging=LoggingConfig(tensorboard=False),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, Path(folder) / "run")
    found = {each["name"]: each for each in result["evaluations"]}
    return {"initial": found["initial"], "final": found["final"], "versions": result["versions"]}


class D3RLPyPeer(Peer):
    def act(self, inputs: dict[str, torch.Tensor], deterministic: bool, noise: Any) -> ActionSample:
        actions = np.asarray(self.model.predict(inputs["state"].numpy()), np.float32)
        return ActionSample(torch.from_numpy(actions)[:, None].clamp(-1, 1), {})


def peer(data: Path, seed: int, updates: int) -> dict[str, Any]:
    """d3rlpy's defaults are those of the paper, as ours; what differs from them is what is set."""
    import d3rlpy  # pyright: ignore[reportMissingImports]

    d3rlpy.seed(seed)
    episodes = read(data)
    dataset = d3rlpy.dataset.MDPDataset(
        np.concatenate([episode.states[:-1] for episode in episodes]),
        np.concatenate([episode.actions for episode in episodes]),
        np.concatenate([np.asarray(episode.rewards) for episode in episodes]),
        np.concatenate([episode.terminated for episode in episodes]).astype(np.float32),
        np.concatenate([episode.truncated & ~episode.terminated for episode in episodes]).astype(np.float32),
    )
    networks = d3rlpy.models.VectorEncoderFactory(list(HIDDEN))
    algorithm = d3rlpy.algos.IQLConfig(
        batch_size=BATCH,
        gamma=GAMMA,
        expectile=EXPECTILE,
        weight_temp=INVERSE_TEMPERATURE,
        actor_learning_rate=RATE,
        critic_learning_rate=RATE,
        actor_encoder_factory=networks,
        critic_encoder_factory=networks,
        value_encoder_factory=networks,
        observation_scaler=d3rlpy.preprocessing.StandardObservationScaler(),
        reward_scaler=d3rlpy.preprocessing.MultiplyRewardScaler(REWARD_SCALE),
    ).create()
    algorithm.build_with_dataset(dataset)
    simulator_config = replace(fetch_reach_sac().simulator, num_envs=EPISODES)
    streams = Streams(seed, 1, 1, EPISODES)
    with simulator_config.build(streams) as simulator:
        player: Any = D3RLPyPeer(algorithm, simulator)
        connection = connect(player.observation_spec, player.action_spec, player.observation_spec, player.action_spec)

        def judge(name: str) -> dict[str, Any]:
            worker = RolloutWorker(simulator, player, connection, seed)
            return EvaluationResult.of(name, run_episodes(worker, streams.episodes("test"))).to_dict()

        for scaler in (algorithm.observation_scaler, algorithm.reward_scaler):
            scaler.fit_with_transition_picker(dataset.episodes, dataset.transition_picker)
        initial = judge("initial")
        algorithm.fit(
            dataset,
            n_steps=updates,
            n_steps_per_epoch=updates,
            show_progress=False,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        )
        final = judge("final")
    packages = {name: version(name) for name in ("d3rlpy", "gymnasium")}
    return {"initial": initial, "final": final, "versions": versions() | packages}


def record(path: Path) -> None:
    """The dataset: `STAGE_EPISODES` episodes in the weights after every `STAGE_STEPS` steps, acting as in training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config, found = fetch_reach_sac(), list[DemonstrationEpisode]()
    with tempfile.TemporaryDirectory() as folder:
        for stage in range(1, STAGES + 1):
            training = replace(config.training, env_steps=stage * STAGE_STEPS, evaluate_every=0)
            out = Path(folder) / "run"
            train(replace(config, training=training, evaluation=EvaluationConfig(episodes=1)), out, resume=stage > 1)
            newest = checkpoint.latest(out / "checkpoints")
            assert newest is not None
            streams = Streams(config.seed, 1, 1, 1)
            with replace(config.simulator, num_envs=8).build(streams) as simulator:
                policy = config.policy.build(simulator.observation_spec, simulator.action_spec)
                policy.load_state_dict(checkpoint.load(newest)["policy"])
                specs = (simulator.observation_spec, simulator.action_spec)
                worker = RolloutWorker(simulator, policy, connect(*specs, *specs), config.seed)
                first = streams.first("demonstrations") + (stage - 1) * STAGE_EPISODES
                found += episodes(worker, streams, range(first, first + STAGE_EPISODES))
                task, control = simulator.tasks[0].name, simulator.action_spec.control
    write(path, found, task, control)


def episodes(worker: RolloutWorker, streams: Streams, tickets: range) -> list[DemonstrationEpisode]:
    """Whole episodes of a policy of single actions, in the order of their tickets."""
    worker.restart(TicketList(tickets))
    steps: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    last: dict[int, np.ndarray] = {}
    while len(last) < len(tickets):
        worker.begin()
        decision = worker.finish()
        result = decision.result
        for row in np.flatnonzero(result.valid[:, 0]):
            assert result.success is not None
            flags = [bool(each[row, 0]) for each in (result.success, result.terminated, result.truncated)]
            step = (decision.inputs["state"][row], decision.sample.actions[row, 0], result.reward[row, 0], *flags)
            steps[int(decision.tickets[row])].append(step)
        for i, row in enumerate(result.final_rows):
            assert decision.final_inputs is not None
            last[int(decision.tickets[row])] = decision.final_inputs["state"][i].numpy().copy()
    found = []
    for ticket in tickets:
        states, actions, *columns = zip(*steps[ticket], strict=True)
        rewards, success, terminated, truncated = map(np.array, columns)
        found.append(
            DemonstrationEpisode(
                states=np.stack([*(np.array(state) for state in states), last[ticket]]),
                actions=np.stack([np.array(action) for action in actions]),
                rewards=rewards.astype(np.float32),
                success=success,
                terminated=terminated,
                truncated=truncated,
                seed=streams.state(ticket).seed,
            )
        )
    return found


if __name__ == "__main__":
    main()
