"""What a device can do at best: the table in conf/machine, or a measurement.

known("NVIDIA A100-SXM4-40GB")                  # -> the machine a100_40gb
balance(known("NVIDIA H200"), "bf16")           # 206 FLOP for each byte that it reads
"""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path

from toolkit.config.schema import Dtype, Machine, cache_dir, conf_dir, load
from toolkit.config.units import GIB
from toolkit.errors import ConfigError, PlanError


def table() -> list[Machine]:
    """Every machine of conf/machine, oldest first; ``this`` is none."""
    import yaml

    files = [f for f in (conf_dir() / "machine").glob("*.yaml") if f.stem != "this"]
    machines = [Machine.model_validate(yaml.safe_load(f.read_text())) for f in files]
    return sorted(machines, key=lambda m: (m.year or 0, m.bandwidth_gbs or 0, m.name))


@lru_cache
def known(device_name: str) -> Machine | None:
    """The machine all of whose words are in torch's name of a device; of several the one with the most words.

    The words of "NVIDIA A100-SXM4-80GB" are NVIDIA, A100, SXM4 and 80GB, so "L4" is not found in "NVIDIA L40S". A
    part of a GPU (MIG) is none of the table's.
    """
    words = _words(device_name)
    found = [m for m in table() if m.device_name and not m.measured and _words(m.device_name) <= words]
    return max(found, key=lambda m: len(_words(m.device_name or "")), default=None) if "mig" not in words else None


def _words(name: str) -> set[str]:
    return set(re.findall(r"\w+", name.lower()))


def here() -> Machine:
    """The host at hand: its GPUs by the driver's own tool, else its CPU and memory. No torch."""
    import psutil

    total = psutil.virtual_memory().total / GIB
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        names = []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        chosen = [word.strip() for word in visible.split(",") if word.strip() not in ("", "-1")]
        names = [names[int(c)] if c.isdigit() and int(c) < len(names) else names[0] for c in chosen if names]
    if not names:
        return Machine(device="cpu", host_memory_gib=total)
    found = known(names[0]) or Machine(device_name=names[0])
    return found.model_copy(update={"name": "this", "devices_per_node": len(names), "host_memory_gib": total})


def way_out(machine: Machine, unknown: Collection[str]) -> str:
    """How to measure what is unknown, of the host at hand; a sentence after another."""
    if machine.name != "this" or machine.measured or "machine.node_link_gbs" in unknown:
        return ""
    return f" Measure it: toolkit plan … --world {machine.devices_per_node} --calibrate."


def stored(machine: Machine) -> Path:
    """Where `toolkit plan --calibrate` keeps what this host does; CPU ranks share its cores, so their number counts."""
    host = re.sub(r"[^\w.-]", "_", platform.node())
    return cache_dir("machines") / f"{host}{f'-cpu{machine.devices_per_node}' if machine.device == 'cpu' else ''}.yaml"


def calibrated(machine: Machine, given: Collection[str]) -> Machine:
    """The host at hand with the rates that are stored for it, but for the keys ``given``. Raises PlanError."""
    from yaml import YAMLError

    path = stored(machine)
    if machine.name != "this" or machine.measured or not path.exists():
        return machine
    try:
        found = parsed(path.read_text())
        if not found.measured or found.device_name != machine.device_name:
            raise ValueError(f"it is of {found.device_name or 'a CPU'} and says measured: {list(found.measured)}")
    except (OSError, ValueError, YAMLError, ConfigError) as error:
        why = " ".join(str(error).split())[:200]
        raise PlanError(
            f"{path}: not a calibration of this machine: {why}. Delete it, or plan with --calibrate to measure again."
        ) from error
    keys = [key for key in found.measured if key not in given]
    rates = {key: getattr(found, key) for key in (*keys, "source", "node_source")}
    return machine.model_copy(update=rates | {"measured": tuple(keys)})


def parsed(text: str) -> Machine:
    """A machine's YAML. Raises ConfigError and YAMLError."""
    import yaml

    return load({"machine": yaml.safe_load(text)}).machine


def balance(machine: Machine, dtype: Dtype) -> float | None:
    """FLOP per byte of memory at the ridge of the roofline: work with fewer waits for memory (Williams et al. 2009)."""
    peak = machine.peak_tflops.get(dtype)
    return 1000 * peak / machine.bandwidth_gbs if peak and machine.bandwidth_gbs else None


def peak_tflops(machine: Machine, dtype: Dtype, device_name: str | None) -> float | None:
    """Dense TFLOP/s of one device for inputs of ``dtype`` (fp32, tf32, bf16, fp16).

    From the chosen machine, else from the table by the device's name; None if neither knows it.
    ``device_name`` None is a CPU: there the peak is a measured matrix product.
    """
    if dtype in machine.peak_tflops:
        return machine.peak_tflops[dtype]
    if device_name is None:
        return measured_tflops(dtype, size=512, seconds=0.1)  # bf16 takes 30 times as long where the CPU has none
    found = known(device_name)
    return found.peak_tflops.get(dtype) if found else None


@lru_cache
def measured_tflops(
    dtype: Dtype, size: int = 1024, device: str = "cpu", at_once: int = 1, seconds: float = float("inf")
) -> float:
    """Of products of two square matrices, the best of ten times ``at_once``, with this process's threads.

    After ``seconds`` no further repeat begins. tf32 is the caller's to set, by torch.set_float32_matmul_precision.
    """
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    a, b = (torch.ones(size, size, dtype=kind, device=device) for _ in "ab")  # no draws: dropout's come next
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    best, end = float("inf"), time.perf_counter() + seconds
    for repeat in range(11):  # the first one warms up
        wait()
        start = time.perf_counter()
        if repeat > 1 and start > end:
            break
        for _ in range(at_once):
            torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * at_once / best / 1e12
