"""Losses against slow float64 versions; masks that leak nothing."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.algorithms.losses import aggregate, importance_weight, policy_loss, segment_sums, term_mask, value_loss

seeds = st.integers(0, 2**32 - 1)
granularities = st.sampled_from(["token", "action", "chunk"])
means = st.sampled_from(["terms", "rows"])
ROWS, K, TERMS = 5, 3, 7


def slow_policy_loss(log_prob, old, advantage, low, high, dual):
    ratio = math.exp(log_prob - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, dual * -advantage) if dual is not None and advantage < 0 else loss


def slow_value_loss(value, old, target, clip, delta):
    def error(prediction):
        e = abs(prediction - target)
        return e * e / 2 if delta is None or e <= delta else delta * (e - delta / 2)

    return error(value) if clip is None else max(error(value), error(old + min(max(value - old, -clip), clip)))


def slow_loss(log_prob, old, entry_mask, term_step, advantages, granularity, over, clip):
    """The whole policy loss with loops and dictionaries; rows without any term count nowhere."""
    row_means, everything = [], []
    for b in range(len(log_prob)):
        groups = {}
        for i in range(log_prob.shape[1]):
            if entry_mask[b, i]:
                key = {"token": i, "action": term_step[i], "chunk": 0}[granularity]
                new_sum, old_sum = groups.get(key, (0.0, 0.0))
                groups[key] = (new_sum + log_prob[b, i], old_sum + old[b, i])
        losses = [slow_policy_loss(n, o, advantages[b], *clip) for n, o in groups.values()]
        everything += losses
        if losses:
            row_means.append(np.mean(losses))
    return np.mean(everything if over == "terms" else row_means) if everything else 0.0


def random_scores(rng):
    old = rng.normal(-1, 1, (ROWS, TERMS))
    return {
        "log_prob": old + rng.normal(0, 0.3, old.shape),
        "old": old,
        "term_step": rng.integers(0, K, TERMS),
        "mask": rng.random(old.shape) < 0.6,
        "advantages": rng.normal(size=ROWS),
    }


def whole_loss(scores, granularity, over, clip=(0.2, 0.28, 3.0)):
    mask = torch.as_tensor(scores["mask"])
    steps = torch.as_tensor(scores["term_step"])
    new, ratios = segment_sums(torch.as_tensor(scores["log_prob"]), mask, steps, K, granularity)
    old, _ = segment_sums(torch.as_tensor(scores["old"]), mask, steps, K, granularity)
    losses, _ = policy_loss(new, old, torch.as_tensor(scores["advantages"])[:, None], ratios, *clip)
    return aggregate(losses, ratios, over)


@given(seed=seeds, granularity=granularities, over=means, dual=st.sampled_from([None, 1.1, 3.0]))
def test_policy_loss_agrees_with_its_definition(seed, granularity, over, dual):
    scores, clip = random_scores(np.random.default_rng(seed)), (0.1, 0.3, dual)
    expected = slow_loss(
        scores["log_prob"],
        scores["old"],
        scores["mask"],
        scores["term_step"],
        scores["advantages"],
        granularity,
        over,
        clip,
    )
    np.testing.assert_allclose(whole_loss(scores, granularity, over, clip).item(), expected, rtol=1e-9, atol=1e-12)


@given(seed=seeds, granularity=granularities, over=means)
def test_policy_loss_does_not_depend_on_the_order_of_rows(seed, granularity, over):
    rng = np.random.default_rng(seed)
    scores = random_scores(rng)
    order = rng.permutation(ROWS)
    shuffled = {name: x if name == "term_step" else x[order] for name, x in scores.items()}
    one, two = whole_loss(scores, granularity, over), whole_loss(shuffled, granularity, over)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@given(seed=seeds, granularity=granularities, over=means, garbage=st.sampled_from([math.nan, math.inf, 1e30]))
def test_masked_terms_have_no_gradient_and_no_influence(seed, granularity, over, garbage):
    scores = random_scores(np.random.default_rng(seed))
    mask = scores["mask"]
    results = []
    for filling in (0.0, garbage):
        log_prob = torch.as_tensor(np.where(mask, scores["log_prob"], filling)).requires_grad_()
        dirty = scores | {
            "log_prob": log_prob,
            "old": np.where(mask, scores["old"], filling),
            "advantages": np.where(mask.any(1), scores["advantages"], filling),
        }
        loss = whole_loss(dirty, granularity, over)
        loss.backward()
        assert log_prob.grad is not None and (log_prob.grad.numpy()[~mask] == 0).all()
        results.append((loss.item(), log_prob.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, 1e30]))
def test_masked_ratios_have_no_gradient(seed, garbage):
    """Also when the ratios do not come from `segment_sums`."""
    scores = random_scores(np.random.default_rng(seed))
    mask = scores["mask"]
    log_prob = torch.as_tensor(np.where(mask, scores["log_prob"], garbage)).requires_grad_()
    old, advantages = (torch.as_tensor(x) for x in (scores["old"], scores["advantages"][:, None]))
    losses, _ = policy_loss(log_prob, old, advantages, torch.as_tensor(mask), 0.2, 0.2, 3.0)
    loss = aggregate(losses, torch.as_tensor(mask))
    loss.backward()
    assert loss.isfinite() and log_prob.grad is not None
    assert (log_prob.grad.numpy()[~mask] == 0).all()


@given(seed=seeds)
def test_actions_of_a_chunk_are_rows_of_single_steps(seed):
    """Per action, a chunk of K with an end anywhere inside is the same as its executed steps as rows of their own."""
    rng = np.random.default_rng(seed)
    dim = 2
    old = rng.normal(size=(ROWS, K * dim))
    new, advantages = old + rng.normal(0, 0.3, old.shape), rng.normal(size=ROWS)
    valid = torch.as_tensor(np.arange(K) < rng.integers(0, K + 1, ROWS)[:, None])
    steps = torch.arange(K).repeat_interleave(dim)
    mask = term_mask(valid, steps)
    in_chunks = whole_loss(
        {"log_prob": new, "old": old, "mask": mask, "term_step": steps, "advantages": advantages}, "action", "terms"
    )
    executed = valid.flatten().numpy()
    single = {
        "log_prob": new.reshape(-1, dim)[executed],
        "old": old.reshape(-1, dim)[executed],
        "mask": np.ones((executed.sum(), dim), bool),
        "term_step": np.zeros(dim, np.int64),
        "advantages": advantages.repeat(K)[executed],
    }
    torch.testing.assert_close(in_chunks, whole_loss(single, "chunk", "terms"), rtol=1e-12, atol=1e-12)


@given(seed=seeds, clip=st.sampled_from([None, 0.2]), delta=st.sampled_from([None, 0.5]))
def test_value_loss_agrees_with_its_definition(seed, clip, delta):
    value, old, target = np.random.default_rng(seed).normal(size=(3, 6))
    expected = [slow_value_loss(v, o, t, clip, delta) for v, o, t in zip(value, old, target, strict=True)]
    result = value_loss(torch.as_tensor(value), torch.as_tensor(old), torch.as_tensor(target), clip, delta)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9)


def test_terms_count_with_their_action():
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    steps = torch.tensor([0, 1, -1])
    assert term_mask(valid, steps).tolist() == [[True, True, True], [True, False, True], [False, False, False]]
    own = torch.tensor([[True, False, True]] * 3)
    assert term_mask(valid, steps, own)[0].tolist() == [True, False, True]
    per_row = torch.tensor([[0, 1, -1], [1, 0, 1], [-1, -1, 0]])
    assert term_mask(valid, per_row).tolist() == [[True, True, True], [False, True, False], [False, False, False]]


def test_nothing_to_average_gives_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for over in ("terms", "rows"):
        assert aggregate(torch.full((2, 3), math.nan), nothing, over) == 0


@given(seed=seeds, granularity=granularities, over=means)
def test_no_mask_is_one_of_true_everywhere(seed, granularity, over):
    rng = np.random.default_rng(seed)
    scores, everything = random_scores(rng), torch.ones(ROWS, TERMS, dtype=torch.bool)
    weight = torch.as_tensor(rng.random(ROWS)) if seed % 2 else None
    results = []
    for mask in (None, everything):
        steps = torch.arange(TERMS) % K  # every action has a term
        new, ratios = segment_sums(torch.as_tensor(scores["log_prob"]), mask, steps, K, granularity)
        old, _ = segment_sums(torch.as_tensor(scores["old"]), mask, steps, K, granularity)
        losses, clipped = policy_loss(new, old, torch.as_tensor(scores["advantages"])[:, None], ratios, 0.2, 0.2)
        kept = importance_weight(new, old, ratios, 2.0)
        results.append((losses, clipped, kept, aggregate(losses, ratios, over, weight)))
    torch.testing.assert_close(*results)
