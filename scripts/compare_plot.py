"""A dot plot on a logarithmic scale, as SVG.

Dots and not bars: a bar's length says something only where there is a zero, and a logarithm has none.
"""

import math
from dataclasses import dataclass
from html import escape

# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ["#d55e00", "#0072b2", "#56b4e9", "#666666"]
WIDTH = 900
LEFT, RIGHT, TOP, BOTTOM = 130, 110, 74, 34
LINE = 19  # height of one dot's line
GAP = 14  # between two cases


@dataclass
class Point:
    series: str
    value: float
    low: float
    high: float
    label: str


def dots(title, tick, series, rows):
    """One band per row, one dot per point; `tick` writes an axis value, `series` gives the order of the colours.

    A name that stands more than once in `series` is one series.
    """
    series = list(dict.fromkeys(series))
    colours = dict(zip(series, COLOURS))
    values = [v for _, points in rows for p in points for v in (p.low, p.value, p.high)]
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)

    def x(value):
        return LEFT + (math.log10(value) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    height = TOP + BOTTOM + sum(len(points) * LINE + GAP for _, points in rows)
    floor = height - BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        text(16, 24, title, size=15, weight="600"),
    ]
    at = 16
    for name in used(series, rows):
        out.append(f'<circle cx="{at + 5}" cy="44" r="5" fill="{colours[name]}"/>' + text(at + 15, 48, name))
        at += 35 + 7 * len(name)

    for decade in range(first, last + 1):
        for step in range(1, 10 if decade < last else 2):
            at = x(step * 10.0**decade)
            shade = "#c8c8c8" if step == 1 else "#f0f0f0"
            out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 8}" y2="{floor}" stroke="{shade}"/>')
        out.append(text(x(10.0**decade), floor + 18, tick(10.0**decade), anchor="middle"))

    y = TOP
    for case, points in rows:
        out.append(text(LEFT - 14, y + len(points) * LINE / 2 + 4, case, anchor="end", weight="600"))
        for point in points:
            middle, colour = y + LINE / 2, colours[point.series]
            out.append(
                f'<line x1="{x(point.low):.1f}" x2="{x(point.high):.1f}" y1="{middle}" y2="{middle}" '
                f'stroke="{colour}" stroke-width="2.5" stroke-opacity="0.55"/>'
                f'<circle cx="{x(point.value):.1f}" cy="{middle}" r="5" fill="{colour}"/>'
            )
            out.append(text(x(max(point.high, point.value)) + 10, middle + 4, point.label))
            y += LINE
        y += GAP
        out.append(f'<line x1="16" x2="{WIDTH - 16}" y1="{y - GAP / 2}" y2="{y - GAP / 2}" stroke="#e4e4e4"/>')
    return "\n".join([*out, "</svg>\n"])


def used(series, rows):
    there = {point.series for _, points in rows for point in points}
    return [name for name in series if name in there]


def text(x, y, content, anchor="start", size=12, weight="400"):
    attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    return f"<text {attributes}>{escape(content)}</text>"
