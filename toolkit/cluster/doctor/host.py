"""The checks of one host, in the order of the table.

here(request)       # what `python -m toolkit.cluster.doctor` answers on every host
"""

import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from toolkit.cluster.doctor import disk
from toolkit.cluster.doctor.host_job import Finding, HostJob, rated, unneeded
from toolkit.config.schema import load
from toolkit.config.units import gib
from toolkit.errors import ConfigError, PlanError
from toolkit.job import fingerprint, nvme, ops, ranks
from toolkit.plan import machines

IN_USE = 0.1  # of a GPU's memory; the driver and our own context take less
CAP_IPC_LOCK = 14  # bit of /proc/self/status, CapEff: pins without a limit


def here(request: dict[str, Any], console: Any) -> dict[str, Any]:
    """The findings of this host and what must be the same on all: ``request`` has the config and the host's ranks."""
    size = {"WORLD_SIZE": request["world"], "LOCAL_SIZE": request["slots"], "RANK": 0, "LOCAL_RANK": 0}
    os.environ |= {name: str(value) for name, value in size.items()}  # toolkit.job.ranks reads them
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    device = ranks.device()
    job = HostJob(load(request.pop("config")), device, **request)
    return {
        "device": device,
        "findings": [vars(finding) for finding in findings(job, console)],
        "fingerprint": {"configuration": fingerprint.of(job.config), "device": device, **fingerprint.here()},
        "port": ranks.free_port(),
    }


def findings(job: HostJob, console: Any) -> list[Finding]:
    """Of every check; what this configuration does not need says so."""
    try:
        ops_needed = len(job.ops)
    except ConfigError as error:  # DeepSpeed's node suits no such world or device
        refusals = [Finding("configuration", "fail", text) for text in str(error).splitlines()]
        return [*refusals, gpus(job), driver(job)]
    value = f"{job.config.task.name} on {job.device}, {job.slots} of {job.world} ranks, {ops_needed} ops"
    return [
        Finding("configuration", "ok", value), gpus(job), driver(job), compiler(job), libaio(job),
        disk.shared_memory(job), pinned(job), open_files(job), cores(job), memory(job), name(job),
        disk.checkpoints(job), *disk.swap_checks(job), built(job, console),
    ]  # fmt: skip


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
    if (built := torch.version.cuda) is None:
        return unneeded("driver", "torch is a CPU build")
    version, newest = driver_versions()
    if job.device != "cuda" and version is None:
        return unneeded("driver", "no GPU")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"  # type: ignore[no-untyped-call]
    value = f"driver {version or 'unknown'} (CUDA {newest or 'unknown'}), torch {torch.__version__}, NCCL {nccl}"
    rule, way = f"CUDA {built}, which torch is built for", "Install a newer driver, or a torch for an older CUDA."
    if newest is None:
        return Finding("driver", "warn", value, rule, "`nvidia-smi` does not tell: run it.")
    return rated("driver", int(newest.split(".")[0]) >= int(built.split(".")[0]), value, rule, way)


def compiler(job: HostJob) -> Finding:
    """For ops that are still to be built: a C++ compiler, ninja, and nvcc where they are CUDA's."""
    if not (missing := ops.missing(job.ops)):
        return unneeded("compiler", "every op is built")
    from torch.utils.cpp_extension import CUDA_HOME

    path = f"{os.environ.get('PATH', '')}:{Path(sys.executable).parent}"
    found = {tool: shutil.which(tool, path=path) for tool in ("g++", "ninja")}
    found["g++"] = shutil.which(os.environ.get("CXX", "c++"), path=path) or found["g++"]
    if job.device == "cuda":
        found["nvcc"] = shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None
    ways = {"g++": "apt install g++", "ninja": "pip install ninja", "nvcc": "install the CUDA toolkit, set CUDA_HOME"}
    way = "; ".join(ways[tool] for tool, place in found.items() if place is None) + "."
    value = ", ".join(f"{tool}: {place or 'missing'}" for tool, place in found.items())
    return rated("compiler", all(found.values()), value, f"to build {', '.join(missing)}", way)


