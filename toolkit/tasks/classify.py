"""A label of a whole example: of a text or a pair a class or a score, of a prompt the ending that follows it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import mse_loss

from toolkit.config.schema import RunConfig
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.labelled import Sample
from toolkit.run.directory import Run
from toolkit.tasks import metrics
from toolkit.tasks.finetune import Finetune, Rows


class Classify(Finetune):
    """One of several classes."""

    models = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"
    problem: str | None = "single_label_classification"

    @classmethod
    def encode(cls, config: RunConfig, tokenizer: Any, examples: list[Any]) -> Iterator[Sample]:
        """[CLS] text [SEP] pair [SEP]; what is too long loses the end of its longer part."""
        pairs = bool(examples) and examples[0].text_pair is not None
        texts = ([e.text for e in examples], [e.text_pair for e in examples] if pairs else None)
        found = tokenizer(*texts, truncation=True, max_length=config.data.max_length, return_token_type_ids=True)
        nothing = math.nan if cls.float_labels else IGNORED
        for example, ids, types in zip(examples, found["input_ids"], found["token_type_ids"], strict=True):
            label = nothing if example.label is None else example.label
            yield Sample([(ids, types)], label if isinstance(label, tuple) else [label])

    def decide(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """Predictions [samples] of logits [samples, outputs]."""
        return np.asarray(logits.argmax(-1))

    def named(self, label: Any) -> str:
        return self.names[int(label)]

    def chances(self, logits: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Columns of probabilities [samples] beside the predictions."""
        return {"probability": torch.from_numpy(logits).softmax(-1).max(-1).values.numpy()}

    def texts(self, example: Any, decided: Any) -> dict[str, str]:
        """What a person judges the prediction by."""
        return {"text": example.text, "text_pair": example.text_pair or ""}

    def scores(self, split: str, said: Rows) -> dict[str, float]:
        gold = np.array([self.examples(split)[i].label for i in said])
        decided = self.decide(np.stack(list(said.values())))
        names, positive = self.config.task.metrics, self.prepared.facts["positive"]
        undefined, constant = metrics.undefined(names, decided, gold), np.ptp(decided) == 0
        if undefined or (self.float_labels and constant):
            count = f"; undefined, {', '.join(undefined)} count as 0" if undefined else ""
            self.warn_once(
                f"{split}: all {'predictions' if constant else 'labels'} are the same{count}. Train longer, at another "
                "learning rate, or hold out other rows."
            )
        return metrics.scores(names, decided, gold, len(self.names), positive)

    def files(self, split: str, said: Rows, labelled: bool) -> Mapping[str, str]:
        """``index`` and ``prediction`` as GLUE's server takes them; beside known labels, these and the texts."""
        logits = np.stack(list(said.values()))
        columns = self.chances(logits)
        rows: list[dict[str, Any]] = []
        for place, (index, decided) in enumerate(zip(said, self.decide(logits), strict=True)):
            example = self.examples(split)[index]
            row = {"index": example.id, "prediction": self.named(decided)}
            row |= {"label": self.named(example.label)} if labelled else {}
            if labelled or len(columns) > 1:
                row |= {name: values[place] for name, values in columns.items()}  # written exactly
            rows.append(row | (self.texts(example, decided) if labelled else {}))
        # cells hold neither tabs nor ends of lines
        lines: list[Iterable[Any]] = [rows[0], *(row.values() for row in rows)]
        return {"tsv": "".join("\t".join(" ".join(str(c).split()) for c in line) + "\n" for line in lines)}


class Regress(Classify):
    """A number; the loss is the squared error."""

    problem = "regression"
    float_labels = True
    label_names = ("score",)

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        real = ~batch["labels"].isnan()
        return {"loss": mse_loss(outputs["logits"].float()[:, 0][real], batch["labels"][real], reduction="sum")}

    def decide(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        return logits[:, 0]

    def named(self, label: Any) -> str:
        return str(label)

    def chances(self, logits: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        return {}


class Choose(Classify):
    """Each ending makes a sequence with the prompt; the softmax is over the endings, known by their numbers."""

    models = "MODEL_FOR_MULTIPLE_CHOICE_MAPPING"
    problem = None
    label_names = ("choice",)

    def __init__(self, run: Run) -> None:
        self.choices = len(run.config.data.columns.endings)
        super().__init__(run)

    @classmethod
    def encode(cls, config: RunConfig, tokenizer: Any, examples: list[Any]) -> Iterator[Sample]:
        for example in examples:
            texts = [example.prompt] * len(example.endings), list(example.endings)
            found = tokenizer(*texts, truncation=True, max_length=config.data.max_length, return_token_type_ids=True)
            sequences = list(zip(found["input_ids"], found["token_type_ids"], strict=True))
            yield Sample(sequences, [IGNORED if example.label is None else example.label])

    def named(self, label: Any) -> str:
        return str(int(label))

    def texts(self, example: Any, decided: Any) -> dict[str, str]:
        return {"prompt": example.prompt, "chosen": example.endings[int(decided)]}
