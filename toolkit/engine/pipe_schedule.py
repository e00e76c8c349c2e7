"""Pipeline schedules: DeepSpeed's, GPipe's fill and drain, and when each pass of them would run.

SCHEDULES["gpipe"](micro_batches=8, stages=4, stage_id=0).steps()    # what stage 0 does, in DeepSpeed's instructions
ideal("gpipe", stages=4, micro_batches=8)                            # the passes of all stages, with their times
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.pipe import schedule as pipe

from toolkit.engine.pipe_events import Direction, Event
from toolkit.errors import ConfigError, nearest


class GPipeSchedule(pipe.PipeSchedule):  # type: ignore[misc]
    """Every micro-batch forward, then every micro-batch backward (GPipe, Huang et al. 2019).

    Drained first in, first out, so gradients are summed in the order of 1F1B and are equal to the last bit.
    All activations are in flight at once, so buffer k holds micro-batch k. A stage receives before it computes
    and sends after it: along a line of stages, blocking messages then cannot wait for each other in a circle.
    """

    def num_pipe_buffers(self) -> int:
        return max(2, int(self.micro_batches))

    def steps(self) -> Iterator[list[Any]]:
        for buffer in range(self.micro_batches):
            receive = [] if self.is_first_stage else [pipe.RecvActivation(buffer)]
            fetch = [pipe.LoadMicroBatch(buffer)] if self.is_first_stage or self.is_last_stage else []
            send = [] if self.is_last_stage else [pipe.SendActivation(buffer)]
            yield [*receive, *fetch, pipe.ForwardPass(buffer), *send]
        for buffer in range(self.micro_batches):
            receive = [] if self.is_last_stage else [pipe.RecvGrad(buffer)]
            send = [] if self.is_first_stage else [pipe.SendGrad(buffer)]
            last = buffer == self.micro_batches - 1
            end = [pipe.ReduceTiedGrads(), pipe.ReduceGrads(), pipe.OptimizerStep()] if last else []
            yield [*receive, pipe.BackwardPass(buffer), *send, *end]


PASSES: dict[Any, Direction] = {pipe.ForwardPass: "forward", pipe.BackwardPass: "backward"}
_SENT: dict[Any, tuple[Any, int]] = {pipe.SendActivation: (pipe.RecvActivation, 1), pipe.SendGrad: (pipe.RecvGrad, -1)}
_Message = tuple[type, int, int, int]  # as what it is received, by which stage, phase, micro-batch
SCHEDULES: dict[str, type] = {"1f1b": pipe.TrainSchedule, "gpipe": GPipeSchedule, "dualpipev": pipe.DualPipeVSchedule}


def check(name: str, stages: int, micro_batches: int) -> None:
    """ConfigError where there is no such schedule, or none with these numbers."""
    if name not in SCHEDULES:
        hint = nearest(name, SCHEDULES)
        raise ConfigError(f"schedule={name}: no such pipeline schedule.{hint} There are {', '.join(SCHEDULES)}.")
    if stages < 1 or micro_batches < 1:
        raise ConfigError(f"stages={stages}, micro_batches={micro_batches}: a pipeline needs at least one of each.")
    if name == "dualpipev" and micro_batches < 2 * stages:
        raise ConfigError(
            f"schedule=dualpipev with {stages} stages and {micro_batches} micro-batches: it needs two micro-batches "
            f"for each stage. Use at least {2 * stages} micro-batches, or 1f1b."
        )


def ideal(name: str, stages: int, micro_batches: int, *, forward: float = 1.0, backward: float = 2.0) -> list[Event]:
    """When each pass runs if all stages are equal, messages take no time and a sender never waits.

    ``forward`` and ``backward`` are the time of one micro-batch in all that one rank holds: with DualPipeV two parts
    of half the size. It posts its messages after a pair of passes, so the first pass of the pair holds its message
    back: here as in DeepSpeed, though not in a drawing by dependencies alone.
    """
    check(name, stages, micro_batches)
    parts = 2 if name == "dualpipev" else 1
    cost: dict[Direction, float] = {"forward": forward / parts, "backward": backward / parts}
    arrived: dict[_Message, float] = {}
    walks = [_walk(SCHEDULES[name](micro_batches, stages, s), cost, arrived) for s in range(stages)]
    events: list[Event] = []
    while walks:
        known = len(arrived), len(events), len(walks)
        for walk in tuple(walks):  # each goes on until it waits for a message, or has finished
            for event in walk:
                if event is None:
                    break
                events.append(event)
            else:
                walks.remove(walk)
        assert (len(arrived), len(events), len(walks)) != known, f"{name} stands still"
    return sorted(events, key=lambda e: (e.start, e.stage))


def _walk(schedule: Any, cost: dict[Direction, float], arrived: dict[_Message, float]) -> Iterator[Event | None]:
    """The passes of one stage in their order; None whenever it waits for a message of another stage."""
    stage, now = schedule.stage_id, 0.0
    seen = Counter[tuple[type, int]]()
    for instruction in (i for step in schedule.steps() for i in step):
        what, phase = type(instruction), getattr(instruction, "phase", 0)
        micro_batch = seen[what, phase]  # the k-th instruction of a kind and phase belongs to the k-th
        seen[what, phase] += 1
        if what in PASSES:
            kind = PASSES[what]
            yield Event(stage, kind, micro_batch, now, now + cost[kind], phase)
            now += cost[kind]
        elif what in _SENT:
            received, way = _SENT[what]
            arrived[received, stage + (way if phase == 0 else -way), phase, micro_batch] = now
        elif what in (pipe.RecvActivation, pipe.RecvGrad):
            message = (what, stage, phase, micro_batch)
            while message not in arrived:
                yield None
            now = max(now, arrived[message])
