import io

from rich.console import Console

from embodied_rl.training.progress import Progress, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def show(terminal: bool) -> tuple[str, list[tuple[str, str]]]:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=160, legacy_windows=False)
    with Progress("env_steps", 10_000, console, clock) as progress:
        progress.phase("clone demonstrations")
        clock.now = 2.0
        progress.update(detail="step 100/800", **{"imitation/loss": 0.5})
        clock.now = 8.0
        progress.phase("reinforcement learning")
        progress.update(spent=4000)  # resumed: earlier steps do not count for the rate
        clock.now = 10.0
        progress.update(spent=5000, **{"train/success": 0.5, "train/return": 0.123})
        clock.now = 20.0
        progress.update(spent=10_000, **{"evaluation/success": 0.75})
        clock.now = 20.5
        facts = progress.facts()
    return file.getvalue(), facts


def test_plain_lines_without_a_terminal() -> None:
    text, facts = show(terminal=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "   0:02  clone demonstrations, step 100/800"
    assert lines[1] == "   0:08  clone demonstrations: 8.0 s"
    assert "reinforcement learning, env steps 10,000 / 10,000, success 50%, development success 75%" in text
    assert lines[-1].endswith("reinforcement learning: 12.5 s")
    assert ("steps/s", "500") in facts and ("time left", "0:00") in facts


def test_lines_are_throttled() -> None:
    clock, file = Clock(), io.StringIO()
    progress = Progress("env_steps", 100, Console(file=file), clock)
    for clock.now in range(1, 21):
        progress.update(spent=int(clock.now))
    assert len(file.getvalue().splitlines()) == 4


def test_live_display_on_a_terminal() -> None:
    text, _ = show(terminal=True)
    assert "\x1b" in text
    assert "time left" in text and "75%" in text and "reinforcement learning" in text


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
