"""What a run says about who worked when."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from training_toys import off_policy, on_policy

from embodied_rl.config import LoggingConfig, PipelineConfig, RunConfig
from embodied_rl.planner.prediction import Prediction
from embodied_rl.training.metrics import read_metrics
from embodied_rl.training.run import train

SHARES = ("simulating", "deciding", "waiting", "learning")


def overlapped() -> RunConfig:
    config = on_policy(env_steps=200, evaluate_every=0, checkpoint_every=100)
    logging = LoggingConfig(tensorboard=False, trace=True)
    algorithm = replace(config.algorithm, staleness=1)
    return replace(config, algorithm=algorithm, pipeline=PipelineConfig(env_groups=2), logging=logging)


def test_a_run_measures_its_stages_and_writes_a_trace_of_them(tmp_path: Path) -> None:
    train(overlapped(), tmp_path, prediction=Prediction(1e-3))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    *collected, learned_last = rows  # the last batch is learned from when the budget of steps is used up
    assert all(learned_last[f"time/{name}"] == 0 for name in SHARES if name != "learning")
    assert 0 < learned_last["time/learning"] <= 1.001
    for row in collected:
        assert all(0 < row[f"time/{name}"] <= 1.001 for name in SHARES)
        assert row["time/deciding"] + row["time/waiting"] <= 1.001
    assert "time/iteration_expected" not in rows[0]  # it fills what overlaps
    assert rows[1]["time/expectation_error"] > 0

    events = json.loads((tmp_path / "trace.json").read_text().rstrip(",\n") + "]")
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(names.values()) == {"rollout", "learner", "simulator 0", "simulator 1"}
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    assert {name for *_, name in tracks["rollout"]} == {"infer", "wait"}
    assert len([name for *_, name in tracks["learner"] if name == "train"]) == len(rows)
    for spans in tracks.values():
        spans.sort()
        assert all(one[1] <= other[0] + 5 for one, other in pairwise(spans))  # microseconds
    learning = tracks["learner"][1]
    assert any(learning[0] < start < learning[1] for start, *_ in tracks["rollout"])


def test_an_off_policy_run_is_measured_too(tmp_path: Path) -> None:
    train(off_policy(env_steps=120), tmp_path)
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert [row[f"time/{name}"] for name in SHARES] == pytest.approx([0.5] * 4, abs=0.5)
    assert row["time/learning"] > 0
    assert not (tmp_path / "trace.json").exists()
