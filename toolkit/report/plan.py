"""A plan, and the devices of conf/machine, as tables for a terminal.

show(plan(config), Console(), explain=True)
Console().print(machines(toolkit.plan.machines.table(), "bf16"))
"""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from rich.table import Table

from toolkit.config.schema import Dtype, Machine
from toolkit.config.units import GIB
from toolkit.plan.machines import balance, way_out
from toolkit.plan.memory import MOMENTS
from toolkit.plan.paper import zero_bytes, zero_volume
from toolkit.plan.plan import Plan
from toolkit.run.table import table


def show(plan: Plan, console: Any, *, explain: bool) -> None:
    """What fits, then how fast; what is assumed; with ``explain`` the formula behind each number."""
    memory, speed = plan.memory, plan.speed
    console.print(_head(plan), highlight=False)
    held = [(p.name, p.bytes / GIB, p.formula) for p in memory.at_peak]
    held += [(f"{p.name} ({'pinned ' * p.pinned}{p.place})", p.bytes / GIB, p.formula)
             for p in memory.parts if p.place != "device"]  # fmt: skip
    console.print(_table(f"GiB of a device when {MOMENTS[memory.moment]}", held, explain))
    console.print(*_verdict(plan), sep="\n", highlight=False)
    if speed.unknown:
        console.print(f"No time without {', '.join(speed.unknown)}: machine={plan.machine.name} does not say."
                      f"{way_out(plan.machine, speed.unknown)}", highlight=False)  # fmt: skip
    else:
        spans = [(f"{s.name}, {s.hidden / s.seconds:.0%} hidden" if s.hidden else s.name, s.seconds, s.formula)
                 for s in speed.shares if s.seconds]  # fmt: skip
        console.print(_table("Seconds of a step", spans, explain))
        hours = plan.hours
        more = "" if hours is None else f", {hours:,.1f} h = {hours * plan.layout.ranks:,.0f} device-hours"
        rates = f"{speed.samples_per_second:,.0f} samples/s, {speed.tokens_per_second:,.0f} tokens/s"
        console.print(f"{speed.step_seconds:.3f} s a step, {rates}, MFU {speed.mfu:.0%}{more}", highlight=False)
    if explain and plan.layout.dtype != "fp32" and plan.layout.pipe == plan.layout.tensor == 1:
        console.print(_paper(plan), highlight=False)
    for line in plan.assumptions:
        console.print(line, highlight=False, style="dim")


def _head(plan: Plan) -> str:
    layout, nodes = plan.layout, plan.machine.nodes
    split = {"pipe stages": layout.pipe, "tensor ranks": layout.tensor}
    how = [f"ZeRO {layout.stage}", layout.dtype, layout.optimizer, *(f"{n} {s}" for s, n in split.items() if n > 1)]
    parts = (
        f"{plan.count:,} parameters",
        f"{layout.ranks} {plan.name} ranks on {nodes} node{'s' * (nodes > 1)}",
        ", ".join(how),
        f"{layout.samples} samples = {layout.micro} x {layout.accumulation} x {layout.data}",
    )
    return "; ".join(parts)


def _table(title: str, rows: list[tuple[str, float, str]], explain: bool) -> Table:
    columns = {"part": "", "number": ",.4f", **({"formula": ""} if explain else {})}
    return table(columns, [row[: len(columns)] for row in rows], title, heads=False)


def _verdict(plan: Plan) -> Iterator[str]:
    titles = {"device": "Device", "host": "Host of a node", "nvme": "NVMe of a node"}
    for place, (need, limit) in plan.needs.items():
        pinned = f" ({plan.pinned_gib:.2f} pinned)" if place == "host" else ""
        rest = 0.0 if limit is None else limit - need
        of = "" if limit is None else f" of {limit:,.1f}, {abs(rest):,.1f} {'left' if rest >= 0 else 'too much'}"
        yield f"{titles[place]}: {need:.2f} GiB{pinned}{of}"
    unknown = f"Whether it fits is unknown: machine={plan.machine.name} does not say {', '.join(plan.unknown_limits)}"
    verdict = {True: "It fits", False: "It does not fit", None: unknown}[plan.fits]
    which = "within the known limits" if plan.unknown_limits else "that fits"
    micro = f"; the largest micro-batch {which} is {plan.largest_micro}" if plan.largest_micro else ""
    yield f"{verdict}{micro}."


def _paper(plan: Plan) -> str:
    """The ZeRO paper's accounting beside DeepSpeed's, of one rank."""
    stage, world, groups = plan.layout.stage, plan.layout.data, ("weights", "gradients", "optimizer")
    held = sum(p.bytes for p in plan.memory.parts if p.group in groups and "o" in p.moments) / GIB
    sent = sum(s.bytes for s in plan.speed.sent) / 1e9
    paper_held = zero_bytes(plan.count, stage=stage, world=world) / GIB
    paper_sent = zero_volume(plan.count, stage=stage) * 2 * (world - 1) / world / 1e9
    return (
        f"The ZeRO paper counts {paper_held:.3f} GiB of states and {paper_sent:.3f} GB sent a step; "
        f"DeepSpeed has {held:.3f} GiB and sends {sent:.3f} GB."
    )


def machines(chosen: Sequence[Machine], dtype: Dtype) -> Table:
    """80 columns, a line per machine; what is unknown is blank, FLOP per byte are of ``dtype``."""
    dtypes = get_args(Dtype)
    columns = {"machine": ""} | dict.fromkeys(("year", "GiB", "GB/s", *dtypes, "FLOP/B"), ">")
    numbers = [(m.memory_gib, m.bandwidth_gbs, *map(m.peak_tflops.get, dtypes), balance(m, dtype)) for m in chosen]
    rows = [(m.name, str(m.year or ""), *map(_cell, own)) for m, own in zip(chosen, numbers, strict=True)]
    return table(columns, rows, "Of one device; TFLOP/s by input type, dense")


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}" if number >= 1000 else f"{number:,.1f}".removesuffix(".0")


def source(machine: Machine) -> str:
    """``a100_40gb (A100 40GB): NVIDIA A100 data sheet …``"""
    return f"{machine.name}{f' ({machine.device_name})' if machine.device_name else ''}: {machine.source}"
