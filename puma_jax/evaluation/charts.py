"""Draw line charts as SVG that a page can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[int | float, int | float]]

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
_TICKS = 5


def line_chart(lines: Mapping[str, Points], *, x: str, y: str) -> str:
    """Return an SVG element with a line for each name; its colors are the classes line0, line1...

    Args:
        lines: Points of each line, by its name in the legend; points that are not finite are left
            out.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
    """
    lines = {
        name: [point for point in points if all(map(math.isfinite, point))]
        for name, points in lines.items()
    }
    every = [point for points in lines.values() for point in points]
    if not every:
        return ""
    (left, right), (low, high) = (_span([point[axis] for point in every]) for axis in (0, 1))

    def place(point: tuple[int | float, int | float]) -> tuple[float, float]:
        across = (point[0] - left) / (right - left)
        up = (point[1] - low) / (high - low)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = []
    for value in _ticks(low, high):
        at = place((left, value))[1]
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4}" text-anchor="end">{value:g}</text>')
    for value in _ticks(left, right):
        at = place((value, low))[0]
        parts.append(
            f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value:,g}</text>'
        )
    middle = (_WIDTH + _LEFT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
    for number, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{across},{up}" for across, up in map(place, points))
        title = f"<title>{escape(name)}</title>"
        if len(points) == 1:
            across, up = place(points[0])
            parts.append(
                f'<circle class="line{number}" cx="{across}" cy="{up}" r="3">{title}</circle>'
            )
        else:
            parts.append(f'<polyline class="line{number}" points="{path}">{title}</polyline>')
    legend = "".join(
        f'<li><i class="line{number}"></i>{escape(name)}</li>' for number, name in enumerate(lines)
    )
    return (
        f'<figure class="chart"><figcaption>{escape(y)}<ul>{legend}</ul></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y)} by {escape(x)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _span(values: Sequence[int | float]) -> tuple[float, float]:
    """Return the lowest and the highest value, apart from each other."""
    low, high = min(values), max(values)
    return (float(low), float(high)) if low < high else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two others.

    >>> _ticks(0.0, 100.0)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    rough = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]
