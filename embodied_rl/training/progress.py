"""What a run shows while it goes on: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_EVERY = 5.0
"""Seconds between two plain lines."""
SMOOTHING = 0.2
"""Weight of the newest iteration in the shown rate."""


class Progress:
    """Phase, success, return, speed and time left of a run with a budget of `total` `unit`, say "env_steps"."""

    def __init__(
        self,
        unit: str,
        total: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unit = unit.replace("_", " ")
        self._total = total
        self._console = console or Console(file=sys.stdout)
        self._clock = clock
        self._began = self._phase_began = self._changed = clock()
        self._last_line = -LINE_EVERY
        self._phase = ""
        self._detail = ""
        self._spent: int | None = None
        self._rate: float | None = None
        self._metrics: dict[str, float | None] = {}
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=False)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_phase()
        if self._live.is_started:
            self._live.stop()

    def phase(self, name: str) -> None:
        """A new phase begins; the last one is reported with its duration."""
        self._finish_phase()
        self._phase, self._phase_began, self._detail, self._spent = name, self._clock(), "", None
        self._metrics.clear()

    def update(self, spent: float | None = None, detail: str | float = "", **metrics: float | None) -> None:
        """What is known after an iteration; metrics keep their last value until a new one comes."""
        now = self._clock()
        if spent is not None:
            if self._spent is not None and spent > self._spent and now > self._changed:
                rate = (spent - self._spent) / (now - self._changed)
                self._rate = rate if self._rate is None else self._rate + SMOOTHING * (rate - self._rate)
            self._spent, self._changed = int(spent), now
        self._detail = str(detail)
        self._metrics.update(metrics)
        if not self._live.is_started and now - self._last_line >= LINE_EVERY:
            self._last_line = now
            self._print(", ".join([self._phase, *(f"{name} {value}".strip() for name, value in self.facts())]))

    def facts(self) -> list[tuple[str, str]]:
        """What is worth showing now, as (name, value)."""
        facts: list[tuple[str, str]] = []
        if self._detail:
            facts.append(("", self._detail))
        if self._spent is not None:
            facts.append((self._unit, f"{self._spent:,} / {self._total:,}"))
        for name, key in (("success", "train/success"), ("development success", "evaluation/success")):
            if (value := self._metrics.get(key)) is not None:
                facts.append((name, f"{value:.0%}"))
        if (value := self._metrics.get("train/return")) is not None:
            facts.append(("return", f"{value:.2f}"))
        for name in ("simulating", "deciding", "learning"):
            if value := self._metrics.get(f"time/{name}"):
                facts.append((name, f"{value:.0%}"))
        if self._spent is not None and self._rate:
            facts.append((f"{self._unit.split()[-1]}/s", f"{self._rate:,.0f}"))
            facts.append(("time left", duration(max(0.0, self._total - self._spent) / self._rate)))
        return facts

    def _finish_phase(self) -> None:
        if self._phase:
            self._print(f"{self._phase}: {self._clock() - self._phase_began:.1f} s")
            self._phase = ""

    def _print(self, text: str) -> None:
        since = duration(self._clock() - self._began)
        self._console.print(f"{since:>7}  {text}", markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> Any:
        now = self._clock()
        head = Table.grid(padding=(0, 2))
        bar: Any = ProgressBar(self._total, min(self._spent or 0, self._total), width=40)
        if self._spent is None:
            bar = ProgressBar(total=None, pulse=True, width=40, animation_time=now)
        head.add_row(Text(self._phase, "bold"), bar, Text(duration(now - self._began), "dim"))
        facts = Table.grid(padding=(0, 3))
        facts.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in self.facts()))
        return Group(head, facts)


def duration(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
