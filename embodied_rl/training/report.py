"""`report.html`: one page about a run that opens without a network, made from the files of the run folder."""

from __future__ import annotations

import base64
import html
import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from embodied_rl.config import COMPONENTS, describe, from_dict, spell
from embodied_rl.errors import UserError
from embodied_rl.files import write_atomic
from embodied_rl.planner.timeline import SHARES
from embodied_rl.training import charts
from embodied_rl.training.charts import Series, number, percent
from embodied_rl.training.metrics import FILE, read_metrics
from embodied_rl.training.progress import duration

PACKAGES = ("embodied-rl", "torch", "numpy", "gymnasium", "mani-skill", "sapien", "transformers", "lerobot", "ray")
NAMES = {"initial": "cloned policy", "final": "after RL", "converged_clone": "converged clone"}
"""What the evaluations of a run are called, in the order of the headline."""
MEDIA = {".gif": "image/gif", ".png": "image/png"}
STYLE = Path(__file__).with_name("report.css")

Rows = list[dict[str, Any]]


def versions() -> dict[str, str]:
    """Versions of Python, the system and the packages that a run's numbers may depend on."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_report(run_dir: Path) -> Path:
    """Write and return `run_dir`/report.html; a run that has not ended yet gets a report of what there is. Raises
    `UserError` when `run_dir` is not a run folder."""
    config = _read_json(run_dir / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{run_dir} is not a run folder: it has no config.json")
    result = _read_json(run_dir / "result.json") or {}
    rows = read_metrics(run_dir / FILE)
    sections = [
        _header(config, result, rows),
        _headline(config, result),
        _learning(rows),
        _evaluations(config, result),
        _rollouts(run_dir),
        _costs(result, rows),
        _losses(rows),
        _configuration(config),
        _table("Versions", ("", ""), sorted(result.get("versions", {}).items()), "versions"),
    ]
    title = html.escape(f"{config.get('recipe')} · seed {config.get('seed')}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE.read_text()}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    write_atomic(run_dir / "report.html", page)
    return run_dir / "report.html"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _header(config: dict[str, Any], result: dict[str, Any], rows: Rows) -> str:
    last = rows[-1] if rows else {}
    steps = result.get("env_steps", last.get("env_steps", 0))
    seconds = result.get("wall_seconds", last.get("wall_seconds", 0.0))
    components = [config[name] for name in COMPONENTS if isinstance(config.get(name), dict)]
    names = " · ".join(str(component.get("task", component.get("name"))) for component in components)
    facts = [f"{number(steps)} env steps", f"{duration(seconds)} wall time"]
    if result:
        facts += [f"{result.get('deaths', 0)} worker deaths", f"{result.get('lost_episodes', 0)} lost episodes"]
    else:
        facts.append("this run has not ended")
    chips = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    title = f"{html.escape(str(config.get('recipe')))} <small>seed {html.escape(str(config.get('seed')))}</small>"
    return f'<header><h1>{title}</h1><p>{html.escape(names)}</p><p class="chips">{chips}</p></header>'


def _headline(config: dict[str, Any], result: dict[str, Any]) -> str:
    found = {each["name"]: each for each in result.get("evaluations", []) if each["success"] is not None}
    shown = [found[name] for name in NAMES if name in found]
    if not shown:
        return ""
    cards = "".join(
        f'<div class="card"><b class="c{i}">{percent(each["success"])}</b><span>{_name(config, each)}</span>'
        f"<small>{each['successes']} of {each['episodes']} · 95 % interval {_interval(each)}</small></div>"
        for i, each in enumerate(shown)
    )
    rows = [(_name(config, each), each["success"], each["low"], each["high"]) for each in shown]
    return _section("Success", f'{_summary(found)}<div class="cards">{cards}</div>{charts.interval_chart(rows)}')


def _summary(found: dict[str, dict[str, Any]]) -> str:
    if not {"initial", "final"} <= found.keys():
        return ""
    before, after = percent(found["initial"]["success"]), percent(found["final"]["success"])
    sentence = f"Reinforcement learning took success from {before} to {after}"
    if "converged_clone" in found:
        clone = percent(found["converged_clone"]["success"])
        sentence += f"; cloning the same demonstrations until it converges gives {clone}"
    return f"<p>{sentence}.</p>"


def _name(config: dict[str, Any], evaluation: dict[str, Any]) -> str:
    if evaluation["name"] == "initial" and not config.get("imitation"):
        return "before RL"
    return NAMES.get(evaluation["name"], evaluation["name"].replace("_", " "))


def _interval(evaluation: dict[str, Any]) -> str:
    return f"{100 * evaluation['low']:.1f} to {100 * evaluation['high']:.1f} %"


def _series(rows: Rows, key: str, name: str = "", **style: bool) -> Series:
    known = [row for row in rows if row.get(key) is not None]
    return Series(name or key, [row[_axis(rows)] for row in known], [row[key] for row in known], **style)


def _axis(rows: Rows) -> str:
    """What the run spent, see `metrics.budget`."""
    return "updates" if rows and "updates" in rows[0] else "env_steps"


def _learning(rows: Rows) -> str:
    """Success, return and length of episodes over what was spent."""
    figures, x_label = [], _axis(rows).replace("_", " ")
    for what in ("success", "return", "length"):
        training = _series(rows, f"train/{what}", "training", smooth=True)
        development = _series(rows, f"evaluation/{what}", "development", markers=True)
        scale: dict[str, Any] = {"y_range": (0, 1), "y_format": percent} if what == "success" else {}
        figures.append(
            _figure(f"episode {what}", charts.line_chart([training, development], what, x_label=x_label, **scale))
        )
    return _section("Learning", _grid(figures))


def _losses(rows: Rows) -> str:
    """Every other metric in a small chart; what is not a loss is folded away."""
    shown = {f"{kind}/{what}" for kind in ("train", "evaluation") for what in ("success", "return", "length")}
    shown |= {f"time/{name}" for name in SHARES.values()}
    figures: dict[str, list[str]] = {"Losses": [], "Other metrics": []}
    x_label = _axis(rows).replace("_", " ")
    for key in sorted({key for row in rows for key in row if "/" in key} - shown):
        chart = charts.line_chart([_series(rows, key, smooth=True)], key, width=230, height=130, x_label=x_label)
        kind = "Losses" if key.startswith("loss/") else "Other metrics"
        figures[kind].append(_figure(key.removeprefix("loss/"), chart))
    return "".join(_section(kind, _grid(found, "small"), folded=kind != "Losses") for kind, found in figures.items())


def _evaluations(config: dict[str, Any], result: dict[str, Any]) -> str:
    rows = [
        (
            _name(config, each),
            each["episodes"],
            "" if each["success"] is None else each["successes"],
            "" if each["success"] is None else f"{100 * each['success']:.1f} %",
            "" if each["success"] is None else _interval(each),
            f"{each['mean_return']:.2f}",
            f"{each['mean_length']:.1f}",
        )
        for each in result.get("evaluations", [])
    ]
    head = ("policy", "n", "successes", "success", "95 % Wilson interval", "mean return", "mean length")
    return _table("Evaluation", head, rows, "numbers")


def _rollouts(run_dir: Path) -> str:
    """Pictures of the trained policy: recorded images and the paths of end-effector and object."""
    parts = []
    for name in ("rollout.gif", "rollout.png"):
        if (path := run_dir / name).exists():
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<img alt="rollout" src="data:{MEDIA[path.suffix]};base64,{data}">')
    episodes = (_read_json(run_dir / "rollout.json") or {}).get("episodes", [])
    names: list[str] = []
    paths: list[tuple[int, Sequence[Sequence[float]]]] = []
    for episode in episodes:
        for name, points in episode["positions"].items():
            if name not in names:
                names.append(name)
            if points:
                paths.append((names.index(name), points))
    if paths:
        legend = "".join(f'<span><i class="c{i}"></i>{html.escape(name)}</span>' for i, name in enumerate(names))
        legend += "<span>○ start</span><span>● end</span>"
        views = [
            _figure("from the side", charts.projection(paths, (0, 2))),
            _figure("from above", charts.projection(paths, (0, 1))),
        ]
        parts.append(f'<p class="legend">{legend}</p>{_grid(views, "wide")}')
    return _section(
        f"Rollouts of the trained policy ({len(episodes)} episodes)" if paths else "Rollouts", "".join(parts)
    )


def _costs(result: dict[str, Any], rows: Rows) -> str:
    phases = {name: seconds for name, seconds in result.get("phases", {}).items() if seconds > 0}
    total = sum(phases.values())
    if not total:
        return ""
    shares = [_series(rows, f"time/{name}", name, smooth=True) for name in SHARES.values()]
    label = "share of an iteration"
    x_label = _axis(rows).replace("_", " ")
    chart = charts.line_chart(shares, label, width=480, y_range=(0, 1), y_format=percent, x_label=x_label)
    bars = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="right">{seconds:.1f} s</td>'
        f'<td class="wide"><div class="bar" style="width:{100 * seconds / total:.2f}%"></div></td></tr>'
        for name, seconds in phases.items()
    )
    return _section("Where the time went", f'<table class="phases">{bars}</table>{_figure(label, chart)}')


def _configuration(config: dict[str, Any]) -> str:
    try:
        settings = [(setting.key, spell(setting.value), setting.doc) for setting in describe(from_dict(config))]
    except UserError:  # written by another version, or with a plug-in that is not installed here: without explanations
        settings = [(key, json.dumps(value), "") for key, value in _flat(config, "")]
    return _table("Configuration", ("setting", "value", ""), settings, "settings", folded=True)


def _flat(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _flat(child, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _section(title: str, body: str, *, folded: bool = False) -> str:
    if not body:
        return ""
    if folded:
        return f"<section><details><summary><h2>{html.escape(title)}</h2></summary>{body}</details></section>"
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{drawing}</figure>" if drawing else ""


def _grid(figures: Iterable[str], kind: str = "") -> str:
    body = "".join(figures)
    return f'<div class="grid {kind}">{body}</div>' if body else ""


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str, *, folded: bool = False) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return _section(
        title, f'<div class="scroll"><table class="{kind}">{top}<tbody>{lines}</tbody></table></div>', folded=folded
    )
