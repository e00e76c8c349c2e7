"""What a model learns: its data, its model, its losses and metrics; one file per kind of task."""

from importlib import import_module
from typing import Any

from toolkit.config.schema import RunConfig

KINDS = {
    "pretrain": ("pretrain", "Pretrain"),
    "classify": ("classify", "Classify"),
    "regress": ("classify", "Regress"),
    "tag": ("tag", "Tag"),
    "span_qa": ("span_qa", "SpanQA"),
    "choose": ("choose", "Choose"),
    "translate": ("translate", "Translate"),
    "linear": ("linear", "Linear"),
    "denoise": ("denoise", "Denoise"),
}


def kind(config: RunConfig) -> Any:
    """The class that ``task.kind`` names."""
    module, name = KINDS[config.task.kind]
    return getattr(import_module(f"toolkit.tasks.{module}"), name)


def build_task(run: Any) -> Any:
    """The run's task, its data prepared."""
    return kind(run.config)(run)
