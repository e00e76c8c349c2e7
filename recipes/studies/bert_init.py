"""Held-out results of several runs, by step: as rows, and as a table in Markdown.

markdown(rows({"random": Path("runs/a"), "BERT encoder": Path("runs/b")}, ["eval_loss", "eval_bleu"]))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.report.figures import curve


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
