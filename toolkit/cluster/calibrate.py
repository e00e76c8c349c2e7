"""What this host does of its data sheet: rates that all ranks measure at once, and three real steps, for later plans.

toolkit plan experiment=smoke model=bert_mini --world 2 --calibrate

Every rank runs this module under PyTorch's launcher; of each rate the slowest rank's counts. What comes of it is a
conf/machine/*.yaml of this host, which `toolkit plan` with machine=this reads from the user's cache.
"""

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from toolkit.cluster.doctor.allreduce import BYTES, bus_gbs, timed
from toolkit.cluster.doctor.disk import refused, speed
from toolkit.cluster.doctor.finding import existing
from toolkit.config.compose import compose
from toolkit.config.schema import Dtype, Machine, RunConfig
from toolkit.config.units import MIB
from toolkit.deepspeed import ds_config
from toolkit.deepspeed.facts import BATCH_KEYS
from toolkit.errors import ConfigError, OutOfMemory, PlanError, ToolkitError
from toolkit.job import ranks
from toolkit.plan import machines
from toolkit.plan.plan import plan_for, plan_on
from toolkit.plan.shapes import model_shape
from toolkit.plan.speed import product_dtype
from toolkit.run.files import as_yaml, replace
from toolkit.run.recipe import recipe

STEPS = 3
MICRO_BATCHES = 8  # of a step at most: on CPUs one of hundreds takes minutes, and tells no more
COPY_BYTES = 256 * MIB  # beyond any cache
REPEATS = 5
TINY = 8  # rows of a product that is all launch


def calibrate(overrides: list[str], world: int | None, console: Any) -> int:
    """Measure with ``world`` ranks (None: this host's GPUs, or 2), store it, and return how many they were.

    ``console`` is for what a person should know meanwhile. Raises ToolkitError.
    """
    config, here = compose(overrides), machines.here()
    if config.machine.name != "this":
        raise ConfigError(f"machine={config.machine.name} with --calibrate: only this host can be measured. Drop one.")
    cuda = bool(here.device_name)
    world = world or (here.devices_per_node if cuda else 2)
    if cuda and world > here.devices_per_node:
        raise PlanError(f"--world {world}: this host has {here.devices_per_node} GPUs. Lower it, or leave it out.")
    here = here if cuda else here.model_copy(update={"devices_per_node": world})
    # What a plan refuses, before anything is started
    shape, device = model_shape(config), "cuda" if cuda else "cpu"
    ds = ds_config.complete(config, world=world, device=device, vocab_size=shape.vocab_size)
    planned = plan_for(here, config, ds, shape, ranks=world, device=device)
    path = machines.stored(here)
    if problem := refused(path.parent):
        raise ConfigError(f"{path.parent}: {problem}. Set XDG_CACHE_HOME to a folder that can be written.")
    text = as_yaml(_with_earlier_steps(_measured(capped(config, planned.layout.accumulation), world, console), path))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, text)
    console.print(f"{told(machines.parsed(text))}. Stored in {path}", highlight=False)
    return world


def _with_earlier_steps(text: str, path: Path) -> dict[str, Any]:
    """What steps in other types have reached before stays, if ``path`` can be read."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(text)
    with suppress(OSError, ConfigError, yaml.YAMLError):
        found["efficiency"] = machines.parsed(path.read_text()).efficiency | found["efficiency"]
    return found


def told(machine: Machine) -> str:
    """The rates in a line."""
    peaks = ", ".join(f"{dtype} {peak:.3g}" for dtype, peak in machine.peak_tflops.items())
    names = {"memory": "bandwidth_gbs", "all-reduce": "link_gbs", "host link": "pcie_gbs", "drive": "nvme_gbs"}
    rates = ", ".join(f"{name} {rate:.3g}" for name, key in names.items() if (rate := getattr(machine, key)))
    steps = ", ".join(f"{share:.0%} of {dtype}" for dtype, share in machine.efficiency.items())
    return f"TFLOP/s: {peaks}; steps reach {steps}. GB/s: {rates}"


def capped(config: RunConfig, accumulation: int) -> RunConfig:
    """With fewer micro-batches in a step, of the same size; enough of them to fill a pipeline."""
    kept, batch = min(accumulation, max(MICRO_BATCHES, 4 * config.pipeline.stages)), config.batch
    sizes = {"global_size": batch.global_size // accumulation * kept}
    sizes |= {"tokens": batch.tokens // accumulation * kept} if batch.tokens else {}
    ds = {key: value for key, value in config.deepspeed.items() if key not in BATCH_KEYS}  # they would say it twice
    return config.model_copy(update={"batch": batch.model_copy(update=sizes), "deepspeed": ds})


def _measured(config: RunConfig, world: int, console: Any) -> str:
    """The YAML that a job writes in a folder on output_dir's disk, which is gone afterwards."""
    disk = existing(Path(config.output_dir))
    if problem := refused(disk):
        raise ConfigError(f"output_dir={config.output_dir}: {disk}: {problem}. Name a folder that can be written.")
    console.print(f"Measuring this host with {world} ranks …", highlight=False)
    with tempfile.TemporaryDirectory(prefix=".calibrate-", dir=disk.resolve()) as name:
        folder, own = Path(name), config.model_copy(update={"output_dir": name, "name": "run", "resume": "never"})
        (folder / "job.yaml").write_text(as_yaml(own.model_dump(mode="json")))
        _run(folder, world)
        return (folder / "run" / "machine.yaml").read_text()


