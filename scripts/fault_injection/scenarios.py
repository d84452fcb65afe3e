"""Which faults are injected into which trainings."""

from __future__ import annotations

from fault_injection.training import Setup

_RAY = "--pipeline.executor ray --pipeline.rollout-workers 2"
_LEARNERS = "--pipeline.learners 2"
_ASYNCHRONOUS = "--algorithm.staleness 1"

LOCAL = Setup("local", _LEARNERS)
LOCAL_ASYNC = Setup("local, staleness 1", f"{_LEARNERS} {_ASYNCHRONOUS}")
RAY = Setup("ray", _RAY)
RAY_ASYNC = Setup("ray, staleness 1", f"{_RAY} {_ASYNCHRONOUS}")

SMALL_SHARED_MEMORY = Setup("ray, a small /dev/shm", _RAY, small_shared_memory=True)
ROOM = Setup("ray, a node to spare", _RAY, nodes=3)
NO_ROOM = Setup("ray, no node to spare", _RAY, nodes=2)

SCENARIOS: list[tuple[Setup, list[str]]] = [
    (LOCAL, ["learner_rank", "slow_simulator", "driver", "slow_learner_rank", "learner_rank", "driver"]),
    (RAY, ["simulator", "rollout_worker", "slow_rollout_worker", "rollout_worker", "simulator"]),
    (LOCAL_ASYNC, ["driver", "learner_rank", "slow_simulator", "driver"]),
    (ROOM, ["node"]),
    (SMALL_SHARED_MEMORY, ["shared_memory", "shared_memory"]),
    (RAY_ASYNC, ["driver", "slow_rollout_worker", "driver"]),
    (LOCAL, ["stopped_simulator", "stopped_learner_rank"]),
    (NO_ROOM, ["node"]),
    (LOCAL_ASYNC, ["simulator", "learner_rank", "simulator", "driver"]),
    (RAY, ["driver", "slow_simulator", "slow_rollout_worker"]),
    (RAY, ["stopped_rollout_worker"]),
    (RAY_ASYNC, ["rollout_worker", "simulator", "rollout_worker", "driver"]),
    (LOCAL, ["simulator", "driver", "simulator"]),
]
"""In this order, again and again."""
