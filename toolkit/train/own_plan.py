"""A run's own plan: told and judged before the model takes memory, and set beside what was measured; plan.json.

plan = begin(run, task)                                # PlanError on every rank if it cannot fit
finish(run, plan, meter.peak_gib, meter.overall())     # at the end of fit
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from rich.table import Table

from toolkit.config.kinds import KINDS
from toolkit.config.units import GIB
from toolkit.deepspeed import ds_config
from toolkit.errors import ConfigError, PlanError
from toolkit.job import nvme, ranks
from toolkit.models.build import parameters
from toolkit.plan.machines import way_out
from toolkit.plan.memory import MOMENTS
from toolkit.plan.plan import Plan, place_of_job, plan_on
from toolkit.plan.shapes import model_shape
from toolkit.plan.speed import RATES
from toolkit.run.directory import Run
from toolkit.run.table import table
from toolkit.tasks.task import Task

SHORTEST = 8  # tokens of a sequence
Numbers = Mapping[str, float | None]
_TRAININGS = count()  # of this process, before


@dataclass(frozen=True)
class OwnPlan:
    """What a run begins from."""

    ds: dict[str, Any]  # exactly what DeepSpeed gets
    plan: Plan | None  # on rank 0, where there can be one
    resident_gib: float | None  # of this process before the model, where its peak was then forgotten


def begin(run: Run, task: Task) -> OwnPlan:
    """Complete the DeepSpeed config, tell the plan in one line, write plan.json, take the folders on NVMe.

    What has no plan yet (other models, DualPipeV) runs without one; the log says why. Raises ConfigError and, before
    any memory is taken, PlanError where the run cannot fit: on every rank.
    """
    device, world, own_gib = ranks.device(), ranks.world(), 0.0
    ds = ds_config.complete(run.config, world=world, device=device, vocab_size=task.vocab_size, run_dir=run.dir)
    if device == "cuda":  # of this rank's GPU, by its driver: sheets round up
        import torch

        own_gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    per_node, less = ranks.largest([ranks.local_size(), -own_gib])
    plan = ranks.agreed(lambda: _judge(run, ds, task.steps, int(per_node), -less) if ranks.rank() == 0 else None)
    nvme.claim(ds, lambda: parameters(task))
    return OwnPlan(ds, plan, _forget_peak())


def finish(run: Run, own: OwnPlan, peak_gib: float, rates: Numbers) -> None:
    """Show planned and measured numbers and write both to plan.json. All ranks must call it.

    ``peak_gib`` is that of this rank's device, or of its process on a CPU, and 0 where no step was made.
    """
    grown = peak_gib - own.resident_gib if peak_gib and own.resident_gib is not None else -1.0
    (peak,) = ranks.largest([grown])
    if own.plan is None or not peak_gib:
        return
    measured = {"peak_gib": peak if peak > 0 else None} | {name: rates.get(name) for name in RATES}
    _write(run, own.plan, measured)
    run.console.print(_table(own.plan.layout.device, planned(own.plan), measured))


def beside(run: Path) -> Table:
    """The same of a run directory's plan.json. Raises ConfigError."""
    try:
        found = json.loads((run / "plan.json").read_text())
        return _table(found["layout"]["device"], found["planned"], found["measured"] or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run}/plan.json: no plan of a run ({error}). Name one that has.") from error


def _judge(run: Run, ds: Mapping[str, Any], steps: int, per_node: int, device_gib: float) -> Plan | None:
    """``device_gib`` is that of the smallest GPU, 0 on a CPU."""
    device, world, chosen = ranks.device(), ranks.world(), run.config.machine

    def plan(length: int) -> Plan:
        """Of the very model, as model/ describes it: the vocabulary and the labels are known by now."""
        model = run.config.model.model_copy(update={"weights": str(run.dir / "model")})
        data = run.config.data.model_copy(update={"max_length": length})
        config = run.config.model_copy(update={"model": model, "data": data})
        machine = place_of_job(config, world=world, per_node=per_node, device=device)
        if device_gib and (chosen.name != "this" or not chosen.memory_gib):
            machine = machine.model_copy(update={"memory_gib": device_gib})
        return plan_on(machine, config, ds, model_shape(config), ranks=world, device=device, largest=True)

    try:
        found = plan(run.config.data.max_length)
        seconds = found.speed.step_seconds
        found = replace(found, hours=seconds * steps / 3600 if seconds and steps else None)
    except (ConfigError, PlanError) as error:
        logging.getLogger(__name__).warning("There is no plan of this run: %s", error)
        return None
    _write(run, found, _measured_before(run.dir / "plan.json"))
    # Other tasks pad a batch to its longest sequence, which may be short.
    filled = found.fits is not False or "full" in KINDS[run.config.task.kind].can
    if run.config.plan.enforce and not _may_fit(found if filled else plan(SHORTEST)):
        raise PlanError(refusal(found))
    run.console.print(line(found), highlight=False)
    return found


def _may_fit(plan: Plan) -> bool:
    """On a CPU buffers take no memory until they are written, and larger ones than the model never are."""
    if plan.fits is not False or plan.layout.device != "cpu":
        return plan.fits is not False
    written = max(sum(p.bytes for p in plan.memory.at(m) if p.group != "buffers") for m in MOMENTS)
    return written / GIB <= (plan.device_limit_gib or 0)


def _write(run: Run, plan: Plan, measured: Numbers | None) -> None:
    run.write_json("plan.json", plan.as_json() | {"planned": planned(plan), "measured": measured})


