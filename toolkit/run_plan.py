"""A run's own plan: told and judged before the model takes memory, and set beside what was measured; plan.json.

begin(run)                                             # in build_model: PlanError on every rank if it cannot fit
finish(run, meter.peak_gib, meter.overall())           # at the end of fit
"""

import ctypes
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from toolkit import ranks
from toolkit.errors import ConfigError, PlanError
from toolkit.plan.plan import GIB, Plan, place_of_job, plan_for
from toolkit.plan.shapes import model_shape
from toolkit.run import Run

SHORTEST = 8  # tokens of a sequence
RATES = ("step_seconds", "samples_per_second", "tokens_per_second", "mfu")
Numbers = Mapping[str, float | None]


def begin(run: Run) -> None:
    """Tell the plan in one line and write plan.json. Raises PlanError on every rank where the run cannot fit.

    What has no plan yet (other models, DualPipeV) runs without one; the log says why.
    """
    per_node = int(ranks.largest([ranks.local_size()])[0])
    ranks.agreed(lambda: _judge(run, per_node) if ranks.rank() == 0 else None)
    run.resident_gib = _forget_peak()


def finish(run: Run, peak_gib: float, rates: Numbers) -> None:
    """Show planned and measured numbers and write both to plan.json. All ranks must call it.

    ``peak_gib`` is that of this rank's device, or of its process on a CPU, and 0 where no step was made.
    """
    grown = peak_gib - (run.resident_gib or 0) if peak_gib and run.resident_gib is not None else -1.0
    (peak,) = ranks.largest([grown])
    if run.plan is None or not peak_gib:
        return
    measured = {"peak_gib": peak if peak > 0 else None} | {name: rates.get(name) for name in RATES}
    _write(run, run.plan, measured)
    run.console.print(_table(run.plan, measured))


def _judge(run: Run, per_node: int) -> None:
    try:
        found = _plan(run, per_node)
    except (ConfigError, PlanError) as error:
        logging.getLogger(__name__).warning("There is no plan of this run: %s", error)
        return
    run.plan = found
    _write(run, found, _measured_before(run.dir / "plan.json"))
    if run.config.plan.enforce and not _may_fit(run, per_node, found):
        raise PlanError(refusal(found))
    run.console.print(line(found), highlight=False)


def _may_fit(run: Run, per_node: int, found: Plan) -> bool:
    """Only pretraining fills every sequence; the other tasks pad a batch to its longest, which may be short."""
    if found.fits is not False or run.config.task.kind == "pretrain":
        return found.fits is not False
    return _plan(run, per_node, length=SHORTEST).fits is not False


def _plan(run: Run, per_node: int, length: int | None = None) -> Plan:
    """Of the very model, as model/ describes it: the vocabulary and the labels are known by now."""
    device, world = ranks.device(), ranks.world()
    model = run.config.model.model_copy(update={"weights": str(run.dir / "model")})
    data = run.config.data.model_copy(update={"max_length": length or run.config.data.max_length})
    config = run.config.model_copy(update={"model": model, "data": data})
    shape = model_shape(config)
    machine = place_of_job(config, world=world, per_node=per_node, device=device)
    found = plan_for(machine, config, shape, ranks=world, device=device)
    seconds = found.speed.step_seconds
    return replace(found, hours=seconds * run.steps / 3600 if seconds and run.steps else None)


def _write(run: Run, plan: Plan, measured: Numbers | None) -> None:
    run.write_json("plan.json", plan.as_json() | {"planned": planned(plan), "measured": measured})


