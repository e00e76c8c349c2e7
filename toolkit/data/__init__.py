"""Text to masked batches: sources -> documents -> sentences -> token ids -> chunks -> pairs -> batches.

    prepared = prepare(config)
    dataset = PairDataset(prepared, config.data, config.task.objective, config.seed, "train")
    batches = train_batches(
        dataset, start_sample=0, global_size=256, micro_size=16, rank=0, world=1, workers=1
    )

Names load on first use, so preparing imports no torch before it needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.data.audit import format_audit
    from toolkit.data.loader import eval_batches, train_batches
    from toolkit.data.pairs import PairDataset
    from toolkit.data.prepared import Prepared, prepare, require

__all__ = ["PairDataset", "Prepared", "eval_batches", "format_audit", "prepare", "require", "train_batches"]

_HOMES = {
    "PairDataset": "pairs",
    "Prepared": "prepared",
    "eval_batches": "loader",
    "format_audit": "audit",
    "prepare": "prepared",
    "require": "prepared",
    "train_batches": "loader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
