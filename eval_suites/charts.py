"""Line charts as inline SVG: no script, no library, colours from the page's style sheet (so they follow light and dark)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log2, log10

from markupsafe import Markup, escape

WIDTH, HEIGHT = 260, 170  # of the whole chart; it scales with its column
LEFT, RIGHT, TOP, BOTTOM = 38, 10, 10, 24  # margins for the tick labels
MOST_POINTS = 100  # of one line; more are averaged in groups


@dataclass(frozen=True)
class Line:
    """One curve; `number` picks colour and dash (CSS classes t0, t1, …), the same for a tower everywhere on the page."""

    name: str
    number: int
    points: list[tuple[float, float]]  # sorted by x


def line_chart(title: str, lines: Sequence[Line], x_name: str, reference: float | None = None) -> Markup:
    """An SVG of `lines`, with a dotted horizontal line at `reference` (chance, say) where one is given."""
    lines = [Line(line.name, line.number, averaged(line.points)) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([reference] if reference is not None else [])
    x_ticks, y_ticks = ticks(0.0, max(xs)), ticks(0.0 if reference is not None else min(ys), max(ys))
    x_end = max(max(xs), 1e-9)
    y_low, y_high = y_ticks[0], max(y_ticks[-1], max(ys))

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / x_end

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_low) / ((y_high - y_low) or 1.0)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        anchor = "middle" if across(x) < WIDTH - RIGHT - 12 else "end"
        position = f'x="{across(x):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}"'
        parts.append(
            f'<text class="tick" {position}>{short(x)}{" " + escape(x_name) if x == x_ticks[-1] else ""}</text>'
        )
    if reference is not None:
        level = f"{down(reference):.1f}"
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level}" y2="{level}"/>')
    for line in lines:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line.points)
        x, y = line.points[-1]
        parts.append(
            f'<g class="t{line.number}"><title>{escape(line.name)}</title><polyline class="line" points="{path}"/>'
        )
        parts.append(f'<circle class="end" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.5"/></g>')
    parts.append("</svg>")
    return Markup("".join(parts))  # every text that comes from outside is escaped above


def averaged(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: the means of consecutive groups."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from `low`, rounded down, to `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** floor(log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first = floor(low / step)
    return [round((first + i) * step, 10) for i in range(about + 2) if (first + i) * step <= high + 1e-9 * span]


def short(value: float) -> str:
    """1200 → 1.2k, 0.50 → 0.5."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# ------------------------------------------------------------------------------------- points with intervals

WIDE, HIGH = 420, 270  # of a chart of intervals
APART = 5  # pixels between the whiskers of two lines at one x


@dataclass(frozen=True)
class IntervalLine:
    """Measured points with their intervals; `number` as in `Line`."""

    name: str
    number: int
    points: list[tuple[float, float, float, float]]  # x, y, low, high; sorted by x, which is positive


def interval_chart(title: str, lines: Sequence[IntervalLine], x_name: str, reference: float | None = None) -> Markup:
    """An SVG of `lines` over a logarithmic x axis, whose ticks are the x that occur; y starts at 0.

    `reference`: a dotted horizontal line (chance, say).
    """
    xs = sorted({x for line in lines for x, *_ in line.points})
    y_high = max([high for line in lines for *_, high in line.points] + [reference or 0.0, 1e-9])
    first, last = log2(xs[0]), log2(xs[-1])
    left, right = LEFT + 24, WIDE - RIGHT - 24  # room for the whiskers of the first and the last x

    def across(x: float) -> float:
        return left + (right - left) * (log2(x) - first) / (last - first) if last > first else (left + right) / 2

    def down(y: float) -> float:
        return HIGH - BOTTOM - 16 - (HIGH - TOP - BOTTOM - 16) * y / y_high

    parts = [f'<svg class="chart" viewBox="0 0 {WIDE} {HIGH}" role="img"><title>{escape(title)}</title>']
    for y in ticks(0.0, y_high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in xs:
        position = f'x="{across(x):.1f}" y="{HIGH - BOTTOM}" text-anchor="middle"'
        parts.append(f'<text class="tick" {position}>{short(x)}</text>')
    middle = f'x="{(left + right) / 2:.1f}" y="{HIGH - 6}" text-anchor="middle"'
    parts.append(f'<text class="tick" {middle}>{escape(x_name)}</text>')
    if reference is not None:
        level = f"{down(reference):.1f}"
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{level}" y2="{level}"/>')
    for place, line in enumerate(lines):
        shift = APART * (place - (len(lines) - 1) / 2)
        path = " ".join(f"{across(x) + shift:.1f},{down(y):.1f}" for x, y, *_ in line.points)
        parts.append(f'<g class="t{line.number}"><title>{escape(line.name)}</title>')
        parts.append(f'<polyline class="line" points="{path}"/>')
        for x, y, low, high in line.points:
            at = f"{across(x) + shift:.1f}"
            parts.append(f'<line class="span" x1="{at}" x2="{at}" y1="{down(low):.1f}" y2="{down(high):.1f}"/>')
            parts.append(f'<circle class="end" cx="{at}" cy="{down(y):.1f}" r="3.5">')
            parts.append(f"<title>{escape(line.name)}, {short(x)}: {y:.1f} [{low:.1f}, {high:.1f}]</title></circle>")
        parts.append("</g>")
    parts.append("</svg>")
    return Markup("".join(parts))  # every text that comes from outside is escaped above
