"""What a configuration needs on a machine and how fast it is, before any device is rented; no torch.

found = plan(compose(["model=bert_large", "machine=a100_80gb", "machine.nodes=4"]))
found.fits, found.left_gib, found.largest_micro, found.speed.step_seconds
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
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

LIMITS = {"device": "memory_gib", "host": "host_memory_gib", "nvme": "nvme_gib"}  # the machine's key for each place


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
    def count(self) -> int:
        """Parameters of the model."""
        return sum(self.parameters.values())

    @property
    def name(self) -> str:
        """The machine's; of the host at hand its device's."""
        return self.machine.name if self.machine.name != "this" else self.machine.device_name or "CPU"

    @property
    def needs(self) -> dict[str, tuple[float, float | None]]:
        """GiB of the device, the host and NVMe, where they are used, and their limits; None where one is not known."""
        every = ((place, getattr(self, f"{place}_gib"), getattr(self, f"{place}_limit_gib")) for place in LIMITS)
        return {place: (need, limit) for place, need, limit in every if need}

    @property
    def unknown_limits(self) -> tuple[str, ...]:
        """The machine's missing keys, without which nobody knows whether all fits."""
        return tuple(f"machine.{LIMITS[place]}" for place, (_, limit) in self.needs.items() if limit is None)

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
        device_hours = None if self.hours is None else self.hours * self.layout.ranks
        return found | {"device_hours": device_hours, "unknown_limits": self.unknown_limits}


def plan(config: RunConfig, *, world: int | None = None) -> Plan:
    """``world`` ranks, or all devices of the machine. Raises ConfigError and PlanError, a line for each problem."""
    machine, ranks, device = place(config, world)
    shape = model_shape(config)
    ds = ds_config.complete(config, world=ranks, device=device, vocab_size=shape.vocab_size)
    return plan_on(machine, config, ds, shape, ranks=ranks, device=device, largest=True)


def plan_on(
    machine: Machine, config: RunConfig, ds: Mapping[str, Any], shape: ModelShape, *, ranks: int, device: str,
    largest: bool = False,
) -> Plan:  # fmt: skip
    """The same of a completed ``ds`` and a known shape, on known devices. Raises PlanError.

    ``largest``: also the largest micro-batch, of those that divide a copy's share of the global batch.
    """
    layout = Layout.of(config, ds, world=ranks, device=device)
    if problem := next(_problems(config, shape, layout), None):
        raise PlanError(problem)
    stages = [memory_of(shape, layout, stage) for stage in range(layout.pipe)]
    worst = max(range(layout.pipe), key=lambda stage: stages[stage].peak)
    peak, on_node = stages[worst].peak, min(ranks, machine.devices_per_node)
    per_node = on_node / layout.pipe / GIB
    host, pinned = (per_node * sum(m.total("host", pinned=only) for m in stages) for only in (False, True))
    limit = machine.memory_gib
    if device == "cpu" and machine.host_memory_gib:  # its ranks share the host's memory
        limit = max(0.0, machine.host_memory_gib - host) / on_node
    speed = speed_of(shape, layout, machine, stages[worst], tf32=config.train.tf32)
    dtype = product_dtype(layout, machine, tf32=config.train.tf32)
    steps, seconds = config.train.steps if config.train.epochs is None else None, speed.step_seconds
    share = config.batch.global_size // (ranks // config.split)

    def fits(micro: int) -> bool:
        tried = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": micro})})
        steps = {"gradient_accumulation_steps": share // micro}
        return plan_on(machine, tried, {**ds, **steps}, shape, ranks=ranks, device=device).fits is not False

    micros = divisors(share)[::-1] if largest and limit is not None else []
    return Plan(
        machine=machine.model_copy(update={"memory_gib": limit}), parameters=shape.by_part(), layout=layout,
        pipe_stage=worst, memory=stages[worst],
        device_gib=peak / GIB if device == "cpu" else peak * (1 + assumptions.SLACK) / GIB + assumptions.CONTEXT_GIB,
        device_limit_gib=limit, host_gib=host, pinned_gib=pinned, host_limit_gib=machine.host_memory_gib,
        nvme_gib=per_node * sum(m.total("nvme") for m in stages), nvme_limit_gib=machine.nvme_gib,
        largest_micro=next(filter(fits, micros), None), speed=speed,
        hours=steps * seconds / 3600 if steps and seconds else None,
        assumptions=tuple(assumptions.told(machine, device, dtype)),
    )  # fmt: skip


def place(config: RunConfig, world: int | None) -> tuple[Machine, int, str]:
    """The machine, the ranks to plan for, and DeepSpeed's word for its devices. Raises PlanError."""
    machine = _here(config)
    ranks = world or machine.nodes * machine.devices_per_node
    if machine.name == "this" and machine.device == "cpu":  # a CPU has as many as are started
        machine = machine.model_copy(update={"devices_per_node": -(-ranks // machine.nodes)})
    if ranks > machine.nodes * machine.devices_per_node:
        raise PlanError(
            f"--world {ranks}: machine={machine.name} with machine.nodes={machine.nodes} x {machine.devices_per_node} "
            "devices has fewer. Add machine.nodes, or leave --world out."
        )
    return machines.calibrated(machine, _given(config)), ranks, "cpu" if machine.device == "cpu" else "cuda"


def place_of_job(config: RunConfig, *, world: int, per_node: int, device: str) -> Machine:
    """The machine as a job that has been started takes it: its ranks, on its nodes, on the device that they use."""
    machine = _here(config)
    if device == "cpu" and machine.device != "cpu":  # there are GPUs, or one is named for its peak: not what is used
        machine = Machine(device="cpu", host_memory_gib=machines.here().host_memory_gib)
    machine = machine.model_copy(update={"nodes": -(-world // per_node), "devices_per_node": per_node})
    return machines.calibrated(machine, _given(config))


def _here(config: RunConfig) -> Machine:
    """machine=this is what is at hand, but for the keys that are given; who names a device means a GPU."""
    if config.machine.name != "this":
        return config.machine
    named = {"device": config.machine.device} if config.machine.device_name else {}
    return machines.here().model_copy(update=named | _given(config))


def _given(config: RunConfig) -> dict[str, Any]:
    return config.machine.model_dump(exclude_defaults=True)


def _problems(config: RunConfig, shape: ModelShape, layout: Layout) -> Iterator[str]:
    length, stages, tensor = config.data.max_length, layout.pipe, layout.tensor
    if length > shape.positions:
        yield f"data.max_length={length}: the model has only {shape.positions} positions. Lower it."
    if shape.heads % tensor:
        yield f"deepspeed.tensor_parallel.autotp_size={tensor}: does not divide the {shape.heads} heads. Lower it."
    if stages > 1 and layout.schedule == "dualpipev":
        yield "pipeline.schedule=dualpipev: there is no plan for it yet. Use 1f1b or gpipe."
    if stages > 1 and shape.type != "bert":
        yield f"pipeline.stages={stages}: only a BERT is cut into stages. Use pipeline=none."


@cache
def divisors(number: int) -> list[int]:
    """All of them, smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]
