"""Pipeline schedules as the figures of the GPipe and PipeDream papers draw them: stages over time.

draw({"1F1B": ideal("1f1b", 4, 8)}, Path("timeline"), title="4 stages, 8 micro-batches", unit="forward passes")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from toolkit.engine.pipe_events import DIRECTIONS, Event, bubble_share, formula, span
from toolkit.report import figures

LABELS = {"1f1b": "1F1B", "gpipe": "GPipe", "dualpipev": "DualPipeV"}
# Blue and orange of Okabe and Ito (2008), which all kinds of colour vision tell apart; the way back is lighter.
FILL = {
    ("forward", 0): "#0072B2", ("forward", 1): "#85C1E5", ("backward", 0): "#E69F00", ("backward", 1): "#F7D58B",
}  # fmt: skip
BUBBLE = "#E8E8E8"
HEIGHT = 0.86  # of a row
WIDTH_INCHES = (7.0, 16.0)
NUMBER_POINTS = (4.0, 8.0)  # the smallest and the largest number in a box
DIGIT = 0.64  # width of a digit in its font size (DejaVu Sans)


def draw(timelines: Mapping[str, Sequence[Event]], out: Path, *, title: str, unit: str) -> list[Path]:
    """Draw one panel for each timeline over one time axis in ``unit``; ``out`` with .png and with .svg is returned.

    Every panel begins with its first pass. Numbers in the boxes are micro-batches; grey is a bubble.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    every = [e for events in timelines.values() for e in events]
    longest = max(end - start for start, end in map(span, timelines.values()))
    rows = [1 + max(e.stage for e in events) for events in timelines.values()]
    # The mean forward pass holds its number, within the limits of a page
    forward = [e.end - e.start for e in every if e.kind == "forward"]
    digits = len(str(max(e.micro_batch for e in every)))
    wanted = 0.9 + longest / (sum(forward) / len(forward)) * (digits * DIGIT * 7 + 3) / 72
    width = min(max(wanted, WIDTH_INCHES[0]), WIDTH_INCHES[1])
    height = 0.9 + sum(0.42 + 0.26 * r for r in rows)
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.06))
    panels = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    points = (width - 0.9) * 72 / longest  # of paper for a unit of time
    for panel, (name, events), stages in zip(panels, timelines.items(), rows, strict=True):
        _panel(panel, events, stages, points)
        whose = "1F1B:" if any(e.phase for e in events) else "(S−1)/(M+S−1) ="
        usual = formula(stages, 1 + max(e.micro_batch for e in events))
        said = f"{100 * bubble_share(events, stages):.1f} % bubbles; {whose} {100 * usual:.1f} %"
        panel.set_title(f"{name}: {said}", loc="left", fontsize=9)
    panels[0].set_xlim(0, longest)
    panels[-1].set_xlabel(f"time ({unit})", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    names = {0: "", 1: ", second half"} if any(e.phase for e in every) else {0: ""}
    entries = [Patch(color=FILL[kind, phase], label=f"{kind}{names[phase]}") for kind in DIRECTIONS for phase in names]
    entries.append(Patch(color=BUBBLE, label="bubble"))
    style = {"fontsize": 8, "frameon": False, "handlelength": 1.2, "columnspacing": 1.5}
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), **style)
    return [figures.write(figure, out, suffix) for suffix in ("png", "svg")]


def _panel(panel: Any, events: Sequence[Event], stages: int, points: float) -> None:
    """Stages from the top down, time from the left; ``points`` of paper make a unit of time."""
    first, last = span(events)
    panel.set_ylim(stages - 0.5, -0.5)
    panel.set_yticks(range(stages), [f"stage {s}" for s in range(stages)], fontsize=8)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8, bottom=panel.get_subplotspec().is_last_row())
    panel.spines[:].set_visible(False)
    for stage in range(stages):
        panel.broken_barh([(0, last - first)], (stage - HEIGHT / 2, HEIGHT), facecolor=BUBBLE)
    for (kind, phase), colour in FILL.items():
        same = [e for e in events if (e.kind, e.phase) == (kind, phase)]
        for stage in range(stages):
            bars = [(e.start - first, e.end - e.start) for e in same if e.stage == stage]
            panel.broken_barh(bars, (stage - HEIGHT / 2, HEIGHT), facecolor=colour, edgecolor="white", linewidth=0.5)
        if same:
            _numbers(panel, same, first, points, "white" if (kind, phase) == ("forward", 0) else "black")


def _numbers(panel: Any, boxes: Sequence[Event], first: float, points: float, colour: str) -> None:
    """Micro-batch numbers in one size that fits the typical box; a box too small for its number stays empty."""
    room = {box: (box.end - box.start) * points - 1.5 for box in boxes}
    digits = {box: DIGIT * len(str(box.micro_batch)) for box in boxes}
    size = min(NUMBER_POINTS[1], median(room.values()) / max(digits.values()))
    for box in boxes if size >= NUMBER_POINTS[0] else ():
        if digits[box] * size <= room[box] + 1:
            middle, style = (box.start + box.end) / 2 - first, {"fontsize": size, "color": colour}
            panel.text(middle, box.stage, str(box.micro_batch), ha="center", va="center_baseline", **style)
