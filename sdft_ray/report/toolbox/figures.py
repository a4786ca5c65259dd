"""Matplotlib figures as inline SVG: in the colours of the page, its font, and with a label for those who do not see it.

Figures are drawn at 72 dots per inch, so that a point is a pixel of the page. Matplotlib is imported when one is drawn.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARM_COLORS = ("#d55e00", "#0072b2", "#009e73", "#b5568e", "#2a9bd6", "#b07900")
"""Of arms, in the light theme of style.css; a seventh arm begins again."""
INK, SOFT, LINE, PAPER, BAD = "#15181c", "#586270", "#e1e5ea", "#ffffff", "#b23c00"
TONES = {
    "teacher": "#23282f", "pruned": "#8d96a1", "ink": INK, "soft": SOFT, "line": LINE, "paper": PAPER, "bad": BAD,
    **{f"arm{i}": color for i, color in enumerate(ARM_COLORS)},
}  # fmt: skip
"""Colours by their name in style.css. In a page each becomes a CSS variable, and follows the theme."""
WIDE, NARROW = 744, 360
"""Widths in pixels of a figure of the page beside its section's text, and on a telephone."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "sdft_ray", "font.family": "sans-serif", "font.size": 12.0,
    "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "axes.titlesize": 13.0, "axes.titlecolor": SOFT,
    "axes.linewidth": 1.0, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelsize": 12.0, "ytick.labelsize": 12.0,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "hatch.linewidth": 2.0,
}  # fmt: skip


def inline(label: str, draw: Callable[[Figure, bool], None], sizes: Iterable[tuple[int, int]]) -> Markup:
    """`draw(figure, narrow)` at each (width, height) in pixels, as SVG that scales with its place on the page.

    With two sizes narrow screens show the second. An artist whose gid is "title:TEXT" shows the text when pointed at.
    """
    shown = [_svg(draw, size, place > 0) for place, size in enumerate(sizes)]
    classes = ("for-wide", "for-narrow") if len(shown) > 1 else ("",)
    parts = (f'<svg class="drawn {name}" {svg}' for name, svg in zip(classes, shown, strict=True))
    return Markup(f'<div role="img" aria-label="{escape(label)}">{"".join(parts)}</div>')  # noqa: S704  (matplotlib escapes)


def _svg(draw: Callable[[Figure, bool], None], size: tuple[int, int], narrow: bool) -> str:
    """From its first attribute to its end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with rc_context(_STYLE):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        draw(figure, narrow)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|\n\s*", "", stream.getvalue(), flags=re.DOTALL
    )
    text = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", text[text.index("<svg") :])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    # An id must be unique on the page: only those that are referenced stay, prefixed with the figure's digest.
    known = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: f' id="{digest}-{match[1]}"' if match[1] in known else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{digest}-", text)
    for name, color in TONES.items():
        text = text.replace(color, f"var(--{name})")
    return re.sub(r"^<svg[^>]*?viewBox=(\"[^\"]*\")[^>]*>", r'viewBox=\1 aria-hidden="true">', text)


def pixels(figure: Figure, top: float, height: float, left: float = 45.0, right: float = 4.0) -> Axes:
    """Plain axes at a distance from the top of the figure and its sides, without spines and ticks."""
    width, whole = (72 * inches for inches in figure.get_size_inches())
    axes = figure.add_axes((left / width, 1 - (top + height) / whole, (width - left - right) / width, height / whole))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    return axes


def y_grid(axes: Axes, ticks: Iterable[float], labels: Iterable[str]) -> None:
    """Lines at ticks from the first up; the first is the axis."""
    places = list(ticks)
    axes.set_yticks(places, list(labels))
    axes.set_ylim(places[0], places[-1])
    axes.grid(axis="y", color=LINE, linewidth=1.0, clip_on=False)
    axes.axhline(places[0], color=SOFT, linewidth=1.0, clip_on=False)
