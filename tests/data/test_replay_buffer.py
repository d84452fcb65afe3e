"""The replay buffer against a naive one that keeps whole episodes in lists."""

import errno
import json
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rl.data.replay_buffer import ReplayBuffer
from embodied_rl.errors import UserError

K, A = 3, 2


class NaiveReplay:
    """Slots per row as a Python list [kind, observation number, successor, episode], oldest dropped first."""

    def __init__(self, slots, num_envs, successful_capacity):
        self.slots, self.successful_capacity = slots, successful_capacity
        self.rings = [[] for _ in range(num_envs)]
        self.running = [[] for _ in range(num_envs)]
        self.tickets = [None] * num_envs
        self.successes = []

    def push(self, row, entry):
        self.rings[row].append(entry)
        if len(self.rings[row]) > self.slots:
            self.rings[row].pop(0)

    def add(self, row, number, ticket, waiting, lost, end, final, success):
        if lost:
            for entry in self.running[row]:
                entry["sampled"] = False
            self.running[row] = []
            return
        if waiting:
            return
        if ticket != self.tickets[row]:
            self.running[row] = []
        self.tickets[row] = ticket
        if self.running[row]:
            self.running[row][-1] |= {"next": number, "sampled": True}
        entry = {"number": number, "next": None, "sampled": False}
        self.push(row, entry)
        self.running[row].append(entry)
        if end:
            entry |= {"next": final, "sampled": True}
            self.push(row, {"number": final, "sampled": False})
            if success:
                alive = [e for e in self.running[row] if any(e is kept for kept in self.rings[row])]
                self.successes += [(row, e) for e in alive]
            self.running[row] = []

    def sampleable(self):
        return sorted((e["number"], e["next"]) for ring in self.rings for e in ring if e["sampled"])

    def successful(self):
        recent = self.successes[-self.successful_capacity :]
        return sorted(e["number"] for row, e in recent if any(e is kept for kept in self.rings[row]))


events = st.tuples(
    st.sampled_from(["go", "go", "go", "terminate", "truncate", "wait", "lose", "interrupt"]), st.booleans()
)


def image(number):
    return np.full((2, 2), number % 256, np.uint8)


def decision(actions_of, numbers, finals, tickets, row_events) -> dict[str, Any]:
    """The arguments of `add` for one decision of every row."""
    kind = np.array([event for event, _ in row_events])
    success = np.array([flag for _, flag in row_events])
    terminated, truncated = kind == "terminate", kind == "truncate"
    lost = kind == "lose"
    valid = np.ones((len(kind), K), bool)
    valid[terminated | truncated, -1] = False
    valid[(kind == "wait") | lost] = False
    rows = np.flatnonzero(terminated | truncated)
    return {
        "inputs": {"state": np.array(numbers, np.float32)[:, None], "image": np.stack([image(n) for n in numbers])},
        "actions": actions_of(numbers),
        "reward": np.ones((len(kind), K), np.float32),
        "valid": valid,
        "terminated": terminated,
        "truncated": truncated,
        "success": success,
        "final_inputs": {
            "state": np.array([finals[r] for r in rows], np.float32)[:, None],
            "image": np.array([image(finals[r]) for r in rows], np.uint8).reshape(-1, 2, 2),
        },
        "final_rows": rows,
        "tickets": np.array(tickets),
        "lost": lost,
        "potential": np.array(numbers, np.float32) / 2,
        "final_potential": np.array([finals[r] for r in rows], np.float32) / 2,
    }


def actions_of(numbers):
    return np.array(numbers, np.float32)[:, None, None] + np.zeros((len(numbers), K, A), np.float32)


def play(buffer, naive, history):
    """Run the same events through both; observation numbers are unique, so they identify every record."""
    num_envs = buffer.num_envs
    tickets, count = list(range(num_envs)), 0
    next_ticket = num_envs
    for row_events in history:
        numbers = [count + 2 * r for r in range(num_envs)]
        finals = [n + 1 for n in numbers]
        count += 2 * num_envs
        for row, (event, _) in enumerate(row_events):
            if event == "interrupt":
                tickets[row], next_ticket = next_ticket, next_ticket + 1
        buffer.add(**decision(actions_of, numbers, finals, tickets, row_events))
        for row, (event, success) in enumerate(row_events):
            end = event in ("terminate", "truncate")
            naive.add(row, numbers[row], tickets[row], event == "wait", event == "lose", end, finals[row], success)
            if end:
                tickets[row], next_ticket = next_ticket, next_ticket + 1


