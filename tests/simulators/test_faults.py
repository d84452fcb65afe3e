"""Real processes, real signals: what becomes of a run when its simulators die, hang, or raise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulator_toys import Counter, assert_same

from embodied_rl.errors import SimulatorDied, UserError
from embodied_rl.simulators import worker
from embodied_rl.simulators.base import WAIT
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.simulators.worker import Channel, Kind, Message
from embodied_rl.simulators.worker_process import EnvironmentFailed
from embodied_rl.simulators.workers import WorkerSimulator
from embodied_rl.types import ChunkResult

SCHEDULE = RandomSchedule(11)
ACTIONS = np.full((4, 2, 2), 0.5, np.float32)
LONG = 10**6


class Faults:
    """Four long episodes in two workers, and a file that tells one of them to misbehave."""

    def __init__(self, folder: Path, timeout: float = 60.0, max_deaths: int = 3) -> None:
        self.orders = folder / "orders.json"
        self.log_dir = folder / "logs"
        self.simulator = WorkerSimulator(
            "simulator_toys:Faulty",
            {"orders": str(self.orders), "longest": LONG},
            4,
            2,
            SCHEDULE,
            log_dir=self.log_dir,
            timeout=timeout,
            max_deaths=max_deaths,
        )

    def order(self, do: str, ticket: int, where: str = "step", **when: Any) -> None:
        what = {"do": do, "where": where, "seed": SCHEDULE.state(ticket).seed, **when}
        written = self.orders.with_suffix(".new")
        written.write_text(json.dumps(what))
        written.rename(self.orders)


@pytest.fixture
def faults(tmp_path: Path) -> Any:
    made: list[Faults] = []

    def make(**options: Any) -> Faults:
        made.append(Faults(tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.simulator.close()
    assert workers() == []


def workers() -> list[int]:
    """Process ids of all children, zombies too."""
    listing = [Path(f"/proc/self/task/{task}/children").read_text() for task in os.listdir("/proc/self/task")]
    return [int(child) for child in " ".join(listing).split()]


def check_lost(result: ChunkResult, lost: list[bool], tickets: list[int]) -> None:
    """Rows that are lost are at the first observation of their own ticket; nothing of them counts."""
    assert result.lost.tolist() == lost
    assert result.tickets.tolist() == tickets
    assert result.success is not None
    for row, ticket in enumerate(tickets):
        if lost[row]:
            fresh = Counter(LONG)
            fresh.reset(SCHEDULE.state(ticket))
            np.testing.assert_array_equal(result.observation.state[row], fresh.observe()["state"])
            arrays = (result.valid, result.reward, result.terminated, result.truncated, result.success)
            assert not any(array[row].any() for array in arrays)
        elif ticket != WAIT:
            assert result.valid[row].all()


@pytest.mark.parametrize("do", ["die", "crash", "exit", "garble"])
def test_the_run_survives_the_death_of_a_worker(do: str, faults: Callable[..., Faults]) -> None:
    it = faults()
    simulator = it.simulator
    simulator.reset(tickets=np.arange(4))
    before = simulator.step(ACTIONS).observation.state.copy()
    it.order(do, ticket=1, at=3)
    result = simulator.step(ACTIONS, "all", next_tickets=np.arange(10, 14))
    check_lost(result, [True, True, False, False], [0, 1, 2, 3])
    assert not result.episodes and not len(result.final_rows)
    assert [each.state[:2, 0].tolist() for each in result.intermediate or []] == [[0, 0], [0, 0]]
    assert simulator.deaths == 1
    np.testing.assert_array_equal(result.observation.state[2:, 0], before[2:, 0] + 2)
    # The new worker runs the same episodes from their start: lengths and returns are not those of the lost part.
    again = simulator.step(ACTIONS)
    assert not again.lost.any() and again.valid.all()
    assert again.observation.state[:, 0].tolist() == [2, 2, 6, 6]
    assert f"about to {do}" in (it.log_dir / "worker-0.log").read_text()


def test_a_lost_episode_counts_from_its_second_start(tmp_path: Path) -> None:
    schedule = RandomSchedule(3)
    orders = tmp_path / "orders.json"
    with WorkerSimulator("simulator_toys:Faulty", {"orders": str(orders), "longest": 9}, 1, 1, schedule) as simulator:
        simulator.reset(tickets=np.array([0]))
        length = int(simulator.step(ACTIONS[:1]).observation.state[0, 2])
        assert length > 3
        orders.write_text(json.dumps({"do": "die", "where": "step"}))
        assert simulator.step(ACTIONS[:1]).lost.all()
        result = simulator.step(np.repeat(ACTIONS[:1], 5, 1))
    (episode,) = result.episodes
    reference = Counter(9)
    reference.reset(schedule.state(0))
    rewards = [np.float32(reference.step(np.array([0.5, 0.5]))[0]) for _ in range(length)]
    assert (episode.ticket, episode.length) == (0, length)
    assert episode.episode_return == pytest.approx(sum(map(float, rewards)), rel=1e-12)


def test_a_worker_killed_while_its_answer_is_awaited(faults: Callable[..., Faults]) -> None:
    it = faults()
    simulator = it.simulator
    simulator.reset(tickets=np.arange(4))
    it.order("hang", ticket=3)
    simulator.send(ACTIONS)
    timer = threading.Timer(0.5, os.kill, (simulator.pids[1], signal.SIGKILL))
    timer.start()
    start = time.monotonic()
    check_lost(simulator.receive(), [False, False, True, True], [0, 1, 2, 3])
    assert time.monotonic() - start < 30.0  # by the end of the socket, long before the timeout
    timer.join()


def test_a_worker_that_hangs_is_killed_and_tells_where(faults: Callable[..., Faults]) -> None:
    it = faults(timeout=3.0)
    it.simulator.reset(tickets=np.arange(4))
    it.order("hang", ticket=0)
    check_lost(it.simulator.step(ACTIONS), [True, True, False, False], [0, 1, 2, 3])
    log = (it.log_dir / "worker-0.log").read_text()
    assert "most recent call first" in log and "in misbehave" in log


@pytest.mark.parametrize(("do", "dead"), [("hang", True), ("poll", False)])
def test_a_worker_that_stands_still_is_not_waited_for(
    faults: Callable[..., Faults], monkeypatch: pytest.MonkeyPatch, do: str, dead: bool
) -> None:
    monkeypatch.setattr(worker, "_BEAT", 0.5)
    it = faults()
    it.simulator.reset(tickets=np.arange(4))
    it.order(do, ticket=0)
    began = time.monotonic()
    check_lost(it.simulator.step(ACTIONS), [dead, dead, False, False], [0, 1, 2, 3])
    assert time.monotonic() - began < 30, "half of the timeout"


def test_both_workers_dead_between_calls(faults: Callable[..., Faults]) -> None:
    simulator = faults().simulator
    simulator.reset(tickets=np.array([0, WAIT, 2, WAIT]))
    for pid in simulator.pids:
        os.kill(pid, signal.SIGKILL)
    result = simulator.step(ACTIONS)
    check_lost(result, [True, False, True, False], [0, WAIT, 2, WAIT])
    assert simulator.deaths == 2
    assert simulator.step(ACTIONS).valid[:, 0].tolist() == [True, False, True, False]


def test_death_in_a_reset_loses_the_other_episodes_of_the_worker(faults: Callable[..., Faults]) -> None:
    it = faults()
    simulator = it.simulator
    simulator.reset(tickets=np.arange(4))
    simulator.step(ACTIONS)
    it.order("die", ticket=7, where="reset")
    fresh = simulator.reset(np.array([1]), np.array([7]))
    assert fresh.state[0, 0] == 0
    # Row 1 is where its caller wanted it; row 0 went back to its start, so what its caller acts on is gone.
    result = simulator.step(ACTIONS)
    check_lost(result, [True, False, False, False], [0, 7, 2, 3])
    assert result.observation.state[:, 0].tolist() == [0, 2, 4, 4]
    assert simulator.step(ACTIONS).observation.state[:, 0].tolist() == [2, 4, 6, 6]


def test_death_in_the_reset_at_the_border(tmp_path: Path) -> None:
    """An episode that ended in the very chunk its worker died in is lost with it: no record of it got out."""
    orders = tmp_path / "orders.json"
    orders.write_text(json.dumps({"do": "die", "where": "reset", "seed": SCHEDULE.state(21).seed}))
    kwargs = {"orders": str(orders), "longest": 3}
    actions, following = np.zeros((1, 5, 2), np.float32), np.array([21])
    with WorkerSimulator("simulator_toys:Faulty", kwargs, 1, 1, SCHEDULE) as simulator:
        simulator.reset(tickets=np.array([20]))
        result = simulator.step(actions, next_tickets=following)
        assert result.lost.tolist() == [True] and result.tickets.tolist() == [20] and result.episodes == []
        result = simulator.step(actions, next_tickets=following)
        assert [episode.ticket for episode in result.episodes] == [20] and result.tickets.tolist() == [21]


def test_repeated_deaths_end_the_run_with_the_workers_words(faults: Callable[..., Faults]) -> None:
    it = faults(max_deaths=2)
    simulator = it.simulator
    simulator.reset(tickets=np.arange(4))
    it.order("crash", ticket=2, again=True)
    assert simulator.step(ACTIONS).lost.any() and simulator.step(ACTIONS).lost.any()
    with pytest.raises(SimulatorDied, match=r"(?s)3 worker deaths.*environments 2-3.*SIGSEGV.*about to crash"):
        simulator.step(ACTIONS)


def test_a_reset_that_always_kills_ends_the_run(faults: Callable[..., Faults]) -> None:
    it = faults(max_deaths=1)
    it.order("exit", ticket=0, where="reset", again=True)
    with pytest.raises(SimulatorDied, match=r"(?s)exit code 3.*about to exit"):
        it.simulator.reset(tickets=np.arange(4))


@pytest.mark.parametrize(
    ("do", "how", "patience"), [("die", "SIGKILL", 60), ("exit", "exit code 3", 60), ("hang", "in time", 5)]
)
def test_death_at_start_up_is_final(do: str, how: str, patience: float) -> None:
    with pytest.raises(SimulatorDied, match=f"(?s)at start-up: .*{how}.*about to {do}"):
        WorkerSimulator("simulator_toys:Faulty", {"at_start": do}, 2, 2, SCHEDULE, start_timeout=patience)
    assert workers() == []


def test_an_exception_comes_with_its_traceback_and_a_full_reset_recovers(faults: Callable[..., Faults]) -> None:
    it = faults()
    simulator = it.simulator
    first = simulator.reset(tickets=np.arange(4)).copy()
    it.order("raise", ticket=2)
    with pytest.raises(
        EnvironmentFailed, match=r"(?s)environments 2-3.*in misbehave.*ZeroDivisionError: the toy broke"
    ):
        simulator.step(ACTIONS)
    assert_same(simulator.reset(tickets=np.arange(4)).copy(), first)
    assert simulator.step(ACTIONS).valid.all() and simulator.deaths == 0


def test_an_error_of_the_user_stays_one_line(faults: Callable[..., Faults]) -> None:
    it = faults()
    it.simulator.reset(tickets=np.arange(4))
    it.order("refuse", ticket=0)
    with pytest.raises(UserError) as raised:
        it.simulator.step(ACTIONS)
    assert str(raised.value) == "the toy needs a battery: put one in"


def test_answers_of_abandoned_calls_are_dropped(faults: Callable[..., Faults]) -> None:
    it = faults()
    simulator = it.simulator
    first = simulator.reset(tickets=np.arange(4)).copy()
    for _ in range(3):
        simulator.send(ACTIONS)
        assert_same(simulator.reset(tickets=np.arange(4)).copy(), first)
    assert simulator.step(ACTIONS).observation.state[:, 0].tolist() == [2] * 4


@pytest.mark.parametrize(("kind", "ahead"), [(Kind.DONE, 1), (Kind.CHUNK, 0)])
def test_an_answer_from_nowhere_is_not_taken_for_a_current_one(
    kind: Kind, ahead: int, faults: Callable[..., Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator = faults().simulator
    simulator.reset(tickets=np.arange(4))
    real = Channel.receive

    def receive(channel: Channel, deadline: float | None) -> Message:
        monkeypatch.undo()
        message = real(channel, deadline)
        return Message(kind, message.sequence + ahead)

    monkeypatch.setattr(Channel, "receive", receive)
    check_lost(simulator.step(ACTIONS), [True, True, False, False], [0, 1, 2, 3])


def test_ctrl_c_reaches_only_the_parent(faults: Callable[..., Faults]) -> None:
    simulator = faults().simulator
    simulator.reset(tickets=np.arange(4))
    for pid in simulator.pids:
        os.kill(pid, signal.SIGINT)
    assert not simulator.step(ACTIONS).lost.any()


def test_close_does_not_wait_for_a_worker_that_hangs(faults: Callable[..., Faults], monkeypatch: Any) -> None:
    monkeypatch.setattr("embodied_rl.simulators.workers._GRACE", 0.5)
    it = faults()
    it.simulator.reset(tickets=np.arange(4))
    it.order("hang", ticket=0)
    it.simulator.send(ACTIONS)
    start = time.monotonic()
    it.simulator.close()
    assert time.monotonic() - start < 30.0
    assert workers() == []


@pytest.mark.parametrize("busy", [False, True])
def test_workers_die_with_their_parent(busy: bool, tmp_path: Path) -> None:
    """SIGKILL gives the parent no chance to tell them; a worker inside a long step cannot see the socket either."""
    program = f"""
import sys, time; sys.path[:0] = {sys.path!r}
import numpy as np
from pathlib import Path
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.simulators.workers import WorkerSimulator
orders = Path({str(tmp_path / "orders.json")!r})
simulator = WorkerSimulator("simulator_toys:Faulty", {{"orders": str(orders)}}, 2, 2, RandomSchedule(0))
simulator.reset(tickets=np.arange(2))
if {busy}:
    orders.write_text('{{"do": "hang", "where": "step", "again": true}}')
    simulator.send(np.zeros((2, 1, 2), np.float32))
    time.sleep(0.3)
print(*simulator.pids, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        parent.kill()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
