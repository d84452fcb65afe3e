"""Every recipe: the published numbers, and a dry run at real size."""

import json
from typing import Any

import pytest

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.config import RunConfig, from_dict, to_dict
from embodied_rl.training import dry_run, memory

RECIPES = [
    name for name in registry.recipes.names() if registry.recipes.target(name).startswith("embodied_rl.recipes.")
]
LIBERO = {"spatial": "libero_spatial", "object": "libero_object", "goal": "libero_goal", "long": "libero_10"}

# name: learning rate, of the value, clip, environments, decisions of each per iteration, executed actions, decisions
# of an update, of a part of it, epochs
PPO = {
    "maniskill_ppo_openvla": (1e-4, 3e-3, 0.2, 0.2, 128, 160, 1, 640, 80, 1),
    "maniskill_ppo_openvla_oft": (1e-4, 3e-3, 0.2, 0.28, 128, 20, 8, 640, 40, 1),
    "maniskill_async_ppo_openvla": (1e-4, 3e-3, 0.3, 0.3, 64, 80, 1, 320, 40, 1),
    "maniskill_ppo_pi0": (7.91e-6, 1.55e-4, 0.2, 0.2, 320, 16, 5, 5120, 32, 4),
    "maniskill_ppo_pi05": (7.91e-6, 1.55e-4, 0.2, 0.2, 320, 16, 5, 5120, 32, 5),
    "maniskill_ppo_mlp": (3e-4, 3e-4, 0.2, 0.2, 1024, 50, 1, 6400, None, 8),
    "libero_spatial_ppo_gr00t": (5e-6, 1e-4, 0.2, 0.2, 64, 384, 5, 1024, 128, 4),
    "isaaclab_ppo_gr00t": (1e-5, 2e-5, 0.2, 0.2, 64, 56, 16, 512, 32, 3),
    "isaaclab_ppo_pi05": (5e-6, 1e-4, 0.2, 0.2, 128, 180, 5, 256, 32, 3),
}
for _suite in LIBERO:
    _chunk = 10 if _suite == "long" else 5
    PPO[f"libero_{_suite}_ppo_pi0"] = (5e-6, 1e-4, 0.2, 0.2, 64, 384, _chunk, 2048, 128, 4)
    PPO[f"libero_{_suite}_ppo_pi05"] = (5e-6, 1e-4, 0.2, 0.2, 64, 384, _chunk, 2048, 128, 1)

# name: learning rate, clip, groups of 8, decisions of an episode, executed actions, decisions of an update, of a part,
# epochs, accepted mean scores
GRPO: dict[str, tuple[Any, ...]] = {
    "maniskill_grpo_openvla": (1e-5, 0.2, 0.28, 32, 80, 1, 640, 40, 1, None),
    "maniskill_grpo_openvla_oft": (1e-4, 0.2, 0.28, 32, 10, 8, 640, 40, 1, None),
    "libero_spatial_grpo_openvla_oft": (2e-5, 0.2, 0.28, 128, 64, 8, 16384, 32, 1, (0.1, 0.9)),
    "libero_long_grpo_openvla_oft": (2e-5, 0.2, 0.28, 128, 64, 8, 16384, 32, 1, (0.1, 0.9)),
    "libero_130_grpo_openvla_oft": (2e-5, 0.2, 0.28, 512, 64, 8, 16384, 32, 1, (0.1, 0.9)),
}
for _suite in LIBERO:
    _chunk, _epochs = (10, 4) if _suite == "long" else (5, 2)
    for _policy in ("pi0", "pi05"):
        GRPO[f"libero_{_suite}_grpo_{_policy}"] = (5e-6, 0.2, 0.2, 64, 48, _chunk, 2048, 128, _epochs, (0.1, 0.9))

# name: learning rates, decisions of an update, updates, per decisions, gamma, first temperature, target entropy
SAC = {
    "maniskill_sac_mlp": (3e-4, 3e-4, 1024, 32, 64, 0.8, 0.01, -4.0),
    "maniskill_crossq_mlp": (3e-4, 3e-4, 1024, 32, 64, 0.8, 0.01, -4.0),
    "maniskill_rlpd_cnn": (3e-4, 3e-4, 256, 8, 1, 0.96, 1.0, -3.0),
    "libero_spatial_dsrl_pi0": (1e-4, 3e-4, 512, 200, 768, 0.999, 1.0, -16.0),
}


def load(name: str) -> RunConfig:
    return registry.recipes.load(name)()


def executed(policy: Any) -> int:
    return policy.executed if hasattr(policy, "executed") else policy.chunk


