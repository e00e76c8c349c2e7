"""What a linear regression learned beside its optimum: coefficients and the way there.

rows = coefficients(run, task)      # of the newest checkpoint, read as anyone would read an export
"""

from pathlib import Path
from typing import Any

from rich.table import Table

from toolkit.checkpoint.export import export
from toolkit.report import figures
from toolkit.run.directory import Run
from toolkit.run.table import table


def coefficients(run: Run, task: Any) -> list[dict[str, Any]]:
    """A row for the intercept and each feature, in the table's units: ``learned``, and ``optimum`` where known.

    ``deviation`` is the feature's standard deviation.
    """
    from safetensors.numpy import load_file

    state = load_file(export(run.dir) / "model.safetensors")
    learned = task.coefficients(state["linear.weight"][0], float(state["linear.bias"][0]))
    best = task.coefficients(task.optimum.weights, task.optimum.intercept) if task.optimum else {}
    deviations = {"(intercept)": 1.0} | dict(zip(task.table.names, task.moments[1].tolist(), strict=True))
    return [
        {"name": n, "deviation": deviations[n], "learned": value, **({"optimum": best[n]} if best else {})}
        for n, value in learned.items()
    ]


def listing(rows: list[dict[str, Any]]) -> Table:
    """A table of ``coefficients``."""
    columns = {name: "" if name == "name" else ",.5g" for name in rows[0]}
    return table(columns, [list(row.values()) for row in rows[:40]], "Coefficients")


def plot(run: Run, rows: list[dict[str, Any]], stem: Path) -> None:
    """``stem``.png and .svg: the loss by step, and what a deviation of each feature does, learned and at best."""
    figure, panels = figures.new(2, f"Linear regression, loss={run.config.task.loss}")
    steps = figures.curve(run.dir, "loss")
    panels[0].plot([s for s, _ in steps], [v for _, v in steps], color=figures.COLOURS[0], label="training batches")
    if best := figures.curve(run.dir, "optimum_loss"):
        panels[0].axhline(best[-1][1], color=figures.COLOURS[1], ls="--", label="optimum")
    shown = rows[1:25]
    for place, key, marker in ((0, "learned", "o"), (1, "optimum", "|")):
        if key in rows[0]:
            effects = [r[key] * r["deviation"] for r in shown]
            style = {"color": figures.COLOURS[place], "label": key, "markersize": 5 + 7 * place}
            panels[1].plot(effects, range(len(shown)), marker, mew=2, zorder=3, **style)
    panels[1].set_yticks(range(len(shown)), [r["name"] for r in shown])
    panels[1].invert_yaxis()
    panels[1].axvline(0, color="0.6", lw=1)
    panels[1].set_xlabel("effect of one standard deviation")
    panels[1].legend(frameon=False)
    panels[0].set_xlabel("optimizer step")
    panels[0].set_ylabel("loss, in the target's units")
    panels[0].legend(frameon=False)
    figures.save(figure, stem)
