"""What a model learns: its data, its model, its losses and metrics; one file per task."""

from typing import Any


def build_task(run: Any) -> Any:
    """The task named by ``task.kind``, its data prepared."""
    from toolkit.tasks.pretrain import Pretrain
    from toolkit.tasks.translate import Translate

    return {"pretrain": Pretrain, "translate": Translate}[run.config.task.kind](run)
