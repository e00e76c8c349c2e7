"""What the chains of :mod:`studies.mcmc` say of the posterior, as numbers, tables and a plot.

rows = summary(target, draws)                       # [steps after the warm-up, size, chains]
"""

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from studies.mcmc import Posterior, Simulated
from studies.random_numbers import Floats, Generator
from toolkit.report import figures
from toolkit.run.directory import Run
from toolkit.run.table import table


def write(
    run: Run, posterior: Posterior, draws: Floats, choices: list[dict[str, Any]],
    simulated: dict[tuple[Generator, int], Simulated],
) -> None:  # fmt: skip
    """mcmc.csv, mcmc_numbers.csv, mcmc.png, mcmc.svg, the records and the terminal; of rank 0."""
    rows = summary(posterior, draws)
    worst = overall(rows, draws)
    run.rewind(-1)  # an earlier one of this name
    for record in (*choices, worst):
        run.log({"step": len(draws), **record})
    run.write_csv("mcmc.csv", rows)
    run.write_csv("mcmc_numbers.csv", choices)
    run.console.print(_coefficients(rows))
    run.console.print("  ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in worst.items()))
    run.console.print(_choices(choices))
    _plot(posterior, draws, simulated, run.dir / "mcmc")


def summary(posterior: Posterior, draws: Floats) -> list[dict[str, Any]]:
    """A row for each coefficient: what the draws [steps, size, chains] say of it, and the closed form.

    z is the difference of the means in Monte Carlo standard errors; R-hat and both sizes are those of Vehtari et al.
    2021: rank-normalised, split, bulk and the worse of the 5 % and 95 % tails.
    """
    from arviz_stats.base import array_stats

    axes: dict[str, Any] = {"chain_axis": 2, "draw_axis": 0}
    mean, error = draws.mean(axis=(0, 2)), array_stats.mcse(draws, **axes)
    columns = {
        "coefficient": posterior.names,
        "mean": mean,
        "sd": draws.std(axis=(0, 2)),
        "closed_mean": posterior.mean,
        "closed_sd": posterior.deviations,
        "mcse": error,
        "z": (mean - posterior.mean) / error,
        "r_hat": array_stats.rhat(draws, **axes),
        "ess_bulk": array_stats.ess(draws, **axes),
        "ess_tail": array_stats.ess(draws, method="tail", prob=(0.05, 0.95), **axes),
    }
    return [
        {name: value if isinstance(value, str) else float(value) for name, value in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


def overall(rows: list[dict[str, Any]], draws: Floats) -> dict[str, float]:
    """The worst of ``summary``'s rows, and the share of proposals accepted."""
    return {
        "acceptance": float((draws[1:] != draws[:-1]).any(axis=1).mean()),
        "r_hat_max": max(r["r_hat"] for r in rows),
        "ess_min": min(min(r["ess_bulk"], r["ess_tail"]) for r in rows),
        "mean_error_in_mcse": max(abs(r["z"]) for r in rows),
    }


def _coefficients(rows: list[dict[str, Any]]) -> Table:
    names = ("coefficient", "mean", "closed_mean", "sd", "closed_sd", "z", "r_hat", "ess_bulk")
    forms = ("", ".4f", ".4f", ".4f", ".4f", "+.2f", ".4f", ",.0f")
    heads = zip(("", "mean", "exact", "sd", "exact", "z", "R-hat", "ESS"), forms, strict=True)
    return table(list(heads), [[row[name] for name in names] for row in rows], "Posterior by chains, and exact")


def _choices(rows: list[dict[str, Any]]) -> Table:
    drawn = [name for name in rows[0] if name.startswith("drawn_at_")]
    ranks = ", ".join(name.removeprefix("drawn_at_") for name in drawn)
    columns = {"numbers": "", "same": ">", "sha256": ">", "millions": ">", "draw s": ".3f", "steps/s": ",.0f"}
    cells = [
        [r["numbers"], "yes" if r["same_chains"] else "no", r["sha256"][:8],
         "  ".join(f"{r[name] / 1e6:.3g}" for name in drawn), r["draw_seconds"], r["steps_per_second"]]
        for r in rows
    ]  # fmt: skip
    title = f"Numbers: the same chains at {ranks} ranks? Millions of them that a rank draws there"
    return table(columns, cells, title)


def _plot(posterior: Posterior, draws: Floats, simulated: dict[tuple[Generator, int], Simulated], stem: Path) -> None:
    """Draws over exact densities; then how the last chain begins at each number of ranks."""
    figure, (density, *traces) = figures.new(3, "Metropolis chains of a linear regression")
    order = np.argsort(-np.abs(posterior.mean))
    for colour, place in zip(figures.COLOURS, order[:3], strict=False):
        mean, deviation = posterior.mean[place], posterior.deviations[place]
        grid = np.linspace(mean - 4 * deviation, mean + 4 * deviation, 80)
        exact = np.exp(-0.5 * ((grid - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
        density.hist(draws[:, place].ravel(), bins=40, density=True, histtype="stepfilled", color=colour, alpha=0.4)
        density.plot(grid, exact, color=colour, label=posterior.names[place])
    density.set_title("draws and exact posterior (lines)", fontsize=10)
    density.set_xlabel("coefficient")
    density.legend(frameon=False)
    traces[0].sharey(traces[1])
    for axes, kind in zip(traces, ("counter", "per_rank"), strict=True):
        of = {world: found for (name, world), found in simulated.items() if name == kind}
        for i, (world, found) in enumerate(of.items()):
            width = 1 + 1.8 * (len(of) - 1 - i)  # later lines are thinner: all are seen where they are the same
            axes.plot(found.beginning, color=figures.COLOURS[i], linewidth=width, label=world)
        axes.axhline(posterior.mean[order[0]], color="0.4", linestyle="--", linewidth=1)
        axes.set_title(f"numbers={kind}: a chain begins", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(posterior.names[order[0]])
        axes.locator_params(nbins=4)
        axes.legend(frameon=False, title="ranks")
    figures.save(figure, stem)
