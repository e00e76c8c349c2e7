"""Any number of labels for a text or a pair: data.columns.labels=[toxic,obscene], lists, or texts with separators."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from toolkit.data.batch import Batch
from toolkit.tasks import metrics
from toolkit.tasks.classify import Classify
from toolkit.tasks.finetune import Rows


class MultiLabel(Classify):
    """A sigmoid and a binary cross-entropy for each label."""

    problem = "multi_label_classification"
    float_labels = True

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        logits = outputs["logits"].float()
        # without any label in a split its samples hold one number each, which is none
        labels = batch["labels"].view(len(logits), -1).expand_as(logits)
        real = ~labels.isnan()
        return {"loss": binary_cross_entropy_with_logits(logits[real], labels[real], reduction="sum")}

    def decide(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """Whether each label applies [samples, labels]."""
        return np.stack(list(self.chances(logits).values()), 1) >= self.config.task.threshold

    def named(self, label: Any) -> str:
        mine = (name for name, has in zip(self.names, label, strict=True) if has)
        return (self.config.data.label_separator or ",").join(mine)

    def chances(self, logits: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        found = torch.from_numpy(logits).sigmoid().numpy()
        return {f"probability_{name}": found[:, i] for i, name in enumerate(self.names)}

    def scores(self, split: str, said: Rows) -> dict[str, float]:
        gold, logits = np.array([self.examples(split)[i].label for i in said]), np.stack(list(said.values()))
        found = metrics.several(self.decide(logits), logits, gold)
        return {name: found[name] for name in self.config.task.metrics}
