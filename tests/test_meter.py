"""The meter's clock leaves out what is no training, and its rates are of all ranks."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forks import on_ranks

from toolkit.config.schema import RunConfig
from toolkit.engine.plain import Step
from toolkit.train.meter import WARMUP_STEPS, Meter, Worked, conditions


class Clock:
    """time.perf_counter that only moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


FLOPS = 5e9  # of a token


def useful_flops(counts: dict[str, float]) -> float:
    return FLOPS * counts.get("tokens", 0)


def metered(clock: Clock, **train: Any) -> Meter:
    time.perf_counter = clock  # type: ignore[assignment]  # in a fork of its own
    config = RunConfig(machine={"peak_tflops": {"fp32": 0.5}}, train=train)  # type: ignore[arg-type]
    return Meter(config, SimpleNamespace(useful_flops=useful_flops), "fp32")


def step(waited: float = 0.0, **counts: float) -> Step:
    return Step({}, {"sequences": 8, "tokens": 300, "positions": 400} | counts, waited, False)


def trained(meter: Meter, clock: Clock, steps: int, seconds: float, waited: float = 0.0) -> None:
    for _ in range(steps):
        clock.now += seconds
        meter.add(step(waited))


def one(tmp_path: Path, work: Any) -> Any:
    """What ``work(clock, meter)`` returns in a world of one rank."""

    def alone(rank: int) -> Any:
        clock = Clock()
        return work(clock, metered(clock))

    (ended,) = on_ranks(1, tmp_path, alone)
    assert ended.code == 0, ended.printed
    return ended.result


def test_the_first_steps_are_left_out(tmp_path: Path) -> None:
    def work(clock: Clock, meter: Meter) -> Any:
        trained(meter, clock, WARMUP_STEPS - 1, seconds=60)  # compiles, allocates
        before = meter.read()
        trained(meter, clock, 1, seconds=60)
        nothing_yet = meter.read()
        trained(meter, clock, 4, seconds=0.5)
        return before, nothing_yet, meter.read()

    before, nothing_yet, record = one(tmp_path, work)
    assert set(before) == set(nothing_yet) == {"peak_gib", "process_peak_gib"}
    assert record["step_seconds"] == pytest.approx(0.5)
    assert record["samples_per_second"] == pytest.approx(16)


def test_evaluating_and_saving_stop_the_clock(tmp_path: Path) -> None:
    def work(clock: Clock, meter: Meter) -> Any:
        trained(meter, clock, WARMUP_STEPS, seconds=1)
        trained(meter, clock, 2, seconds=1)
        for _ in range(2):
            with meter.paused():
                clock.now += 30
        trained(meter, clock, 2, seconds=1)
        first = meter.read()
        trained(meter, clock, 1, seconds=1)
        return first, meter.read()

    first, second = one(tmp_path, work)
    assert first["step_seconds"] == pytest.approx(1)
    assert second["step_seconds"] == pytest.approx(1)  # a pause counts for one reading only


def test_padding_is_counted_apart_and_does_no_useful_work(tmp_path: Path) -> None:
    def work(clock: Clock, meter: Meter) -> Any:
        trained(meter, clock, WARMUP_STEPS, seconds=1)
        trained(meter, clock, 5, seconds=2)
        return meter.read()

    record = one(tmp_path, work)
    assert record["tokens_per_second"] == pytest.approx(200)
    assert record["tokens_per_second_unpadded"] == pytest.approx(150)
    assert record["padding"] == pytest.approx(0.25)
    assert record["tflops_per_device"] == pytest.approx(150 * FLOPS / 1e12)
    assert record["mfu"] == pytest.approx(150 * FLOPS / 0.5e12)


def test_a_task_without_tokens_has_bytes(tmp_path: Path) -> None:
    def work(clock: Clock, meter: Meter) -> Any:
        for _ in range(WARMUP_STEPS + 1):
            clock.now += 2
            meter.add(Step({}, {"sequences": 10, "bytes": 4e9}, 0.0, False))
        return meter.read()

    record = one(tmp_path, work)
    assert record["gb_per_second"] == pytest.approx(2)
    assert "tokens_per_second" not in record


def test_overall_is_of_all_counted_steps_whatever_was_read_between(tmp_path: Path) -> None:
    def work(clock: Clock, meter: Meter) -> Any:
        none = meter.overall()
        trained(meter, clock, WARMUP_STEPS, seconds=9)
        trained(meter, clock, 1, seconds=1)
        meter.read()
        trained(meter, clock, 3, seconds=3)
        meter.read()
        return none, meter.overall()

    none, overall = one(tmp_path, work)
    assert none == {}
    assert overall["step_seconds"] == pytest.approx(10 / 4)
    assert overall["samples_per_second"] == pytest.approx(32 / 10)


def test_ranks_rates_are_the_slowest_ones_and_the_wait_is_the_mean(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        clock = Clock()
        meter = metered(clock)
        trained(meter, clock, WARMUP_STEPS, seconds=1)
        trained(meter, clock, 2, seconds=(1, 2)[rank], waited=(0.2, 1.0)[rank])
        return meter.read()

    ended = on_ranks(2, tmp_path, work)
    assert [e.code for e in ended] == [0, 0], [e.printed for e in ended]
    first, second = (e.result for e in ended)
    assert first == second
    assert first["step_seconds"] == pytest.approx(2)  # counts are of all ranks already, seconds the slowest rank's
    assert first["samples_per_second"] == pytest.approx(4)
    assert first["data_wait"] == pytest.approx((0.4 + 2.0) / 2 / 4)
    assert first["tflops_per_device"] == pytest.approx(150 * FLOPS / 2 / 1e12)


def test_conditions_of_linear_scaling() -> None:
    found = conditions([Worked(2**20, 0.1, 3.0, 4.0), Worked(3 * 2**20, 0.3, 1.0, 2.0)])
    assert found == {"comm_mib": 2, "comm_share": 0.1, "work_balance": 2 / 3, "memory_balance": 3 / 4}
