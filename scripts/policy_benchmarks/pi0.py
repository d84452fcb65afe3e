"""π₀ against LeRobot's `PI0Policy` with the same weights, and its update against encoding the observation for every
denoise step."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import torch
from policy_benchmarks.measuring import Bench
from torch import Tensor

from embodied_rl.policies.check import synthesise
from embodied_rl.policies.flow import FlowSampler, FlowSamplerConfig
from embodied_rl.policies.pi0.checkpoint import to_published
from embodied_rl.policies.pi0.config import PI0, Pi0Config
from embodied_rl.policies.pi0.gemma import GemmaConfig
from embodied_rl.policies.pi0.network import NetworkConfig
from embodied_rl.policies.pi0.siglip import SiglipConfig
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

DIM, STATE, PROMPT = 7, 8, 48
DENOISE_STEPS = 10
"""LeRobot's and openpi's, for acting."""
SCORED_STEPS = 4
"""Of the update: a chain of which every step is scored."""


def sizes(scale: str) -> NetworkConfig:
    """Both transformers with width 1024 and 16 layers, 32064 tokens, 256 image tokens; a toy; or π₀'s own."""
    if scale == "published":
        return PI0
    if scale == "laptop":
        vision = SiglipConfig(width=128, depth=2, heads=4, mlp=256, patch=14, image=224)
        language = GemmaConfig(width=1024, depth=16, mlp=4096, heads=8, kv_heads=1, head_dim=128)
        expert = GemmaConfig(width=1024, depth=16, mlp=2048, heads=8, kv_heads=1, head_dim=128)
        return NetworkConfig(vision, language, expert, vocabulary=32064, action_dim=32, adaptive=False)
    vision = SiglipConfig(width=32, depth=2, heads=4, mlp=64, patch=14, image=56)
    gemma = GemmaConfig(width=64, depth=2, mlp=128, heads=4, kv_heads=1, head_dim=16)
    return NetworkConfig(vision, gemma, gemma, vocabulary=272, action_dim=32, adaptive=False)


def pi0(bench: Bench, scale: str) -> None:
    """One row, one camera, a chunk of 50 actions; the vision-language model is frozen in the update."""
    torch.manual_seed(0)
    network = sizes(scale)
    horizon = 4 if scale == "toy" else 50
    config = Pi0Config(
        network=network,
        tokenizer="bytes",
        prompt_length=PROMPT,
        horizon=horizon,
        chunk=horizon,
        denoise_steps=DENOISE_STEPS,
        dtype=bench.precision,
    )
    side = network.vision.image
    seen = ObservationSpec(state=STATE, cameras={"agentview": CameraSpec(side, side)})
    action = ActionSpec((-math.inf,) * DIM, (math.inf,) * DIM, (0.0,) * DIM)
    policy = config.build(seen, action).to(bench.device)
    inputs = policy.prepare(synthesise(policy.observation_spec, rows=1))
    _against_lerobot(bench, policy, inputs)

    policy.sampler = FlowSampler(FlowSamplerConfig(SCORED_STEPS, joint=True), horizon, DIM)
    trace = policy.act(inputs).trace

    def ours() -> Tensor:
        return _learn(policy.evaluate_actions(inputs, trace).log_prob)

    def recomputed() -> Tensor:
        prefixes = []

        def velocity(_: None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            prefixes.append(policy.encode(inputs))
            return policy.velocity(prefixes[-1], x, t)

        log_prob, _ = policy.sampler.score(velocity, None, trace)
        policy.prefix_value(prefixes[-1], inputs)  # ours computes it, too
        return _learn(log_prob)

    bench.compare("pi0_update_vs_recomputed", ours, recomputed, 1e-4)


def _against_lerobot(bench: Bench, policy: Any, inputs: dict[str, Tensor]) -> None:
    theirs = _lerobot(policy).model
    images = [image.permute(0, 3, 1, 2).float() / 255 * 2 - 1 for name, image in inputs.items() if "image." in name]
    masks = [mask for name, mask in inputs.items() if "image_mask." in name]
    zeros = torch.zeros(1, policy.horizon, policy.width, device=bench.device)

    @torch.no_grad()
    def lerobot() -> Tensor:
        actions = theirs.sample_actions(
            images, masks, inputs["tokens"], inputs["token_mask"], inputs["state"], zeros, DENOISE_STEPS
        )
        return policy.to_simulator(actions, inputs)

    bench.compare("pi0_act_vs_lerobot", lambda: policy.act(inputs, True).actions, lerobot, 1e-4)


def _lerobot(policy: Any) -> Any:
    """LeRobot's policy around the very same tensors; it builds two sizes only and is given ours."""
    from lerobot.policies.pi0 import modeling_pi0 as module
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    network: NetworkConfig = policy.config.network
    vision, known, build = network.vision, module.CONFIG_MAPPING, module.PaliGemmaForConditionalGenerationWithPiGemma

    def paligemma(config: Any) -> Any:
        config.text_config.vocab_size = network.vocabulary
        for name, value in {
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "patch_size": vision.patch,
            "image_size": vision.image,
            "projection_dim": network.language.width,
        }.items():
            setattr(config.vision_config, name, value)
        return build(config=config)

    def gemma(variant: str) -> Any:
        part = {"gemma_2b": network.language, "gemma_300m": network.expert}[variant]
        return module.GemmaConfig(part.width, part.depth, part.mlp, part.heads, part.kv_heads, part.head_dim)

    mapping = {
        "paligemma": known["paligemma"],
        "gemma": lambda **settings: known["gemma"](**{**settings, "vocab_size": network.vocabulary}),
    }
    replaced = {
        "PaliGemmaForConditionalGenerationWithPiGemma": paligemma,
        "get_gemma_config": gemma,
        "CONFIG_MAPPING": mapping,
    }
    config = PI0Config(
        device=policy.device.type,
        dtype=policy.config.dtype,
        chunk_size=policy.horizon,
        n_action_steps=policy.horizon,
    )
    with mock.patch.multiple(module, **replaced):
        theirs = module.PI0Policy(config)
    unused = torch.empty(network.vocabulary, network.expert.width, device=policy.device)
    weights = to_published(policy.network.state_dict(), unused, lerobot=True)
    theirs.load_state_dict(theirs._fix_pytorch_state_dict_keys(weights, config), strict=True, assign=True)
    return theirs.eval()


def _learn(log_prob: Tensor) -> Tensor:
    (-log_prob.mean()).backward()
    return log_prob.detach()
