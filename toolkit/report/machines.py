"""The devices of conf/machine as a table.

Console().print(listing(toolkit.plan.machines.table(), "bf16"))
"""

from collections.abc import Sequence
from typing import get_args

from rich.table import Table

from toolkit.config.schema import Dtype, Machine
from toolkit.plan.machines import balance
from toolkit.run.table import table


def listing(machines: Sequence[Machine], dtype: Dtype) -> Table:
    """80 columns, a line per machine; what is unknown is blank, FLOP per byte are of ``dtype``."""
    dtypes = get_args(Dtype)
    columns = {"machine": ""} | dict.fromkeys(("year", "GiB", "GB/s", *dtypes, "FLOP/B"), ">")
    rows = []
    for m in machines:
        numbers = (m.memory_gib, m.bandwidth_gbs, *map(m.peak_tflops.get, dtypes), balance(m, dtype))
        rows.append((m.name, str(m.year or ""), *map(_cell, numbers)))
    return table(columns, rows, "Of one device; TFLOP/s by input type, dense")


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}" if number >= 1000 else f"{number:,.1f}".removesuffix(".0")


def source(machine: Machine) -> str:
    """``a100_40gb (A100 40GB): NVIDIA A100 data sheet …``"""
    return f"{machine.name}{f' ({machine.device_name})' if machine.device_name else ''}: {machine.source}"
