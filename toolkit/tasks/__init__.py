"""What a model learns: its data, its model, its losses and metrics; one file per kind of task."""

from importlib import import_module
from typing import Any

KINDS = {
    "pretrain": ("pretrain", "Pretrain"),
    "classify": ("classify", "Classify"),
    "regress": ("classify", "Regress"),
    "tag": ("tag", "Tag"),
    "span_qa": ("span_qa", "SpanQA"),
    "choose": ("choose", "Choose"),
    "translate": ("translate", "Translate"),
}


def build_task(run: Any) -> Any:
    """The task that ``task.kind`` names, its data prepared."""
    module, name = KINDS[run.config.task.kind]
    return getattr(import_module(f"toolkit.tasks.{module}"), name)(run)
