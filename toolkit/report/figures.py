"""How every plot of the toolkit looks, and its two files.

figure, (left, right) = figures.new(2, "Time by threads")
figures.save(figure, run.dir / "reductions")        # reductions.png and .svg
"""

import os
from pathlib import Path
from typing import Any

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")


def new(
    panels: int, title: str, *, across: int | None = None, width: float = 4.4, height: float = 3.6
) -> tuple[Any, list[Any]]:
    """A figure of ``panels``, each ``width`` by ``height`` inches: all side by side, or ``across`` in a row."""
    from matplotlib.figure import Figure

    across = min(panels, across or panels)
    down = -(-panels // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    places = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in places[panels:]:
        empty.set_axis_off()
    return figure, places[:panels]


def save(figure: Any, stem: Path) -> list[Path]:
    """``stem``.png and .svg, without frames and with a light grid; written under temporary names and renamed."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return [write(figure, stem, suffix) for suffix in ("png", "svg")]


def write(figure: Any, stem: Path, suffix: str) -> Path:
    """One file of a picture, whole or not at all."""
    path = stem.with_name(f"{stem.name}.{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    temporary.replace(path)
    return path