def _measured_before(path: Path) -> Any:
    """By the start before this one, which may have been the last to train."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found.get("measured") if isinstance(found, dict) else None
    return None


def planned(plan: Plan) -> dict[str, float | None]:
    """What can be measured: GiB of tensors at the peak (those offloaded are in the same memory on a CPU), and rates."""
    held = plan.memory.peak + (plan.memory.total("host") if plan.layout.device == "cpu" else 0)
    return {"peak_gib": held / GIB} | plan.speed.rates


def _forget_peak() -> float | None:
    """From now on the peak of the device's tensors is the model's. Returns the GiB that do not count: on a CPU what
    the process holds now; None where its peak cannot be forgotten, or it has memory to spare of a training before."""
    if ranks.device() == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return 0.0
    import psutil

    with suppress(OSError):
        if next(_TRAININGS):
            return None
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is resident now (man 5 proc)
        return psutil.Process().memory_info().rss / GIB
    return None


def line(plan: Plan) -> str:
    """``plan: 2.31 of 80 GiB a device (activations 1.2), largest micro-batch 64; 0.214 s a step, …``"""
    device = "rank" if plan.layout.device == "cpu" else "device"
    names = {"device": f"a {device} (activations {_held(plan, 'activations')})", "host": "of host", "nvme": "of NVMe"}
    limits = {place: "" if limit is None else f" of {_gib(limit)}" for place, (_, limit) in plan.needs.items()}
    memory = [f"{_gib(need)}{limits[place]} GiB {names[place]}" for place, (need, _) in plan.needs.items()]
    memory += [f"does not fit at {plan.layout.length} tokens a sequence"] if plan.fits is False else []
    memory += [f"whether it fits is unknown without {', '.join(plan.unknown_limits)}"] if plan.fits is None else []
    memory += [f"largest micro-batch {plan.largest_micro}"] if plan.largest_micro else []
    speed, told = plan.speed, f"plan: {', '.join(memory)}; "
    if speed.step_seconds is None:
        what = ", ".join(speed.unknown).replace("machine.", "")
        return f"{told}times are unknown without the machine's {what}.{way_out(plan.machine, speed.unknown)}"
    told += f"{speed.step_seconds:.3g} s a step, {speed.tokens_per_second:,.0f} tokens/s, MFU {speed.mfu:.0%}"
    return told if plan.hours is None else f"{told}, {plan.hours:,.1f} h"


def refusal(plan: Plan) -> str:
    """What is too small for what, and the ways out, in one line."""
    layout, (group, _) = plan.layout, max(plan.memory.groups.items(), key=lambda held: held[1])
    told = f" at batch.micro_size={layout.micro} and length {layout.length} ({group} {_held(plan, group)} of it)"
    names = {"device": "a rank" if layout.device == "cpu" else "a device", "host": "the host", "nvme": "NVMe"}
    small = [
        f"{names[place]} needs {_gib(need)} GiB{told if place == 'device' else ''} and has {_gib(limit)}"
        for place, (need, limit) in plan.needs.items()
        if limit is not None and need > limit
    ]
    *others, last = _ways(plan, group)
    ways = f"{', '.join(others)} or {last}" if others else last
    return (
        f"machine={plan.machine.name}: the plan does not fit: {'; '.join(small)}. Use {ways}; "
        "`toolkit plan … --search` lists what fits, plan.enforce=false tries it anyway."
    )


def _ways(plan: Plan, group: str) -> list[str]:
    """Those that are legal and make ``group``, the largest, smaller."""
    layout, cpu = plan.layout, plan.layout.device == "cpu"
    if plan.device_limit_gib is None or plan.device_gib <= plan.device_limit_gib:
        return ["less offload", "more nodes"]
    states = group in ("weights", "gradients", "optimizer")
    ways = {
        f"batch.micro_size={plan.largest_micro} (the largest that fits)": plan.largest_micro is not None,
        "activation=recompute": group == "activations" and not layout.recompute,
        "a smaller deepspeed.zero_optimization.reduce_bucket_size": group == "buffers",
        "a higher ZeRO stage": states and layout.data > 1 and layout.stage < (1 if layout.pipe > 1 else 3),
        "offload=cpu": states and layout.offload == "none" and not cpu,
        "fewer ranks on a host": cpu and layout.ranks > 1,
        "more devices": not cpu,
    }
    return [way for way, helps in ways.items() if helps] or ["a host with more memory"]


def _held(plan: Plan, group: str) -> str:
    return _gib(plan.memory.groups.get(group, 0) / GIB)


def _gib(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _table(device: str, planned: Numbers, measured: Numbers) -> Table:
    """A row for each number that was planned or measured."""
    cpu = device == "cpu"
    names = {
        "peak_gib": "GiB of a rank, measured as growth of its process" if cpu else "GiB of tensors on a device",
        "step_seconds": "seconds of a step",
        "tokens_per_second": "tokens/s (all ranks)",
        "mfu": "MFU",
    }
    form = {"tokens_per_second": ",.0f", "mfu": ".1%"}
    rows = []
    for key, name in names.items():
        numbers = [known.get(key) for known in (planned, measured)]
        if any(n is not None for n in numbers):
            rows.append((name, *(None if n is None else format(n, form.get(key, ".3g")) for n in numbers)))
    return table({"": "", "planned": ">", "measured": ">"}, rows, "Plan")
