from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from simulator_toys import ACTION, OBSERVATION, TASKS, assert_same

from embodied_rl.errors import UserError
from embodied_rl.simulators.base import WAIT
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.simulators.worker_process import EnvironmentFailed
from embodied_rl.simulators.workers import WorkerSimulator
from embodied_rl.types import ChunkResult, Observation

SCHEDULE = RandomSchedule(5, num_tasks=2)
COUNTER = "simulator_toys:Counter"


def counters(num_envs: int = 4, workers: int | None = 2) -> WorkerSimulator:
    return WorkerSimulator(COUNTER, {}, num_envs, workers, SCHEDULE)


def test_results_do_not_depend_on_the_number_of_workers() -> None:
    def play(workers: int | None) -> list[Observation | ChunkResult]:
        generator = np.random.default_rng(0)
        with counters(4, workers) as simulator:
            results: list[Observation | ChunkResult] = [simulator.reset(tickets=np.arange(4)).copy()]
            for i in range(20):
                actions = generator.uniform(-1, 1, (4, 1 + i % 7, 2)).astype(np.float32)
                tickets = generator.integers(WAIT, 50, 4)
                result = simulator.step(actions, "all" if i % 5 == 0 else "last", tickets)
                results.append(copied(result))
                if i % 6 == 5:
                    results.append(simulator.reset(np.array([3, 1]), np.array([60 + i, 70 + i])).copy())
        return results

    alone = play(1)
    for workers in (2, 3, 4, None):
        assert_same(play(workers), alone)


def copied(result: ChunkResult) -> ChunkResult:
    result.observation = result.observation.copy()
    for name in ("reward", "terminated", "truncated", "valid", "success"):
        setattr(result, name, getattr(result, name).copy())
    result.intermediate = result.intermediate and [each.copy() for each in result.intermediate]
    return result


def test_specs_cross_the_border_unchanged() -> None:
    with counters() as simulator:
        assert simulator.observation_spec == OBSERVATION
        assert simulator.action_spec == ACTION
        assert simulator.tasks == TASKS
        assert simulator.num_envs == 4
        observation = simulator.reset(tickets=np.arange(4))
    assert observation.texts() == [TASKS[task].instruction for task in observation.task]
    assert observation.images["wrist"].shape == (4, 3, 3, 3)
    assert set(observation.image_mask) == {"front", "wrist"}


def test_an_observation_stays_intact_until_the_second_call_after_it() -> None:
    actions = np.ones((4, 3, 2), np.float32)
    with counters() as simulator:
        given = [simulator.reset(tickets=np.arange(4))]
        kept = [given[0].copy()]
        for i in range(12):
            if i == 7:
                simulator.reset(np.array([2]), np.array([9]))
            result = simulator.step(np.tile(actions, (1, 1 + 2 * i, 1)), next_tickets=np.arange(4) + i)
            if i != 7:
                assert_same(given[-1], kept[-1])
            given.append(result.observation)
            kept.append(result.observation.copy())
    assert_same(given[-1], kept[-1])  # also after the simulator is closed


def test_a_waiting_row_keeps_its_last_observation_through_calls_and_larger_chunks() -> None:
    with counters() as simulator:
        simulator.reset(tickets=np.arange(4))
        final = simulator.step(np.ones((4, 10, 2), np.float32)).final_observation
        assert final is not None and len(final) == 4
        calls: list[tuple[int, Literal["last", "all"]]] = [(2, "last"), (40, "last"), (3, "all"), (100, "all")]
        for chunk, observe in calls:
            result = simulator.step(np.ones((4, chunk, 2), np.float32), observe)
            assert_same(result.observation.copy(), final)
            assert not result.valid.any() and result.tickets.tolist() == [WAIT] * 4
            for each in result.intermediate or []:
                assert_same(each.copy(), final)
        simulator.reset(np.array([1]), np.array([5]))
        state = simulator.step(np.ones((4, 1, 2), np.float32)).observation.state
        np.testing.assert_array_equal(np.delete(state, 1, 0), np.delete(final.state, 1, 0))


def test_workers_start_at_the_same_time(tmp_path: Path) -> None:
    WorkerSimulator("simulator_toys:Rendezvous", {"folder": str(tmp_path), "others": 3}, 4, 4, SCHEDULE).close()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
def test_workers_do_not_interrupt_whoever_wakes_them() -> None:
    with counters(2, workers=2) as simulator:
        assert {os.sched_getscheduler(pid) for pid in simulator.pids} == {os.SCHED_BATCH}


def test_rows_are_shared_out_unevenly_when_they_must() -> None:
    with counters(5, 3) as simulator:
        simulator.reset(tickets=np.arange(5))
        assert simulator.step(np.ones((5, 12, 2), np.float32)).final_rows.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 5])