def built(job: HostJob, console: Any) -> Finding:
    """DeepSpeed's ops, built here and now where asked for."""
    missing = ops.missing(job.ops)
    rule = ", ".join(op.removesuffix("Builder") for op in job.ops)
    if not rule:
        return unneeded("ops", "it loads none")
    if missing and not job.build:
        way = "toolkit build-ops, or toolkit doctor without --no-build."
        return Finding("ops", "warn", f"not built: {', '.join(missing)}", rule, f"The job would wait for it: {way}")
    try:
        ops.ensure(job.ops, console)
    except PlanError as error:
        return Finding("ops", "fail", str(error).strip(), rule, "Mend what this line says.")
    except Exception as error:  # whatever a compiler or DeepSpeed's builder raises is what was found
        text = (str(error).strip() or repr(error)).splitlines()[0]
        return Finding("ops", "fail", text, rule, "`toolkit build-ops` on this host shows the whole error.")
    return Finding("ops", "ok", "built", rule)


def libaio(job: HostJob) -> Finding:
    if not job.facts.nvme:
        return unneeded("libaio", "nothing is swapped to a drive")
    try:
        nvme.require_libaio()
    except PlanError as error:
        return Finding("libaio", "fail", str(error), "for offload=nvme", "apt install libaio-dev")
    return Finding("libaio", "ok", "found", "for offload=nvme")


def pinned(job: HostJob) -> Finding:
    """Memory that may be pinned: DeepSpeed's swap buffers (mlock, csrc/pin_memory/page_alloc.cpp), and RDMA's."""
    if not job.facts.nvme and not (job.device == "cuda" and job.hosts > 1):
        return unneeded("memlock", "no NVMe offload, no RDMA")
    why = "NVMe's swap buffers are pinned" if job.facts.nvme else "RDMA pins its buffers"
    limit, status = _limit(resource.RLIMIT_MEMLOCK), Path("/proc/self/status").read_text().splitlines()
    rights = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    free = limit == math.inf or bool(rights >> CAP_IPC_LOCK & 1)
    value = "unlimited" if limit == math.inf else gib(limit) + (" (not for this user)" if free else "")
    way = "docker run --ulimit memlock=-1; on a host `* - memlock unlimited` in /etc/security/limits.conf."
    return rated("memlock", free, value, f"unlimited: {why}", way, bad="warn")


def _limit(kind: int) -> float:
    limit = resource.getrlimit(kind)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def open_files(job: HostJob) -> Finding:
    """The first rank holds a connection to every other, data workers hand over file descriptors."""
    limit, wanted = _limit(resource.RLIMIT_NOFILE), 512 + 4 * job.world
    value = "unlimited" if limit == math.inf else f"{limit:,}"
    way = "ulimit -n 65536; docker run --ulimit nofile=65536; `* - nofile 65536` in /etc/security/limits.conf."
    return rated("open files", limit >= wanted, value, f"{wanted:,} for {job.world} ranks", way, bad="warn")


def cores(job: HostJob) -> Finding:
    found, busy = len(os.sched_getaffinity(0)), job.slots * (1 + job.config.data.workers)
    wanted, more = (job.slots, "") if job.device == "cpu" else (busy, " and their data workers")
    rule = f"{wanted} for {job.slots} ranks{more}"
    return rated("cores", found >= wanted, f"{found}", rule, "Lower data.workers, or the ranks.", bad="warn")


def memory(job: HostJob) -> Finding:
    """What is offloaded to this host's memory, against what is free, in a container too."""
    if "cpu" not in (job.facts.offload, job.facts.param_offload):
        return unneeded("host memory", "nothing is offloaded to it")
    free, needed = _free_memory(), job.host_bytes
    good, rule = None if needed is None else free >= needed, f"{gib(needed or 0)} of optimizer and weights"
    way = "Use more hosts, offload=nvme, or offload=none on more GPUs."
    return rated("host memory", good, f"{gib(free)} free", rule, way)


def _free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Of the host, or of its container (cgroup version 2, then 1) where that is less."""
    free = psutil.virtual_memory().available
    for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
        folder = group if limit == "max" else group / "memory"
        with suppress(OSError, ValueError):  # not this version, or no limit: the word "max"
            left = [int((folder / f"memory.{name}").read_text()) for name in (limit, used)]
            free = min(free, left[0] - left[1])
    return int(free)


def name(job: HostJob) -> Finding:
    """gloo asks for the address of the host's own name."""
    if job.hosts == 1:
        return unneeded("host name", "one host")
    own = socket.gethostname()
    try:
        address = socket.gethostbyname(own)
    except OSError as error:
        return Finding("host name", "fail", f"{own}: {error}", "resolves", f"Add {own} to /etc/hosts or DNS.")
    loop = address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ
    way = "Name the interface in .deepspeed_env: GLOO_SOCKET_IFNAME=eth0 (NCCL_SOCKET_IFNAME=eth0)."
    return rated("host name", not loop, f"{own} is {address}", "an address that other hosts reach", way, bad="warn")
