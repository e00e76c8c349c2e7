"""What papers have printed beside what this toolkit computes, target by target: numbers in conf/reproduce/*.yaml.

found = {target: records(target) for target in chosen("all")}    # published, ours, difference, verdict of each number
markdown(found)
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from studies import largest, superlinear
from studies.published import Row, published
from toolkit.engine.pipe_events import bubble_share, formula
from toolkit.plan.paper import zero_bytes, zero_volume
from toolkit.report import figures
from toolkit.run.table import table

Data = dict[str, Any]


def _table1(data: Data) -> list[Row]:
    return [
        Row(f"{model} on {world}, {column}", printed, _gb(data["parameters"][model], stage, world), "GB")
        for world, models in data["gb"].items()
        for model, numbers in models.items()
        for stage, (column, printed) in enumerate(zip(data["columns"], numbers, strict=True), start=1)
    ]


def _table2(data: Data) -> list[Row]:
    memory, world = data["device_gb"] * 1e9, data["data_parallel"]
    most = [memory / zero_bytes(1, stage=stage, world=world) / 1e9 for stage in range(4)]
    return [
        Row(f"{column}, model parallel {split}", printed, split * ours, "billion parameters")
        for split, numbers in data["billions"].items()
        for column, printed, ours in zip(data["columns"], numbers, most, strict=True)
    ]


def _figure1(data: Data) -> list[Row]:
    sizes = [_gb(data["parameters"], stage, data["data_parallel"]) for stage in range(4)]
    return [Row(*row, "GB") for row in zip(data["columns"], data["gb"], sizes, strict=True)]


def _communication(data: Data) -> list[Row]:
    volumes = [zero_volume(1, stage=stage) for stage in range(4)]
    return [Row(*row, "elements a parameter") for row in zip(data["columns"], data["volume"], volumes, strict=True)]


def _gb(parameters: float, stage: int, world: int) -> float:
    return zero_bytes(parameters, stage=stage, world=world) / 1e9


def _bubble(data: Data) -> list[Row]:
    from toolkit.engine.pipe_schedule import ideal

    return [
        Row(f"{name}, {stages} stages, {micro} micro-batches", 100 * formula(stages, micro),
            100 * bubble_share(ideal(name, stages, micro), stages), "% of the time")
        for name in data["schedules"] for stages in data["stages"] for micro in data["micro_batches"]
    ]  # fmt: skip


def _gpipe(data: Data) -> list[Row]:
    """Against the first cell, which is 1 by that and left out.

    A backward pass, with the forward pass run again, takes three times as long as that.
    """
    found = []
    for name, lines in data["throughput"].items():
        cells = [(k, m, x) for m, line in lines.items() for k, x in zip(data["partitions"], line, strict=True)]
        early = {"run again while waiting": _early} if name.startswith("Transformer") else {}
        for way, seconds in {"equal stages": _drained, **early}.items():
            first = seconds(*cells[0][:2])
            found += [Row(f"{name}, K = {k}, M = {m}: {way}", x, first / seconds(k, m), "times")
                      for k, m, x in cells[1:]]  # fmt: skip
    return found


def _drained(stages: int, micro: int) -> float:
    """Of a batch, in the schedule that the toolkit runs."""
    from toolkit.engine.pipe_schedule import ideal

    return max(e.end for e in ideal("gpipe", stages, micro, forward=1 / stages / micro, backward=3 / stages / micro))


def _early(stages: int, micro: int) -> float:
    """Where a stage runs its first forward pass again before the gradient arrives (GPipe, section 2.3)."""
    return (4 * micro + 3 * (stages - 1)) / stages / micro


TARGETS: dict[str, Callable[[Data], list[Row]]] = {
    "zero_table1": _table1,
    "zero_table2": _table2,
    "zero_figure1": _figure1,
    "zero_communication": _communication,
    "zero_superlinear": superlinear.rows,
    "zero_offload_largest": largest.rows,
    "zero_infinity_largest": largest.rows,
    "pipeline_bubble": _bubble,
    "gpipe_speedup": _gpipe,
}


def chosen(target: str) -> list[str]:
    """The targets of ``target``, which is one of them or all. Raises ConfigError."""
    if target == "all":
        return list(TARGETS)
    published(target)
    return [target]


def records(target: str) -> list[dict[str, Any]]:
    """The lines of reproduce.csv."""
    data = published(target)
    return [
        {"target": target, "what": row.what, "published": row.published, "ours": row.ours, "unit": row.unit,
         "difference": row.difference, "verdict": row.verdict(data)}
        for row in TARGETS[target](data)
    ]  # fmt: skip


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """``54 equal`` or ``3 equal, 6 within, 9 differ``."""
    words = Counter(str(record["verdict"]).split(" ")[0].rstrip(":") for record in found)
    return ", ".join(f"{words[word]} {word.replace('differs', 'differ')}" for word in ("equal", "within", "differs")
                     if words[word])  # fmt: skip


def listing(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """A line for each target."""
    rows = [(target, published(target)["what"], f"{len(mine)}: {summary(mine)}") for target, mine in found.items()]
    return table({"target": "", "what": "", "numbers": ""}, rows)


COLUMNS = ("what", "published", "ours", "unit", "difference", "verdict")


def of_target(found: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each number, and below them why some differ."""
    numbers = ("published", "ours", "difference")
    shown = table({name: ">" if name in numbers else "" for name in COLUMNS}, _lines(found))
    shown.caption, shown.caption_justify = "\n".join(reasons(found)), "left"
    return shown


