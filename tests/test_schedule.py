"""The learning rate against its closed forms."""

import math

import pytest

from toolkit.config.schema import Schedule
from toolkit.engine.start import factor


def curve(total: int, **keys: object) -> list[float]:
    schedule = Schedule.model_validate(keys)
    return [factor(schedule, step, total) for step in range(total + 1)]


def test_warmup_counts_steps_or_is_a_share() -> None:
    assert factor(Schedule(warmup=0.1), 0, 200) == 1 / 20
    assert factor(Schedule(warmup=7), 0, 200) == 1 / 7
    rates = curve(10, name="constant", warmup=4)
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0], "the first step trains, too"


def test_linear_and_cosine_reach_zero_at_the_end() -> None:
    assert curve(10, name="linear", warmup=0)[::5] == [1.0, 0.5, 0.0]
    assert curve(10, name="cosine", warmup=0)[::5] == pytest.approx([1.0, 0.5, 0.0])
    assert curve(4, name="linear", warmup=0, decay_steps=8)[4] == 0.5


def test_inverse_sqrt_is_that_of_the_transformer_paper() -> None:
    warmup, width = 4000, 512
    for step in (1, 100, 4000, 4001, 100_000):
        paper = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        peak = width**-0.5 * warmup**-0.5
        ours = factor(Schedule(name="inverse_sqrt", warmup=warmup), step - 1, 100_000)
        assert ours * peak == pytest.approx(paper)
    assert math.isclose(curve(100, name="inverse_sqrt", warmup=0)[0], 1.0)
