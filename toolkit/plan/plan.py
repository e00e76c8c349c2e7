"""What a configuration needs on a machine and how fast it is, before any device is rented; no torch.

found = plan(compose(["model=bert_large", "machine=a100_80gb", "machine.nodes=4"]))
found.fits, found.left_gib, found.largest_micro, found.speed.step_seconds
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import isqrt
from typing import Any

from toolkit.config.schema import Machine, RunConfig
from toolkit.config.units import GIB
from toolkit.deepspeed import ds_config
from toolkit.errors import PlanError
from toolkit.plan import assumptions, machines
from toolkit.plan.layout import Layout
from toolkit.plan.memory import MOMENTS, Memory, memory_of
from toolkit.plan.shapes import ModelShape, model_shape
from toolkit.plan.speed import Speed, product_dtype, speed_of


@dataclass(frozen=True)
class Plan:
    """``memory`` is that of the pipe stage with most; ``None`` is what the machine's sheet does not tell."""

    machine: Machine
    parameters: Mapping[str, int]  # by part of the model
    layout: Layout
    pipe_stage: int
    memory: Memory
    device_gib: float  # with the allocator's slack and the GPU's context
    device_limit_gib: float | None
    host_gib: float  # of a node
    pinned_gib: float  # of it
    host_limit_gib: float | None
    nvme_gib: float  # of a node
    nvme_limit_gib: float | None
    largest_micro: int | None  # within the known limits; None: not even one sample, no limit of a device, not asked
    speed: Speed
    hours: float | None  # None: no time is known, or the run ends by epochs
    assumptions: tuple[str, ...]

    @property
    def left_gib(self) -> float | None:
        return None if self.device_limit_gib is None else self.device_limit_gib - self.device_gib

    @property
    def needs(self) -> dict[str, tuple[float, float | None]]:
        """GiB by the machine's key that limits it, and that limit; None where it is not known."""
        every = {
            "memory_gib": (self.device_gib, self.device_limit_gib),
            "host_memory_gib": (self.host_gib, self.host_limit_gib),
            "nvme_gib": (self.nvme_gib, self.nvme_limit_gib),
        }
        return {key: (need, limit) for key, (need, limit) in every.items() if need}

    @property
    def unknown_limits(self) -> tuple[str, ...]:
        """The machine's missing keys, without which nobody knows whether all fits."""
        return tuple(f"machine.{key}" for key, (_, limit) in self.needs.items() if limit is None)

    @property
    def fits(self) -> bool | None:
        """None where a limit is not known and no known one is broken."""
        if any(limit is not None and need > limit for need, limit in self.needs.values()):
            return False
        return None if self.unknown_limits else True

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values, derived ones too."""
        found = asdict(self) | {"machine": self.machine.model_dump(mode="json", exclude_none=True)}
        found |= {"fits": self.fits, "left_gib": self.left_gib, "moment": MOMENTS[self.memory.moment]}
        rates = ("step_seconds", "samples_per_second", "tokens_per_second", "mfu")
        found["speed"] |= {name: getattr(self.speed, name) for name in rates}
        device_hours = None if self.hours is None else self.hours * self.layout.ranks
        return found | {"device_hours": device_hours, "unknown_limits": self.unknown_limits}


def plan(config: RunConfig, *, world: int | None = None) -> Plan:
    """``world`` ranks, or all devices of the machine. Raises ConfigError and PlanError, a line for each problem."""
    machine, ranks, device = place(config, world)
    shape = model_shape(config)
    ds = ds_config.complete(config, world=ranks, device=device, vocab_size=shape.vocab_size)
    return plan_for(machine, config, ds, shape, ranks=ranks, device=device)


def plan_for(
    machine: Machine, config: RunConfig, ds: Mapping[str, Any], shape: ModelShape, *, ranks: int, device: str
) -> Plan:
    """The same of a completed ``ds`` and a known shape, on known devices. Raises PlanError."""
    found = plan_on(machine, config, ds, shape, ranks=ranks, device=device)
    return replace(found, largest_micro=_largest_micro(machine, config, ds, shape, ranks=ranks, device=device))


def plan_on(
    machine: Machine, config: RunConfig, ds: Mapping[str, Any], shape: ModelShape, *, ranks: int, device: str
) -> Plan:
    """The same of a completed ``ds``, but for the largest micro-batch. Raises PlanError."""
    layout = Layout.of(config, ds, world=ranks, device=device)
    _refuse(config, shape, layout)
    stages = [memory_of(shape, layout, stage) for stage in range(layout.pipe)]
    worst = max(range(layout.pipe), key=lambda stage: stages[stage].peak)
    per_node = min(ranks, machine.devices_per_node) / layout.pipe / GIB
    host, pinned = (per_node * sum(m.total("host", pinned=only) for m in stages) for only in (False, True))
    if device == "cpu" and machine.host_memory_gib:  # its ranks share the host's memory
        left = max(0.0, machine.host_memory_gib - host) / min(ranks, machine.devices_per_node)
        machine = machine.model_copy(update={"memory_gib": left})
    speed = speed_of(shape, layout, machine, stages[worst], tf32=config.train.tf32)
    dtype = product_dtype(layout, machine, tf32=config.train.tf32)
    steps, seconds = config.train.steps if config.train.epochs is None else None, speed.step_seconds
    return Plan(
        machine=machine, parameters=shape.by_part(), layout=layout, pipe_stage=worst, memory=stages[worst],
        device_gib=_device_gib(stages[worst], layout), device_limit_gib=machine.memory_gib,
        host_gib=host, pinned_gib=pinned, host_limit_gib=machine.host_memory_gib,
        nvme_gib=per_node * sum(m.total("nvme") for m in stages), nvme_limit_gib=machine.nvme_gib,
        largest_micro=None, speed=speed, hours=steps * seconds / 3600 if steps and seconds else None,
        assumptions=tuple(assumptions.told(machine, device, dtype)),
    )  # fmt: skip


def place(config: RunConfig, world: int | None) -> tuple[Machine, int, str]:
    """The machine, the ranks to plan for, and DeepSpeed's word for its devices. Raises PlanError."""
    machine = _here(config.machine)
    ranks = world or machine.nodes * machine.devices_per_node
    if machine.name == "this" and machine.device == "cpu":  # a CPU has as many as are started
        machine = machine.model_copy(update={"devices_per_node": -(-ranks // machine.nodes)})
    if ranks > machine.nodes * machine.devices_per_node:
        raise PlanError(f"--world {ranks}: {_told(machine)} has fewer. Add machine.nodes, or leave --world out.")
    machine = _with_rates(machine, config.machine)
    return machine, ranks, "cpu" if machine.device == "cpu" else "cuda"


def place_of_job(config: RunConfig, *, world: int, per_node: int, device: str) -> Machine:
    """The machine as a job that has been started takes it: its ranks, on its nodes, on the device that they use."""
    machine = _here(config.machine)
    if device == "cpu" and machine.device != "cpu":  # there are GPUs, or one is named for its peak: not what is used
        machine = Machine(device="cpu", host_memory_gib=machines.here().host_memory_gib)
    machine = machine.model_copy(update={"nodes": -(-world // per_node), "devices_per_node": per_node})
    return _with_rates(machine, config.machine)


def _here(machine: Machine) -> Machine:
    """machine=this is what is at hand, but for the keys that are given; who names a device means a GPU."""
    if machine.name != "this":
        return machine
    named = {"device": machine.device} if machine.device_name else {}
    return machines.here().model_copy(update=named | _given(machine))


def _with_rates(machine: Machine, chosen: Machine) -> Machine:
    """With those that were measured on this host, but for the keys that are given."""
    measurable = machine.name == "this" and not machine.measured
    return machines.calibrated(machine, _given(chosen)) if measurable else machine


def _given(machine: Machine) -> dict[str, Any]:
    return {key: getattr(machine, key) for key in machine.model_dump(exclude_defaults=True)}


def _told(machine: Machine) -> str:
    return f"machine={machine.name} with machine.nodes={machine.nodes} x {machine.devices_per_node} devices"


def _refuse(config: RunConfig, shape: ModelShape, layout: Layout) -> None:
    if config.data.max_length > shape.positions:
        raise PlanError(
            f"data.max_length={config.data.max_length}: the model has only {shape.positions} positions. Lower it."
        )
    if shape.heads % layout.tensor:
        raise PlanError(
            f"deepspeed.tensor_parallel.autotp_size={layout.tensor}: does not divide the {shape.heads} heads. Lower it."
        )
    if layout.pipe > 1 and layout.schedule == "dualpipev":
        raise PlanError("pipeline.schedule=dualpipev: there is no plan for it yet. Use 1f1b or gpipe.")
    if layout.pipe > 1 and shape.type != "bert":
        raise PlanError(f"pipeline.stages={layout.pipe}: only a BERT is cut into stages. Use pipeline=none.")


def _device_gib(memory: Memory, layout: Layout) -> float:
    if layout.device == "cpu":
        return memory.peak / GIB
    return memory.peak * (1 + assumptions.SLACK) / GIB + assumptions.CONTEXT_GIB


def _largest_micro(
    machine: Machine, config: RunConfig, ds: Mapping[str, Any], shape: ModelShape, *, ranks: int, device: str
) -> int | None:
    """The largest micro-batch within every known limit, of those that divide a copy's share of the global batch."""
    share = config.batch.global_size // (ranks // config.split)
    for micro in reversed(divisors(share)):
        tried = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": micro})})
        steps = {"gradient_accumulation_steps": share // micro}
        found = plan_on(machine, tried, {**ds, **steps}, shape, ranks=ranks, device=device)
        if found.device_limit_gib is None:
            return None
        if found.fits is not False:
            return micro
    return None


@cache
def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