def _run(folder: Path, world: int) -> None:
    """The job to its end. Raises ToolkitError with what its ranks say."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-addr", "127.0.0.1",
                "--master-port", str(ranks.free_port())]  # fmt: skip
    job = ["-m", "toolkit.cluster.calibrate", "--config-path", str(folder), "--config-name", "job"]
    threads = str(max(1, (os.cpu_count() or 1) // world))  # as toolkit.job.ranks has it; the launcher would set 1
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: without ranks or folders left behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    process = subprocess.Popen(
        [sys.executable, *launcher, *job], stdout=sys.stderr, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        text=True, errors="replace", env={"OMP_NUM_THREADS": threads, **os.environ},
    )  # fmt: skip
    try:
        said = process.communicate()[1]
    except BaseException:  # the launcher ends its ranks
        process.terminate()
        process.communicate()
        raise
    if process.returncode:
        errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
        if not errors:
            print(said, file=sys.stderr)
            errors = [f"--calibrate: the job ended with exit code {process.returncode}, see above."]
        raise (OutOfMemory if errors[0].startswith("out of memory") else ToolkitError)(errors[0])  # torchrun's is 1


@recipe()
def main(config: RunConfig) -> None:
    from toolkit.engine.start import start_engine
    from toolkit.models.build import build_model
    from toolkit.run.directory import Run
    from toolkit.tasks import build_task
    from toolkit.train.own_plan import begin

    here, cuda = machines.here(), ranks.device() == "cuda"
    if cuda != bool(here.device_name):
        raise PlanError(
            f"DeepSpeed's device is {ranks.device()}, but a plan's is {here.device_name or 'the CPU'}: mend torch's "
            "CUDA, or unset DS_ACCELERATOR."
        )
    run = Run.open(config)
    machine = here.model_copy(update=_rates(ranks.device(), _drive(run)) | _source(here, ranks.world()))
    task = build_task(run)
    ds = begin(run, task).ds
    engine = start_engine(build_model(run, task, ds), task, run, ds)
    machine = _stepped(machine, run.config, ds, engine, task.train_batches(start_sample=0))
    engine.close()
    run.write_yaml("machine.yaml", {"name": "this"} | machine.model_dump(mode="json", exclude_defaults=True))


def _source(here: Machine, world: int) -> dict[str, Any]:
    day = time.strftime("%Y-%m-%d")
    said = f"measured by toolkit plan --calibrate on {platform.node()}, {day}, {world} ranks at once"
    return {"source": said, "node_source": said} | ({} if here.device_name else {"devices_per_node": world})


def _drive(run: Any) -> Path:
    """Where the optimizer is swapped to: the drive that the configuration names, or output_dir's."""
    block = (run.config.deepspeed.get("zero_optimization") or {}).get("offload_optimizer") or {}
    return Path(block.get("nvme_path") or run.dir)


