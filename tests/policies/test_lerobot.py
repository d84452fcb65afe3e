"""LeRobot's policies: the wrapper acts and loses as LeRobot does, from a folder that LeRobot wrote."""

import json
import shutil

import numpy as np
import pytest
import torch
from lerobot_toys import write_act, write_tdmpc
from safetensors.torch import load_file, save_file

from embodied_rl.errors import SpecError, UserError
from embodied_rl.policies import check
from embodied_rl.policies.check import synthesise
from embodied_rl.policies.lerobot import LeRobotConfig
from embodied_rl.randomness import RowNoise
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec

SEEN = ObservationSpec(state=4, cameras={"top": CameraSpec(32, 48)})
ACTION = ActionSpec((-1.0,) * 3, (1.0,) * 3, (0.0,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("act")
    write_act(path, cameras={"cam": (32, 48)}, state=4, action=3)
    return path


def build(folder, seen=SEEN, action=ACTION, **settings):
    return LeRobotConfig(str(folder), {"cam": "top"}, **settings).build(seen, action)


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
        torch.manual_seed(0)
        rows = [{key: value[i : i + 1] for key, value in padded.items() if torch.is_tensor(value)} for i in range(6)]
        torch.testing.assert_close(mine, torch.stack([policy(row)[0] for row in rows]).mean())
        if not mode:
            torch.testing.assert_close(mine, policy(padded)[0])


def test_steps_that_are_not_valid_cost_nothing(folder):
    ours, valid = build(folder).eval(), torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    inputs = {name: value[:3] for name, value in ours.prepare(synthesise(ours.observation_spec)).items()}
    actions = torch.rand(3, 4, 3)
    other = torch.where(valid[..., None], actions, 7.0)
    losses = [ours.imitation_loss(inputs, each, valid) for each in (actions, other)]
    assert torch.equal(*losses) and losses[0][2] == 0 and (losses[0][:2] > 0).all()
    losses[0].sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in ours.parameters())


def test_a_saved_folder_is_read_by_lerobot_and_by_us(folder, tmp_path):
    ours = build(folder)
    ours.save_pretrained(tmp_path)
    inputs = ours.prepare(synthesise(ours.observation_spec))
    assert torch.equal(build(tmp_path).act(inputs).actions, ours.act(inputs).actions)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    theirs(tmp_path)


def test_a_policy_that_draws_acts_by_the_noise_of_each_row(tmp_path):
    """TD-MPC plans with random actions."""
    write_tdmpc(tmp_path, state=4, action=3)
    ours = LeRobotConfig(str(tmp_path)).build(ObservationSpec(state=4), ACTION)
    inputs = ours.prepare(synthesise(ours.observation_spec))

    def act(rows):
        noise = RowNoise(0, np.arange(6)[rows], np.zeros(6, np.int64)[rows])
        return ours.act({name: value[rows] for name, value in inputs.items()}, noise=noise).actions

    whole = act(slice(None))
    assert whole.shape == (6, ours.chunk, 3) and whole.std() > 0.01
    torch.testing.assert_close(torch.cat([act(slice(0, 2)), act(slice(2, 6))]), whole)
    assert not torch.equal(ours.act(inputs).actions, whole)


def test_has_no_density_to_learn_from(folder):
    ours = build(folder)
    assert ours.act(ours.prepare(synthesise(ours.observation_spec))).log_prob is None
    with pytest.raises(TypeError, match="no density"):
        ours.evaluate_actions({}, {})


def test_what_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(SpecError, match="takes 4 states and gives 3"):
        build(folder, seen=ObservationSpec(5, cameras=SEEN.cameras))
    with pytest.raises(UserError, match="did you mean cam"):
        LeRobotConfig(str(folder), {"came": "top"}).build(SEEN, ACTION)
    with pytest.raises(UserError, match="chunk <= 2"):
        build(folder, chunk=3)
    with pytest.raises(UserError, match="no LeRobot policy"):
        build(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for kind, message in (
        ("pi05", "use --policy pi05"),
        ("smolvla", "use --policy smolvla"),
        ("diffusion", "looks at 2 observations"),
        ("acd", "cannot be loaded as LeRobot's 'acd'"),
    ):
        (copy / "config.json").write_text(json.dumps({"type": kind}))
        with pytest.raises(UserError, match=message):
            build(copy)


def test_a_missing_statistic_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = next(copy.glob("policy_preprocessor*.safetensors"))
    statistics = load_file(file)
    del statistics["observation.state.std"]
    save_file(statistics, file)
    with pytest.raises(UserError, match=r"policy_preprocessor.json has no statistics 'observation.state.std'"):
        build(copy)
