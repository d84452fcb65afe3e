"""The published conventions of normalisation, against their formulas and through casts and state dicts."""

import json

import numpy as np
import pytest
import torch

from embodied_rl.errors import UserError
from embodied_rl.policies.normalization import CONVENTIONS, Normaliser, read_statistics

STATISTICS = {
    "mean": [0.1, -2.0, 3.0],
    "std": [0.5, 1.5, 1e-3],
    "min": [-1.0, -4.0, 2.0],
    "max": [1.0, 4.0, 2.0],
    "q01": [-0.9, -3.0, 2.0],
    "q99": [0.8, 3.5, 2.0],
    "mask": [True, True, False],
}
X = np.array([[0.3, -1.0, 2.0], [5.0, -9.0, 0.25]])


def fitted(convention):
    normaliser = Normaliser(convention, 3)
    normaliser.fit(STATISTICS, "here")
    return normaliser


def formula(convention, x, inverse=False):
    """The references' own arithmetic, written out."""
    s = {name: np.array(value) for name, value in STATISTICS.items()}
    if convention == "openpi_mean_std":
        return x * (s["std"] + 1e-6) + s["mean"] if inverse else (x - s["mean"]) / (s["std"] + 1e-6)
    if convention == "lerobot_mean_std":
        return x * s["std"] + s["mean"] if inverse else (x - s["mean"]) / (s["std"] + 1e-8)
    low, high = (s[n] for n in (("min", "max") if convention.endswith(("bounds", "min_max")) else ("q01", "q99")))
    if convention == "openpi_quantile":
        span = high - low + 1e-6
        return (x + 1.0) / 2.0 * span + low if inverse else (x - low) / span * 2.0 - 1.0
    if convention.startswith("lerobot"):
        span = np.where(high == low, 1e-8, high - low)
        return (x + 1) * span / 2 + low if inverse else 2 * (x - low) / span - 1
    if inverse:
        epsilon = 0 if convention == "openvla" else 1e-8
        return np.where(s["mask"], 0.5 * (x + 1) * (high - low + epsilon) + low, x)
    return np.where(s["mask"], np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1), x)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_equals_the_reference_formula(convention):
    normaliser, x = fitted(convention), torch.from_numpy(X)
    np.testing.assert_allclose(normaliser.normalise(x), formula(convention, X), rtol=1e-12)
    np.testing.assert_allclose(normaliser.unnormalise(x), formula(convention, X, inverse=True), rtol=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_cast_and_a_state_dict_change_no_digit(convention):
    normaliser, other = fitted(convention), Normaliser(convention, 3)
    other.load_state_dict(normaliser.state_dict())
    other.bfloat16()
    assert other.statistics.dtype == torch.float64
    x = torch.from_numpy(X)
    assert torch.equal(normaliser.normalise(x), other.normalise(x))
    assert other.as_dict() == STATISTICS


def test_statistics_that_the_convention_does_not_use_may_be_absent():
    normaliser = Normaliser("openpi_mean_std", 3)
    normaliser.fit({"mean": [0, 0, 0], "std": [1, 2, 3]}, "here")
    assert normaliser.as_dict() == {"mean": [0, 0, 0], "std": [1, 2, 3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q01": None}, "here has no 'q01'"),
        ({"q99": [1.0, 2.0]}, r"here, 'q99' has shape \(2,\), the policy needs \(3,\)"),
        ({"q99": [1.0, 2.0, float("nan")]}, "'q99' is not finite"),
        ({"q99": ["a", 2.0, 1.0]}, "not a list of numbers"),
        ({"mask": [True]}, "'mask' has shape"),
    ],
)
def test_statistics_that_do_not_fit_are_named(change, message):
    statistics = {name: value for name, value in (STATISTICS | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        Normaliser("openpi_quantile", 3).fit(statistics, "here")


def test_an_unknown_convention_is_named():
    with pytest.raises(UserError, match="did you mean openpi_quantile"):
        Normaliser("openpi_quantiles", 3)


def test_statistics_are_found_by_their_keys(tmp_path):
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"state": STATISTICS, "note": "text"}}))
    assert read_statistics(path, "norm_stats", "state") == STATISTICS
    for keys, message in {
        ("norm_stats", "actions"): "norm_stats has no statistics 'actions'; it has state, note",
        ("libero",): "norm_stats.json has no statistics 'libero'; it has norm_stats",
        ("norm_stats", "note"): "is str, not statistics",
        ("norm_stats", "note", "x"): "has no statistics 'x'; it has str",
    }.items():
        with pytest.raises(UserError, match=message):
            read_statistics(path, *keys)
