"""Every family of policies in every simulator of the matrix: what the network sees and what the simulator executes,
against slow conversions written from the original code; and updates that change the trainable parameters, all of them
and nothing else."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matrix_expected import (
    DIGITS,
    decoded,
    executed,
    gr00t_levels,
    gr00t_prompts,
    normalised_state,
    openvla_pixels,
    openvla_prompts,
    pi0_pixels,
    pi0_prompts,
    pi05_prompts,
)
from matrix_families import (
    CHUNK,
    FAMILIES,
    PAD,
    PIXELS,
    Dataset,
    build,
    policy_state,
    publish,
    sees_state,
    unit_gripper,
)
from matrix_simulators import GROUP, ROWS, STEPS, Recorder

from embodied_rl.algorithms.grpo import GRPOConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.specs import connect
from embodied_rl.training.on_policy import EpisodeWorkflow, SegmentWorkflow
from embodied_rl.types import Observation

families = pytest.mark.parametrize("family", FAMILIES)


class Pair:
    """A family's checkpoint acting in a simulator. `network` holds what its layers were given since the last look."""

    def __init__(self, simulator: Recorder, family: str, folder: Path, **settings: Any) -> None:
        if not simulator.seen:
            simulator.reset(tickets=np.arange(ROWS))
        self.simulator, self.family = simulator, family
        self.data: Dataset = publish(family, simulator, folder)
        self.policy = build(family, simulator, folder, **settings)
        specs = simulator.observation_spec, simulator.action_spec
        self.connection = connect(*specs, self.policy.observation_spec, self.policy.action_spec)
        self.worker = RolloutWorker(simulator, self.policy, self.connection, seed=0)
        self.network: dict[str, list[np.ndarray]] = defaultdict(list)

    def listen(self) -> None:
        """From now on, note what the layers behind images, state and prompt are given, and what comes out."""
        network = self.policy.network
        if self.family.startswith("openvla"):
            vision, text = network.vision_backbone, network.language_model.model
            layers = {"dino": vision.featurizer.patch_embed, "siglip": vision.fused_featurizer.patch_embed}
            layers |= {"prompt": text.embed_tokens} | (
                {"state": network.proprio_projector} if self.family == "openvla_oft" else {}
            )
        elif self.family == "gr00t":
            layers = {"pixels": network.eagle.vision_model, "state": network.action_head.state_encoder}
            layers |= {"prompt": network.eagle.language_model["model"].embed_tokens}
        else:
            layers = {"pixels": network.vision, "prompt": network.language.embed_tokens}
            layers |= {"state": network.state_proj} if self.family == "pi0" else {}
        for name, layer in layers.items():
            layer.register_forward_pre_hook(self._note(name), with_kwargs=True)
        convert = self.policy.to_simulator

        def noted(output: torch.Tensor, *inputs: Any) -> torch.Tensor:
            self.network["output"].append(output.numpy())
            return convert(output, *inputs)

        self.policy.to_simulator = noted

    def _note(self, name: str) -> Any:
        return lambda _, given, named: self.network[name].append((*given, *named.values())[0].numpy())

    @property
    def opens(self) -> int | None:
        """The sign that opens the simulator's gripper where the data's is another."""
        return self.simulator.action_spec.gripper_open if unit_gripper(self.simulator, self.family) else None

    @property
    def views(self) -> tuple[str, ...]:
        """The simulator's cameras in the network's order."""
        return self.simulator.place.cameras[: 1 if self.family == "openvla" else None]


@families
def test_network_and_simulator_are_given_the_published_conversions(
    simulator: Recorder, family: str, tmp_path: Path
) -> None:
    pair = Pair(simulator, family, tmp_path)
    pair.listen()
    pair.worker.restart(TicketCounter(0))
    for _ in range(2):  # at the first observation, and after a chunk
        pair.network.clear()
        seen = simulator.seen[-1]
        pair.worker.begin()
        decision = pair.worker.finish()
        check_inputs(pair, seen, decision.inputs)
        tokens = decision.sample.trace.get("tokens")
        output = pair.network["output"][0]
        if tokens is not None:
            np.testing.assert_array_equal(output, decoded(tokens.numpy()).reshape(output.shape))
        expected = executed(family, output, pair.data, pair.opens)
        assert simulator.told[-1].shape == (ROWS, 1 if family == "openvla" else CHUNK, 7)
        np.testing.assert_allclose(simulator.told[-1], expected, rtol=0, atol=1e-6)
    first, second = simulator.seen[-3], simulator.seen[-2]
    assert not np.array_equal(first.state, second.state) and len(np.unique(first.state, axis=0)) == ROWS // GROUP


