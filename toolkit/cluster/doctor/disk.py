"""Disks: room for checkpoints, room and speed where optimizer and weights are swapped to, shared memory.

speed(Path("/nvme"))        # DiskSpeed(write_gbs=2.1, read_gbs=3.4, direct=True), 256 MiB written and removed again
"""

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fcntl import F_GETFL, F_SETFL, fcntl
from pathlib import Path

from toolkit.cluster.doctor.host_job import Finding, HostJob, rated, unneeded
from toolkit.config.units import GIB, MIB, gib
from toolkit.job import nvme

BLOCK = 8 * MIB
SIZE = 256 * MIB
SECONDS = 15.0  # of writing, and as long of reading
SHM_COMM = 66 * MIB  # a rank: 2 x 1 MiB and 2 x 32 MiB (csrc/cpu/comm/shm.cpp, DeepSpeed 0.19.8)
PREFETCH = 4  # batches a worker holds ready (toolkit/data/loader.py)


@dataclass(frozen=True)
class DiskSpeed:
    """GB/s of one thread with blocks of 8 MiB; ``direct``: past the page cache, else synced and dropped from it."""

    write_gbs: float
    read_gbs: float
    direct: bool


def swap_checks(job: HostJob) -> list[Finding]:
    """Of each disk that the job swaps to: room for what all ranks of this host write there, then speed."""
    found: list[Finding] = []
    for folder, size in nvme.bytes_per_parameter(job.ds).items():
        disk, needed = folder.parent, None if job.parameters is None else size * job.parameters
        found += [swap_space(disk, needed, named=disk != job.run_dir), _swap_speed(disk, needed)]
    return found or [unneeded("NVMe", "nothing is swapped to a drive")]


def swap_space(disk: Path, needed: float | None, *, named: bool) -> Finding:
    """``needed`` bytes (None: unknown); ``named``: by a key, which means a drive that is mounted there."""
    there = existing(disk)
    if named and there != disk and not refused(disk):
        text = f"{disk} is not there: it would be a folder on the disk of {there}, {gib(_free(there))} free"
        return Finding("NVMe space", "warn", text, "a mounted drive", f"Mount it, or mkdir {disk}.")
    way = "Name another drive: deepspeed.zero_optimization.offload_optimizer.nvme_path and offload_param.nvme_path."
    return _room("NVMe space", disk, needed, f"{gib(needed or 0)} will be written", way)


def _swap_speed(disk: Path, needed: float | None) -> Finding:
    if refused(disk) or _free(disk) < 2 * SIZE:
        return Finding("NVMe speed", "skipped", f"not measured: no {gib(2 * SIZE)} to write to")
    try:
        found = speed(existing(disk))
    except OSError as error:
        return Finding("NVMe speed", "fail", f"{disk}: {error.strerror or error}", "256 MiB", "Make room there.")
    how = "O_DIRECT" if found.direct else "synced, the cache dropped"
    value = f"write {found.write_gbs:.2f} GB/s, read {found.read_gbs:.2f} GB/s ({how})"
    seconds = (needed or 0) * (1 / found.write_gbs + 1 / found.read_gbs) / 1e9
    return Finding("NVMe speed", "ok", value, f"all of it there and back: {seconds:.1f} s" if needed else "")


def checkpoints(job: HostJob) -> Finding:
    """Room for those that are kept, the best, and the one that is being written."""
    folder, one = Path(job.config.output_dir), job.checkpoint_bytes
    several = job.config.train.keep_checkpoints + 1 + bool(job.config.task.metrics)
    way = "Make room, lower train.keep_checkpoints, or name another output_dir."
    rule = f"{several} x {gib(one or 0)}, {job.parameters or 0:,} parameters"
    return _room("checkpoints", folder, None if one is None else several * one, rule, way)


def _room(name: str, folder: Path, needed: float | None, rule: str, way_out: str) -> Finding:
    if problem := refused(folder):
        return Finding(name, "fail", f"{folder}: {problem}", "a folder that can be written", way_out)
    free = _free(folder)
    good = None if needed is None else free >= needed
    return rated(name, good, f"{folder}: {gib(free)} free", rule, way_out)


def _free(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).free


def shared_memory(job: HostJob) -> Finding:
    """For DeepSpeed's op between ranks on a CPU, for the batches that workers hand over, for NCCL."""
    folder = Path("/dev/shm")
    way = "docker run --shm-size=8g (compose: shm_size), in Kubernetes an emptyDir of medium Memory at /dev/shm."
    if not folder.is_dir():
        return Finding("shared memory", "fail", f"no {folder}", "a tmpfs", way)
    usage = shutil.disk_usage(folder)
    value = f"{folder}: {gib(usage.free)} of {gib(usage.total)} free"
    together = "ShareMemCommBuilder" in job.ops and job.slots == job.world  # over several hosts it is not used
    # Six columns of int64, as BERT's pretraining has; others have fewer
    batch = 6 * 8 * job.config.batch.micro_size * job.config.data.max_length
    needed = SHM_COMM * job.slots * together + job.slots * job.config.data.workers * PREFETCH * batch
    if job.device == "cuda" and job.slots > 1 and usage.free >= needed:
        return rated("shared memory", usage.total >= GIB, value, "1 GiB: NVIDIA's advice for NCCL", way, bad="warn")
    rule = f"{gib(needed)} for {job.slots} ranks and their workers"
    return rated("shared memory", usage.free >= needed, value, rule, way)


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def refused(folder: Path) -> str | None:
    """Why nothing can be written in ``folder``, or None: tried, for permissions do not tell of mounts and quotas."""
    try:
        with tempfile.NamedTemporaryFile(dir=existing(folder), prefix=".doctor-") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def speed(folder: Path, size: int = SIZE) -> DiskSpeed:
    """Write and read ``size`` bytes at most, in ``SECONDS`` each at most. Raises OSError; leaves nothing behind."""
    block = mmap.mmap(-1, BLOCK)  # on a page's boundary, as O_DIRECT wants it
    block.write(os.urandom(BLOCK))  # what no drive compresses
    with tempfile.TemporaryFile(dir=folder) as opened:
        file, direct = opened.fileno(), True
        try:
            fcntl(file, F_SETFL, fcntl(file, F_GETFL) | os.O_DIRECT)
        except OSError:  # a file system that only knows its cache
            direct = False
        written = _gbs(lambda: os.write(file, block), size, lambda: os.fsync(file))
        os.lseek(file, 0, os.SEEK_SET)
        if not direct:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return DiskSpeed(written, _gbs(lambda: os.readv(file, [block]), size, lambda: None), direct)


def _gbs(move: Callable[[], int], size: int, finish: Callable[[], None]) -> float:
    """Of moving ``size`` bytes, until the end of the file or of patience."""
    start, moved = time.monotonic(), 0
    while moved < size and time.monotonic() - start < SECONDS and (step := move()):
        moved += step
    finish()
    return moved / (time.monotonic() - start) / 1e9
