"""What a plan cannot know and therefore assumes: every such number, with where it comes from, and in words.

print(*told(machine, "cuda", "bf16"), sep="\\n")
"""

from toolkit.config.schema import Dtype, Machine

# Share of the data sheet's rate that a step's matrix products reach. DeepSpeed's BERT-large: 64 of a V100's 125 TFLOP/s
# at length 128, 53 at 512 (its page on the fastest BERT training, 2020); without tensor cores it is nearer to it.
EFFICIENCY = {"fp32": 0.7, "tf32": 0.45, "bf16": 0.45, "fp16": 0.45}
# Microseconds that a product takes before it begins: a kernel's launch takes 2 to 4 (A. Gray, Getting started with CUDA
# graphs, NVIDIA 2019: 3.8 a kernel of 2.9), PyTorch's way there some more. `toolkit plan --calibrate` measures it
LAUNCH_US = 5.0
LINK_EFFICIENCY = 0.8  # of links, of PCIe and of drives: headers, latency, rings that are not full
OVERLAP = 0.8  # share of the backward pass behind which overlap_comm, or a prefetch, can hide communication
CONTEXT_GIB = 0.75  # of a GPU: CUDA's context, cuBLAS's workspace, NCCL's buffers
SLACK = 0.03  # of what PyTorch allocates: blocks that do not fit together
HOST_GBS = 100.0  # GB/s of a node's memory while the optimizer runs on its CPUs
ADAM_BYTES = 32  # that a CPU's Adam reads and writes for each parameter: weight, gradient, two moments, weight to send


def host_gbs(machine: Machine, device: str) -> float:
    """GB/s of a node's memory: where the ranks run on its CPUs, it is known as theirs."""
    return machine.bandwidth_gbs * machine.devices_per_node if device == "cpu" and machine.bandwidth_gbs else HOST_GBS


def efficiency(machine: Machine, dtype: Dtype) -> float:
    """Share of their rate that products reach: as measured, if need be in another type, else the usual one."""
    return machine.efficiency.get(dtype) or next(iter(machine.efficiency.values()), EFFICIENCY[dtype])


def launch_us(machine: Machine) -> float:
    return LAUNCH_US if machine.launch_us is None else machine.launch_us


def told(machine: Machine, device: str, dtype: Dtype) -> list[str]:
    """The sentences that stand below a plan."""
    known = ", ".join(key for key in machine.measured if key != "efficiency")
    but = f", but for what was measured ({known}; {machine.source})" if known else ""
    hidden = "no computing hides" if device == "cpu" else f"{OVERLAP:.0%} of the backward pass can hide"
    gpu = f"A GPU holds {CONTEXT_GIB} GiB besides tensors, the allocator {SLACK:.0%} more than it is asked for; "
    host = f"host memory {host_gbs(machine, device):.4g} GB/s a node."
    return [
        f"Matrix products reach {efficiency(machine, dtype):.0%} of their rate in {dtype}, links and drives "
        f"{LINK_EFFICIENCY:.0%} of theirs{but}; {hidden} communication.",
        f"A product takes {launch_us(machine):.3g} us to begin, then its arithmetic or its bytes, whichever is longer.",
        gpu + host if device != "cpu" else host.capitalize(),
        "Every sequence is as long as data.max_length and has all its predictions; pipe stages take equally long.",
    ]
