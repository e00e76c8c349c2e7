"""The devices of conf/machine as a table.

Console().print(table(toolkit.plan.machines.table(), "bf16"))
"""

from collections.abc import Sequence
from typing import Any, get_args

from toolkit.config.schema import Dtype, Machine
from toolkit.plan.machines import balance


def table(machines: Sequence[Machine], dtype: Dtype) -> Any:
    """A rich table of 80 columns, a line per machine; what is unknown is blank, FLOP per byte are of ``dtype``."""
    from rich.box import SIMPLE
    from rich.table import Table

    shown = Table(
        title="Of one device; TFLOP/s by input type, dense", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    shown.add_column("machine", no_wrap=True)
    for name in ("year", "GiB", "GB/s", *get_args(Dtype), "FLOP/B"):
        shown.add_column(name, justify="right", no_wrap=True)
    for m in machines:
        peaks = (m.peak_tflops.get(d) for d in get_args(Dtype))
        numbers = (_cell(n) for n in (m.memory_gib, m.bandwidth_gbs, *peaks, balance(m, dtype)))
        shown.add_row(m.name, str(m.year or ""), *numbers)
    return shown


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}" if number >= 1000 else f"{number:,.1f}".removesuffix(".0")


def source(machine: Machine) -> str:
    """``a100_40gb (A100 40GB): NVIDIA A100 data sheet …``"""
    return f"{machine.name}{f' ({machine.device_name})' if machine.device_name else ''}: {machine.source}"
