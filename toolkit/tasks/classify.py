"""Single sentences and pairs: a class for each, or a score."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn.functional import mse_loss

from toolkit.config.schema import RunConfig
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.labelled import Sample
from toolkit.tasks import metrics
from toolkit.tasks.finetune import Finetune, Rows, softmax, tsv


class Sentences(Finetune):
    """What classification and regression share: one vector of outputs a sample."""

    models = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"

    @classmethod
    def encode(cls, config: RunConfig, tokenizer: Any, examples: list[Any]) -> Iterator[Sample]:
        """[CLS] text [SEP] pair [SEP]; what is too long loses the end of its longer part."""
        pairs = bool(examples) and examples[0].text_pair is not None
        texts = ([e.text for e in examples], [e.text_pair for e in examples] if pairs else None)
        found = tokenizer(*texts, truncation=True, max_length=config.data.max_length, return_token_type_ids=True)
        for example, ids, types in zip(examples, found["input_ids"], found["token_type_ids"], strict=True):
            nothing = math.nan if cls.float_labels else IGNORED
            label = nothing if example.label is None else example.label
            yield Sample([(ids, types)], [label])

    def scores(self, split: str, said: Rows) -> dict[str, float]:
        gold = np.array([self.examples(split)[i].label for i in said])
        decided = self.decide(np.stack(list(said.values())))
        return metrics.scores(self.config.task.metrics, decided, gold, len(self.names))

    def decide(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Predictions [samples] of logits [samples, outputs]."""
        raise NotImplementedError

    def named(self, value: Any) -> str:
        raise NotImplementedError

    def files(self, split: str, said: Rows, labelled: bool) -> Mapping[str, str]:
        """``index`` and ``prediction`` as GLUE's server takes them; beside known labels, these and the texts."""
        logits = np.stack(list(said.values()))
        rows = [self.examples(split)[i] for i in said]
        decided = [self.named(d) for d in self.decide(logits)]
        columns = {"index": [e.id for e in rows], "prediction": decided}
        if labelled:
            columns["label"] = [self.named(e.label) for e in rows]
            if logits.shape[-1] > 1:
                columns["probability"] = [f"{p:.3f}" for p in softmax(logits).max(-1)]
            columns |= {"text": [e.text for e in rows], "text_pair": [e.text_pair or "" for e in rows]}
        return {"tsv": tsv(list(columns), zip(*columns.values(), strict=True))}


class Classify(Sentences):
    """One of several classes."""

    def decide(self, logits: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(logits.argmax(-1))

    def named(self, value: Any) -> str:
        return self.names[int(value)]


class Regress(Sentences):
    """A number; the loss is the squared error."""

    float_labels = True
    label_names = ("score",)

    def count(self, batch: Batch) -> int:
        return int((~batch["labels"].isnan()).sum())

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        real = ~batch["labels"].isnan()
        return {"loss": mse_loss(outputs["logits"].float()[:, 0][real], batch["labels"][real], reduction="sum")}

    def decide(self, logits: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(logits[:, 0])

    def named(self, value: Any) -> str:
        return f"{float(value):.3f}"
