"""Throughput as it is: over all ranks, real work only, the clock stopped for warm-up, evaluation and saving.

meter.add(step); ...; record = meter.read()
"""

import re
import resource
import sys
import time
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
        self.config = config
        self.task = task
        cuda = torch.cuda.is_available() and ranks.device() == "cuda"
        self.cuda = cuda
        name = torch.cuda.get_device_name() if cuda else None
        if dtype == "fp32" and cuda and config.train.tf32:
            dtype = "tf32"
        self.peak_tflops = peak_tflops(config.machine, dtype, name)
        self.seen = 0
        self.active_seconds = 0.0  # of all counted steps of this process
        self.active_steps = 0
        self.active_counts: dict[str, float] = {}
        self.peak_gib = 0.0  # of this rank's device, at the last reading
        self.traffic = Traffic() if config.train.communication else None
        self._restart()

    def _restart(self) -> None:
        self.steps = 0
        self.counts: dict[str, float] = {}
        self.waited = 0.0
        self.paused_seconds = 0.0
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
        self.steps += 1
        self.waited += step.data_seconds
        self.counts = {k: self.counts.get(k, 0) + v for k, v in step.counts.items()}
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
        """Rates since the last reading, over all ranks; {} while warming up. All ranks must call it."""
        seconds = self._now() - self.start - self.paused_seconds
        self.peak_gib, _ = memory = self._memory()
        steps, counts, waited = self.steps, self.counts, self.waited
        warming = self.seen < WARMUP_STEPS or steps == 0
        found = {} if warming else self._conditions(seconds, memory[0])
        if not warming:
            self._restart()
        slowest, peak, process = ranks.largest([seconds, *memory])
        (all_waited,) = ranks.total([waited])
        memory_record = {"peak_gib": peak, "process_peak_gib": process}
        if warming:
            return dict(memory_record)
        self.active_seconds += slowest
        self.active_steps += steps
        for name, count in counts.items():
            self.active_counts[name] = self.active_counts.get(name, 0) + count
        waiting = {"data_wait": all_waited / ranks.world() / slowest}
        return {**self._speed(steps, counts, slowest), **waiting, **memory_record, **found}

    def overall(self) -> dict[str, float | None]:
        """Rates of all counted steps of this process; {} if there were none."""
        return self._speed(self.active_steps, self.active_counts, self.active_seconds) if self.active_steps else {}

    def _speed(self, steps: int, counts: dict[str, float], seconds: float) -> dict[str, float | None]:
        tflops = self.task.useful_flops(counts) / seconds / ranks.world() / 1e12
        return {
            "step_seconds": seconds / steps,
            "samples_per_second": counts["sequences"] / seconds,
            **_rates(counts, seconds),
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
        }

    def _conditions(self, seconds: float, peak: float) -> dict[str, float]:
        if self.traffic is None:
            return {}
        sent, held = self.traffic.read()
        mine = Share(sent / self.steps, held / seconds, seconds - self.waited - held, peak)
        return conditions(ranks.gathered(mine))

    def _memory(self) -> tuple[float, float]:
        """Peak GiB of the device (of the process where there is none) and of the process."""
        process = _process_peak() / GIB
        return (torch.cuda.max_memory_allocated() / GIB if self.cuda else process), process


def _process_peak() -> int:
    """Bytes. On Linux not getrusage's, which begins with those of the process that has started this one."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rates(counts: dict[str, float], seconds: float) -> dict[str, float]:
    """Of tokens where the task has any, of bytes where it counts those that it reads."""
    if "bytes" in counts:
        return {"gb_per_second": counts["bytes"] / seconds / 1e9}
    return {
        "tokens_per_second": counts["positions"] / seconds,
        "tokens_per_second_unpadded": counts["tokens"] / seconds,
        "padding": 1 - counts["tokens"] / counts["positions"],
    }


@dataclass(frozen=True)
class Share:
    """What one rank had of the work since the last reading."""

    sent: float  # bytes in a step
    held: float  # share of the time that it communicated or waited for the other ranks to do so
    busy: float  # seconds that it neither communicated nor waited for data
    peak: float  # memory


def conditions(shares: Sequence[Share]) -> dict[str, float]:
    """What linear scaling asks for: little communication; work and memory even (mean by largest, at best 1)."""
    busy, peak = ([getattr(s, name) for s in shares] for name in ("busy", "peak"))
    return {
        "comm_mib": mean(s.sent for s in shares) / MIB,  # that a rank sends in a step
        "comm_share": min(s.held for s in shares),  # of the rank that waits least for the others
        "work_balance": mean(busy) / max(busy),
        "memory_balance": mean(peak) / max(peak),
    }
