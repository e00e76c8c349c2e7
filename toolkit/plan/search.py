"""Every legal layout of a configuration on a machine, fastest first: `toolkit plan … --search`; no torch.

found = search(["model=bert_large", "machine=a100_80gb", "machine.nodes=4"])
found.fitting[0].overrides, found.fitting[0].plan.speed.samples_per_second
"""

import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from math import inf
from typing import Any

from toolkit.config.compose import changed, compose, options
from toolkit.config.overrides import values
from toolkit.config.schema import Machine, RunConfig, conf_dir
from toolkit.config.units import GIB
from toolkit.deepspeed import ds_config
from toolkit.deepspeed.facts import BATCH_KEYS
from toolkit.errors import PlanError
from toolkit.plan.plan import Plan, divisors, place, plan_on
from toolkit.plan.shapes import ModelShape, model_shape

MICRO = "batch.micro_size"
ZERO = "deepspeed.zero_optimization"
# What is searched, and the keys (or what they are part of) that fix it when they are given
AXES = {
    "zero": ("zero", f"{ZERO}.stage"),
    "offload": ("offload", f"{ZERO}.offload_optimizer.device", f"{ZERO}.offload_param.device"),
    "activation": ("activation.recompute", "activation.offload"),
    "pipeline": ("pipeline.stages",),
    "parallel": ("parallel", "deepspeed.tensor_parallel.autotp_size"),
    MICRO: (MICRO,),
}
GROUPS = ("weights", "gradients", "optimizer", "buffers", "activations", "workspace")
LAYOUT = ("stage", "offload", "offload_params", "recompute", "offload_activations", "pipe", "tensor", "data", "micro",
          "accumulation")  # fmt: skip
RATES = ("samples_per_second", "tokens_per_second", "step_seconds", "mfu")
MICRO_RULES = {"batch_split", "batch_twice", "dualpipev_micro_batches"}  # that another micro-batch may keep


@dataclass(frozen=True)
class Candidate:
    """``overrides`` are typed after those that were given."""

    overrides: tuple[str, ...]
    plan: Plan

    @property
    def rank(self) -> tuple[float, float, int]:
        """Fastest first, unknown speed last; of equally fast ones what holds least, then what is typed sooner."""
        return -round(self.plan.speed.samples_per_second or 0, 3), self.plan.device_gib, len(self.overrides)

    @property
    def over(self) -> tuple[str, float]:
        """The place (device, host, nvme) that lacks most and how many GiB; below 0, what is left there."""
        known = [(place, need - limit) for place, (need, limit) in self.plan.needs.items() if limit is not None]
        return max(known, key=lambda found: found[1], default=("device", -inf))

    def as_row(self) -> dict[str, Any]:
        """Flat: what is typed, the layout, rates, GiB of a device by part and of a node's host and NVMe."""
        plan, (place, over) = self.plan, self.over
        place = place if over > 0 else "device"
        parts = plan.memory.at_peak if place == "device" else [p for p in plan.memory.parts if p.place == place]
        groups = {f"{group}_gib": plan.memory.groups.get(group, 0) / GIB for group in GROUPS}
        return {
            "overrides": shlex.join(self.overrides), "fits": plan.fits,
            **{name: getattr(plan.layout, name) for name in LAYOUT},
            **{name: getattr(plan.speed, name) for name in RATES},
            "hours": plan.hours, "unknown": " ".join(plan.speed.unknown),
            "device_gib": plan.device_gib, "left_gib": plan.left_gib, "host_gib": plan.host_gib,
            "nvme_gib": plan.nvme_gib, "over_gib": max(0.0, over), "over_of": place if over > 0 else None,
            "largest_part": max(parts, key=lambda part: part.bytes).name if parts else None,
            **groups, "context_gib": plan.device_gib - sum(groups.values()),
        }  # fmt: skip


@dataclass(frozen=True)
class Search:
    """``refused``: how many layouts each rule, in the words of its message, made illegal."""

    given: tuple[str, ...]  # with --world, where it was
    fitting: tuple[Candidate, ...]  # fastest first
    unsure: tuple[Candidate, ...]  # likewise: within the known limits, but the machine does not say all of them
    too_large: tuple[Candidate, ...]  # likewise, of equally fast ones what lacks least; where nothing fits only that
    refused: Mapping[str, int]

    @property
    def every(self) -> tuple[Candidate, ...]:
        return self.fitting + self.unsure + self.too_large

    @property
    def unknown(self) -> tuple[str, ...]:
        """The machine's missing keys, without which some candidates have no speed."""
        return tuple(dict.fromkeys(key for c in self.every for key in c.plan.speed.unknown))

    @property
    def unknown_limits(self) -> tuple[str, ...]:
        """Likewise, without which nobody knows whether they fit."""
        return tuple(dict.fromkeys(key for c in self.every for key in c.plan.unknown_limits))