def _rates(device: str, drive: Path) -> dict[str, Any]:
    """Each measured by all ranks at the same time."""
    import torch

    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank())
    peaks = {}
    for dtype in _dtypes(device):
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        size = 8192 if device == "cuda" else 1024 if dtype == "fp32" else 512  # slow in bf16 without AMX
        peaks[dtype] = _slowest(partial(machines.measured_tflops, dtype, size, device=device))
    here, there = (torch.ones(COPY_BYTES, dtype=torch.uint8, device=device) for _ in "ab")
    copied = _slowest(partial(_copy_gbs, there, here))
    rates: dict[str, Any] = {"peak_tflops": peaks, "bandwidth_gbs": 2 * copied, "pcie_gbs": copied}
    tiny = _slowest(partial(machines.measured_tflops, "fp32", TINY, device=device, at_once=100))
    rates["launch_us"] = 2 * TINY**3 / tiny / 1e6  # there is next to nothing to compute
    if device == "cuda":
        host = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        rates["pcie_gbs"] = min(_slowest(partial(_copy_gbs, *way)) for way in ((host, here), (here, host)))
    if ranks.world() > 1:
        seconds = timed(torch.ones(BYTES // 4, device=device), ranks.world())
        rates["link_gbs"] = bus_gbs(BYTES, seconds, ranks.world())
    if gbs := _drive_gbs(drive):
        rates["nvme_gbs"] = gbs
    return rates | {"measured": tuple(rates)}


def _dtypes(device: str) -> tuple[Dtype, ...]:
    """That a step's products can be in: fp16 does not train on a CPU, tf32 and bf16 need Ampere."""
    import torch

    if device == "cpu":
        return "fp32", "bf16"
    return ("fp32", "tf32", "bf16", "fp16") if torch.cuda.get_device_capability() >= (8, 0) else ("fp32", "fp16")


def _slowest(rate: Callable[[], float]) -> float:
    ranks.wait()
    return -ranks.largest([-rate()])[0]


def _copy_gbs(target: Any, source: Any) -> float:
    """GB/s one way, the best of REPEATS; of a memory's own rate, read and written, it is half."""
    import torch

    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        if target.is_cuda or source.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return float(target.nbytes / best / 1e9)


def _drive_gbs(folder: Path) -> float | None:
    """Of all ranks together, as much written as read; None where one of them has no room for it."""
    ranks.wait()
    try:
        found = speed(existing(folder))
        mine = 2 / (1 / found.write_gbs + 1 / found.read_gbs)
    except OSError:
        mine = 0.0
    every = ranks.gathered(mine)
    return sum(every) if all(every) else None


def _stepped(
    machine: Machine, config: RunConfig, ds: Mapping[str, Any], engine: Any, batches: Iterator[Any]
) -> Machine:
    """With the share of the peak that the steps' products reach, and the rest of the time as a plan tells it."""
    shape = model_shape(config)
    every: dict[Dtype, float] = {"fp32": 1, "tf32": 1, "bf16": 1, "fp16": 1}
    ideal = machine.model_copy(update={"efficiency": every})
    plan = plan_on(ideal, config, ds, shape, ranks=ranks.world(), device=ranks.device())
    if plan.speed.unknown:
        raise PlanError(f"{', '.join(plan.speed.unknown)}: could not be measured here. Is there room on the drive?")
    # On a side stream communication has a clock of its own: how much of it computing hides is not known
    hides = plan.layout.overlap and ranks.device() == "cuda"
    busy = _busy_seconds(engine, batches, hides=hides)
    sent = {s.name for s in plan.speed.sent}
    seconds = {s.name: s.seconds for s in plan.speed.shares if s.name not in sent and s.name != "pipeline bubble"}
    computing = seconds.pop("computing")
    dtype = product_dtype(plan.layout, machine, tf32=config.train.tf32)
    share = computing / max(computing, busy - sum(seconds.values()))
    return machine.model_copy(update={"efficiency": {dtype: share}, "measured": (*machine.measured, "efficiency")})


def _busy_seconds(engine: Any, batches: Iterator[Any], *, hides: bool) -> float:
    """Of the median step, after one that warms up, without communication and waits for data; on the slowest rank."""
    from toolkit.engine.collectives import Traffic

    engine.train_batch(batches)
    traffic, found = Traffic(), []
    for _ in range(STEPS):
        ranks.wait()
        traffic.read()  # waits for the device, too
        start = time.perf_counter()
        step = engine.train_batch(batches)
        held = traffic.read()[1]
        seconds = time.perf_counter() - start - step.data_seconds
        found.append(seconds if hides else seconds - held)
    return ranks.largest([median(found)])[0]


if __name__ == "__main__":
    main()
