"""One sum over the rows of a table, taken by threads in four ways: how fast, and how right.

    data = draw(rows=16_000_000, features=8, seed=42)
    rows = measure(data, load(console), threads=(1, 2), repeats=5)

The sum makes the mean absolute error of a linear model, ``sum |w x - y| / rows``; csrc/reductions.cpp has the ways:

- ``serial``: one thread, in blocks of 4096 rows.
- ``unprotected``: all threads add each row's error to one variable. Wrong: additions are lost.
- ``mutex``: the same under a lock. Right, slow.
- ``partial``: sums of blocks, each made by one thread, added up at the end. Right, fast.

The right ones give the same bits for any number of threads. ``serial`` and ``partial`` have one order of summation:
within a block, row i to lane i mod 64; then the 64 lanes; then the blocks, each in ascending order. ``mutex`` adds
integers, multiples of 2^-32, whose sum has no order.
"""

import hashlib
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from rich.table import Table
from torch import Tensor

from toolkit.config.units import GIB
from toolkit.errors import ConfigError
from toolkit.job import ops
from toolkit.report import figures
from toolkit.run.table import grouped, table

SOURCE = Path(__file__).parent / "csrc" / "reductions.cpp"
METHODS = ("serial", "unprotected", "mutex", "partial")
GROUP = 64  # rows that lie side by side; csrc/reductions.cpp


class ReductionsBuilder(OpBuilder):  # type: ignore[misc]
    """Our source for DeepSpeed's way to build ops; the name changes with source and flags, so they are never stale."""

    def __init__(self) -> None:
        text = SOURCE.read_bytes() + " ".join(self.cxx_args()).encode()
        super().__init__(f"reductions_{hashlib.sha256(text).hexdigest()[:8]}")

    def absolute_name(self) -> str:
        return f"studies.csrc.{self.name}"

    def sources(self) -> list[str]:
        return [str(SOURCE)]

    def cxx_args(self) -> list[str]:
        return ["-O3", f"-march={ops.march()}", "-pthread"]


def load(console: Any) -> Any:
    """The compiled module, built if need be."""
    builder = ReductionsBuilder()
    ops.ensure([builder], console)
    return builder.load()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_threads() -> list[int]:
    """1, 2, 4, … below the cores, and as many as there are; at least two, so that there is a race."""
    return sorted({1, 2, cores(), *(2**i for i in range(cores().bit_length()))})


@dataclass(frozen=True)
class Terms:
    """fp32: ``x`` [groups, features, 64], ``w`` [features], ``y`` [groups, 64]; the last group filled up with zeros."""

    x: Tensor
    w: Tensor
    y: Tensor
    rows: int

    @property
    def nbytes(self) -> int:
        """What one sum reads."""
        return self.x.nbytes + self.y.nbytes

    def exact(self) -> float:
        """The sum to the last bit of a double: rows in fp64 with torch, added by math.fsum."""
        chunks = zip(torch.split(self.x, 1024), torch.split(self.y, 1024), strict=True)
        errors = (torch.einsum("gfr,f->gr", x.double(), self.w.double()) - y for x, y in chunks)
        return math.fsum(chain.from_iterable(e.abs().flatten().tolist() for e in errors))


def draw(*, rows: int, features: int, seed: int) -> Terms:
    """Normal ``x`` and ``w``, and what a linear model misses by normal noise as ``y``.

    Raises ConfigError if rows do not fit the memory that is free.
    """
    need = rows * 4 * (features + 2 + features / 2)  # x, y, what y is made of, and half of x as copied in measure
    free = psutil.virtual_memory().available
    if need > free:
        raise ConfigError(
            f"reductions.rows={rows}: {need / GIB:,.1f} GiB with {features} features, and {free / GIB:,.1f} GiB of "
            f"memory are free. Take at most reductions.rows={int(0.9 * free * rows / need)}."
        )
    generator = torch.Generator().manual_seed(seed)
    groups = math.ceil(rows / GROUP)
    w = torch.empty(features).normal_(generator=generator)
    x = torch.empty(groups, features, GROUP).normal_(generator=generator)
    y = torch.empty(groups, GROUP).normal_(generator=generator)
    y += torch.einsum("gfr,f->gr", x, w)
    last = rows - (groups - 1) * GROUP
    x[-1, :, last:] = 0
    y[-1, last:] = 0
    return Terms(x, w, y, rows)


