"""GPUs, their memory and their driver, against what torch was built for and what the job wants.

driver_versions()        # ("550.54.15", "12.4"): of the driver, and the newest CUDA that it can run
"""

import os
import re
import subprocess
from typing import Any

from toolkit.cluster.doctor.finding import Finding, rated, unneeded
from toolkit.cluster.doctor.host_job import HostJob
from toolkit.config.units import gib
from toolkit.plan import machines

IN_USE = 0.1  # of a GPU's memory; the driver and our own context take less


def driver_versions(command: str = "nvidia-smi") -> tuple[str | None, str | None]:
    """From the head of nvidia-smi's table; None where it is missing, fails or does not say."""
    try:
        text = subprocess.run([command], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        text = ""
    found = (re.search(rf"{name} Version:\s*([\d.]+)", text) for name in ("Driver", "CUDA"))
    driver, cuda = (match[1] if match else None for match in found)
    return driver, cuda


def gpus(job: HostJob) -> Finding:
    """As many as ranks, and free."""
    import torch

    wanted = job.config.machine
    if job.device != "cuda":
        if (idle := machines.here()).device_name and "DS_ACCELERATOR" not in os.environ:
            value = f"{idle.devices_per_node} x {idle.device_name}, torch {torch.__version__} sees none"
            way = "Install torch's build for CUDA and this driver, or set DS_ACCELERATOR=cpu to train on the CPU."
            return Finding("GPUs", "fail", value, "no GPU idle", way)
        if wanted.device_name and wanted.device != "cpu":
            way = "See `nvidia-smi`, or use machine=this."
            return Finding("GPUs", "fail", f"device {job.device}", f"machine={wanted.name}", way)
        return unneeded("GPUs", f"the job runs on {job.device}")
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    least, smallest = (min(sizes) for sizes in zip(*memory, strict=True)) if memory else (0, 0)
    value = f"{count} x {', '.join(names)}, {gib(least)} of {gib(smallest)} free"
    return _rated_gpus(job, value, names, count, any(total - free > IN_USE * total for free, total in memory))


def _rated_gpus(job: HostJob, value: str, names: list[str], count: int, in_use: bool) -> Finding:
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


def driver(job: HostJob) -> Finding:
    """The driver runs the CUDA that torch was built for: at least the same major version (CUDA's compatibility)."""
    import torch

    if (built := torch.version.cuda) is None:
        return unneeded("driver", "torch is a CPU build")
    version, newest = driver_versions()
    if job.device != "cuda" and version is None:
        return unneeded("driver", "no GPU")
    value = (
        f"driver {version or 'unknown'} (CUDA {newest or 'unknown'}), torch {torch.__version__}, NCCL {_nccl(torch)}"
    )
    rule, way = f"CUDA {built}, which torch is built for", "Install a newer driver, or a torch for an older CUDA."
    if newest is None:
        return Finding("driver", "warn", value, rule, "`nvidia-smi` does not tell: run it.")
    return rated("driver", int(newest.split(".")[0]) >= int(built.split(".")[0]), value, rule, way)


def _nccl(torch: Any) -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
