"""A plot, drawn: SVG for pages that can show it, characters for the others."""

from __future__ import annotations

from html import escape

from graphopt.report.elements import Plot

_LEFT, _WIDE, _STEP = 170, 560, 20  # pixels: of the labels, the axis, and the height of a row
_COLUMNS = 40  # characters of the axis


def svg(plot: Plot) -> str:
    """One row below the other; the numbers show as titles."""

    def place(x: float) -> float:
        return round(_LEFT + _WIDE * plot.share(x), 1)

    high = _STEP * (len(plot.rows) + 2)
    marks = [
        f'<line x1="{place(x)}" y1="0" x2="{place(x)}" y2="{high - 2 * _STEP}" stroke="#ddd"/>'
        f'<text x="{place(x)}" y="{high - 1.3 * _STEP}" text-anchor="middle">{x:g}</text>'
        for x in (plot.tick * k for k in range(int(plot.top / plot.tick) + 1))
    ]
    unit, fill, look = escape(plot.unit), 'height="12" fill="#7aa6c2"', 'r="4" fill="none" stroke="#b03030" stroke-width="2"'
    rows = [
        f'<text x="{_LEFT - 8}" y="{_STEP * k + 14}" text-anchor="end">{escape(label)}</text>'
        f'<rect x="{_LEFT}" y="{_STEP * k + 4}" width="{round(place(bar) - _LEFT, 1)}" {fill}><title>{bar:.1f} {unit}</title></rect>'
        f'<circle cx="{place(ring)}" cy="{_STEP * k + 10}" {look}><title>{escape(plot.ring)} {ring:.1f} {unit}</title></circle>'
        for k, (label, bar, ring) in enumerate(plot.rows)
    ]
    legend = f'<text x="{_LEFT}" y="{high - 4}">{escape(_legend(plot))}</text>'
    size = f'width="{_LEFT + _WIDE + 30}" height="{high}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="12" role="img">{"".join((*marks, *rows, legend))}</svg>'


def bars(plot: Plot) -> str:
    """A line a row in ASCII: `=` is the bar, `o` the ring, and the numbers stand behind; the legend is the last line."""
    width = max((len(label) for label, *_ in plot.rows), default=0)
    lines = []
    for label, bar, ring in plot.rows:
        axis = ("=" * round(_COLUMNS * plot.share(bar))).ljust(_COLUMNS + 1)
        at = round(_COLUMNS * plot.share(ring))
        lines.append(f"{label:<{width}}  {axis[:at]}o{axis[at + 1 :]}  {bar:.1f}, {ring:.1f}")
    return "\n".join([*lines, _legend(plot)])


def _legend(plot: Plot) -> str:
    return f"{plot.title}, {plot.unit}: bar, {plot.bar}; ring, {plot.ring}"
