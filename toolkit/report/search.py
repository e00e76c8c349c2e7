"""What a search found as tables for a terminal, as JSON, as CSV and as a picture.

show(search(["model=bert_large", "machine=h100"]), Console(), top=20)
plot(search(["model=bert_large", "machine=h100"]), Path("layouts"), top=20)     # layouts.png and .svg
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.plan.machines import way_out
from toolkit.plan.search import GROUPS, MICRO, Candidate, Search
from toolkit.run.files import as_csv, replace
from toolkit.run.table import table

# (heading, key of a row, how it is written)
FITTING = (("samples/s", "samples_per_second", ",.0f"), ("MFU", "mfu", ".0%"), ("GiB", "device_gib", ",.2f"),
           ("left", "left_gib", ",.2f"), ("to type", "overrides", ""))  # fmt: skip
TOO_LARGE = (FITTING[0], ("GiB over", "over_gib", ",.2f"), ("of", "over_of", ""), ("largest part", "largest_part", ""),
             FITTING[-1])  # fmt: skip
MISSED = 5  # of those that do not fit, or perhaps, in tables and plots


def as_json(found: Search) -> dict[str, Any]:
    """Every candidate, and why others are illegal."""
    plan = found.every[0].plan
    sides = {"fitting": found.fitting, "unsure": found.unsure, "too_large": found.too_large}
    return {
        "given": found.given, "machine": plan.machine.name, "ranks": plan.layout.ranks, "unknown": found.unknown,
        "unknown_limits": found.unknown_limits, **{name: [c.as_row() for c in side] for name, side in sides.items()},
        "refused": dict(found.refused), "assumptions": plan.assumptions,
    }  # fmt: skip


def write_csv(found: Search, path: Path) -> Path:
    """A line for each candidate: those that fit, fastest first, those that may, then the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, as_csv([c.as_row() for c in found.every]))
    return path


def show(found: Search, console: Any, *, top: int) -> None:
    """The fastest layouts that fit and the command for the first; the fastest that do not; what nobody knows."""

    def print_table(what: str, columns: Sequence[tuple[str, str, str]], rows: list[dict[str, Any]], most: int) -> None:
        if rows:
            cells = [[one[key] for _, key, _ in columns] for one in rows[:most]]
            title = f"{min(most, len(rows))} of {len(rows)} {what}"
            console.print(table([(name, form) for name, _, form in columns], cells, title, missing="unknown"))

    fitting, unsure = _best(found.fitting), _best(found.unsure)
    console.print(_head(found), highlight=False)
    print_table("layouts, each with its best micro-batch", FITTING, fitting, top)
    print_table("layouts that perhaps fit", FITTING, unsure, MISSED if fitting else top)
    if fitting or unsure:
        command = f"toolkit plan {shlex.join([*found.given, *found.every[0].overrides])}"
        console.print(command, style="bold", highlight=False, markup=False)
    print_table("layouts with a micro-batch that does not fit", TOO_LARGE, _best(found.too_large), MISSED)
    for line in (*_unknown(found), *found.every[0].plan.assumptions):
        console.print(line, highlight=False, style="dim")


def _head(found: Search) -> str:
    plan, maybe = found.every[0].plan, f", {len(found.unsure):,} more perhaps" if found.unsure else ""
    size = f"{plan.count:,} parameters; {plan.layout.ranks} {plan.name} ranks; {plan.layout.samples} samples a step"
    return f"{size}; {len(found.fitting):,} of {len(found.every):,} legal configurations fit{maybe}"


def _best(side: Sequence[Candidate]) -> list[dict[str, Any]]:
    """The first of those that differ in the micro-batch only, as rows."""
    layouts: dict[tuple[str, ...], Candidate] = {}
    for one in side:
        layouts.setdefault(tuple(o for o in one.overrides if not o.startswith(MICRO)), one)
    return [c.as_row() for c in layouts.values()]


def _unknown(found: Search) -> Iterator[str]:
    machine = found.every[0].plan.machine
    where = f"which machine={machine.name} does not say"
    if found.unsure:
        limits = ", ".join(found.unknown_limits)
        yield f"Nobody knows what fits without {limits}, {where}. Give it, e.g. {found.unknown_limits[0]}=1000."
    if found.unknown:
        some = any(c.plan.speed.step_seconds for c in found.every)
        ranked = "what needs it stands last" if some else "all is ranked by memory, the least first"
        how = f"Give it, e.g. {found.unknown[0]}=10.{way_out(machine, found.unknown)}"
        yield f"No speed without {', '.join(found.unknown)}, {where}: {ranked}. {how}"


def plot(found: Search, stem: Path, *, top: int) -> list[Path]:
    """``stem``.png and .svg: GiB of a device by part beside samples/s, a bar a layout; what does not fit is pale."""
    from toolkit.report import figures

    fitting = _best(found.fitting + found.unsure)[:top]
    rows = [*fitting, *_best(found.too_large)[:MISSED]]
    figure, (memory, speed) = figures.new(2, _head(found), width=7, height=1.6 + 0.3 * len(rows))
    colours = dict(zip([*GROUPS, "context"], [*figures.COLOURS, "#bab0ac"], strict=True))
    names = []
    for y, one in enumerate(rows):
        alpha, start, rate = 1.0 if y < len(fitting) else 0.45, 0.0, one["samples_per_second"]
        for group, colour in colours.items():
            gib = one[f"{group}_gib"]
            memory.barh(y, gib, left=start, color=colour, alpha=alpha, label=None if y else group)
            start += gib
        if one["left_gib"] is not None:
            limit = one["device_gib"] + one["left_gib"]
            memory.vlines(limit, y - 0.5, y + 0.5, color="black", label=None if y else "limit")
        speed.barh(y, rate or 0, color=figures.COLOURS[0], alpha=alpha)
        speed.text(rate or 0, y, " unknown" if rate is None else f" {rate:,.0f}", va="center", fontsize=8)
        over = f" ({one['over_gib']:,.2f} GiB over, {one['over_of']})" if one["over_gib"] else ""
        names.append((re.sub(r"deepspeed\.tensor_parallel\.|batch\.", "", one["overrides"]) or "as given") + over)
    memory.set(yticks=range(len(rows)), yticklabels=names, xlabel="GiB of a device")
    memory.tick_params("y", labelsize=8)
    fastest = max(one["samples_per_second"] or 0 for one in rows)
    speed.set(yticks=[], xlabel="samples/s, predicted", xlim=(0, 1.12 * fastest or 1))
    for axes in (memory, speed):
        axes.set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figures.save(figure, stem)