def search(overrides: list[str], *, world: int | None = None) -> Search:
    """What ``overrides`` leave open is searched. Raises ConfigError and PlanError, the latter if nothing is legal."""
    base = compose(overrides)
    machine, ranks, device = place(base, world)
    plans = partial(_plans, machine=machine, shape=model_shape(base), ranks=ranks, device=device)
    keys = values(overrides)
    fixed = {axis for axis, own in AXES.items() for k in keys if any(o == k or o.startswith(f"{k}.") for o in own)}
    refused: Counter[str] = Counter()
    found = []
    for typed, config in _layouts(overrides, base, fixed, ranks):
        micros = [config.batch.micro_size] if MICRO in fixed else _micros(config, ranks)
        try:
            for plan in plans(config, micros, refused):
                micro = () if MICRO in fixed else (f"{MICRO}={plan.layout.micro}",)
                found.append(Candidate((*typed, *micro), plan))
        except PlanError as error:
            refused[str(error)] += 1
    if not found:
        raise PlanError(refused.most_common(1)[0][0])
    found.sort(key=lambda c: c.rank)
    fitting, unsure, large = (tuple(c for c in found if c.plan.fits is verdict) for verdict in (True, None, False))
    large = tuple(sorted(large, key=lambda c: (c.rank[0] if fitting or unsure else 0, c.over[1])))
    given = (*overrides, *(["--world", str(world)] if world else []))
    return Search(given, fitting, unsure, large, refused)


def _layouts(
    overrides: list[str], base: RunConfig, fixed: set[str], ranks: int
) -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """(what is typed for it, configuration) of each layout, legal or not, with the micro-batch still to be chosen."""

    def typed_for(group: str) -> list[tuple[str, ...]]:
        files = sorted((conf_dir() / group).glob("*.yaml"))
        return [()] if group in fixed else [(f"{group}={file.stem}",) for file in files]

    zeros, offloads, activations = map(typed_for, ("zero", "offload", "activation"))
    kept = {a: (compose([*overrides, *a]) if a else base).activation for a in activations}
    tensors: dict[tuple[str, ...], dict[str, Any]] = {(): {}}  # what it changes in the DeepSpeed config
    if "parallel" not in fixed:
        preset = compose([*overrides, "parallel=tensor"]).deepspeed["tensor_parallel"]
        tensors = {("parallel=none",): {}}
        for size in divisors(ranks)[1:]:
            more = [f"deepspeed.tensor_parallel.autotp_size={size}"] * (size != preset["autotp_size"])
            tensors[("parallel=tensor", *more)] = {"tensor_parallel": preset | {"autotp_size": size}}
    whole = next(iter(tensors))
    stages = [base.pipeline.stages] if "pipeline" in fixed else divisors(ranks)
    usual = {f"{group}={option}" for group, option in options(overrides).items() if group != "zero"}
    usual.add(f"pipeline.stages={base.pipeline.stages}")
    # Composing is slow: each option once, not each pair
    by_zero = {zero: compose([*overrides, *zero, *offloads[0], *whole]) for zero in zeros}
    first = by_zero[zeros[0]].deepspeed
    by_offload = {o: compose([*overrides, *zeros[0], *o, *whole]).deepspeed for o in offloads[1:]}
    for (zero, composed), offload in product(by_zero.items(), offloads):
        ds = changed(composed.deepspeed, first, by_offload.get(offload, first))
        for activation, count, (tensor, block) in product(activations, stages, tensors.items()):
            pipeline = base.pipeline.model_copy(update={"stages": count})
            update = {"deepspeed": ds | block, "activation": kept[activation], "pipeline": pipeline}
            typed = (*zero, *offload, *activation, f"pipeline.stages={count}", *tensor)
            yield tuple(o for o in typed if o not in usual), composed.model_copy(update=update)


def _plans(
    config: RunConfig, micros: list[int], refused: Counter[str], *, machine: Machine, shape: ModelShape, ranks: int,
    device: str,
) -> Iterator[Plan]:  # fmt: skip
    """Of the legal ones of these micro-batches, largest first, the largest that fits and the powers of two.

    Raises PlanError.
    """
    legal: dict[int, tuple[RunConfig, dict[str, Any]]] = {}  # with its configuration, completed
    ds: dict[str, Any] = {}
    given = any(key in config.deepspeed for key in BATCH_KEYS)
    for micro in micros:
        tried = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": micro})})
        if not ds or given:  # all rules are asked until one is legal
            completed = ds_config.examine(tried, world=ranks, device=device, vocab_size=shape.vocab_size)
            refused.update([*dict.fromkeys(problem.text for problem in completed.problems)])
            if {problem.rule for problem in completed.problems} - MICRO_RULES:
                break
            if completed.problems:
                continue
            ds = completed.ds
        legal[micro] = tried, ds | ds_config.batch_sizes(tried, ranks // config.split)

    @cache
    def planned(micro: int) -> Plan:
        return plan_on(machine, *legal[micro], shape, ranks=ranks, device=device)

    def fits(micro: int) -> bool:
        return planned(micro).fits is not False

    found = list(legal)
    # Memory grows with the micro-batch, but for the largest: with one a step no gradients wait for the next
    best = 0 if found and fits(found[0]) else bisect_left(found, True, lo=1, key=fits)
    for at, micro in enumerate(found):
        if at == best or len(micros) == 1 or micro & (micro - 1) == 0:
            yield planned(micro)


def _micros(config: RunConfig, ranks: int) -> list[int]:
    """All that divide a copy's share of the global batch, largest first; 1 where it has none, for a rule to refuse."""
    share, rest = divmod(config.batch.global_size, max(1, ranks // config.split))
    return [1] if rest or not share else divisors(share)[::-1]
