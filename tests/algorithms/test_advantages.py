"""Returns and advantages against slow float64 versions written from their definitions."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.algorithms.advantages import chunk_return, explained_variance, gae, gae_tokens, normalize

seeds = st.integers(0, 2**32 - 1)


def slow_gae(reward, value, last_value, terminated, truncated, final_value, discount, gae_lambda, valid):
    """A_t as the weighted sum of all later temporal differences of the same episode."""
    steps, rows = reward.shape
    advantages = np.zeros((steps, rows))
    for n in range(rows):
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                if not valid[k, n]:
                    break
                if terminated[k, n]:
                    following = 0.0
                elif truncated[k, n]:
                    following = final_value[k, n]
                else:
                    following = last_value[n] if k == steps - 1 else value[k + 1, n]
                advantages[t, n] += weight * (reward[k, n] + discount[k, n] * following - value[k, n])
                if terminated[k, n] or truncated[k, n]:
                    break
                weight *= discount[k, n] * gae_lambda
    return advantages


def random_segment(rng, steps=7, rows=4):
    def numbers():
        return rng.normal(size=(steps, rows))

    return {
        "reward": numbers(),
        "value": numbers(),
        "last_value": rng.normal(size=rows),
        "terminated": rng.random((steps, rows)) < 0.2,
        "truncated": rng.random((steps, rows)) < 0.2,
        "final_value": numbers(),
        "discount": rng.uniform(0.5, 1, (steps, rows)),
        "gae_lambda": rng.random(),
        "valid": rng.random((steps, rows)) < 0.8,
    }


def tensors(segment) -> dict[str, Any]:
    return {name: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for name, x in segment.items()}


@given(seed=seeds)
def test_gae_agrees_with_its_definition(seed):
    segment = random_segment(np.random.default_rng(seed))
    advantages, returns = gae(**tensors(segment))
    expected, valid = slow_gae(**segment), segment["valid"]
    np.testing.assert_allclose(advantages.numpy()[valid], expected[valid], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(returns.numpy()[valid], (expected + segment["value"])[valid], rtol=1e-9, atol=1e-12)


@given(seed=seeds)
def test_gae_treats_every_row_alike_and_alone(seed):
    rng = np.random.default_rng(seed)
    segment = random_segment(rng)
    order = rng.permutation(4)[:3]
    picked = {name: x[..., order] if isinstance(x, np.ndarray) else x for name, x in segment.items()}
    for whole, part in zip(gae(**tensors(segment)), gae(**tensors(picked)), strict=True):
        torch.testing.assert_close(whole[:, order], part, rtol=0, atol=0)


def test_termination_wins_over_truncation():
    one, no, yes = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    ends = {(yes, yes): 1.0, (yes, no): 1.0, (no, yes): 1 + 0.5 * 8, (no, no): 1 + 0.5 * 6}
    for (terminated, truncated), expected in ends.items():
        _, returns = gae(one, 2 * one, torch.tensor([6.0]), terminated, truncated, 8 * one, 0.5 * one, 0.9)
        assert returns.item() == pytest.approx(expected)


@given(seed=seeds, size=st.integers(1, 5))
def test_a_chunk_is_worth_its_single_steps(seed, size):
    """With gamma per executed step and lambda 1 the advantage of a chunk is that of its first action, wherever in a
    chunk the episode ends and whatever a critic says in between."""
    rng = np.random.default_rng(seed)
    decisions, gamma = 6, 0.9
    ended = rng.random(decisions) < 0.4
    cut = rng.random(decisions) < 0.5
    lengths = np.where(ended, rng.integers(1, size + 1, decisions), size)
    valid = np.arange(size) < lengths[:, None]
    reward = rng.normal(size=(decisions, size))
    value, final_value, last_value = rng.normal(size=decisions), rng.normal(size=decisions), rng.normal(size=1)

    total, discount = chunk_return(torch.as_tensor(reward), torch.as_tensor(valid), gamma, "step")

    def column(x):
        return torch.as_tensor(x)[:, None]

    by_chunk, _ = gae(
        total[:, None],
        column(value),
        torch.as_tensor(last_value),
        column(ended & ~cut),
        column(ended & cut),
        column(final_value),
        discount[:, None],
        1.0,
    )
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    last = starts + lengths - 1
    steps = lengths.sum()
    single = {
        name: np.zeros(steps, kind) for name, kind in {"terminated": bool, "truncated": bool, "final": float}.items()
    }
    single_value = rng.normal(size=steps)
    single_value[starts] = value
    single["terminated"][last], single["truncated"][last] = ended & ~cut, ended & cut
    single["final"][last] = final_value
    by_step, _ = gae(
        column(reward[valid]),
        column(single_value),
        torch.as_tensor(last_value),
        column(single["terminated"]),
        column(single["truncated"]),
        column(single["final"]),
        torch.full((steps, 1), gamma, dtype=torch.float64),
        1.0,
    )
    torch.testing.assert_close(by_chunk[:, 0], by_step[starts, 0], rtol=1e-9, atol=1e-12)


@given(seed=seeds, length=st.integers(0, 4))
def test_chunk_return_counts_executed_steps_only(seed, length):
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=4)
    valid = np.arange(4) < length
    executed = torch.as_tensor(np.where(valid, reward, np.nan))
    total, discount = chunk_return(executed, torch.as_tensor(valid), 0.9, "step")
    assert total.item() == pytest.approx(sum(0.9**k * reward[k] for k in range(length)))
    assert discount.item() == pytest.approx(0.9**length)
    total, discount = chunk_return(executed, torch.as_tensor(valid), 0.9, "decision")
    assert total.item() == pytest.approx(reward[:length].sum()) and discount.item() == pytest.approx(0.9)


@given(seed=seeds)
def test_masked_tokens_are_skipped(seed):
    """GAE over tokens with holes is GAE over the tokens that remain."""
    rng = np.random.default_rng(seed)
    reward, value, mask = rng.normal(size=(1, 9)), rng.normal(size=(1, 9)), rng.random((1, 9)) < 0.6
    holes, _ = gae_tokens(torch.as_tensor(reward), torch.as_tensor(value), torch.as_tensor(mask), 0.95, 0.8)
    reward, value = torch.as_tensor(reward[mask])[None], torch.as_tensor(value[mask])[None]
    dense, _ = gae_tokens(reward, value, torch.ones_like(reward, dtype=torch.bool), 0.95, 0.8)
    torch.testing.assert_close(holes[torch.as_tensor(mask)], dense[0])


@given(seed=seeds)
def test_normalize_reads_nothing_behind_the_mask(seed):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(3, 5, (6, 4)), rng.random((6, 4)) < 0.7
    mask[:2, 0] = True
    dirty = torch.as_tensor(np.where(mask, x, np.nan))
    result = normalize(dirty, torch.as_tensor(mask)).numpy()
    np.testing.assert_allclose(result[mask], (x[mask] - x[mask].mean()) / (x[mask].std(ddof=1) + 1e-8), rtol=1e-9)


def test_normalize_survives_one_entry_and_none():
    x = torch.tensor([[3.0, 4.0]])
    assert normalize(x, torch.tensor([[True, False]]))[0, 0] == 0
    assert normalize(x, torch.tensor([[False, False]])).isfinite().all()


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.zeros(3), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(3)) == 0
