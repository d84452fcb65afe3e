"""A point that must reach one of two squares, which only the image shows: small, batched, seeded."""

import numpy as np

from embodied_rl.pipeline.rollout import RolloutWorker
from embodied_rl.pipeline.tickets import TicketCounter
from embodied_rl.simulators.base import BatchedEnvironment
from embodied_rl.simulators.chunk import BatchedSimulator
from embodied_rl.simulators.reset_schedule import RandomSchedule
from embodied_rl.specs import ActionSpec, CameraSpec, ObservationSpec, TaskSpec, connect

SIZE, LIMIT = 24, 6
CAMERAS = {"overhead": CameraSpec(SIZE, SIZE)}
TASKS = tuple(TaskSpec(name, f"reach the {name} square", LIMIT, True, "dense") for name in ("red", "blue"))


class TwoSquares(BatchedEnvironment):
    """State: the point's position in [-1, 1]^2, which actions move by at most 0.5."""

    num_envs = 4
    observation_spec = ObservationSpec(state=2, cameras=CAMERAS)
    action_spec = ActionSpec((-1.0, -1.0), (1.0, 1.0), (0.0, 0.0))
    tasks = TASKS

    def __init__(self):
        self.point, self.wanted, self.at = np.zeros((4, 2)), np.zeros(4, np.int64), np.zeros(4, np.int64)
        self.squares = np.zeros((4, 2, 2))

    def reset(self, rows, states):
        for row, state in zip(rows, states, strict=True):
            drawn = np.random.default_rng(state.seed).uniform(-0.8, 0.8, (3, 2))
            self.point[row], self.squares[row], self.wanted[row], self.at[row] = drawn[0], drawn[1:], state.task, 0

    def step(self, actions):
        self.point = np.clip(self.point + 0.5 * actions, -1, 1)
        self.at += 1
        distance = np.linalg.norm(self.point - self.squares[range(4), self.wanted], axis=1)
        return 1 - distance, distance < 0.2, self.at >= LIMIT, distance < 0.2

    def observe(self, rows):
        images = np.zeros((len(rows), SIZE, SIZE, 3), np.uint8)
        for image, places in zip(images, np.concatenate([self.squares, self.point[:, None]], 1)[rows], strict=True):
            for channel, (y, x) in zip((0, 2, 1), ((places + 1) / 2 * (SIZE - 4)).astype(int), strict=True):
                image[y : y + 4, x : x + 4, channel] = 255
        return {"state": self.point[rows].astype(np.float32), "image.overhead": images}


def simulate():
    """Four of them, in this process."""
    return BatchedSimulator(TwoSquares(), RandomSchedule(0, num_tasks=2))


def roll_out(simulator, policy):
    """A worker that has begun."""
    connection = connect(simulator.observation_spec, simulator.action_spec, policy.observation_spec, policy.action_spec)
    worker = RolloutWorker(simulator, policy, connection, seed=0)
    worker.restart(TicketCounter(0))
    return worker