@settings(max_examples=150, deadline=None)
@given(
    history=st.lists(st.tuples(events, events), min_size=1, max_size=40),
    slots=st.integers(2, 9),
    recent=st.integers(1, 12),
)
def test_agrees_with_a_naive_replay(history, slots, recent):
    buffer, naive = ReplayBuffer(slots * 2 + 1, 2, recent), NaiveReplay(slots, 2, recent)
    play(buffer, naive, history)
    expected = naive.sampleable()
    assert len(buffer) == len(expected)
    generator = np.random.default_rng(0)
    if expected:
        data = buffer.sample(40 * len(expected), generator)
        number, following = data["inputs"]["state"][:, 0], data["next_inputs"]["state"][:, 0]
        assert sorted({(int(a), int(b)) for a, b in zip(number, following, strict=True)}) == expected
        np.testing.assert_array_equal(data["inputs"]["image"][:, 0, 0], number % 256)
        np.testing.assert_array_equal(data["next_inputs"]["image"][:, 1, 1], following % 256)
        np.testing.assert_array_equal(data["potential"], number / 2)
        np.testing.assert_array_equal(data["next_potential"], following / 2)
        np.testing.assert_array_equal(data["actions"][..., 0], number[:, None] * data["valid"][:, 0])
        np.testing.assert_array_equal(data["reward"], data["valid"])
        assert data["inputs"]["image"].dtype == np.uint8
    else:
        with pytest.raises(UserError, match="no decision"):
            buffer.sample(1, generator)
    successes = naive.successful()
    assert buffer.successful == len(successes)
    if successes:
        chosen = buffer.sample_successful(40 * len(successes), generator)["inputs"]["state"][:, 0]
        assert sorted({int(n) for n in chosen}) == successes
    else:
        with pytest.raises(UserError, match="no successful decision"):
            buffer.sample_successful(1, generator)


@settings(max_examples=40, deadline=None)
@given(
    history=st.lists(st.tuples(events, events), min_size=1, max_size=40),
    slots=st.integers(2, 9),
    decisions=st.integers(1, 4),
)
def test_several_decisions_are_followed_to_the_end_of_what_is_known(history, slots, decisions):
    buffer, naive = ReplayBuffer(slots * 2, 2), NaiveReplay(slots, 2, 1)
    play(buffer, naive, history)
    successor = {(e["number"], e["next"]) for ring in naive.rings for e in ring if e["sampled"]}
    if not successor:
        return
    following = dict(successor)
    data = buffer.sample(40 * len(successor), np.random.default_rng(0), decisions)
    plain = buffer.sample(40 * len(successor), np.random.default_rng(0))
    for b, number in enumerate(data["inputs"]["state"][:, 0].astype(int)):
        chain = [number]
        while len(chain) < decisions and following[chain[-1]] in following:
            chain.append(following[chain[-1]])
        assert data["next_inputs"]["state"][b, 0] == following[chain[-1]]
        made = data["valid"][b].any(1)
        assert made.tolist() == [i < len(chain) for i in range(decisions)]
        assert (data["potential"][b], data["next_potential"][b]) == (number / 2, following[chain[-1]] / 2)
        np.testing.assert_array_equal(data["valid"][b, 0], plain["valid"][b, 0])
        if len(chain) == 1:
            assert data["terminated"][b] == plain["terminated"][b]
        np.testing.assert_array_equal(data["actions"][b], plain["actions"][b])


