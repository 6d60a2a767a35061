"""How plots of the documentation look: colors that are readable on light and on dark pages."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# Stand-in for each color while matplotlib draws → CSS variable, light value, dark value.
INK, SOFT, FAINT = "#010101", "#020202", "#030303"
GREEN, ORANGE, VIOLET = "#040404", "#050505", "#060606"
COLORS = {
    INK: ("--ink", "#1b2530", "#e8edf2"),
    SOFT: ("--soft", "#56636f", "#a9b5c0"),
    FAINT: ("--faint", "#d5dbe1", "#3c454e"),
    GREEN: ("--a", "#0f766e", "#5fe0cd"),
    ORANGE: ("--b", "#c26a17", "#f5b454"),
    VIOLET: ("--c", "#4b44a3", "#c3bdfb"),
}


def use() -> None:
    """Set what matplotlib draws with."""
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "puma_jax",
            "font.family": "sans-serif",
            "font.size": 11,
            "text.color": INK,
            "axes.labelcolor": SOFT,
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.edgecolor": FAINT,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": FAINT,
            "xtick.color": SOFT,
            "ytick.color": SOFT,
            "legend.frameon": False,
            "lines.linewidth": 2.2,
        }
    )


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG with colors for light and for dark pages."""
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
    text = path.read_text("utf-8")
    for stand_in, (variable, _, _) in COLORS.items():
        text = text.replace(stand_in, f"var({variable})")
    light, dark = (
        ";".join(f"{variables[0]}:{variables[which]}" for variables in COLORS.values())
        for which in (1, 2)
    )
    style = (
        f"<style>:root{{{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"#only-light:target{{{light}}}#only-dark:target{{{dark}}}"
        "text{font-family:system-ui,sans-serif !important}</style>"
    )
    text = re.sub(r"<\?xml.*?(?=<svg)", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg ", '<svg id="only-dark" ', text, count=1)
    text = text.replace('<g id="figure_1">', f'{style}\n<g id="only-light">')
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", "utf-8")
