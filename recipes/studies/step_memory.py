"""What a training step keeps in memory, measured, and what each way to keep less of it costs in time.

    row = measure(engine, batches)                       # peaks of this rank's second step, and its seconds
    with Tracker(engine) as tracker: engine.train_batch(batches)
    tracker.peak["activations"]                          # bytes

On CUDA the allocator tells the peak. On a CPU every tensor is counted from birth to death by category, and what
a configuration offloads counts as the host's though both are the same memory here.
"""

import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toolkit.config.schema import RunConfig
from toolkit.config.units import MIB
from toolkit.deepspeed.facts import Facts
from toolkit.report import figures
from toolkit.run.table import grouped, table

DEVICE = ("weights", "gradients", "optimizer", "activations", "workspace")
HOST = ("moved", "offloaded")  # activations; optimizer states, weights and the buffers of NVMe
ACTIVATIONS = ("none", "recompute", "offload_cpu", "recompute_offload")
LAYOUTS = (
    ("stage0", "none"), ("stage1", "none"), ("stage2", "none"), ("stage3", "none"),
    ("stage2", "cpu"), ("stage3", "cpu_params"), ("stage3", "nvme"),
)  # fmt: skip


def measure(engine: Any, batches: Iterator[Any]) -> dict[str, float]:
    """A warm-up step, a timed one, and on a CPU one whose tensors are counted: seconds, and peaks in MiB."""
    engine.train_batch(batches)
    cuda = engine.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    engine.train_batch(batches)
    if cuda:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"step_seconds": seconds, "peak_mib": torch.cuda.max_memory_allocated() / MIB}
    seconds = time.perf_counter() - start
    with Tracker(engine.ds) as tracker:
        engine.train_batch(batches)
    sizes = {"peak": sum(tracker.at_peak.values()), **tracker.at_peak, "saved": tracker.peak["activations"]}
    sizes |= {name: tracker.peak[name] for name in HOST}
    return {"step_seconds": seconds, **{f"{name}_mib": size / MIB for name, size in sizes.items()}}


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors, each storage once, while a step of ``ds`` (DeepSpeed's engine) runs on a CPU.

    ``peak`` holds the largest number of bytes of each category, ``at_peak`` those of DEVICE when their sum was largest.
    Activations are what an operation saves for the backward pass, also within a recomputation, but no weights.
    """

    def __init__(self, ds: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ds = ds
        self.peak: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self._live: Counter[str] = Counter()
        self._category: dict[int, str] = {}

    def __enter__(self) -> "Tracker":
        for category, tensors in state(self.ds).items():
            self._count(category, tensors)
        self._step, self.ds._take_model_step = self.ds._take_model_step, self._before_step  # of both kinds of engine
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p: self._count("gradients", _gradients([p])))
            for p in self.ds.module.parameters()
            if p.requires_grad  # the positions of an encoder-decoder do not
        ]
        self._enter_hooks, tracker = saved_tensors_hooks.__enter__, self
        # Only the innermost hooks are asked, so each pair is watched as it is entered; the outermost is our own.
        saved_tensors_hooks.__enter__ = lambda hooks: tracker._watch(hooks)  # type: ignore[method-assign]
        self._outermost = saved_tensors_hooks(lambda t: t if _is_weight(t) else t.detach(), lambda t: t)
        self._outermost.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._outermost.__exit__(*error)
        saved_tensors_hooks.__enter__ = self._enter_hooks  # type: ignore[method-assign]
        for handle in self._handles:
            handle.remove()
        self.ds._take_model_step = self._step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count("workspace", (t for t in tree_leaves(result) if isinstance(t, Tensor)))
        return result

    def _watch(self, hooks: saved_tensors_hooks) -> None:
        def pack(tensor: Tensor) -> Any:
            packed = hooks.pack_hook(tensor)
            if not _is_weight(tensor):
                self._count("activations", [tensor])
                self._count("moved", (t for t in tree_leaves(packed) if isinstance(t, Tensor)))
            return packed

        torch._C._autograd._push_saved_tensors_default_hooks(pack, hooks.unpack_hook)

    def _before_step(self, *args: Any, **kwargs: Any) -> Any:
        for category, tensors in state(self.ds).items():
            self._count(category, tensors)
        return self._step(*args, **kwargs)

    def _count(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Add storages not seen before; those known as workspace get their better name."""
        grown = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            known = self._category.get(key)
            if known is None:
                weakref.finalize(storage, self._forget, key, size)
            elif known != "workspace" or category == "workspace":
                continue
            else:
                self._live[known] -= size
            self._category[key] = category
            self._live[category] += size
            grown = True
        if not grown:  # most operations make no storage
            return
        if self._live[category] > self.peak[category]:
            self.peak[category] = self._live[category]
        on_device = {name: self._live[name] for name in DEVICE}
        if sum(on_device.values()) > sum(self.at_peak.values()):
            self.at_peak = on_device

    def _forget(self, key: int, size: int) -> None:
        self._live[self._category.pop(key)] -= size


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def state(ds: Any) -> dict[str, list[Tensor]]:
    """The tensors that DeepSpeed's engine ``ds`` holds between operations, by category."""
    facts = Facts(ds.config, 1, "cpu")
    optimizer = ds.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(ds.module.parameters())
    masters = _tensors(v for k, v in vars(optimizer).items() if "fp32" in k)
    states = [*masters, *_tensors(inner.state.values())]
    gradients = _gradients(masters) + _tensors(v for k, v in vars(optimizer).items() if "grad" in k)
    shards = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    found = {
        # The model's first: in fp32 the optimizer of ZeRO 0 has the weights themselves.
        "weights": [*parameters, *(shards if facts.param_offload == "none" else [])],
        "gradients": _gradients(parameters) + (gradients if facts.offload == "none" else []),
        "optimizer": states if facts.offload == "none" else [],
        "offloaded": _buffers(optimizer, parameters),
    }
    found["offloaded"] += (shards if facts.param_offload != "none" else []) + (
        [*states, *gradients] if facts.offload != "none" else []
    )
    return found


def sizes(ds: Any) -> dict[str, int]:
    """Bytes of :func:`state`, each storage once, under the first category that has it."""
    seen: set[int] = set()
    found: Counter[str] = Counter()
    for category, tensors in state(ds).items():
        for storage in (t.untyped_storage() for t in tensors):
            found[category] += 0 if storage._cdata in seen else storage.nbytes()
            seen.add(storage._cdata)
    return dict(found)


def _gradients(parameters: list[Any]) -> list[Tensor]:
    """Those with memory of their own; slices of DeepSpeed's buckets are workspace."""
    found = [p.grad for p in parameters if p.grad is not None]
    return [g for g in found if g.untyped_storage().nbytes() == g.nbytes]


def _buffers(optimizer: Any, parameters: list[Any]) -> list[Tensor]:
    """What DeepSpeed reads from and writes to NVMe with."""
    swappers = [getattr(optimizer, "optimizer_swapper", None), *(getattr(p, "nvme_swapper", None) for p in parameters)]
    found = {id(s): s for s in swappers if s is not None}.values()
    return _tensors([s.buffers if hasattr(s, "buffers") else s.swap_buffer_manager.all_buffers for s in found])


def _tensors(tree: Iterable[Any]) -> list[Tensor]:
    return [t for t in tree_leaves(list(tree)) if isinstance(t, Tensor)]


def chosen(config: RunConfig) -> dict[str, str]:
    """The options of zero, offload and activation that a configuration is made of."""
    zero, kept = config.deepspeed.get("zero_optimization", {}), config.activation
    optimizer, parameters = ((zero.get(f"offload_{key}") or {}).get("device", "none") for key in ("optimizer", "param"))
    recompute = "recompute_offload" if kept.offload else "recompute"
    return {
        "zero": f"stage{zero.get('stage', 0)}",
        "offload": "cpu_params" if (optimizer, parameters) == ("cpu", "cpu") else optimizer,
        "activation": recompute if kept.recompute else "offload_cpu" if kept.offload else "none",
    }


def combinations(config: Any) -> list[dict[str, str]]:
    """The options of each run to compare: every layout with every ``activation``, or those of ``config``."""
    own, compared = chosen(config), config.memory
    layouts = LAYOUTS if compared.layouts == "all" else [(own["zero"], own["offload"])]
    activations = ACTIVATIONS if compared.activations == "all" else [own["activation"]]
    return [{"zero": z, "offload": o, "activation": a} for z, o in layouts for a in activations]


def overrides(options: Mapping[str, str]) -> list[str]:
    return [f"{group}={option}" for group, option in options.items()]


def label(options: Mapping[str, str]) -> dict[str, str]:
    """``{"layout": "stage3 + nvme", "activation": "recompute"}`` of one of ``combinations``."""
    layout = [options["zero"], options["offload"]]
    return {"layout": " + ".join(o for o in layout if o != "none"), "activation": options["activation"]}


def listing(rows: list[dict[str, Any]]) -> Table:
    """What fits a terminal: a line per combination."""
    forms = {
        "layout": "", "activation": "", "step_seconds": ".3f", "peak_mib": ",.1f", "saved_mib": ",.1f",
        "moved_mib": ",.1f",
    }  # fmt: skip
    names = [name for name in forms if name in rows[0]]
    columns = {name.removesuffix("_mib").replace("_seconds", " s"): forms[name] for name in names}
    cells = grouped([row[name] for name in names] for row in rows)
    return table(columns, cells, "MiB of the rank that needs most, and seconds of a step")


def plot(rows: list[dict[str, Any]], stem: Path, title: str) -> None:
    """``stem``.png and .svg: memory by category on the left, step time beside it, a bar per combination."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.26 * len(rows)), layout="constrained")
    memory, seconds = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    layouts = list(dict.fromkeys(r["layout"] for r in rows))
    places = [-i - 0.7 * layouts.index(row["layout"]) for i, row in enumerate(rows)]  # a gap between layouts
    categories = [c for c in DEVICE if f"{c}_mib" in rows[0]] or ["peak"]
    left = [0.0] * len(rows)
    for i, category in enumerate(categories):
        sizes = [row[f"{category}_mib"] for row in rows]
        memory.barh(places, sizes, left=left, label=category, color=f"C{i}", height=0.8)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    memory.set_xlabel("MiB on the device at the step's peak")
    memory.set_yticks(places, [f"{r['layout']}   {r['activation']}" for r in rows])
    seconds.barh(places, [r["step_seconds"] for r in rows], color="0.6", height=0.8)
    seconds.set_xlabel("seconds per step")
    for axes in (memory, seconds):
        axes.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    figures.save(figure, stem)
