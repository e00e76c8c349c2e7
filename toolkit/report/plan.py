"""A plan as tables for a terminal.

show(plan(config), Console(), explain=True)
"""

from typing import Any

from toolkit.config.units import GIB
from toolkit.plan.machines import way_out
from toolkit.plan.memory import MOMENTS
from toolkit.plan.paper import zero_bytes, zero_volume
from toolkit.plan.plan import Plan
from toolkit.run.table import table


def show(plan: Plan, console: Any, *, explain: bool) -> None:
    """What fits, then how fast; what is assumed; with ``explain`` the formula behind each number."""
    console.print(_head(plan), highlight=False)
    console.print(_memory(plan, explain))
    console.print(*_verdict(plan), sep="\n", highlight=False)
    if plan.speed.unknown:
        console.print(f"No time without {', '.join(plan.speed.unknown)}: machine={plan.machine.name} does not say."
                      f"{way_out(plan.machine, plan.speed.unknown)}", highlight=False)  # fmt: skip
    else:
        console.print(_time(plan, explain))
        console.print(_rates(plan), highlight=False)
    if explain and plan.layout.dtype != "fp32" and plan.layout.pipe == plan.layout.tensor == 1:
        console.print(_paper(plan), highlight=False)
    for line in plan.assumptions:
        console.print(line, highlight=False, style="dim")


def _head(plan: Plan) -> str:
    layout, machine = plan.layout, plan.machine
    name = machine.name if machine.name != "this" else machine.device_name or "CPU"
    split = {"pipe stages": layout.pipe, "tensor ranks": layout.tensor}
    how = [f"ZeRO {layout.stage}", layout.dtype, layout.optimizer, *(f"{n} {s}" for s, n in split.items() if n > 1)]
    parts = (
        f"{sum(plan.parameters.values()):,} parameters",
        f"{layout.ranks} {name} ranks on {machine.nodes} node{'s' * (machine.nodes > 1)}",
        ", ".join(how),
        f"{layout.samples} samples = {layout.micro} x {layout.accumulation} x {layout.data}",
    )
    return "; ".join(parts)


def _memory(plan: Plan, explain: bool) -> Any:
    title = f"GiB of a device when {MOMENTS[plan.memory.moment]}"
    rows = [(f"{p.name}", p.bytes / GIB, p.formula) for p in plan.memory.at_peak]
    rows += [(f"{p.name} ({'pinned ' * p.pinned}{p.place})", p.bytes / GIB, p.formula)
             for p in plan.memory.parts if p.place != "device"]  # fmt: skip
    return _table(title, rows, explain)


def _time(plan: Plan, explain: bool) -> Any:
    shares = [s for s in plan.speed.shares if s.seconds]
    rows = [
        (f"{s.name}, {s.hidden / s.seconds:.0%} hidden" if s.hidden else s.name, s.seconds, s.formula) for s in shares
    ]
    return _table("Seconds of a step", rows, explain)


def _table(title: str, rows: list[tuple[str, float, str]], explain: bool) -> Any:
    columns = {"part": "", "number": ",.4f", **({"formula": ""} if explain else {})}
    return table(columns, [row[: len(columns)] for row in rows], title, heads=False)


def _verdict(plan: Plan) -> list[str]:
    lines = [f"Device: {plan.device_gib:.2f} GiB{_of(plan.device_gib, plan.device_limit_gib)}"]
    if plan.host_gib:
        pinned = f" ({plan.pinned_gib:.2f} pinned)"
        lines.append(f"Host of a node: {plan.host_gib:.2f} GiB{pinned}{_of(plan.host_gib, plan.host_limit_gib)}")
    if plan.nvme_gib:
        lines.append(f"NVMe of a node: {plan.nvme_gib:.2f} GiB{_of(plan.nvme_gib, plan.nvme_limit_gib)}")
    unknown = f"Whether it fits is unknown: machine={plan.machine.name} does not say {', '.join(plan.unknown_limits)}"
    verdict = {True: "It fits", False: "It does not fit", None: unknown}[plan.fits]
    which = "within the known limits" if plan.unknown_limits else "that fits"
    micro = f"; the largest micro-batch {which} is {plan.largest_micro}" if plan.largest_micro else ""
    return [*lines, f"{verdict}{micro}."]


def _paper(plan: Plan) -> str:
    """The ZeRO paper's accounting beside DeepSpeed's, of one rank."""
    count, stage, world = sum(plan.parameters.values()), plan.layout.stage, plan.layout.data
    groups = ("weights", "gradients", "optimizer")
    held = sum(p.bytes for p in plan.memory.parts if p.group in groups and "o" in p.moments) / GIB
    sent = sum(s.bytes for s in plan.speed.sent) / 1e9
    paper_held = zero_bytes(count, stage=stage, world=world) / GIB
    paper_sent = zero_volume(count, stage=stage) * 2 * (world - 1) / world / 1e9
    return (
        f"The ZeRO paper counts {paper_held:.3f} GiB of states and {paper_sent:.3f} GB sent a step; "
        f"DeepSpeed has {held:.3f} GiB and sends {sent:.3f} GB."
    )


def _of(need: float, limit: float | None) -> str:
    if limit is None:
        return ""
    return f" of {limit:,.1f}, {abs(limit - need):,.1f} {'left' if need <= limit else 'too much'}"


def _rates(plan: Plan) -> str:
    speed = plan.speed
    hours = "" if plan.hours is None else f", {plan.hours:,.1f} h = {plan.hours * plan.layout.ranks:,.0f} device-hours"
    return (
        f"{speed.step_seconds:.3f} s a step, {speed.samples_per_second:,.0f} samples/s, "
        f"{speed.tokens_per_second:,.0f} tokens/s, MFU {speed.mfu:.0%}{hours}"
    )
