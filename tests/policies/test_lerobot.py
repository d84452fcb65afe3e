"""LeRobot's ACT: the wrapper acts and loses as LeRobot does, from a folder that LeRobot wrote."""

import pytest
import torch

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.lerobot import LeRobotACTConfig
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

SEEN = ObservationSpec(state=4, cameras={"top": CameraSpec(32, 48)})
ACTION = ActionSpec((-1.0,) * 3, (1.0,) * 3, (0.0,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    torch.manual_seed(0)
    config = ACTConfig(
        input_features={
            "observation.images.cam": PolicyFeature(FeatureType.VISUAL, (3, 32, 48)),
            "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
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

    def statistics(size):
        return {"mean": torch.linspace(-0.1, 0.1, size), "std": torch.linspace(0.2, 0.4, size)}

    stats = {"observation.state": statistics(4), "action": statistics(3)}
    stats["observation.images.cam"] = {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.25)}
    path = tmp_path_factory.mktemp("act")
    ACTPolicy(config).save_pretrained(path)
    for pipeline in make_pre_post_processors(config, dataset_stats=stats):
        pipeline.save_pretrained(path)
    return path


def build(folder, seen=SEEN, action=ACTION, **settings):
    return LeRobotACTConfig(str(folder), {"cam": "top"}, **settings).build(seen, action)


def theirs(folder):
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    policy = ACTPolicy.from_pretrained(folder)
    return policy, *make_pre_post_processors(policy.config, str(folder))


def test_keeps_the_contract(folder):
    check(build(folder))


def test_acts_and_loses_as_lerobot(folder):
    ours, (policy, before, after) = build(folder), theirs(folder)
    seen = synthesise(ours.observation_spec)
    image = torch.from_numpy(seen.images["top"]).permute(0, 3, 1, 2) / 255
    batch = {"observation.images.cam": image, "observation.state": torch.from_numpy(seen.state)}
    inputs = ours.prepare(seen)
    expected = after(policy.predict_action_chunk(before(dict(batch))))[:, :2].clamp(-1, 1)
    torch.testing.assert_close(ours.act(inputs).actions, expected)
    assert expected.std() > 0.01

    actions = torch.rand(6, 4, 3)
    for mode in (False, True):
        ours.train(mode)
        policy.train(mode)
        torch.manual_seed(0)
        mine = ours.imitation_loss(inputs, actions, torch.ones(6, 4, dtype=torch.bool)).mean()
        torch.manual_seed(0)
        padded = before({**batch, "action": actions}) | {"action_is_pad": torch.zeros(6, 4, dtype=torch.bool)}
        torch.testing.assert_close(mine, policy(padded)[0])


def test_has_no_density_to_learn_from(folder):
    ours = build(folder)
    assert ours.act(ours.prepare(synthesise(ours.observation_spec))).log_prob is None
    with pytest.raises(TypeError, match="no density"):
        ours.evaluate_actions({}, {})


def test_what_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(SpecError, match="takes 4 states and gives 3"):
        build(folder, seen=ObservationSpec(5, cameras=SEEN.cameras))
    with pytest.raises(UserError, match="did you mean cam"):
        LeRobotACTConfig(str(folder), {"came": "top"}).build(SEEN, ACTION)
    with pytest.raises(UserError, match="chunk <= 4"):
        build(folder, chunk=5)
    with pytest.raises(UserError, match="no LeRobot policy"):
        build(tmp_path)
    (tmp_path / "config.json").write_text('{"type": "diffusion"}')
    with pytest.raises(UserError, match="only 'act'"):
        build(tmp_path)
