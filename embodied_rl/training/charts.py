"""Charts as inline SVG: text in, text out. Colours are CSS classes (`c0`, `c1`, ...), so that a page's light and dark
styles apply."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_POINTS = 300
"""A longer series is averaged in bins: more points than pixels only weigh."""


@dataclass
class Series:
    """One line: x and y of equal length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    markers: bool = False
    """Dots at the points, for sparse series."""
    smooth: bool = False
    """A noisy series: drawn faint under its moving average."""


def number(value: float) -> str:
    """Short: 950, 12k, 1.5M, 0.035, 2e-05."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return "0" if value == 0 else f"{value:.3g}"


def percent(value: float) -> str:
    """0.935 as "94 %"."""
    return f"{100 * value:.0f} %"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / max(count, 1)
    if not raw > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    label: str,
    *,
    width: int = 330,
    height: int = 210,
    y_range: tuple[float, float] | None = None,
    y_format: Callable[[float], str] = number,
    x_label: str = "env steps",
) -> str:
    """Lines over a common x axis, with a legend when there are several."""
    series = [_thin(each) for each in series if len(each.x)]
    xs, ys = [x for each in series for x in each.x], [y for each in series for y in each.y]
    if not xs:
        return ""
    left, right, top, bottom = 48, 12, 26 if len(series) > 1 else 10, 32
    x_high = max(xs) or 1.0
    y_low, y_high = y_range or _padded(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        u, v = x / x_high, (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)
        return left + u * (width - left - right), height - bottom - v * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">']
    for tick in ticks(y_low, y_high, max(2, (height - top - bottom) // 38)):
        y = place(0, tick)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{html.escape(y_format(tick))}</text>')
    for tick in ticks(0, x_high, max(2, width // 80)):
        x = place(tick, y_low)[0]
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 15}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 3}" text-anchor="end" class="faint">{x_label}</text>')
    for index, each in enumerate(series):
        parts += _line(each, index, place, y_format)
    if len(series) > 1:
        at = left
        for index, each in enumerate(series):
            parts.append(f'<path class="line c{index}" d="M{at} 10h16"/>')
            parts.append(f'<text x="{at + 21}" y="13.5">{html.escape(each.name)}</text>')
            at += 36 + 6 * len(each.name)
    return "".join(parts) + "</svg>"


def interval_chart(rows: Sequence[tuple[str, float, float, float]], width: int = 980) -> str:
    """Proportions with their intervals on a common axis from 0 to 100 %; rows are (name, value, low, high)."""
    left, right, step, top = 130, 30, 30, 4
    height = top + step * len(rows) + 24

    def place(value: float) -> float:
        return left + value * (width - left - right)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="success with 95 % intervals">']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = place(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{height - 24}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{percent(tick)}</text>')
    for index, (name, value, low, high) in enumerate(rows):
        y = top + step * (index + 0.5)
        tip = html.escape(f"{name}: {value:.1%}, 95 % interval {low:.1%} to {high:.1%}")
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end" class="name">{html.escape(name)}</text>')
        parts.append(f'<path class="whisker c{index}" d="M{place(low):.1f} {y}H{place(high):.1f}"/>')
        parts.append(
            f'<circle class="dot c{index}" cx="{place(value):.1f}" cy="{y}" r="6"><title>{tip}</title></circle>'
        )
    return "".join(parts) + "</svg>"


def projection(paths: Sequence[tuple[int, Sequence[Sequence[float]]]], axes: tuple[int, int], size: int = 470) -> str:
    """Paths in space seen along the axis that is not in `axes`, in equal scale; an open ring marks each start, a dot
    each end. `paths` are (colour, points [T,3] in metres)."""
    names = ("x", "y", "z")
    flat = [(colour, [(point[axes[0]], point[axes[1]]) for point in points]) for colour, points in paths]
    us, vs = ([point[i] for _, points in flat for point in points] for i in (0, 1))
    if not us:
        return ""
    margin = 38
    span = max(max(us) - min(us), max(vs) - min(vs), 1e-3) * 1.06
    corner = (max(us) + min(us) - span) / 2, (max(vs) + min(vs) - span) / 2
    scale = (size - 2 * margin) / span

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return margin + (point[0] - corner[0]) * scale, size - margin - (point[1] - corner[1]) * scale

    label = f"paths, {names[axes[0]]} and {names[axes[1]]}"
    parts = [f'<svg viewBox="0 0 {size} {size}" role="img" aria-label="{label}">']
    for tick in ticks(corner[0], corner[0] + span, 4):
        x = place((tick, 0))[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {margin}V{size - margin}"/>')
        parts.append(f'<text x="{x:.1f}" y="{size - margin + 15}" text-anchor="middle">{tick:.3g}</text>')
    for tick in ticks(corner[1], corner[1] + span, 4):
        y = place((0, tick))[1]
        parts.append(f'<path class="grid" d="M{margin} {y:.1f}H{size - margin}"/>')
        parts.append(f'<text x="{margin - 5}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.3g}</text>')
    horizontal, vertical = names[axes[0]], names[axes[1]]
    parts.append(f'<text x="{size - margin}" y="{size - 4}" text-anchor="end" class="faint">{horizontal} (m)</text>')
    parts.append(f'<text x="4" y="{margin - 14}" class="faint">{vertical} (m)</text>')
    for colour, points in flat:
        placed = [place(point) for point in points]
        (x0, y0), (x1, y1) = placed[0], placed[-1]
        parts.append(f'<path class="line thin c{colour}" d="{_path(placed)}"/>')
        parts.append(f'<circle class="ring c{colour}" cx="{x0:.1f}" cy="{y0:.1f}" r="3.5"/>')
        parts.append(f'<circle class="dot c{colour}" cx="{x1:.1f}" cy="{y1:.1f}" r="3.5"/>')
    return "".join(parts) + "</svg>"


def _line(
    each: Series, colour: int, place: Callable[[float, float], tuple[float, float]], y_format: Callable[[float], str]
) -> list[str]:
    parts = []
    y = each.y
    if each.smooth and len(y) > 8:
        faint = [place(*point) for point in zip(each.x, y, strict=True)]
        parts.append(f'<path class="line raw c{colour}" d="{_path(faint)}"/>')
        y = moving_average(y, max(3, len(y) // 15))
    points = [place(*point) for point in zip(each.x, y, strict=True)]
    parts.append(f'<path class="line c{colour}" d="{_path(points)}"/>')
    if each.markers or len(points) == 1:
        for (cx, cy), x, value in zip(points, each.x, y, strict=True):
            tip = html.escape(f"{each.name}: {y_format(value)} at {number(x)}")
            parts.append(
                f'<circle class="dot c{colour}" cx="{cx:.1f}" cy="{cy:.1f}" r="3.5"><title>{tip}</title></circle>'
            )
    return parts


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the `window` values around each, fewer at the ends."""
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if low == 0 else low - pad), high + pad


def _thin(each: Series) -> Series:
    size = math.ceil(len(each.x) / MAX_POINTS)
    if size <= 1:
        return each

    def means(values: Sequence[float]) -> list[float]:
        bins = [values[i : i + size] for i in range(0, len(values), size)]
        return [sum(part) / len(part) for part in bins]

    return Series(each.name, means(each.x), means(each.y), each.markers, each.smooth)
