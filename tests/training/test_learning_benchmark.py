"""What the learning benchmark makes of its runs: the bound, the scores, and a file that is added to."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "learning"


@pytest.fixture(scope="module")
def learning(monkeypatch_module: pytest.MonkeyPatch) -> Any:
    """`run.py`, whose neighbours it imports as a script does."""
    monkeypatch_module.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("learning_run", FOLDER / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    sys.modules.pop("comparison", None)


def run(*returns: float, final: float | None = None, cpu: float = 1.0) -> dict[str, Any]:
    """A run evaluated every 1000 steps."""
    curve = [{"env_steps": 1000 * i, "return": each, "success": 1.0} for i, each in enumerate(returns)]
    last = {"mean_return": returns[-1] if final is None else final, "success_at_end": 1.0}
    return {"curve": curve, "final": last, "cpu_seconds": cpu}


def test_the_bound_holds_in_19_of_20_samples(learning: Any) -> None:
    from comparison import lower_bound  # pyright: ignore[reportMissingImports]

    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        below = [lower_bound(sample) <= 7.0 for sample in rng.normal(7.0, 3.0, (4000, n)).tolist()]
        assert abs(np.mean(below) - 0.95) < 0.015
    assert lower_bound([1.0]) is None
    assert lower_bound([2.0, 2.0, 2.0]) == 2.0


def test_a_case_is_summed_up_over_the_seeds_that_both_sides_have_run(learning: Any) -> None:
    from comparison import Case, summary  # pyright: ignore[reportMissingImports]

    runs = {
        "0": {"ours": run(0, 50, final=95), "peer": run(10, 110, final=100)},
        "1": {"ours": run(0, 50, final=95, cpu=3.0), "peer": run(-10, 90, final=100)},
        "2": {"ours": run(0, 50, final=10)},
    }
    found = summary(Case("toy", "other", "return", 90.0), runs)
    assert found["ours"] == {"0": 95, "1": 95, "2": 10} and found["peer"] == {"0": 100, "1": 100}
    assert found["reached"] == "2 of 3"
    assert found["mean_difference"] == found["lower_bound"] == -5 and found["at_least"] == -12 and found["as_good"]
    assert found["mean_cpu_seconds"] == {"ours": 1.7, "peer": 1.0}
    later = summary(Case("toy", "other", "return", 40.0, scored_from=1000), runs)
    assert later["ours"] == {"0": 50, "1": 50, "2": 50} and later["peer"] == {"0": 110, "1": 90}
    assert not later["as_good"]


def test_a_file_is_added_to_and_nothing_is_run_twice(
    learning: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    made: list[tuple[str, int, str]] = []

    def pretend(case: Any, seed: int, side: str) -> dict[str, Any]:
        made.append((case.recipe, seed, side))
        return run(*[-1000] * 60, -100 - seed)

    monkeypatch.setattr(learning, "run", pretend)
    file = tmp_path / "new" / "found.json"
    for arguments in (["pendulum_sac", "--seeds", "1"], ["pendulum_sac", "--seeds", "0", "1"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--results", str(file)])
        learning.main()
    assert made == [("pendulum_sac", seed, side) for seed in (1, 0) for side in ("ours", "peer")]
    kept = json.loads(file.read_text())
    assert list(kept["runs"]["pendulum_sac"]) == ["0", "1"]
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["pendulum_sac"]["ours"] == {"0": -100, "1": -101} and printed["pendulum_sac"]["reached"] == "2 of 2"
    assert file.with_suffix(".png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "0", "--sides", "ours"])
    learning.main()
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 6
    monkeypatch.setattr(sys, "argv", ["run.py", "pendulum"])
    with pytest.raises(SystemExit):
        learning.main()
    assert "no case pendulum; there are cartpole_ppo," in capsys.readouterr().err
