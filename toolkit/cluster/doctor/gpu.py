"""GPUs, their memory and their driver, against what torch was built for and what the job wants.

parse(smi())        # [Gpu(name="NVIDIA H100 80GB HBM3", driver="550.54.15")]
"""

import os
import re
import subprocess
from dataclasses import dataclass
from typing import Any

from toolkit.cluster.doctor.finding import Finding, Job, rated, unneeded
from toolkit.config.units import gib
from toolkit.plan import machines

QUERY = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
IN_USE = 0.1  # of a GPU's memory; the driver and our own context take less


@dataclass(frozen=True)
class Gpu:
    """A line of nvidia-smi."""

    name: str
    driver: str


def smi(command: list[str] = QUERY) -> str:
    """What nvidia-smi says; empty where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def parse(text: str) -> list[Gpu]:
    """``text`` as QUERY prints it; other lines are nvidia-smi's words."""
    return [Gpu(*line.split(", ")) for line in text.splitlines() if line.count(", ") == 1]


def driver_cuda(text: str) -> str | None:
    """The newest CUDA that the driver can run, from the head of nvidia-smi's table."""
    found = re.search(r"CUDA Version:\s*(\d+\.\d+)", text)
    return found[1] if found else None


def gpus(job: Job) -> Finding:
    """As many as ranks, and free."""
    import torch

    wanted = job.config.machine
    if job.device != "cuda":
        if (listed := parse(smi())) and "DS_ACCELERATOR" not in os.environ:
            value = f"{len(listed)} x {listed[0].name}, torch {torch.__version__} sees none"
            way = "Install torch's build for CUDA and this driver, or set DS_ACCELERATOR=cpu to train on the CPU."
            return Finding("GPUs", "fail", value, "no GPU idle", way)
        if wanted.device_name and wanted.memory_gib:
            way = "See `nvidia-smi`, or use machine=this."
            return Finding("GPUs", "fail", f"device {job.device}", f"machine={wanted.name}", way)
        return unneeded("GPUs", f"the job runs on {job.device}")
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    least = min((free for free, _ in memory), default=0)
    value = f"{count} x {', '.join(names)}, {gib(least)} of {gib(min((t for _, t in memory), default=0))} free"
    return _rated_gpus(job, value, names, count, any(total - free > IN_USE * total for free, total in memory))


def _rated_gpus(job: Job, value: str, names: list[str], count: int, in_use: bool) -> Finding:
    wanted = job.config.machine.name
    found = {m.name if (m := machines.known(name)) else None for name in names}
    rule = f"{job.slots} for as many ranks"
    if count < job.slots:
        return Finding("GPUs", "fail", value, rule, "Lower this host's slots, or see CUDA_VISIBLE_DEVICES.")
    if in_use:
        return Finding("GPUs", "warn", value, f"{rule}, free", "`nvidia-smi` names the processes that use them.")
    if wanted != "this" and found != {wanted}:
        known = ", ".join(sorted(n for n in found if n)) or "none of the table"
        return Finding("GPUs", "warn", value, f"machine={wanted}", f"This is {known}: name it, or use machine=this.")
    return Finding("GPUs", "ok", value, rule)


def driver(job: Job) -> Finding:
    """The driver runs the CUDA that torch was built for: at least the same major version (CUDA's compatibility)."""
    import torch

    built, listed = torch.version.cuda, parse(smi())
    if built is None or (job.device != "cuda" and not listed):
        return unneeded("driver", "torch is a CPU build" if built is None else "no GPU")
    newest = driver_cuda(smi(["nvidia-smi"]))
    version = listed[0].driver if listed else "unknown"
    value = f"driver {version} (CUDA {newest or 'unknown'}), torch {torch.__version__}, NCCL {_nccl(torch)}"
    rule, way = f"CUDA {built}, which torch is built for", "Install a newer driver, or a torch for an older CUDA."
    if newest is None:
        return Finding("driver", "warn", value, rule, "`nvidia-smi` does not tell: run it.")
    return rated("driver", int(newest.split(".")[0]) >= int(built.split(".")[0]), value, rule, way)


def _nccl(torch: Any) -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
