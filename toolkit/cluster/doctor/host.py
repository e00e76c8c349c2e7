"""The checks of one host, in the order of the table.

here(request)       # what `python -m toolkit.cluster.doctor` answers on every host
"""

import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from toolkit.cluster.doctor import disk, gpu
from toolkit.cluster.doctor.finding import Finding, Job, rated, unneeded
from toolkit.cluster.doctor.size import host_bytes
from toolkit.config.schema import load
from toolkit.config.units import gib
from toolkit.errors import ConfigError, PlanError
from toolkit.job import fingerprint, nvme, ops, ranks

CAP_IPC_LOCK = 14  # bit of /proc/self/status, CapEff: pins without a limit


def here(request: dict[str, Any], console: Any) -> dict[str, Any]:
    """The findings of this host and what must be the same on all: ``request`` has the config and the host's ranks."""
    size = {"WORLD_SIZE": request["world"], "LOCAL_SIZE": request["slots"], "RANK": 0, "LOCAL_RANK": 0}
    os.environ |= {name: str(value) for name, value in size.items()}  # toolkit.job.ranks reads them
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    device = ranks.device()
    job = Job(load(request.pop("config")), device, **request)
    return {
        "device": device,
        "findings": [vars(finding) for finding in findings(job, console)],
        "fingerprint": {"configuration": fingerprint.of(job.config), "device": device, **fingerprint.here()},
        "port": ranks.free_port(),
    }


def findings(job: Job, console: Any) -> list[Finding]:
    try:
        ops_needed = len(job.ops)
    except ConfigError as error:  # DeepSpeed's node suits no such world or device
        refusals = [Finding("configuration", "fail", text) for text in str(error).splitlines()]
        return [*refusals, gpu.gpus(job), gpu.driver(job)]
    value = f"{job.config.task.name} on {job.device}, {job.slots} of {job.world} ranks, {ops_needed} ops"
    return [Finding("configuration", "ok", value), *checks(job, console)]


def checks(job: Job, console: Any) -> Iterator[Finding]:
    """Every one; what this configuration does not need says so."""
    simple: list[Callable[[Job], Finding]] = [
        gpu.gpus, gpu.driver, compiler, libaio, disk.shared_memory, pinned, open_files, cores, memory, name,
        disk.checkpoints,
    ]  # fmt: skip
    yield from (check(job) for check in simple)
    yield from disk.swap_checks(job)
    yield built(job, console)


def compiler(job: Job) -> Finding:
    """For ops that are still to be built: a C++ compiler, ninja, and nvcc where they are CUDA's."""
    missing = ops.missing(job.ops)
    if not missing:
        return unneeded("compiler", "every op is built")
    wanted = {"g++": os.environ.get("CXX", "c++"), "ninja": "ninja"}
    wanted |= {"nvcc": "nvcc"} if job.device == "cuda" else {}
    found = {name: _which(tool) or (_which("g++") if name == "g++" else None) for name, tool in wanted.items()}
    absent = [name for name, path in found.items() if path is None]
    ways = {"g++": "apt install g++", "ninja": "pip install ninja", "nvcc": "install the CUDA toolkit, set CUDA_HOME"}
    value = ", ".join(f"{name}: {path or 'missing'}" for name, path in found.items())
    rule = f"to build {', '.join(missing)}"
    return rated("compiler", not absent, value, rule, "; ".join(ways[name] for name in absent) + ".")


def _which(tool: str) -> str | None:
    if tool == "nvcc":
        from torch.utils.cpp_extension import CUDA_HOME

        return shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{Path(sys.executable).parent}")


def built(job: Job, console: Any) -> Finding:
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


def libaio(job: Job) -> Finding:
    if not job.facts.nvme:
        return unneeded("libaio", "nothing is swapped to a drive")
    try:
        nvme.require_libaio()
    except PlanError as error:
        return Finding("libaio", "fail", str(error), "for offload=nvme", "apt install libaio-dev")
    return Finding("libaio", "ok", "found", "for offload=nvme")


def pinned(job: Job) -> Finding:
    """Memory that may be pinned: DeepSpeed's swap buffers (mlock, csrc/pin_memory/page_alloc.cpp), and RDMA's."""
    why = "NVMe's swap buffers are pinned" if job.facts.nvme else "RDMA pins its buffers"
    if not job.facts.nvme and not (job.device == "cuda" and job.hosts > 1):
        return unneeded("memlock", "no NVMe offload, no RDMA")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    free = limit == resource.RLIM_INFINITY or _may_pin_all()
    value = "unlimited" if limit == resource.RLIM_INFINITY else gib(limit) + (" (not for this user)" if free else "")
    way = "docker run --ulimit memlock=-1; on a host `* - memlock unlimited` in /etc/security/limits.conf."
    return rated("memlock", free, value, f"unlimited: {why}", way, bad="warn")


def _may_pin_all() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    return bool(int(next(x.split()[1] for x in lines if x.startswith("CapEff")), 16) >> CAP_IPC_LOCK & 1)


def open_files(job: Job) -> Finding:
    """The first rank holds a connection to every other, data workers hand over file descriptors."""
    limit, wanted = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 512 + 4 * job.world
    good = limit == resource.RLIM_INFINITY or limit >= wanted
    value = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
    way = "ulimit -n 65536; docker run --ulimit nofile=65536; `* - nofile 65536` in /etc/security/limits.conf."
    return rated("open files", good, value, f"{wanted:,} for {job.world} ranks", way, bad="warn")


def cores(job: Job) -> Finding:
    found, busy = len(os.sched_getaffinity(0)), job.slots * (1 + job.config.data.workers)
    wanted = job.slots if job.device == "cpu" else busy
    rule = f"{wanted} for {job.slots} ranks" + ("" if job.device == "cpu" else " and their data workers")
    return rated("cores", found >= wanted, f"{found}", rule, "Lower data.workers, or the ranks.", bad="warn")


def memory(job: Job) -> Finding:
    """What is offloaded to this host's memory, against what is free, in a container too."""
    if "cpu" not in (job.facts.offload, job.facts.param_offload):
        return unneeded("host memory", "nothing is offloaded to it")
    free, needed = _free_memory(), host_bytes(job)
    if needed is None:
        return Finding("host memory", "ok", f"{gib(free)} free", "the model's size is not known here")
    way = "Use more hosts, offload=nvme, or offload=none on more GPUs."
    return rated("host memory", free >= needed, f"{gib(free)} free", f"{gib(needed)} of optimizer and weights", way)


def _free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Of the host, or of its container (cgroup version 2) where that is less."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no limit is the word "max"
        return int(free)


def name(job: Job) -> Finding:
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
