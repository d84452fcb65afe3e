"""LeRobot's own loaders on the folders that are written for it: real sizes by their keys, a tiny one by its actions."""

import math

import numpy as np
import pytest
import torch

from embodied_rl.policies.check import synthesise
from embodied_rl.policies.pi0.checkpoint import to_published
from embodied_rl.policies.pi0.config import PI0, PI05, Pi0Config, Pi05Config, tiny
from embodied_rl.policies.pi0.network import Network
from embodied_rl.policies.pi0.preprocessing import Bytes
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

SEEN = ObservationSpec(state=5, cameras={"agentview": CameraSpec(32, 32), "wrist": CameraSpec(32, 32)})
ACTION = ActionSpec((-math.inf,) * 3, (math.inf,) * 3, (0.0,) * 3)
LENGTH = 96


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def adaptive(request):
    return request.param


def lerobot(adaptive):
    """(LeRobot's module, its configuration class, its policy class)."""
    if adaptive:
        from lerobot.policies.pi05 import configuration_pi05, modeling_pi05

        return modeling_pi05, configuration_pi05.PI05Config, modeling_pi05.PI05Policy
    from lerobot.policies.pi0 import configuration_pi0, modeling_pi0

    return modeling_pi0, configuration_pi0.PI0Config, modeling_pi0.PI0Policy


def test_published_sizes_have_lerobots_keys_and_shapes(adaptive):
    _, configuration, policy_class = lerobot(adaptive)
    config = configuration(device="cpu")
    config.device = "meta"
    with torch.device("meta"):
        theirs = policy_class(config)
        ours = to_published(
            Network(PI05 if adaptive else PI0, 50).state_dict(), torch.empty(257_152, 1024), lerobot=True
        )
    theirs.load_state_dict(theirs._fix_pytorch_state_dict_keys(ours, config), strict=True)


def shrink(monkeypatch, module, sizes):
    """LeRobot builds two sizes only; give it ours."""
    vision, known = sizes.vision, module.CONFIG_MAPPING
    build = module.PaliGemmaForConditionalGenerationWithPiGemma

    def paligemma(config):
        config.text_config.vocab_size = sizes.vocabulary
        for name, value in {
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "patch_size": vision.patch,
            "image_size": vision.image,
            "projection_dim": sizes.language.width,
        }.items():
            setattr(config.vision_config, name, value)
        return build(config=config)

    def gemma(variant):
        part = {"gemma_2b": sizes.language, "gemma_300m": sizes.expert}[variant]
        return module.GemmaConfig(part.width, part.depth, part.mlp, part.heads, part.kv_heads, part.head_dim)

    configs = {
        "paligemma": known["paligemma"],
        "gemma": lambda **settings: known["gemma"](**{**settings, "vocab_size": sizes.vocabulary}),
    }
    monkeypatch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", paligemma)
    monkeypatch.setattr(module, "get_gemma_config", gemma)
    monkeypatch.setattr(module, "CONFIG_MAPPING", configs)


def tokenise(texts, max_length, **_):
    """What LeRobot asks of a tokenizer, from bytes."""
    rows = [[Bytes.bos_token_id, *Bytes().encode(text)] for text in texts]
    padded = [row + [0] * (max_length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (max_length - len(row)) for row in rows]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def test_lerobot_acts_as_we_do_from_the_folder_we_wrote(adaptive, tmp_path, monkeypatch):
    module, _, policy_class = lerobot(adaptive)
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

    torch.manual_seed(0)
    kind = Pi05Config if adaptive else Pi0Config
    config = kind(network=tiny(adaptive), tokenizer="bytes", prompt_length=LENGTH, horizon=4, chunk=4, denoise_steps=3)
    ours = config.build(SEEN, ACTION)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    ours.set_statistics(np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5))
    spread = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "q01": [-1.0, -2.0, -3.0], "q99": [1.5, 2.0, 3.0]}
    ours.action_normaliser.fit(spread, "here")
    ours.save_pretrained(tmp_path, "lerobot")

    shrink(monkeypatch, module, config.network)
    theirs = policy_class.from_pretrained(tmp_path)
    override = {"tokenizer_processor": {"tokenizer": tokenise, "tokenizer_name": None}}
    before = PolicyProcessorPipeline.from_pretrained(
        tmp_path, config_filename="policy_preprocessor.json", overrides=override
    )
    after = PolicyProcessorPipeline.from_pretrained(
        tmp_path,
        config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )

    observation = synthesise(ours.observation_spec, rows=4)
    for mask in observation.image_mask.values():
        mask[:] = True
    noise = RowNoise(0, np.arange(4), np.zeros(4, np.int64))
    batch = {
        f"observation.images.{name}": torch.from_numpy(observation.images[camera]).permute(0, 3, 1, 2) / 255
        for name, camera in ours.views.items()
    }
    batch |= {"observation.state": torch.from_numpy(observation.state), "task": observation.texts()}
    start = torch.from_numpy(RowNoise(0, np.arange(4), np.zeros(4, np.int64)).normal(4, 32))
    expected = after(theirs.predict_action_chunk(before(batch), noise=start))
    actions = ours.act(ours.prepare(observation), deterministic=True, noise=noise).actions
    torch.testing.assert_close(actions, expected, rtol=0, atol=1e-4)
    assert actions.std() > 0.1
