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
from typing import Any, get_args

from yaml import YAMLError

from toolkit.cluster.doctor.allreduce import BYTES, bus_gbs, timed
from toolkit.cluster.doctor.disk import existing, refused, speed
from toolkit.config.compose import compose
from toolkit.config.schema import Dtype, Machine, RunConfig
from toolkit.config.units import MIB
from toolkit.deepspeed import ds_config
from toolkit.deepspeed.facts import BATCH_KEYS
from toolkit.errors import ConfigError, OutOfMemory, PlanError, ToolkitError
from toolkit.job import ranks
from toolkit.plan import machines
from toolkit.plan.plan import plan_on
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
    planned = plan_on(here, config, ds, shape, ranks=world, device=device)
    path = machines.stored(here)
    if problem := refused(path.parent):
        raise ConfigError(f"{path.parent}: {problem}. Set XDG_CACHE_HOME to a folder that can be written.")
    machine = _with_earlier_steps(_measured(capped(config, planned.layout.accumulation), world, console), path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, as_yaml({"name": "this"} | machine.model_dump(mode="json", exclude_defaults=True)))
    console.print(f"{_told(machine)}. Stored in {path}", highlight=False)
    return world


def _with_earlier_steps(machine: Machine, path: Path) -> Machine:
    """What steps in other types have reached before stays, if ``path`` can be read."""
    with suppress(OSError, ConfigError, YAMLError):
        earlier = machines.parsed(path.read_text()).efficiency
        return machine.model_copy(update={"efficiency": earlier | machine.efficiency})
    return machine


def _told(machine: Machine) -> str:
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


def _measured(config: RunConfig, world: int, console: Any) -> Machine:
    """What a job writes in a folder on output_dir's disk, which is gone afterwards."""
    disk = existing(Path(config.output_dir))
    if problem := refused(disk):
        raise ConfigError(f"output_dir={config.output_dir}: {disk}: {problem}. Name a folder that can be written.")
    console.print(f"Measuring this host with {world} ranks …", highlight=False)
    with tempfile.TemporaryDirectory(prefix=".calibrate-", dir=disk.resolve()) as folder:
        own = config.model_copy(update={"output_dir": folder, "name": "run", "resume": "never"})
        Path(folder, "job.yaml").write_text(as_yaml(own.model_dump(mode="json")))
        _run(folder, world)
        return Machine.model_validate_json(Path(folder, "run", "machine.json").read_text())


def _run(folder: str, world: int) -> None:
    """The job to its end. Raises ToolkitError with what its ranks say."""
    launcher = ["torch.distributed.run", "--nproc-per-node", str(world), "--master-addr", "127.0.0.1"]
    launcher += ["--master-port", str(ranks.free_port())]
    job = ["-m", "toolkit.cluster.calibrate", "--config-path", folder, "--config-name", "job"]
    threads = str(max(1, (os.cpu_count() or 1) // world))  # as toolkit.job.ranks has it; the launcher would set 1
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: without ranks or folders left behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, *job], stdout=sys.stderr, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
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
    # Where the optimizer is swapped to: the drive that the configuration names, or output_dir's
    swap = (config.deepspeed.get("zero_optimization") or {}).get("offload_optimizer") or {}
    rates = _rates(ranks.device(), Path(swap.get("nvme_path") or run.dir))
    day, world = time.strftime("%Y-%m-%d"), ranks.world()
    said = f"measured by toolkit plan --calibrate on {platform.node()}, {day}, {world} ranks at once"
    rates |= {"source": said, "node_source": said} | ({} if cuda else {"devices_per_node": world})
    task = build_task(run)
    ds = begin(run, task).ds
    engine = start_engine(build_model(run, task, ds), task, run, ds)
    machine = _stepped(here.model_copy(update=rates), run.config, ds, engine, task.train_batches(start_sample=0))
    engine.close()
    run.write_text("machine.json", machine.model_dump_json())


def _rates(device: str, drive: Path) -> dict[str, Any]:
    """Each measured by all ranks at the same time."""
    import torch

    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")  # fp16 does not train on a CPU
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank())
        ampere = torch.cuda.get_device_capability() >= (8, 0)
        dtypes = ("fp32", "tf32", "bf16", "fp16") if ampere else ("fp32", "fp16")
    peaks = {}
    for dtype in dtypes:
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
    ranks.wait()
    try:  # as much written as read
        found = speed(existing(drive))
        own = 2 / (1 / found.write_gbs + 1 / found.read_gbs)
    except OSError:
        own = 0.0
    if all(every := ranks.gathered(own)):  # else one has no room for it
        rates["nvme_gbs"] = sum(every)
    return rates | {"measured": tuple(rates)}


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


def _stepped(
    machine: Machine, config: RunConfig, ds: Mapping[str, Any], engine: Any, batches: Iterator[Any]
) -> Machine:
    """With the share of the peak that the steps' products reach: of the median step's time on the slowest rank, without
    communication, waits for data and what a plan tells of the rest."""
    from toolkit.engine.collectives import Traffic

    shape = model_shape(config)
    ideal = machine.model_copy(update={"efficiency": dict.fromkeys(get_args(Dtype), 1)})
    plan = plan_on(ideal, config, ds, shape, ranks=ranks.world(), device=ranks.device())
    if plan.speed.unknown:
        raise PlanError(f"{', '.join(plan.speed.unknown)}: could not be measured here. Is there room on the drive?")
    engine.train_batch(batches)  # warms up
    traffic, busy = Traffic(), []
    # On a side stream communication has a clock of its own: how much of it computing hides is not known
    hides = plan.layout.overlap and ranks.device() == "cuda"
    for _ in range(STEPS):
        ranks.wait()
        traffic.read()  # waits for the device, too
        start = time.perf_counter()
        step = engine.train_batch(batches)
        held = traffic.read()[1]
        seconds = time.perf_counter() - start - step.data_seconds
        busy.append(seconds if hides else seconds - held)
    (slowest,) = ranks.largest([median(busy)])
    others = {*(s.name for s in plan.speed.sent), "pipeline bubble"}
    ideal_seconds = {s.name: s.seconds for s in plan.speed.shares if s.name not in others}
    computing = ideal_seconds.pop("computing")
    dtype = product_dtype(plan.layout, machine, tf32=config.train.tf32)
    share = computing / max(computing, slowest - sum(ideal_seconds.values()))
    return machine.model_copy(update={"efficiency": {dtype: share}, "measured": (*machine.measured, "efficiency")})


if __name__ == "__main__":
    main()
