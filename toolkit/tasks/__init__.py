"""What a model learns: its data, its model, its losses and metrics; one file per kind of task."""

from importlib import import_module

from toolkit.config.kinds import KINDS
from toolkit.run.directory import Run
from toolkit.tasks.task import Task


def task_class(kind: str) -> type[Task]:
    """The class of a kind of task."""
    module, name = KINDS[kind].task.split(":")
    found: type[Task] = getattr(import_module(module), name)
    return found


def build_task(run: Run) -> Task:
    """The run's task, its data prepared."""
    return task_class(run.config.task.kind)(run)
