"""Tiny folders as LeRobot writes them."""

import torch


def write_act(folder, cameras, state, action):
    """ACT with `cameras` {name: (height, width)}, and statistics that are not the identity."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    images = {f"observation.images.{name}": (3, *size) for name, size in cameras.items()}
    config = ACTConfig(
        input_features={
            **{key: PolicyFeature(FeatureType.VISUAL, shape) for key, shape in images.items()},
            "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))},
        chunk_size=4,
        n_action_steps=2,
        pretrained_backbone_weights=None,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        latent_dim=8,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        device="cpu",
    )
    save(ACTPolicy(config), make_pre_post_processors(config, dataset_stats=statistics(images, state, action)), folder)


def statistics(images, state, action):
    def spread(size):
        return {"mean": torch.linspace(-0.1, 0.1, size), "std": torch.linspace(0.2, 0.4, size)}

    pixels = {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.25)}
    return {"observation.state": spread(state), "action": spread(action)} | dict.fromkeys(images, pixels)


def save(policy, processors, folder):
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)


def write_smolvlm(folder):
    """Configuration and tokenizer of a tiny SmolVLM, as SmolVLA's checkpoints name one."""
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
    )
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    from embodied_rl.policies.tiny_vla import TOKENIZER

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    SmolVLMConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        text_config={
            **text,
            "model_type": "llama",
            "num_key_value_heads": 2,
            "head_dim": 12,
            "vocab_size": 1024,
            "pad_token_id": 0,
        },
        scale_factor=2,
        image_token_id=3,
    ).save_pretrained(folder)
    names = {"fake_image_token": "<fake>", "image_token": "<image>", "global_image_token": "<global>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="<eos>",
        end_of_utterance_token="<end>",
        extra_special_tokens=names,
    )
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor()).save_pretrained(folder)


def write_smolvla(folder, backbone, cameras, state, action):
    """SmolVLA on `backbone`, with random weights."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    torch.manual_seed(0)
    images = {f"observation.images.{name}": (3, *size) for name, size in cameras.items()}
    config = SmolVLAConfig(
        input_features={
            **{key: PolicyFeature(FeatureType.VISUAL, shape) for key, shape in images.items()},
            "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))},
        chunk_size=5,
        n_action_steps=3,
        max_state_dim=8,
        max_action_dim=6,
        resize_imgs_with_padding=(32, 32),
        tokenizer_max_length=24,
        num_vlm_layers=4,
        num_steps=3,
        vlm_model_name=str(backbone),
        device="cpu",
    )
    policy = SmolVLAPolicy(config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    save(policy, make_pre_post_processors(config, dataset_stats=statistics(images, state, action)), folder)


def write_tdmpc(folder, state, action):
    """TD-MPC on states."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.tdmpc.configuration_tdmpc import TDMPCConfig
    from lerobot.policies.tdmpc.modeling_tdmpc import TDMPCPolicy

    torch.manual_seed(0)
    config = TDMPCConfig(
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (state,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action,))},
        latent_dim=8,
        mlp_dim=16,
        state_encoder_hidden_dim=16,
        n_gaussian_samples=16,
        n_pi_samples=4,
        n_elites=4,
        cem_iterations=2,
        device="cpu",
    )
    values = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0}
    sizes = {"observation.state": state, "action": action}
    stats = {key: {name: torch.full((size,), x) for name, x in values.items()} for key, size in sizes.items()}
    save(TDMPCPolicy(config), make_pre_post_processors(config, dataset_stats=stats), folder)