def test_a_number_of_workers_that_cannot_be(workers: int) -> None:
    with pytest.raises(UserError, match="choose between 1 and 4"):
        counters(4, workers)


@pytest.mark.parametrize("workers", [2, None])
def test_close_leaves_nothing_behind(workers: int | None) -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    counters().close()  # starts what stays: the spawning thread
    before, shared = open_files(), os.listdir("/dev/shm")
    for _ in range(3):
        simulator = counters(4, workers)
        simulator.reset(tickets=np.arange(4))
        simulator.step(np.ones((4, 30, 2), np.float32), "all")
        simulator.send(np.ones((4, 30, 2), np.float32))
        simulator.close()
        simulator.close()
        with pytest.raises(RuntimeError, match="closed"):
            simulator.reset(tickets=np.arange(4))
    del simulator
    assert open_files() == before
    assert os.listdir("/dev/shm") == shared
    assert children() == []


def test_a_forgotten_simulator_ends_with_its_last_reference() -> None:
    simulator = counters()
    del simulator
    gc.collect()
    assert children() == []


def test_a_simulator_built_in_a_thread_outlives_the_thread() -> None:
    built: list[WorkerSimulator] = []
    thread = threading.Thread(target=lambda: built.append(counters()))
    thread.start()
    thread.join()
    with built[0] as simulator:
        simulator.reset(tickets=np.arange(4))
        assert simulator.deaths == 0


def test_environments_in_this_process_fail_as_they_do_in_others() -> None:
    with pytest.raises(UserError, match=r"'simulator_toys:Nothing' .*python.*Nothing"):
        WorkerSimulator("simulator_toys:Nothing", {}, 2, None, SCHEDULE)
    with pytest.raises(EnvironmentFailed, match=r"(?s)environments 0-1.*ZeroDivisionError: the toy broke"):
        WorkerSimulator("simulator_toys:Faulty", {"at_start": "raise"}, 2, None, SCHEDULE)


def test_a_target_that_is_missing_names_module_and_interpreter() -> None:
    with pytest.raises(UserError, match=r"'no_such_module:Toy' .*python.*No module named 'no_such_module'"):
        WorkerSimulator("no_such_module:Toy", {}, 2, 2, SCHEDULE)
    with pytest.raises(UserError, match=r"'simulator_toys:Nothing' .*python.*Nothing"):
        WorkerSimulator("simulator_toys:Nothing", {}, 2, 1, SCHEDULE)
    assert children() == []


def test_arguments_must_be_plain_values() -> None:
    with pytest.raises(UserError, match="plain JSON values"):
        WorkerSimulator(COUNTER, {"longest": object()}, 2, 1, SCHEDULE)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of its own environment that has no numpy."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    return folder / "bin" / "python"


def test_another_interpreter_sees_only_the_path_it_is_given(bare_python: Path) -> None:
    toys = str(Path(__file__).parent)
    numpy = str(Path(np.__file__).parent.parent)
    with pytest.raises(UserError, match=f"{bare_python} cannot run a simulator worker: No module named 'numpy'"):
        WorkerSimulator(COUNTER, {}, 2, 2, SCHEDULE, python=str(bare_python), python_path=[toys, numpy])
    with pytest.raises(UserError, match="/no/such/python cannot be started"):
        WorkerSimulator(COUNTER, {}, 2, 2, SCHEDULE, python="/no/such/python")
    assert children() == []


def test_another_interpreter_runs_the_environments(bare_python: Path) -> None:
    packages = next((bare_python.parent.parent / "lib").glob("python*/site-packages"))
    site = Path(np.__file__).parent.parent
    for needed in ("numpy", "numpy.libs"):
        (packages / needed).symlink_to(site / needed)
    python_path = [str(Path(__file__).parent)]
    with WorkerSimulator(COUNTER, {}, 2, 2, SCHEDULE, python=str(bare_python), python_path=python_path) as other:
        other.reset(tickets=np.arange(2))
        there = copied(other.step(np.ones((2, 5, 2), np.float32)))
        paths = {Path(f"/proc/{pid}/exe").resolve() for pid in other.pids}
    with counters(2) as here:
        here.reset(tickets=np.arange(2))
        assert_same(there, copied(here.step(np.ones((2, 5, 2), np.float32))))
    assert paths == {bare_python.resolve()}
    # It has numpy now, but not the simulator.
    target = "embodied_rl.simulators.maniskill.rows:ManiSkillRows"
    with pytest.raises(UserError, match=f"'{target}' does not run with {bare_python}: No module named '"):
        WorkerSimulator(target, {"task": "PickCube-v1"}, 2, 1, SCHEDULE, python=str(bare_python))


def children() -> list[int]:
    """Process ids of all children, zombies too."""
    listing = [Path(f"/proc/self/task/{task}/children").read_text() for task in os.listdir("/proc/self/task")]
    return [int(child) for child in " ".join(listing).split()]
