"""Where what a layer computed waits for the backward pass: on the device, on the host, or nowhere (vDNN, recompute).

    apply(model.bert.encoder.layer, recompute=False, offload=True)

Rhu et al., vDNN (https://arxiv.org/abs/1602.08124): only the layer at work has its activations on the device.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def apply(layers: Iterable[nn.Module], *, recompute: bool, offload: bool) -> None:
    """Let ``layers`` (transformers' GradientCheckpointingLayer) keep only their inputs, and what they keep on the host;
    a layer is called with tensors, or with one tuple of them as in a pipeline."""
    for layer in layers if recompute or offload else ():
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = partial(_run, recompute, offload)  # type: ignore[assignment]


def _run(recompute: bool, offload: bool, forward: Callable[..., Any], *args: Any) -> Any:
    if len(args) == 1 and isinstance(args[0], tuple):
        # checkpoint() saves the tensors among its arguments; within a tuple it would not see them.
        whole, args = forward, args[0]
        forward = lambda *tensors: whole(tensors)  # noqa: E731
    with _on_host(args) if offload else nullcontext():
        # Its inputs are saved under the hooks that are set here; those within the layer, under its own.
        return checkpoint(forward, *args, use_reentrant=False) if recompute else forward(*args)


def _on_host(args: tuple[Any, ...]) -> AbstractContextManager[None]:
    """As PyTorch's save_on_cpu, but weights and what all layers share (the mask) stay, nothing is moved twice, and
    strides are kept, which compiled code insists on. On CUDA the copies go to pinned memory and the host does not wait
    for them; they take their turn on the stream that computes."""
    shared = {_storage(a) for a in args if isinstance(a, Tensor) and not a.requires_grad}
    moved: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def pack(tensor: Tensor) -> Any:
        base = tensor if tensor._base is None else tensor._base
        # A weight is returned itself: ZeRO 3 empties it after the forward pass and gathers it for the backward one.
        if isinstance(base, nn.Parameter) or _storage(tensor) in shared:
            return tensor
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        alive, packed = moved.get(key, (lambda: None, None))
        if alive() is None:  # else it is this very storage, not another one at its address
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            packed = tensor.device, host.copy_(tensor, non_blocking=True)
            moved[key] = (weakref.ref(storage), packed)
        return packed

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0], non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
