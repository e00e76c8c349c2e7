"""Hugging Face models: from a configuration or from weights, dense or partitioned by ZeRO 3."""

from collections.abc import Iterator
from typing import Any, Protocol

from toolkit.data.batch import Batch


class Described(Protocol):
    """What a task says of its model, see toolkit/tasks/task.py."""

    inputs: tuple[str, ...]
    hf_config: Any
    model_class: Any
    new_head: bool
    choices: int

    def train_batches(self, start_sample: int) -> Iterator[Batch]:
        """Micro-batches, of which one is timed."""
