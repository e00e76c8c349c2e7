"""What a device can do at best: the table in conf/machine, or a measurement on CPU."""

import time
from functools import lru_cache

from toolkit.config import Dtype, Machine, conf_dir


def table() -> list[Machine]:
    """Every machine of conf/machine."""
    from omegaconf import OmegaConf

    files = sorted((conf_dir() / "machine").glob("*.yaml"))
    return [Machine.model_validate(OmegaConf.to_container(OmegaConf.load(f))) for f in files]


def peak_tflops(machine: Machine, dtype: Dtype, device_name: str | None) -> float | None:
    """Dense TFLOP/s of one device for inputs of ``dtype`` (fp32, tf32, bf16, fp16).

    From the chosen machine, else from the table by the device's name; None if neither knows it.
    ``device_name`` None is a CPU: there the peak is a measured matrix product.
    """
    if dtype in machine.peak_tflops:
        return machine.peak_tflops[dtype]
    if device_name is None:
        return measured_tflops(dtype)
    for known in table():
        if known.device_name and known.device_name in device_name:
            return known.peak_tflops.get(dtype)
    return None


@lru_cache
def measured_tflops(dtype: Dtype, size: int = 1024, repeats: int = 10) -> float:
    """The best of ``repeats`` products of two square matrices, in TFLOP/s, with this process's threads."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    a, b = torch.ones(size, size, dtype=kind), torch.ones(size, size, dtype=kind)  # no draws: dropout's come next
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