@pytest.mark.parametrize("name", PPO)
def test_ppo_has_the_published_settings(name: str) -> None:
    run = load(name)
    it, decisions = run.algorithm, run.training.decisions_per_iteration
    batch = run.simulator.num_envs * decisions // it.minibatches
    rates = it.learning_rate, it.value_learning_rate, it.clip_low, it.clip_high
    amounts = run.simulator.num_envs, decisions, executed(run.policy), batch, it.microbatch, it.epochs
    assert (*rates, *amounts) == PPO[name]
    assert (it.gamma, it.gae_lambda, it.value_clip) == ((0.8, 0.9, 1.0) if "mlp" in name else (0.99, 0.95, 0.2))
    assert (it.huber_delta, it.value_coefficient) == (10.0, 1.0)


@pytest.mark.parametrize("name", GRPO)
def test_grpo_has_the_published_settings(name: str) -> None:
    run = load(name)
    it, length = run.algorithm, -(-run.simulator.max_steps // executed(run.policy))
    batch = it.groups_per_iteration * it.group_size * length // it.minibatches
    rates = it.learning_rate, it.clip_low, it.clip_high, it.groups_per_iteration
    amounts = length, executed(run.policy), batch, it.microbatch, it.epochs, it.keep_mean
    assert (*rates, *amounts) == GRPO[name]
    assert it.group_size == 8


@pytest.mark.parametrize("name", SAC)
def test_soft_actor_critics_have_the_published_settings(name: str) -> None:
    it = load(name).algorithm
    rates, updates, decisions, *rest = SAC[name][:2], *SAC[name][3:5], SAC[name][2], *SAC[name][5:]
    assert (it.learning_rate, it.critic_learning_rate) == rates
    assert it.updates_per_decision == pytest.approx(updates / decisions)
    assert [it.batch_size, it.gamma, it.initial_temperature, it.target_entropy] == rest


def test_every_published_row_is_a_recipe() -> None:
    assert {*PPO, *GRPO, *SAC} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_itself_and_survives_json(name: str) -> None:
    run = load(name)
    assert run.recipe == name
    assert from_dict(json.loads(json.dumps(to_dict(run)))) == run


def test_every_recipe_is_built_at_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the activations, which `test_activations_are_those_of_the_real_thing` checks. Equal policies are built
    once."""
    built: dict[str, Any] = {}
    build = memory.build_on_meta

    def once(config: Any, *specs: Any) -> Any:
        key = repr((config, specs))
        if key not in built:
            built[key] = build(config, *specs)
        return built[key]

    monkeypatch.setattr(memory, "build_on_meta", once)
    monkeypatch.setattr(memory, "activations", lambda *_: (0, 0))
    for name in RECIPES:
        told = dry_run.dry_run(load(name))
        assert all(line in told for line in ("simulator", "parameters", "iteration", "to learn")), name
        assert ("policy.checkpoint" in told) == any(family in name for family in ("openvla", "pi0", "gr00t")), name


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_dry_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", name, "--dry-run"]) == 0
    assert "to learn" in capsys.readouterr().out


def test_random_weights_of_a_published_size_are_not_trained(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("libero_spatial_ppo_pi0", "maniskill_ppo_openvla", "isaaclab_ppo_gr00t"):
        assert main(["train", name, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--policy.checkpoint FOLDER" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("quickstart_ppo --policy pi0", "needs an image for its camera"),
        ("quickstart_ppo --simulator libero --policy pi0 --policy.checkpoint {missing}", "{missing}"),
        ("quickstart_ppo --algorithm sac", "gamma_per"),
        ("quickstart_ppo --algorithm grpo --simulator.max-steps none", "set simulator.max_steps"),
    ],
)
def test_a_dry_run_fails_as_the_run_would(
    arguments: str, message: str, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    assert main(["train", *arguments.format(missing=missing).split(), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message.format(missing=missing) in error


def test_memory_of_published_policies_is_listed(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dry_run, "PUBLISHED", ("pi0",))
    monkeypatch.setattr(memory, "activations", lambda *_: (8 * 2**30, 0))
    assert main(["list", "policies", "--memory"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:2] == ["pi0", "3,240,835,857"]
    weights, _, full = (float(last[index]) for index in (2, 4, 6))
    assert 3.24e9 * 2 / 2**30 < weights < 1.02 * 3.24e9 * 2 / 2**30  # bfloat16, but for norms and small projections
    assert 0.95 < full / (3_240_835_857 * 16 / 2**30) <= 1  # some weights reach no action, and are not trained
    assert last[-2:] == ["1.0", "GiB"]
