"""How several runs learned, side by side: a picture and a table of their held-out results.

plot({"random": Path("runs/a"), "from BERT": Path("runs/b")}, ["eval_loss", "eval_bleu"], Path("runs/init"))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def rows(runs: Mapping[str, Path], keys: Sequence[str]) -> list[dict[str, Any]]:
    """One row a run and step: ``{"run": "random", "step": 100, "eval_loss": 3.1, …}``."""
    table = []
    for name, run_dir in runs.items():
        curves = {key: dict(curve(run_dir, key)) for key in keys}
        steps = sorted({step for values in curves.values() for step in values})
        table += [{"run": name, "step": step} | {k: v.get(step) for k, v in curves.items()} for step in steps]
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Runs of equal steps as columns, a line a step."""
    names = list(dict.fromkeys(row["run"] for row in table))
    keys = [key for key in table[0] if key not in ("run", "step")] if table else []
    heads = [f"{name}: {key.removeprefix('eval_')}" for key in keys for name in names]
    lines = [f"| step | {' | '.join(heads)} |", f"|---:|{'---:|' * len(heads)}"]
    for step in sorted({row["step"] for row in table}):
        here = {row["run"]: row for row in table if row["step"] == step}
        cells = [here.get(name, {}).get(key) for key in keys for name in names]
        lines.append(f"| {step} | {' | '.join('' if c is None else f'{c:.3f}' for c in cells)} |")
    return "\n".join(lines) + "\n"


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
