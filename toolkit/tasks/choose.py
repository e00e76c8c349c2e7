"""Multiple choice: which ending follows the prompt?"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from toolkit.config.schema import RunConfig
from toolkit.data.batch import IGNORED
from toolkit.data.labelled import Sample
from toolkit.run.directory import Run
from toolkit.tasks import metrics
from toolkit.tasks.finetune import Finetune, Rows, softmax, tsv


class Choose(Finetune):
    """Each ending makes a sequence with the prompt; the softmax is over the endings."""

    models = "MODEL_FOR_MULTIPLE_CHOICE_MAPPING"
    label_names = ("choice",)

    def __init__(self, run: Run) -> None:
        self.choices = len(run.config.data.columns.endings)
        super().__init__(run)

    @classmethod
    def encode(cls, config: RunConfig, tokenizer: Any, examples: list[Any]) -> Iterator[Sample]:
        for example in examples:
            found = tokenizer(
                [example.prompt] * len(example.endings),
                list(example.endings),
                truncation=True,
                max_length=config.data.max_length,
                return_token_type_ids=True,
            )
            sequences = list(zip(found["input_ids"], found["token_type_ids"], strict=True))
            yield Sample(sequences, [IGNORED if example.label is None else example.label])

    def scores(self, split: str, said: Rows) -> dict[str, float]:
        gold = np.array([self.examples(split)[i].label for i in said])
        return metrics.scores(self.config.task.metrics, np.stack(list(said.values())).argmax(-1), gold)

    def files(self, split: str, said: Rows, labelled: bool) -> Mapping[str, str]:
        """``index`` and ``prediction``, the number of the ending; beside known labels, these and the texts."""
        rows = []
        for index, logits in said.items():
            example, best = self.examples(split)[index], int(logits.argmax())
            known = [example.label, f"{softmax(logits)[best]:.3f}", example.prompt, example.endings[best]]
            rows.append([example.id, best, *(known if labelled else [])])
        header = ["index", "prediction", *(["label", "probability", "prompt", "chosen"] if labelled else [])]
        return {"tsv": tsv(header, rows)}
