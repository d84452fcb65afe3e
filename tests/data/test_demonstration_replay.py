"""Demonstrations as decisions, against a slow list of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rl.data.demonstration_replay import demonstration_replay
from embodied_rl.data.demonstrations import DemonstrationEpisode, observations


def episode(number: int, steps: int, ends_at: int | None) -> DemonstrationEpisode:
    """States 100 * number + t, action and reward of step t are t + 1; terminated at `ends_at`, truncated if None."""
    times = np.arange(steps)
    return DemonstrationEpisode(
        states=(100 * number + np.arange(steps + 1, dtype=np.float32))[:, None],
        actions=(times + 1).astype(np.float32)[:, None],
        rewards=(times + 1).astype(np.float32),
        success=times == ends_at,
        terminated=times == ends_at,
        truncated=np.zeros(steps, bool),
        seed=0,
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 7), st.booleans(), st.integers(0, 6)), min_size=1, max_size=4),
    chunk=st.integers(1, 4),
    shaped=st.booleans(),
)
def test_every_chunk_of_every_demonstration_is_a_decision(lengths, chunk, shaped):
    episodes = [episode(i, steps, at % steps if ends else None) for i, (steps, ends, at) in enumerate(lengths)]
    seen = observations(episodes, ("go",), final=True)
    assert len(seen) == sum(steps + 1 for steps, _, _ in lengths)
    buffer = demonstration_replay(episodes, {"state": seen.state}, chunk, shaped)
    expected = {}
    for i, (steps, ends, at) in enumerate(lengths):
        length = at % steps + 1 if ends else steps
        for start in range(length):
            stop = min(start + chunk, length)
            times = np.arange(start, stop)
            reward = (times == length - 1) & ends if shaped else times + 1
            expected[100 * i + start] = (100 * i + stop, times + 1, reward, ends and stop == length, start, stop)
    assert len(buffer) == len(expected)
    data = buffer.sample(30 * len(expected), np.random.default_rng(0))
    assert {int(state) for state in data["inputs"]["state"][:, 0]} == expected.keys()
    for b, state in enumerate(data["inputs"]["state"][:, 0].astype(int)):
        following, actions, reward, terminated, before, after = expected[state]
        count = len(actions)
        assert data["next_inputs"]["state"][b, 0] == following
        assert data["valid"][b, 0].tolist() == [k < count for k in range(chunk)]
        np.testing.assert_array_equal(data["actions"][b, :count, 0], actions)
        np.testing.assert_array_equal(data["reward"][b, 0, :count], reward)
        assert data["terminated"][b] == terminated
        assert (data["potential"][b], data["next_potential"][b]) == ((before, after) if shaped else (0, 0))


def test_two_decisions_of_a_demonstration_follow_each_other():
    one = episode(0, 5, None)
    buffer = demonstration_replay([one], {"state": one.states}, 2, shaped=False)
    data = buffer.sample(200, np.random.default_rng(0), decisions=2)
    start = data["inputs"]["state"][:, 0]
    assert data["next_inputs"]["state"][:, 0] == pytest.approx(np.minimum(start + 4, 5))
