"""What the ZeRO paper says that its stages need and send (Rajbhandari et al. 2020, arXiv 1910.02054, sections 5 and 7).

zero_bytes(7.5e9, stage=1, world=64) / 1e9        # 31.4 GB
zero_volume(7.5e9, stage=3)                       # elements that a device sends in a step

Sixteen bytes a parameter: 2 of weights, 2 of gradients in half precision, 12 of Adam (weights, momentum, variance in
fp32). What DeepSpeed 0.19.8 holds differs, see toolkit/plan/memory.py.
"""


def zero_bytes(parameters: float, *, stage: int, world: int) -> float:
    """Bytes of model states on each of ``world`` devices; each stage shares out one thing more."""
    shared_from = ((3, 2), (2, 2), (1, 12))
    weights, gradients, states = (size / world if stage >= first else size for first, size in shared_from)
    return parameters * (weights + gradients + states)


def zero_volume(parameters: float, *, stage: int) -> float:
    """Elements each device sends in a step: reduce-scatter and all-gather, at stage 3 one all-gather more."""
    return parameters * (3 if stage == 3 else 2)
