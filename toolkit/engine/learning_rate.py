"""The learning rate as a factor of the optimizer's own, for every step of the run.

factor(Schedule(name="linear", warmup=0.1), step=0, total=1000)   # 1/100: the first step trains, too
"""

import math

from toolkit.config.schema import Schedule


def warmup_steps(schedule: Schedule, total: int) -> int:
    """Steps of warm-up: as given, or as a share of the run."""
    return int(schedule.warmup) if schedule.warmup >= 1 else round(schedule.warmup * total)


def factor(schedule: Schedule, step: int, total: int) -> float:
    """The factor for the optimizer step that follows ``step`` finished ones, in [0, 1].

    Warm-up is linear. Then: linear and cosine reach 0 at ``decay_steps`` (or ``total``); inverse_sqrt falls with
    ``sqrt(warmup / step)`` (Vaswani et al. 2017, section 5.3); constant stays.
    """
    warmup = warmup_steps(schedule, total)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, (schedule.decay_steps or total) - warmup))
    if schedule.name == "linear":
        return 1 - done
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule.name == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / max(1, step + 1))
    return 1.0
