"""Throughput as it is: over all ranks, real work only, the clock stopped for warm-up, evaluation and saving.

meter.add(step); ...; record = meter.read()
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from toolkit import ranks
from toolkit.config import Dtype, RunConfig
from toolkit.plan.machines import peak_tflops
from toolkit.traffic import Traffic

WARMUP_STEPS = 2  # first calls allocate, compile and fill caches
GIB = 2**30


class Meter:
    """Counts steps between two readings. Reading is the only place where the device is waited for."""

    def __init__(self, config: RunConfig, task: Any, dtype: Dtype) -> None:
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
        self.active_tokens = 0.0
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

    def add(self, step: Any) -> None:
        """Count one :class:`toolkit.engine.Step`."""
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
        memory = self._memory()
        steps, counts, waited = self.steps, self.counts, self.waited
        warming = self.seen < WARMUP_STEPS or steps == 0
        shares = {} if warming else self._shares(seconds, memory[0])
        if not warming:
            self._restart()
        slowest, peak, process = ranks.largest([seconds, *memory])
        (all_waited,) = ranks.total([waited])
        memory_record = {"peak_gib": peak, "process_peak_gib": process}
        if warming:
            return dict(memory_record)
        positions = counts["positions"]
        self.active_seconds += slowest
        self.active_tokens += positions
        tflops = self.task.useful_flops(counts) / slowest / ranks.world() / 1e12
        return {
            "step_seconds": slowest / steps,
            "samples_per_second": counts["sequences"] / slowest,
            "tokens_per_second": positions / slowest,
            "tokens_per_second_unpadded": counts["tokens"] / slowest,
            "padding": 1 - counts["tokens"] / positions,
            "data_wait": all_waited / ranks.world() / slowest,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            **memory_record,
            **shares,
        }

    def _shares(self, seconds: float, peak: float) -> dict[str, float]:
        """How far this is from the conditions of linear scaling; {} unless train.communication.

        work_balance: mean over the ranks of the time busy, neither communicating nor waiting for data, by the largest.
        memory_balance: the same of the peak. comm_share: of the rank that waits least for the others.
        """
        if self.traffic is None:
            return {}
        sent, held = self.traffic.read()
        busy = seconds - self.waited - held
        sums = ranks.total([sent, busy, peak])
        most_busy, highest, least_held = ranks.largest([busy, peak, -held / seconds])
        return {
            "comm_mib": sums[0] / ranks.world() / self.steps / 2**20,  # that a rank sends in a step
            "comm_share": -least_held,
            "work_balance": sums[1] / ranks.world() / most_busy,
            "memory_balance": sums[2] / ranks.world() / highest,
        }

    def _memory(self) -> tuple[float, float]:
        """Peak GiB of the device (of the process where there is none) and of the process."""
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
        return (torch.cuda.max_memory_allocated() / GIB if self.cuda else process), process
