"""What the configuration dataclasses of simulators have in common."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

from embodied_rl.errors import UserError, unknown

_COUNTS = ("num_envs", "workers", "image_size", "max_steps")


class OneTask:
    """A configuration that runs one task, whose initial states are drawn from the seed."""

    @property
    def num_tasks(self) -> int:
        """1."""
        return 1

    @property
    def num_states(self) -> int:
        """0: nothing is recorded."""
        return 0


def check_settings(simulator: str, config: Any, *counts: str) -> None:
    """Raise `UserError` when a field of the dataclass `config` that is declared as a Literal holds something else, or
    when one of its usual counts, or of `counts`, is below 1 (None passes)."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise unknown(f"{simulator} {name.replace('_', ' ')}", value, get_args(kind))
        if name in (*_COUNTS, *counts) and value is not None and value < 1:
            raise UserError(f"{simulator} {name} is {value}; it must be at least 1")
