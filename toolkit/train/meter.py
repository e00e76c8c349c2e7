"""Throughput as it is: over all ranks, real work only, the clock stopped for warm-up, evaluation and saving.

meter.add(step); ...; record = meter.read()
"""

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from toolkit.config.schema import Dtype, RunConfig
from toolkit.config.units import GIB, MIB
from toolkit.engine.collectives import Traffic
from toolkit.engine.plain import Step
from toolkit.job import ranks
from toolkit.plan.machines import peak_tflops
from toolkit.tasks.task import Task

WARMUP_STEPS = 2  # first calls allocate, compile and fill caches


class Meter:
    """Counts steps between two readings. Reading is the only place where the device is waited for."""

    def __init__(self, config: RunConfig, task: Task, dtype: Dtype) -> None:
        self.task = task
        self.cuda = torch.cuda.is_available() and ranks.device() == "cuda"
        if dtype == "fp32" and self.cuda and config.train.tf32:
            dtype = "tf32"
        name = torch.cuda.get_device_name() if self.cuda else None
        self.peak_tflops = peak_tflops(config.machine, dtype, name)
        self.seen = 0
        self.active = Counter[str]()  # what the counted steps of this process hold, and their ``steps`` and ``seconds``
        self.peak_gib = 0.0  # of this rank's device, at the last reading
        self.traffic = Traffic() if config.train.communication else None
        self._restart()

    def _restart(self) -> None:
        self.counts = Counter[str]()
        self.waited = self.paused_seconds = 0.0
        if self.traffic:
            self.traffic.read()
        self.start = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, step: Step) -> None:
        """Count one."""
        self.seen += 1
        self.waited += step.data_seconds
        self.counts.update(step.counts | {"steps": 1})
        if self.seen == WARMUP_STEPS:
            self._restart()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the clock."""
        start = self._now()
        if self.traffic:
            self.traffic.counting = False
        yield
        self.paused_seconds += self._now() - start
        if self.traffic:
            self.traffic.counting = True

    def read(self) -> dict[str, float | None]:
        """Rates since the last reading, over all ranks; while warming up memory only. All ranks must call it."""
        seconds = self._now() - self.start - self.paused_seconds
        process = _process_peak() / GIB
        # Where there is no device, it is the process that holds the tensors
        self.peak_gib = torch.cuda.max_memory_allocated() / GIB if self.cuda else process
        counts, waited = self.counts, self.waited
        warming = self.seen < WARMUP_STEPS or not counts
        found = {} if warming else self._conditions(seconds)
        if not warming:
            self._restart()
        memory = self.peak_gib, process
        slowest, *peaks = ranks.largest([seconds, *memory])
        (all_waited,) = ranks.total([waited])
        record: dict[str, float | None] = dict(zip(("peak_gib", "process_peak_gib"), peaks, strict=True))
        if warming:
            return record
        counts.update({"seconds": slowest})
        self.active.update(counts)
        return {**self._speed(counts), "data_wait": all_waited / ranks.world() / slowest, **record, **found}

    def overall(self) -> dict[str, float | None]:
        """Rates of all counted steps of this process; {} if there were none."""
        return self._speed(self.active) if self.active else {}

    def _speed(self, counts: Counter[str]) -> dict[str, float | None]:
        """Of tokens where the task has any, of bytes where it counts those that it reads."""
        seconds = counts["seconds"]
        found = {"step_seconds": seconds / counts["steps"], "samples_per_second": counts["sequences"] / seconds}
        if "bytes" in counts:
            found["gb_per_second"] = counts["bytes"] / seconds / 1e9
        else:
            found |= {
                "tokens_per_second": counts["positions"] / seconds,
                "tokens_per_second_unpadded": counts["tokens"] / seconds,
                "padding": 1 - counts["tokens"] / counts["positions"],
            }
        tflops = self.task.useful_flops(dict(counts)) / seconds / ranks.world() / 1e12
        mfu = tflops / self.peak_tflops if self.peak_tflops else None
        return {**found, "tflops_per_device": tflops, "mfu": mfu}

    def _conditions(self, seconds: float) -> dict[str, float]:
        if self.traffic is None:
            return {}
        sent, held = self.traffic.read()
        busy = seconds - self.waited - held
        return conditions(ranks.gathered(Worked(sent / self.counts["steps"], held / seconds, busy, self.peak_gib)))


def _process_peak() -> int:
    """Bytes. On Linux not getrusage's, which begins with those of the process that has started this one."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Worked:
    """What one rank had of the work since the last reading."""

    sent: float  # bytes in a step
    held: float  # share of the time that it communicated or waited for the other ranks to do so
    busy: float  # seconds that it neither communicated nor waited for data
    peak: float  # memory


def conditions(every: Sequence[Worked]) -> dict[str, float]:
    """What linear scaling asks for: little communication; work and memory even (mean by largest, at best 1)."""
    busy, peak = [one.busy for one in every], [one.peak for one in every]
    return {
        "comm_mib": mean(one.sent for one in every) / MIB,  # that a rank sends in a step
        "comm_share": min(one.held for one in every),  # of the rank that waits least for the others
        "work_balance": mean(busy) / max(busy),
        "memory_balance": mean(peak) / max(peak),
    }
