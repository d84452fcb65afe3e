"""What LIBERO consists of, read from its installed files; nothing here imports it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from embodied_rl.errors import UserError, unknown

CAMERAS = ("agentview", "robot0_eye_in_hand")

_IN_ORDER = ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")
"""LIBERO's own order of its suites, in which LIBERO-130 joins them."""

SUITES = (*sorted(_IN_ORDER), "libero_130")

STEP_LIMITS: dict[str, dict[str, int]] = {
    "openvla": {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400},
    "lerobot": {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400},
    "rlinf": {"libero_spatial": 240, "libero_10": 512, "libero_90": 512, "libero_130": 512},
    "simplevla": dict.fromkeys(SUITES, 512),
}
"""Published time limits, in environment steps: "openvla" of OpenVLA and OpenVLA-OFT, "lerobot" of LeRobot 0.6, "rlinf"
of RLinf's configurations, "simplevla" of SimpleVLA-RL. In LIBERO-130 a task has the limit of its own suite where a
table has none for the whole."""


@dataclass(frozen=True)
class Task:
    """One task: the suite that holds its files, and its name."""

    suite: str
    name: str

    @property
    def instruction(self) -> str:
        """The task in words, as LIBERO reads them off the name."""
        return re.sub(r"^[A-Z_]+SCENE\d+_", "", self.name).replace("_", " ")

    @property
    def bddl(self) -> Path:
        """The file that says what is in the scene, where, and what the goal is."""
        return package() / "bddl_files" / self.suite / f"{self.name}.bddl"

    @property
    def init_states(self) -> Path:
        """The file of recorded initial states."""
        return package() / "init_files" / self.suite / f"{self.name}.pruned_init"


@functools.cache
def contents(task: Task) -> tuple[tuple[str, str], ...]:
    """(category, name) of every fixture, then every object that `task` names, tables and floors included."""
    found = []
    for section in re.findall(r"\(:(?:fixtures|objects)(.*?)\n\s*\)", task.bddl.read_text(), re.DOTALL):
        for names, category in re.findall(r"([\w\s]+?) - (\w+)", section):
            found += [(category, name) for name in names.split()]
    return tuple(found)


@functools.cache
def package() -> Path:
    """The folder libero/libero of the installed package. Raises `UserError` when it is not installed."""
    spec = importlib.util.find_spec("libero")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "libero" / "bddl_files").is_dir():
            return Path(folder) / "libero"
    raise UserError("LIBERO is not installed in this Python: pip install hf-libero==0.1.4")


@functools.cache
def suite_tasks(suite: str) -> tuple[Task, ...]:
    """The tasks of `suite` in LIBERO's order. LIBERO-130 is all suites, a name that two share only once."""
    if suite not in SUITES:
        raise unknown("LIBERO suite", suite, SUITES)
    if suite == "libero_130":
        unique: dict[str, Task] = {}
        for part in _IN_ORDER:
            for task in suite_tasks(part):
                unique.setdefault(task.name, task)
        return tuple(unique.values())
    return tuple(Task(suite, name) for name in _task_map()[suite])


def step_limit(table: str, suite: str, task: Task) -> int:
    """The limit of `task` in a run on `suite`. Raises `UserError` where the table has none."""
    if table not in STEP_LIMITS:
        raise unknown("table of LIBERO step limits", table, STEP_LIMITS)
    limits = STEP_LIMITS[table]
    limit = limits.get(suite, limits.get(task.suite))
    if limit is None:
        raise UserError(f"the step limits '{table}' have none for {task.suite}: set max_steps, or choose another table")
    return limit


@functools.cache
def _task_map() -> dict[str, list[str]]:
    # LIBERO's module is one assignment of a literal; importing it would import torch.
    source = (package() / "benchmark" / "libero_suite_task_map.py").read_text()
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "libero_task_map":
            return ast.literal_eval(statement.value)
    raise UserError(f"{package()} is another version of LIBERO than hf-libero 0.1.4, which this adapter reads")
