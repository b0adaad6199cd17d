"""Plots as SVG that stands inside the page: text stays text, and every plot is as wide as a phone."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hylo.errors import HyLoError

# Told apart in grey and by the colour-blind as well: by lightness, and by dash where published.
COLORS = ("#17609c", "#8a8a8a", "#c2403f", "#c98a1b", "#5b8c5a", "#7b5ea7")


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        errors: standard errors of y, drawn as a band; None for none.
        dashed: a figure that was not measured here.
        alpha: of the line, 1 for opaque.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float | None] | None = None
    color: str = COLORS[0]
    dashed: bool = False
    alpha: float = 1.0


def check_plots() -> None:
    """Raises HyLoError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise HyLoError("a page needs matplotlib; install it with: pip install 'hylo[eval]'") from None


def line_plot(
    name: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    lengths: bool = False,
    log_y: bool = False,
    percent: bool = False,
    size: tuple[float, float] = (5.0, 3.1),
) -> str:
    """An SVG element.

    Args:
        name: of the plot, one a page: the ids inside it are made from it.
        lengths: x is tokens, shown in powers of two.
        percent: y goes from 0 to 100.
    """
    check_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        for line in lines:
            marker = "o" if len(line.x) <= 24 else ""
            dash = "--" if line.dashed else "-"
            axes.plot(
                line.x,
                line.y,
                dash,
                color=line.color,
                label=line.label,
                marker=marker,
                markersize=3.5,
                alpha=line.alpha,
            )
            if line.errors is not None:
                low, high = (
                    [y + sign * (e or 0.0) for y, e in zip(line.y, line.errors, strict=True)] for sign in (-1, 1)
                )
                axes.fill_between(line.x, low, high, color=line.color, alpha=0.18, linewidth=0)
        if lengths:
            ticks = sorted({x for line in lines for x in line.x})
            # On a phone there is room for about seven.
            ticks = ticks[:: -(-len(ticks) // 7)]
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [tokens_label(tick) for tick in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.locator_params(axis="x", nbins=5)
        if log_y:
            axes.set_yscale("log")
            spread = max(max(line.y) for line in lines) / max(min(min(line.y) for line in lines), 1e-9)
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if spread > 300 else (1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if percent:
            axes.set_ylim(0, 100)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(lines) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
        return _svg(figure, plt)


def _svg(figure: Any, plt: Any) -> str:
    buffer = io.StringIO()
    # Without a date the same figures give the same page.
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # The page says how wide it is; the viewBox keeps its shape.
    return re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)


def tokens_label(tokens: float) -> str:
    """8192 as 8K, 1048576 as 1M."""
    if tokens >= 2**20:
        return f"{tokens / 2**20:g}M"
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


def shade(share: float) -> tuple[str, str]:
    """Background and text colour for a share from 0 to 1: darker is more."""
    share = min(max(share, 0.0), 1.0)
    light, dark = (246, 248, 250), (16, 78, 130)
    background = [round(a + (b - a) * share) for a, b in zip(light, dark, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in background), "#ffffff" if share > 0.5 else "#1c2733"
