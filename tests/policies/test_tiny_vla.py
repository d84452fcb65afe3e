"""The small VLA: it reads pixels and words, fits any simulator with a camera, and takes every road that π₀ takes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_toys import roll_out, simulate

from embodied_rl import registry
from embodied_rl.algorithms.imitation import ImitationConfig
from embodied_rl.algorithms.ppo import PPOConfig
from embodied_rl.config import from_dict, to_dict
from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.pi0.preprocessing import Bytes, load_tokenizer, pi0_prompt
from embodied_rl.policies.tiny_vla import TINY, TOKENIZER, TinyVLAConfig, read_tokenizer
from embodied_rl.recipes.quickstart import quickstart
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, connect
from embodied_rl.types import Observation

TOP = ObservationSpec(state=2, cameras={"top": CameraSpec(64, 64)})
ACTION = ActionSpec((-1.0, -1.0), (1.0, 1.0), (0.0, 0.0))
QUICK = {"prompt_length": 16, "horizon": 2, "chunk": 2}


def build(seen=TOP, action=ACTION, **settings):
    torch.manual_seed(0)
    return TinyVLAConfig(**(QUICK | settings)).build(seen, action)


# -- pixels and words -------------------------------------------------------------------------------------------------


def two_targets(rows, seed):
    """(observation, where each row's target is, where its other one is), [rows,2] in [-1, 1]: a red and a blue square
    in two of nine cells. Nothing but the image tells where, nothing but the instruction which."""
    rng = np.random.default_rng(seed)
    cells = np.stack([rng.permutation(9)[:2] for _ in range(rows)])
    images = np.zeros((rows, 48, 48, 3), np.uint8)
    for image, squares in zip(images, cells, strict=True):
        for channel, cell in zip((0, 2), squares, strict=True):
            top, left = 16 * (cell // 3), 16 * (cell % 3)
            image[top : top + 16, left : left + 16, channel] = 255
    wanted = rng.integers(0, 2, rows)
    places = torch.from_numpy(np.stack([cells // 3, cells % 3], -1) - 1).float()
    observation = Observation(
        images={"top": images},
        image_mask={"top": np.ones(rows, bool)},
        state=np.zeros((rows, 2), np.float32),
        instruction_id=wanted,
        task=np.zeros(rows, np.int64),
        instructions=("reach the red cube", "reach the blue cube"),
    )
    return observation, places[range(rows), wanted], places[range(rows), 1 - wanted]


def test_learns_to_find_what_it_is_told_to_find():
    torch.set_num_threads(1)
    sight = replace(TINY.vision, image=48)  # a cell is a patch: places without finer ones are learned in no time
    policy = build(prompt_length=8, network=replace(TINY, vision=sight))
    observation, target, _ = two_targets(4096, seed=0)
    inputs, actions = policy.prepare(observation), target[:, None].expand(-1, 2, -1)
    cloning = ImitationConfig(learning_rate=5e-4, batch_size=32, steps=300).build(policy, 0)
    generator = torch.Generator().manual_seed(0)
    for rows in torch.randint(len(target), (300, 32), generator=generator):
        batch = {"inputs": {name: value[rows] for name, value in inputs.items()}, "actions": actions[rows]}
        cloning.update(batch | {"valid": torch.ones(32, 2, dtype=torch.bool)}, generator)

    seen, target, other = two_targets(64, seed=1)
    black = replace(seen, images={"top": np.zeros_like(seen.images["top"])})
    told_the_other = replace(seen, instruction_id=1 - seen.instruction_id)

    def error(observation, place):
        actions = policy.act(policy.prepare(observation), deterministic=True).actions[:, 0]
        return float((actions - place).abs().mean())

    assert error(seen, target) < 0.15
    assert error(black, target) > 0.4
    assert error(told_the_other, target) > 0.4
    assert error(told_the_other, other) < 0.15


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "noise", "joint": True, "denoise_steps": 2, "frozen": ("vision",), "lora_rank": 2}],
    ids=["sde", "noise_lora"],
)
def test_keeps_the_contract(settings):
    check(build(**settings))


def test_is_registered_and_its_settings_survive_json():
    assert registry.policies.load("tiny_vla") is TinyVLAConfig
    run = replace(quickstart(), policy=TinyVLAConfig(frozen=("vision",)))
    assert from_dict(json.loads(json.dumps(to_dict(run)))) == run


def test_ppo_improves_it_in_every_part():
    with simulate() as simulator:
        policy = build(simulator.observation_spec, simulator.action_spec)
        ppo = PPOConfig(epochs=1, minibatches=1, critic_warmup=0).build(policy, 0)
        worker, generator = roll_out(simulator, policy), torch.Generator().manual_seed(0)
        groups = policy.parameter_groups()
        before = {name: [p.detach().clone() for p in group] for name, group in groups.items()}
        for version in range(2):
            assert abs(ppo.learn(worker.collect(4, version), generator)["approx_kl"]) < 1e-6
    for name, group in groups.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[name], group, strict=True)), name


# -- any simulator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "cameras"),
    [(0, ["top"]), (39, ["corner", "behind"]), (5, ["hand_camera", "base_camera", "left", "right"])],
    ids=["no_state", "many_numbers", "many_cameras"],
)
def test_fits_any_simulator_with_a_camera(state, cameras):
    seen = ObservationSpec(state, cameras={name: CameraSpec(20, 30) for name in cameras})
    policy = build(seen)
    assert list(policy.observation_spec.cameras) == cameras[:3]
    assert policy.width == max(state, ACTION.dim)
    connect(seen, ACTION, policy.observation_spec, policy.action_spec)
    sample = policy.act(policy.prepare(synthesise(policy.observation_spec, rows=4)))
    assert sample.actions.shape == (4, 2, 2)


def test_sees_the_cameras_it_is_told_to_see():
    seen = ObservationSpec(2, cameras={name: CameraSpec(20, 30) for name in ("top", "side")})
    assert build(seen, cameras={"base_0_rgb": "side"}).views == {"base_0_rgb": "side"}


def test_refuses_what_it_cannot_serve():
    with pytest.raises(SpecError, match="observation mode with images"):
        build(ObservationSpec(state=4))
    with pytest.raises(SpecError, match="one of 3 choices"):
        build(action=ActionSpec((0.0,), (2.0,), (0.0,), choices=3))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_saved_policy_brings_its_tokenizer_and_acts_the_same(tmp_path):
    policy = build(lora_rank=2)
    policy.set_statistics(np.array([1.0, 2.0]), np.array([0.5, 3.0]))
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()
    again = build(checkpoint=str(tmp_path))
    observation = synthesise(policy.observation_spec)
    ours, theirs = (each.act(each.prepare(observation), deterministic=True) for each in (policy, again))
    torch.testing.assert_close(ours.actions, theirs.actions)
    torch.testing.assert_close(ours.value, theirs.value)


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def test_any_text_encodes_and_comes_back_in_lower_case():
    tokenizer = read_tokenizer(TOKENIZER)
    for text in ("Pick up the red cube", "öffne die Schublade 12", "手を 🤖\t(x)\n", ""):
        ids = tokenizer.encode(text)
        assert all(0 <= token < TinyVLAConfig().network.vocabulary for token in ids)
        assert tokenizer.decode(ids).strip() == text.lower().strip()
    assert len(set(tokenizer.encode("0123456789"))) == 10 + 1  # a space in front of the first word


@pytest.mark.parametrize("simulator", ["libero", "maniskill", "metaworld"])
def test_the_simulators_instructions_fit_the_prompt(simulator):
    tokenizer = read_tokenizer(TOKENIZER)
    lengths = [len(pi0_prompt(tokenizer, task.instruction)) for task in registry.tasks(simulator)]
    assert lengths
    assert max(lengths) <= TinyVLAConfig().prompt_length


def test_words_are_tokens_wherever_they_stand():
    tokenizer = read_tokenizer(TOKENIZER)
    (first,) = tokenizer.encode("pick")
    assert tokenizer.encode("then PICK")[-1] == first
    assert len(tokenizer.encode("put both moka pots on the stove")) <= 8


def test_transformers_reads_the_same_tokenizer():
    theirs, ours = load_tokenizer(str(TOKENIZER)), read_tokenizer(TOKENIZER)
    assert theirs.bos_token_id == ours.bos_token_id == Bytes.bos_token_id
    for text in ("pick up the red cube", "手 12"):
        assert pi0_prompt(theirs, text) == pi0_prompt(ours, text)


def test_another_tokenizer_is_named_by_its_folder(tmp_path):
    assert build(tokenizer="bytes", prompt_length=48).prepare(synthesise(TOP))["tokens"][0, 1] == 3 + ord("p")
    with pytest.raises(UserError, match=r"no folder .*absent"):
        build(tokenizer=str(tmp_path / "absent")).prepare(synthesise(TOP))