def _measured_before(path: Path) -> Any:
    """By the start before this one, which may have been the last to train."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())["measured"]
    return None


def planned(plan: Plan) -> dict[str, float | None]:
    """What can be measured: GiB of tensors at the peak (those offloaded are in the same memory on a CPU), and rates."""
    held = plan.memory.peak + (plan.memory.total("host") if plan.layout.device == "cpu" else 0)
    return {"peak_gib": held / GIB} | {name: getattr(plan.speed, name) for name in RATES}


def _forget_peak() -> float | None:
    """From now on the peak of the device's tensors is the model's. Returns the GiB that do not count: on a CPU what
    the process holds now; None where its peak cannot be forgotten."""
    if ranks.device() == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return 0.0
    import psutil

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc gives back what the training before had: it would not grow again
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is resident now (man 5 proc)
        return psutil.Process().memory_info().rss / GIB
    return None


def line(plan: Plan) -> str:
    """``plan: 2.31 of 80 GiB a device (activations 1.2), largest micro-batch 64; 0.214 s a step, …``"""
    own = f"{_gib(plan.device_gib)}{_of(plan.device_limit_gib)} GiB a {_device(plan)}"
    memory = [f"{own} (activations {_held(plan, 'activations')})"]
    others = (("host", plan.host_gib, plan.host_limit_gib), ("NVMe", plan.nvme_gib, plan.nvme_limit_gib))
    memory += [f"{_gib(need)}{_of(limit)} GiB of {place}" for place, need, limit in others if need]
    memory += [f"does not fit at {plan.layout.length} tokens a sequence"] if plan.fits is False else []
    memory += [f"largest micro-batch {plan.largest_micro}"] if plan.largest_micro else []
    return f"plan: {', '.join(memory)}; {_speed(plan)}"


def _speed(plan: Plan) -> str:
    speed = plan.speed
    if speed.step_seconds is None:
        what = ", ".join(speed.unknown).replace("machine.", "")
        return f"times are unknown without the machine's {what} (toolkit plan --calibrate)"
    told = [f"{speed.step_seconds:.3g} s a step", f"{speed.tokens_per_second:,.0f} tokens/s", f"MFU {speed.mfu:.0%}"]
    return ", ".join([*told, *([] if plan.hours is None else [f"{plan.hours:,.1f} h"])])


def refusal(plan: Plan) -> str:
    """What is too small for what, and the ways out, in one line."""
    layout, group = plan.layout, _largest(plan)
    told = f" at batch.micro_size={layout.micro} and length {layout.length} ({group} {_held(plan, group)} of it)"
    needs = (
        (f"a {_device(plan)}", plan.device_gib, told, plan.device_limit_gib),
        ("the host", plan.host_gib, "", plan.host_limit_gib),
        ("NVMe", plan.nvme_gib, "", plan.nvme_limit_gib),
    )
    small = [
        f"{place} needs {_gib(need)} GiB{told} and has {_gib(limit)}"
        for place, need, told, limit in needs
        if limit is not None and need > limit
    ]
    return (
        f"machine={plan.machine.name}: the plan does not fit: {'; '.join(small)}. Use {', '.join(_ways(plan))}; "
        "`toolkit plan … --search` lists what fits, plan.enforce=false tries it anyway."
    )


def _ways(plan: Plan) -> list[str]:
    layout, limit = plan.layout, plan.device_limit_gib
    if limit is None or plan.device_gib <= limit:
        return ["less offload", "or more nodes"]
    ways = {
        f"batch.micro_size={plan.largest_micro} (the largest that fits)": plan.largest_micro is not None,
        "activation=recompute": not layout.recompute,
        "a smaller deepspeed.zero_optimization.reduce_bucket_size": _largest(plan) == "buffers",
        "a higher ZeRO stage": layout.stage < 3 and layout.data > 1,
        "offload=cpu": layout.offload == "none" and layout.device == "cuda",
    }
    return [*(way for way, possible in ways.items() if possible), "or more devices"]


def _held(plan: Plan, group: str) -> str:
    return _gib(_bytes(plan, group) / GIB)


def _largest(plan: Plan) -> str:
    return max((p.group for p in plan.memory.at_peak), key=lambda group: _bytes(plan, group))


def _bytes(plan: Plan, group: str) -> int:
    return sum(p.bytes for p in plan.memory.at_peak if p.group == group)


def _device(plan: Plan) -> str:
    return "rank" if plan.layout.device == "cpu" else "device"


def _of(limit: float | None) -> str:
    return "" if limit is None else f" of {_gib(limit)}"


def _gib(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _table(plan: Plan, measured: Numbers) -> Table:
    """A row for each number that was planned or measured."""
    cpu = plan.layout.device == "cpu"
    names = {
        "peak_gib": "GiB of a rank, measured as growth of its process" if cpu else "GiB of tensors on a device",
        "step_seconds": "seconds of a step",
        "tokens_per_second": "tokens/s (all ranks)",
        "mfu": "MFU",
    }
    form = {"tokens_per_second": "{:,.0f}".format, "mfu": "{:.1%}".format}
    table = Table("", title="Plan", title_justify="left")
    for column in ("planned", "measured"):
        table.add_column(column, justify="right")
    for key, name in names.items():
        row = [numbers.get(key) for numbers in (planned(plan), measured)]
        if any(number is not None for number in row):
            table.add_row(name, *("" if n is None else form.get(key, "{:.3g}".format)(n) for n in row))
    return table
