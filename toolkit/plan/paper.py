"""What the ZeRO paper says that its stages need and send (Rajbhandari et al. 2020, arXiv 1910.02054, sections 5 and 7).

zero_bytes(7.5e9, stage=1, world=64) / 1e9        # 31.4 GB
zero_volume(7.5e9, stage=3)                       # elements that a device sends in a step

Sixteen bytes a parameter: 2 of weights, 2 of gradients in half precision, 12 of Adam (weights, momentum, variance in
fp32). What DeepSpeed 0.19.8 holds differs, see toolkit/plan/memory.py.
"""


def zero_bytes(parameters: float, *, stage: int, world: int, optimizer: float = 12) -> float:
    """Bytes of model states on each of ``world`` devices; ``optimizer`` is the paper's K."""
    return parameters * zero_bytes_per_parameter(stage=stage, world=world, optimizer=optimizer)


def zero_bytes_per_parameter(*, stage: int, world: int, optimizer: float = 12) -> float:
    """Each stage shares out one thing more: optimizer states, gradients, weights."""
    weights, gradients, states = (
        size / world if stage >= first else size for first, size in ((3, 2), (2, 2), (1, optimizer))
    )
    return weights + gradients + states


def zero_largest(memory: float, *, stage: int, world: int, optimizer: float = 12) -> float:
    """The most parameters whose states fit into ``memory`` bytes of each device."""
    return memory / zero_bytes_per_parameter(stage=stage, world=world, optimizer=optimizer)


def zero_volume(parameters: float, *, stage: int) -> float:
    """Elements each device sends in a step: reduce-scatter and all-gather, at stage 3 one all-gather more."""
    return parameters * (3 if stage == 3 else 2)