def test_relative_actions_of_pi0_start_at_the_state_the_simulator_showed(simulator: Recorder, tmp_path: Path) -> None:
    pair = Pair(simulator, "pi0", tmp_path, relative_to_state=6)
    pair.listen()
    pair.worker.restart(TicketCounter(0))
    for _ in range(2):
        pair.network.clear()
        seen = simulator.seen[-1]
        pair.worker.begin()
        inputs = pair.worker.finish().inputs
        check_inputs(pair, seen, inputs)
        state = policy_state(simulator, seen.state)
        expected = executed("pi0", pair.network["output"][0], pair.data, pair.opens, state[:, :6])
        np.testing.assert_allclose(simulator.told[-1], expected, rtol=0, atol=1e-6)
        plain = executed("pi0", pair.network["output"][0], pair.data, pair.opens)
        assert np.abs(simulator.told[-1] - plain)[..., :6].max() > 0.1
        np.testing.assert_allclose(simulator.told[-1][..., 6], plain[..., 6], rtol=0, atol=1e-6)


def check_inputs(pair: Pair, seen: Observation, inputs: dict[str, torch.Tensor]) -> None:
    """`inputs` are what the policy makes of `seen` before its network."""
    images = [seen.images[view] for view in pair.views]
    if pair.family.startswith("openvla"):
        dino, siglip = (np.concatenate(pair.network[name]) for name in ("dino", "siglip"))
        by_row = [image for row in zip(*images, strict=True) for image in row]
        expected = openvla_pixels(by_row, evaluated_in_libero=pair.simulator.place.name == "libero")
        level = 1 / 255 / np.array(PIXELS["std"]).reshape(6, 1, 1)
        wrong = np.abs(np.concatenate([dino, siglip], 1) - expected) / level
        # float32 rounds some numbers that lie between two levels the other way
        assert wrong.max() < 1.01 and (wrong > 0.01).mean() < 0.002
    elif pair.family == "gr00t":
        levels = (pair.network["pixels"][0].astype(np.float64) + 1) / 2 * 255
        expected = gr00t_levels([image for row in zip(*images, strict=True) for image in row])
        assert np.abs(levels - np.rint(levels)).max() < 1e-3
        assert (np.rint(levels) <= np.floor(expected + DIGITS)).all()
        assert (np.rint(levels) >= np.floor(expected - DIGITS)).all()
    else:
        np.testing.assert_allclose(pair.network["pixels"][0], pi0_pixels(np.concatenate(images)), rtol=0, atol=1e-6)

    texts = [seen.instructions[i] for i in seen.instruction_id]
    assert len(set(texts)) == pair.simulator.place.config.num_tasks
    state = policy_state(pair.simulator, seen.state).astype(np.float64)
    normalised = normalised_state(pair.family, state, pair.data)
    prompts = {
        "openvla": lambda: openvla_prompts(texts),
        "openvla_oft": lambda: openvla_prompts(texts),
        "pi0": lambda: pi0_prompts(texts),
        "pi05": lambda: (
            pi05_prompts(texts, normalised) if sees_state(pair.simulator, "pi05") else pi0_prompts(texts, "pi05")
        ),
        "gr00t": lambda: gr00t_prompts(texts, len(images)),
    }
    prompt = inputs["prompt" if pair.family.startswith("openvla") else "tokens"]
    assert prompt.tolist() == prompts[pair.family]()
    used = pair.network["prompt"][0]  # padding that nothing sees may be left out: OpenVLA's is in front
    padding, first = (PAD, prompt.shape[1] - used.shape[1]) if "prompt" in inputs else (0, 0)
    np.testing.assert_array_equal(used, prompt[:, first : first + used.shape[1]])
    assert (prompt == padding).sum() - torch.from_numpy(used == padding).sum() == prompt.numel() - used.size
    if pair.family not in ("openvla", "pi05"):
        given = pair.network["state"][0].reshape(ROWS, -1)
        np.testing.assert_allclose(given[:, : state.shape[1]], normalised, rtol=0, atol=1e-6)
        assert not given[:, state.shape[1] :].any()


