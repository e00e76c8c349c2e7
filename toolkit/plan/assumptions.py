"""What a plan cannot know and therefore assumes: every such number, with where it comes from, and in words.

print(*told(machine, "cuda"), sep="\\n")
"""

from toolkit.config import Machine

# Share of the data sheet's rate that a step's matrix products reach. DeepSpeed's BERT-large: 64 of a V100's 125 TFLOP/s
# at length 128, 53 at 512 (its page on the fastest BERT training, 2020); without tensor cores it is nearer to it.
EFFICIENCY = {"fp32": 0.7, "tf32": 0.45, "bf16": 0.45, "fp16": 0.45}
LINK_EFFICIENCY = 0.8  # of links, of PCIe and of drives: headers, latency, rings that are not full
OVERLAP = 0.8  # share of the backward pass behind which overlap_comm, or a prefetch, can hide communication
CONTEXT_GIB = 0.75  # of a GPU: CUDA's context, cuBLAS's workspace, NCCL's buffers
SLACK = 0.03  # of what PyTorch allocates: blocks that do not fit together
HOST_GBS = 100.0  # GB/s of a node's memory while the optimizer runs on its CPUs
ADAM_BYTES = 32  # that a CPU's Adam reads and writes for each parameter: weight, gradient, two moments, weight to send


def host_gbs(machine: Machine, device: str) -> float:
    """GB/s of a node's memory: where the ranks run on its CPUs, it is known as theirs."""
    return machine.bandwidth_gbs * machine.devices_per_node if device == "cpu" and machine.bandwidth_gbs else HOST_GBS


def told(machine: Machine, device: str) -> list[str]:
    """The sentences that stand below a plan."""
    rates = ", ".join(f"{dtype} {share:.0%}" for dtype, share in (machine.efficiency or EFFICIENCY).items())
    whose = f"of the sheet's rate, links {LINK_EFFICIENCY:.0%}"
    if machine.measured:
        whose = f"of their rate and links all of theirs, {machine.source}"
    hidden = "no computing hides" if device == "cpu" else f"{OVERLAP:.0%} of the backward pass can hide"
    return [
        f"Matrix products reach {rates} {whose}; {hidden} communication.",
        f"A GPU holds {CONTEXT_GIB} GiB besides tensors, the allocator {SLACK:.0%} more than it is asked for; host "
        f"memory {host_gbs(machine, device):.4g} GB/s a node.",
        "Every sequence is as long as data.max_length and has all its predictions; pipe stages take equally long.",
    ]