@settings(max_examples=50, deadline=None)
@given(
    before=st.lists(st.tuples(events, events), max_size=25),
    after=st.lists(st.tuples(events, events), min_size=1, max_size=10),
)
def test_a_restored_buffer_goes_on_exactly_in_memory_and_on_disk(tmp_path_factory, before, after):
    folder = tmp_path_factory.mktemp("replay")
    one, two = ReplayBuffer(12, 2, 5, folder), ReplayBuffer(12, 2, 5)
    play(one, NaiveReplay(6, 2, 5), before)
    state = one.state_dict()
    json.dumps({name: value for name, value in state.items() if not isinstance(value, np.ndarray)})
    two.load_state_dict(
        {name: np.copy(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}
    )
    one = ReplayBuffer(12, 2, 5, folder)
    one.load_state_dict(two.state_dict())
    assert not list(folder.iterdir()), "its files have no names"
    for buffer in (one, two):
        play(buffer, NaiveReplay(6, 2, 5), after)
    assert len(one) == len(two) and one.successful == two.successful
    if len(one):
        first, second = (b.sample(64, np.random.default_rng(1)) for b in (one, two))
        for name in ("state", "image"):
            np.testing.assert_array_equal(first["inputs"][name], second["inputs"][name])
            np.testing.assert_array_equal(first["next_inputs"][name], second["next_inputs"][name])
        np.testing.assert_array_equal(first["actions"], second["actions"])
        np.testing.assert_array_equal(first["ticket"], second["ticket"])


def test_an_interrupted_episode_may_start_again_under_its_ticket():
    buffer = ReplayBuffer(20, 1)
    for number in (0, 2):
        buffer.add(**decision(actions_of, [number], [number + 1], [7], [("go", False)]))
    buffer.interrupt(np.array([0]))
    buffer.add(**decision(actions_of, [4], [5], [7], [("go", False)]))
    data = buffer.sample(20, np.random.default_rng(0))
    assert set(data["inputs"]["state"][:, 0]) == {0} and set(data["next_inputs"]["state"][:, 0]) == {2}


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="too small"):
        ReplayBuffer(5, 3)
    buffer = ReplayBuffer(12, 2)
    play(buffer, NaiveReplay(6, 2, 1), [[("go", False)] * 2])
    with pytest.raises(UserError, match="2 environments x 6 slots"):
        ReplayBuffer(14, 2).load_state_dict(buffer.state_dict())


def test_final_rows_must_be_the_rows_that_ended():
    arguments = decision(actions_of, [0, 2], [1, 3], [0, 1], [("go", False), ("terminate", True)])
    arguments["final_rows"] = np.array([0])
    with pytest.raises(ValueError, match="final_rows"):
        ReplayBuffer(12, 2).add(**arguments)


def test_one_choice_may_stand_for_a_chunk_of_several_steps():
    """As the noise that a flow starts from does."""
    buffer = ReplayBuffer(6, 1)
    arguments = decision(actions_of, [3], [4], [0], [("terminate", False)])
    buffer.add(**arguments | {"actions": np.full((1, 1, 7), 0.5, np.float32)})
    data = buffer.sample(2, np.random.default_rng(0))
    assert (data["actions"] == 0.5).all() and data["actions"].shape == (2, 1, 7)
    np.testing.assert_array_equal(data["valid"][0, 0], arguments["valid"][0])
    np.testing.assert_array_equal(data["reward"][0, 0], np.where(arguments["valid"][0], arguments["reward"][0], 0))


def test_every_observation_is_stored_once_as_uint8(tmp_path):
    for folder in (None, tmp_path):
        buffer = ReplayBuffer(40, 2, folder=folder)
        play(buffer, NaiveReplay(20, 2, 1), [[("go", False)] * 2] * 30)
        large = {name: array for name, array in vars(buffer)["_inputs"].items() if name == "image"}
        records = vars(buffer)["_records"].values()
        assert large["image"].dtype == np.uint8 and large["image"].shape == (40, 2, 2)
        assert all(array.ndim < 4 and array.dtype != np.uint8 for array in records), "no further images"
        assert isinstance(large["image"], np.memmap) == (folder is not None)


def test_a_replay_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = decision(actions_of, [0, 2], [1, 3], [0, 1], [("go", False)] * 2)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"no room for a replay column of .* GiB in .*file: Not a directory; free disk"):
        ReplayBuffer(12, 2, folder=tmp_path / "file").add(**arguments)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device; free disk space"):
        ReplayBuffer(12, 2, folder=tmp_path).add(**arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
