"""What a model learns: its data, its model, its losses and metrics; one file per task."""

from typing import Any


def build_task(run: Any) -> Any:
    """The task named by ``task.name``, its data prepared."""
    from toolkit.tasks.pretrain import Pretrain

    return {"pretrain": Pretrain}[run.config.task.name](run)