@families
def test_whatever_the_network_says_is_converted_and_what_it_calls_open_opens(
    simulator: Recorder, family: str, tmp_path: Path
) -> None:
    pair = Pair(simulator, family, tmp_path)
    policy, opens = pair.policy, simulator.action_spec.gripper_open
    if family.startswith("openvla"):
        tokens = torch.arange(384 - 1, 640).repeat_interleave(7).reshape(-1, 7)  # all, and one that is no action
        actions, output = policy.actions(tokens), decoded(tokens.numpy()).reshape(-1, 1, 7)
    else:
        output = torch.linspace(-3, 3, 61)[:, None, None].repeat(1, 1, policy.width)
        actions, output = policy.to_simulator(output, {}), output.numpy()
    told = pair.connection.action(actions.numpy())
    np.testing.assert_allclose(told, executed(family, output, pair.data, pair.opens), rtol=0, atol=1e-6)
    assert told.dtype == np.float32 and np.abs(told).max() <= 1

    # closed, then open: the extremes of what the network can say about the gripper
    gripper = np.sort(told[..., 6].ravel() * opens)[[0, -1]]
    assert gripper[0] < -0.2 and gripper[1] > 0.2
    if unit_gripper(simulator, family):
        assert gripper.tolist() == [-1, 1]
    simulator.reset(tickets=np.zeros(ROWS, np.int64))
    chunk = np.zeros((ROWS, STEPS, 7), np.float32)
    chunk[:, :, 6] = opens * np.repeat(gripper, ROWS // 2)[:, None]
    result = simulator.step(chunk)
    assert result.final_observation is not None
    finger = np.abs(result.final_observation.state[:, simulator.place.finger])
    assert finger[ROWS // 2 :].min() > finger[: ROWS // 2].max() + 1e-3


# -- updates --------------------------------------------------------------------------------------------------------


def bits(policy: Any) -> dict[str, bytes]:
    """Parameters and buffers by name."""
    return {name: value.numpy().tobytes() for name, value in policy.state_dict().items()}


def trainable(policy: Any) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def update_twice(pair: Pair, config: Any) -> tuple[list[str], list[str]]:
    """Two iterations as a run makes them: (names that are trainable and did not change by a bit, names that did and
    are not trainable)."""
    algorithm = config.build(pair.policy, 0)
    generator = torch.Generator().manual_seed(0)
    workflow = EpisodeWorkflow(pair.worker, algorithm, generator)
    if isinstance(config, PPOConfig):
        workflow = SegmentWorkflow(pair.worker, algorithm, STEPS // CHUNK, generator)
    workflow.restart(TicketCounter(0))
    before = bits(pair.policy)
    for _ in range(2):
        workflow.iterate(border=False)
    assert algorithm.updates == 2
    wanted = trainable(pair.policy)
    changed = {name for name, value in bits(pair.policy).items() if value != before[name]}
    return sorted(wanted - changed), sorted(changed - wanted)


ONCE = {"epochs": 1, "minibatches": 1}
PPO = PPOConfig(critic_warmup=0, **ONCE)
GRPO = GRPOConfig(group_size=GROUP, groups_per_iteration=ROWS // GROUP, **ONCE)
"""An iteration is one update."""


def without_critic(family: str) -> dict[str, Any]:
    """Settings of a policy whose value head nobody trains."""
    if family.startswith("openvla"):
        return {"value_head": False}
    return {"frozen": ("vision", "language", "value")}


@families
def test_two_updates_of_ppo_change_what_is_trainable(simulator: Recorder, family: str, tmp_path: Path) -> None:
    assert update_twice(Pair(simulator, family, tmp_path), PPO) == ([], [])


@pytest.mark.slow
@families
def test_two_updates_of_grpo_change_what_is_trainable(simulator: Recorder, family: str, tmp_path: Path) -> None:
    pair = Pair(simulator, family, tmp_path, **without_critic(family))
    with simulator.returns(lambda ticket: ticket % 3):  # nothing that a random policy does would earn a reward
        assert update_twice(pair, GRPO) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("config", [PPO, GRPO], ids=["ppo", "grpo"])
@families
def test_adapters_are_all_that_changes_in_what_they_adapt(
    simulator: Recorder, family: str, config: Any, tmp_path: Path
) -> None:
    pair = Pair(simulator, family, tmp_path, lora_rank=2, **(without_critic(family) if config is GRPO else {}))
    trained = trainable(pair.policy)
    adapted = {name.rpartition(".lora_")[0] for name in trained if ".lora_" in name}
    assert len(adapted) > 5 and trained.isdisjoint(f"{name}.base_layer.weight" for name in adapted)
    with simulator.returns(lambda ticket: ticket % 3):
        assert update_twice(pair, config) == ([], [])


FROZEN = {"openvla": ("vision", "projector"), "openvla_oft": ("language",), "gr00t": ("vision",)}
FROZEN |= {"pi0": ("vision",), "pi05": ("expert",)}


@pytest.mark.slow
@families
def test_frozen_groups_stay_as_they_are(simulator: Recorder, family: str, tmp_path: Path) -> None:
    pair = Pair(simulator, family, tmp_path, frozen=FROZEN[family])
    groups = pair.policy.parameter_groups()
    for name, group in groups.items():
        assert any(parameter.requires_grad for parameter in group) == (bool(group) and name not in FROZEN[family]), name
    assert update_twice(pair, PPO) == ([], [])
