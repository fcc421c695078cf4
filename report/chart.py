"""Curves over the steps of a run as inline SVG: no script, no package, the page's own colours."""

import math
from collections.abc import Callable, Iterable, Mapping

from markupsafe import Markup, escape

from common.text import printable

Point = tuple[float, float]  # (step, value)

WIDE = 100  # times the smallest value: from there on an axis of decades
MOST_POINTS = 600  # of a curve; a longer one is thinned without losing its extremes


def short(value: float) -> str:
    """A number in few characters: 12,345 or 0.01234."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers, evenly apart, from the last one below `low` to the first one above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    power = 10 ** math.floor(math.log10((high - low) / wanted))
    apart = next(power * m for m in (1, 2, 5, 10, 20) if power * m * wanted > (high - low) * 0.99)
    first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    return [apart * number for number in range(first, last + 1)]


def in_decades(values: Iterable[float]) -> bool:
    """Whether they span so much that on an even axis most of them would lie on its floor."""
    values = list(values)
    return bool(values) and min(values) > 0 and max(values) > WIDE * min(values)


def decades(low: float, high: float, wanted: int = 5) -> list[float]:
    """Powers of ten, evenly apart, from one below `low` to one above `high`; both above 0."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    apart = math.ceil((last - first) / wanted)
    return [10.0**power for power in range(first, last + apart, apart)]


def thinned(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS; of each stretch of the curve its lowest and its highest."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    ends = [(min(p, key=lambda at: at[1]), max(p, key=lambda at: at[1])) for p in parts]
    return [point for pair in ends for point in sorted(set(pair))]


def chart(
    title: str,
    lines: dict[str, list[Point]],
    show: Callable[[float], str] = short,
    best: Point | None = None,
    axis: str = "step",
    kinds: Mapping[str, str] | None = None,
    keys: Mapping[str, str] | None = None,
    may_be_wide: bool = False,
) -> Markup | str:
    """Curves over the steps as inline SVG; `show` writes a value, `best` is a point to ring.

    axis is what lies below, where it is not the steps. kinds: the CSS class of each line, by
    default what stands before its name's "/"; keys: what such a class is called.
    may_be_wide: values that span decades get an axis of decades, which the title says.
    """
    title = str(escape(printable(title)))  # titles and names may be those of a file
    of = {str(escape(printable(name))): kind for name, kind in (kinds or {}).items()}
    lines = {escape(printable(name)): thinned(points) for name, points in lines.items() if points}
    if not lines:
        return ""
    every = [point for points in lines.values() for point in points]
    values = [y for _, y in every]
    wide = may_be_wide and in_decades(values)
    marks = (decades if wide else ticks)(min(values), max(values))
    title += ", log scale" * wide
    end = max(1, max(x for x, _ in every))
    low, high = marks[0], marks[-1]
    left, right, top, bottom = 52, 396, 26, 206

    def at(x: float, y: float) -> tuple[float, float]:
        part = math.log(y / low) / math.log(high / low) if wide else (y - low) / (high - low)
        return round(left + x / end * (right - left), 1), round(bottom - part * (bottom - top), 1)

    drawn, described = f'<text x="4" y="13">{title}</text>', []
    for mark in marks:
        y = at(0, mark)[1]
        drawn += f'<path class="grid" d="M{left} {y}H{right}"/>'
        drawn += f'<text class="end" x="{left - 7}" y="{y + 4}">{show(mark)}</text>'
    for mark in (mark for mark in ticks(0, end) if mark <= end):
        x = at(mark, low)[0]
        drawn += f'<path class="tick" d="M{x} {bottom}v5"/>'
        drawn += f'<text class="mid" x="{x}" y="{bottom + 19}">{short(mark)}</text>'
    drawn += f'<text class="end" x="{right}" y="{bottom + 36}">{axis}</text>'

    def dot(kind: str, x: float, y: float, radius: float) -> str:
        place = 'cx="{}" cy="{}"'.format(*at(x, y))
        said = f"<title>{kind} {show(y)} at {axis} {x:,}</title>"  # shown under the mouse
        return f'<circle class="{kind}" {place} r="{radius}">{said}</circle>'

    for name, points in lines.items():
        kind = of.get(name, name.partition("/")[0])
        way = " ".join("{},{}".format(*at(*point)) for point in points)
        drawn += f'<polyline class="{kind}" points="{way}"/>'
        if len(points) == 1 or (len(points) <= 40 and kind in ("val", "test")):
            drawn += "".join(dot(kind, *point, 2.5) for point in points)
        described.append(f"{name} from {show(points[0][1])} to {show(points[-1][1])}")
    names = list(lines) if len(lines) > 1 else []
    if best:
        drawn, names = drawn + dot("best", *best, 6), [*names, "best"]
    entries = {escape(printable(label)): kind for kind, label in (keys or {}).items()}
    entries = entries or {name: name.partition("/")[0] for name in names}
    legend = "".join(f'<span class="key {kind}">{name}</span>' for name, kind in entries.items())
    label = f"{title} over the {axis}s: {'; '.join(described)}"
    svg = f'<svg viewBox="0 0 420 246" role="img" aria-label="{label}">{drawn}</svg>'
    return Markup(f"<figure>{svg}<figcaption>{legend}</figcaption></figure>")
