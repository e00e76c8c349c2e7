"""How several runs learned, side by side.

plot({"random": Path("runs/a"), "from BERT": Path("runs/b")}, ["eval_loss", "eval_bleu"], Path("runs/init"))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from toolkit.report.figures import COLOURS, new, save
from toolkit.run.files import read_metrics


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of each record with ``key``, in the order of steps; of a step that comes twice the last."""
    found = {r["step"]: r[key] for r in read_metrics(run_dir / "metrics.jsonl") if r.get(key) is not None}
    return sorted(found.items())


def keys(runs: Sequence[Path]) -> list[str]:
    """The keys of numbers in the records of the runs, in the order in which they come."""
    records = [record for run in runs for record in read_metrics(run / "metrics.jsonl")]
    return list(dict.fromkeys(k for r in records for k, v in r.items() if isinstance(v, int | float) and k != "step"))


def plot(runs: Mapping[str, Path], keys: Sequence[str], stem: Path, title: str = "") -> None:
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
