"""SmolVLA on LeRobot's modules: it samples and loses as LeRobot does, and has the density that LeRobot has not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot_toys import write_smolvla, write_smolvlm
from safetensors.torch import load_file

from embodied_rl.errors import UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.smolvla import SmolVLAConfig
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

SEEN = ObservationSpec(state=4, cameras={"top": CameraSpec(32, 48), "wrist": CameraSpec(32, 32)})
ACTION = ActionSpec((-9.0,) * 3, (9.0,) * 3, (0.0,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("smolvla")
    write_smolvlm(path / "vlm")
    write_smolvla(path / "checkpoint", path / "vlm", {"cam": (32, 48), "wrist": (32, 32)}, state=4, action=3)
    return path / "checkpoint"


def build(folder, **settings):
    settings = {"cameras": {"cam": "top"}, "chunk": 3, "denoise_steps": 3, "value_hidden": (8,), **settings}
    return SmolVLAConfig(str(folder), **settings).build(SEEN, ACTION)


def theirs(folder):
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    policy = SmolVLAPolicy.from_pretrained(folder)
    return policy, *make_pre_post_processors(policy.config, str(folder))


def observed(policy):
    """(an observation in which every row has its cameras, the same for LeRobot)."""
    seen = synthesise(policy.observation_spec)
    images = {name: torch.from_numpy(seen.images[camera]) for name, camera in (("cam", "top"), ("wrist", "wrist"))}
    batch = {f"observation.images.{name}": image.permute(0, 3, 1, 2) / 255 for name, image in images.items()}
    return seen, batch | {"observation.state": torch.from_numpy(seen.state), "task": seen.texts()}


@pytest.mark.parametrize("settings", [{}, {"method": "cps", "joint": True, "frozen": ("vision",)}])
def test_keeps_the_contract(folder, settings):
    check(build(folder, **settings))


def test_samples_as_lerobot(folder):
    ours, (policy, before, after) = build(folder), theirs(folder)
    seen, batch = observed(ours)
    noise = RowNoise(0, np.arange(6), np.zeros(6, np.int64))
    start = torch.from_numpy(RowNoise(0, np.arange(6), np.zeros(6, np.int64)).normal(5, 6))
    expected = after(policy.predict_action_chunk(before(dict(batch)), noise=start))[:, :3]
    actions = ours.act(ours.prepare(seen), deterministic=True, noise=noise).actions
    torch.testing.assert_close(actions, expected, rtol=0, atol=1e-5)
    assert actions.std() > 0.05


def test_loses_as_lerobot(folder):
    ours, (policy, before, _) = build(folder), theirs(folder)
    seen, batch = observed(ours)
    generator = torch.Generator().manual_seed(0)
    actions, noise = torch.randn(6, 5, 3, generator=generator), torch.randn(6, 5, 6, generator=generator)
    time = torch.rand(6, generator=generator)
    valid = torch.arange(5) < torch.tensor([5, 5, 1, 2, 3, 4])[:, None]
    expected, _ = policy.forward(
        before({**batch, "action": actions}) | {"action_is_pad": ~valid}, noise=noise, time=time, reduction="none"
    )
    loss = ours.imitation_loss(ours.prepare(seen), actions, valid, noise=noise, time=time)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_folder_is_read_by_lerobot_and_by_us(folder, tmp_path):
    ours = build(folder)
    ours.save_pretrained(tmp_path)
    again, inputs = build(tmp_path), ours.prepare(observed(ours)[0])
    assert torch.equal(again.value(inputs), ours.value(inputs))
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    theirs(tmp_path)


def test_gradients_reach_what_is_not_frozen(folder):
    for frozen, reached in ((("vision", "language"), {"expert"}), (("expert",), {"vision", "language"})):
        ours = build(folder, frozen=frozen)
        inputs = ours.prepare(observed(ours)[0])
        ours.imitation_loss(inputs, torch.zeros(6, 5, 3), torch.ones(6, 5, dtype=torch.bool)).sum().backward()
        groups = ours.parameter_groups()
        assert {name for name, group in groups.items() if any(p.grad is not None for p in group)} == reached


def test_what_does_not_fit_is_named(folder, tmp_path):
    ours = build(folder)
    seen = observed(ours)[0]
    with pytest.raises(UserError, match=r"the prompt of 'fold the towel.*' has .* tokens, the checkpoint takes 24"):
        ours.prepare(replace(seen, instructions=("open it", "fold the towel " * 30)))
    with pytest.raises(UserError, match="chunk <= 5"):
        build(folder, chunk=6)
    with pytest.raises(UserError, match="did you mean vision"):
        SmolVLAConfig(frozen=("visoin",))
    with pytest.raises(UserError, match=r"cannot be loaded as LeRobot's 'smolvla'.*nowhere"):
        build(folder, backbone=str(tmp_path / "nowhere"))