def reasons(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """``1: why`` of each way in which numbers differ."""
    texts = dict.fromkeys(record["verdict"] for record in found if record["verdict"].startswith("differs: "))
    return [f"{i}: {text.removeprefix('differs: ')}." for i, text in enumerate(texts, start=1)]


def _lines(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    numbers = {why.partition(": ")[2]: why.partition(": ")[0] for why in reasons(found)}
    lines = []
    for record in found:
        word, _, why = record["verdict"].partition(": ")
        shown = {name: _number(record[name]) for name in ("published", "ours")}
        shown |= {"difference": f"{round(record['difference'], 3) + 0:+.1%}"}
        shown |= {"verdict": f"{word}, {numbers[f'{why}.']}" if why else word}
        lines.append([shown.get(name, str(record[name])) for name in COLUMNS])
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def markdown(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """reproduce.md: a section for each target."""
    lines = ["# Published and computed"]
    for target, mine in found.items():
        data = published(target)
        lines += ["", f"## {target}: {summary(mine)}", "", f"{data['what']}. {data['source']}."]
        lines += ["", f"Assumed: {data['assumes']}"] if "assumes" in data else []
        lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells)} |" for cells in _lines(mine)]
        lines += ["", *(f"- {why}" for why in reasons(mine))] if reasons(mine) else []
    return "\n".join(lines) + "\n"


def plot(target: str, found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """``target``.png and .svg, for those that have one."""
    if target == "zero_superlinear":
        superlinear.plot(published(target), folder / target, "60 billion parameters, tensor parallel 16, ZeRO 2")
    elif target == "gpipe_speedup":
        _bars([r for r in found if r["what"].startswith("Transformer-48")], folder / target, "GPipe, Transformer-48")
    elif target.endswith("_largest"):
        _bars(found, folder / target, published(target)["what"], log=True)


def _bars(found: Sequence[Mapping[str, Any]], stem: Path, title: str, *, log: bool = False) -> None:
    """What is published beside what each way of ours, the end of ``what``, gives; the first row on top."""
    groups = list(dict.fromkeys(record["what"].split(": ")[0] for record in found))
    ways = list(dict.fromkeys(record["what"].split(": ")[1] for record in found))
    figure, (axes,) = figures.new(1, title, width=8, height=1 + 0.42 * len(groups))
    values = {record["what"]: record["ours"] for record in found}
    printed = {record["what"].split(": ")[0]: record["published"] for record in found}
    series = {w: [values.get(f"{g}: {w}", 0) for g in groups] for w in ways}
    series = {"published": [printed[g] for g in groups], **series}
    for i, ((name, bars), colour) in enumerate(zip(series.items(), figures.COLOURS[1::-1] + figures.COLOURS[2:],
                                                   strict=False)):  # fmt: skip
        drawn = axes.barh([y + 0.27 * (i - 1) for y in range(len(groups))], bars, 0.25, label=name, color=colour)
        axes.bar_label(drawn, [_number(bar) if bar else "" for bar in bars], fontsize=7, padding=2)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.margins(x=0.1, y=0.02)
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
        axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        axes.minorticks_off()
    axes.set_xlabel(found[0]["unit"])
    axes.legend(frameon=False, fontsize=8)
    figures.save(figure, stem)