def measure(
    data: Terms, op: Any, *, threads: Sequence[int], repeats: int, each: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """A row per way and number of threads, from ``repeats`` rounds in which all of them take turns.

    Seconds are medians, of starting and ending the threads too. ``copy_gb_per_second`` is what as many threads copied
    in the same rounds, STREAM's way: bytes read plus bytes written, as many in all as ``x`` has. A sum's are all read.
    ``each`` is called after each timed sum.
    """
    source = data.x.view(-1)[: data.x.numel() // 2]
    target = torch.zeros_like(source)  # zeros are written: memory is given out at the first write
    sums: dict[tuple[str, int], float] = {}
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(repeats):
        for n in sorted({1, *threads}):
            seconds["copy", n].append(_timed(op.copy, target, source, n)[0])
            for method in [m for m in METHODS if (n == 1 if m == "serial" else n in threads)]:
                took, sums[method, n] = _timed(getattr(op, method), data.x, data.w, data.y, n)
                seconds[method, n].append(took)
                each()
    exact, typical = data.exact(), {way: median(times) for way, times in seconds.items()}
    return [
        {
            "method": method,
            "threads": n,
            "rows": data.rows,
            "seconds": typical[method, n],
            "speedup": typical["serial", 1] / typical[method, n],
            "mean_absolute_error": total / data.rows,
            "relative_error": abs(total - exact) / exact,
            "samples_per_second": data.rows / typical[method, n],
            "gb_per_second": data.nbytes / typical[method, n] / 1e9,
            "copy_gb_per_second": 2 * source.nbytes / typical["copy", n] / 1e9,
        }
        for (method, n), total in sorted(sums.items(), key=lambda item: (METHODS.index(item[0][0]), item[0][1]))
    ]


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


def listing(rows: list[dict[str, Any]]) -> Table:
    """A line per way and number of threads."""
    columns = {
        "method": "", "threads": "d", "seconds": ".4f", "speedup": ".2f", "relative_error": ".1e",
        "gb_per_second": ".1f", "copy_gb_per_second": ".1f",
    }  # fmt: skip
    heads = ("method", "threads", "seconds", "speed-up", "error", "GB/s", "copy GB/s")
    cells = grouped([r[key] for key in columns] for r in rows)
    return table(list(zip(heads, columns.values(), strict=True)), cells)


def plot(rows: list[dict[str, Any]], stem: Path, title: str) -> None:
    """``stem``.png and .svg: what each way reads in a second beside a copy, and its error, both by threads."""
    figure, (speed, error) = figures.new(2, title, width=5)
    threads = sorted({r["threads"] for r in rows})
    for method, colour, size in zip(METHODS, figures.COLOURS, (11, 9, 7, 5), strict=False):  # so that all are seen
        own = [r for r in rows if r["method"] == method]
        for axes, key in ((speed, "gb_per_second"), (error, "relative_error")):
            axes.plot([r["threads"] for r in own], [r[key] for r in own], "o-", color=colour, ms=size, label=method)
    copies = {r["threads"]: r["copy_gb_per_second"] for r in rows}
    speed.plot(threads, [copies[n] for n in threads], color="0.4", linestyle="--", label="copy (read + write)")
    speed.set(ylabel="GB/s of memory", ylim=(0, None))
    error.set(ylabel="relative error of the sum", yscale="log", ylim=(None, 10))
    for axes in (speed, error):
        axes.set_xlabel("threads")
        axes.set_xticks(threads)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figures.save(figure, stem)
