"""What a model learns: its data, its model, its losses and metrics; one file per kind of task."""

from importlib import import_module
from typing import Any

from toolkit.config.kinds import KINDS
from toolkit.config.schema import RunConfig


def kind(config: RunConfig) -> Any:
    """The class that ``task.kind`` names."""
    module, name = KINDS[config.task.kind].task.split(":")
    return getattr(import_module(module), name)


def build_task(run: Any) -> Any:
    """The run's task, its data prepared."""
    return kind(run.config)(run)
