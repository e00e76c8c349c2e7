"""How every plot of the toolkit looks, and its two files; and how several runs learned, side by side.

figure, (left, right) = figures.new(2, "Time by threads")
figures.save(figure, run.dir / "reductions")        # reductions.png and .svg
figures.curves({"random": Path("runs/a"), "from BERT": Path("runs/b")}, ["eval_loss", "eval_bleu"], Path("runs/init"))
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.run.files import read_metrics

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


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of each record with ``key``, in the order of steps; of a step that comes twice the last."""
    found = {r["step"]: r[key] for r in read_metrics(run_dir / "metrics.jsonl") if r.get(key) is not None}
    return sorted(found.items())


def keys(runs: Sequence[Path]) -> list[str]:
    """The keys of numbers in the records of the runs, in the order in which they come."""
    records = [record for run in runs for record in read_metrics(run / "metrics.jsonl")]
    return list(dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, int | float) and k != "step"))


def curves(runs: Mapping[str, Path], keys: Sequence[str], stem: Path, title: str = "") -> None:
    """``stem``.png and .svg: a panel for each key, a line for each run."""
    figure, panels = new(len(keys), title, across=3, width=4.2, height=3.4)
    for panel, key in zip(panels, keys, strict=True):
        for colour, (name, run_dir) in zip(COLOURS * len(runs), runs.items(), strict=False):
            steps = curve(run_dir, key)
            panel.plot([s for s, _ in steps], [v for _, v in steps], marker=".", color=colour, label=name)
        panel.set_xlabel("optimizer step")
        panel.set_title(key.replace("_", " ").replace("eval", "held-out"), loc="left", fontsize=10)
    if len(runs) > 1:
        figure.axes[0].legend(frameon=False, fontsize=8)
    save(figure, stem)
