"""Extractive question answering: the answer is a span of the context, or there is none (SQuAD v1.1 and v2.0)."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.config.schema import RunConfig
from toolkit.data import windows
from toolkit.data.batch import Batch
from toolkit.data.examples import Labels
from toolkit.data.labelled import Sample
from toolkit.tasks import metrics
from toolkit.tasks.finetune import DOUBTFUL, Finetune, Rows
from toolkit.tasks.task import summed_loss


class SpanQA(Finetune):
    """Long contexts are read in windows; the best span of all windows is the answer."""

    models = "MODEL_FOR_QUESTION_ANSWERING_MAPPING"
    label_names = ("start", "end")
    outputs = ("start_logits", "end_logits")

    @classmethod
    def encode(cls, config: RunConfig, tokenizer: Any, examples: list[Any]) -> Iterator[Sample]:
        """A window a sample; its label is the first and the last token of the answer, or twice [CLS]."""
        for example, cuts in zip(examples, _windows(config, tokenizer, examples), strict=True):
            answers = [(start, text) for text, start in example.answers]
            for cut in cuts:
                yield Sample([(cut.input_ids, cut.token_type_ids)], windows.answer_span(cut, answers))

    @classmethod
    def warnings(cls, config: RunConfig, tokenizer: Any, examples: list[Any], labels: Labels) -> Iterator[str]:
        """Answers that no prediction can be."""
        length, longest = config.data.max_length, config.task.max_answer
        answered = [example for example in examples if example.answers]
        cuts = _windows(config, tokenizer, answered)
        number = Counter(_out_of_reach(e, some, longest) for e, some in zip(answered, cuts, strict=True))
        for reason, what in {
            "cut": f"are whole in no window of data.max_length={length}. Set a larger one, or a smaller task.stride",
            "long": f"have more tokens than predictions may (task.max_answer={longest}). Set a larger one",
            "inside": "begin or end where no token does, so no prediction is theirs exactly. Set another tokenizer",
        }.items():
            if number[reason] > DOUBTFUL * len(answered):
                yield f"{number[reason]:,} of {len(answered):,} answers {what}."

    def count(self, batch: Batch) -> int:
        return int((batch["index"] >= 0).sum())

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """The mean of the two cross-entropies, of the first and of the last token."""
        first, last = (_without_padding(outputs[name], batch) for name in self.outputs)
        return {"loss": (summed_loss(first, batch["labels"][:, 0]) + summed_loss(last, batch["labels"][:, 1])) / 2}

    def rows(self, outputs: Batch, batch: Batch) -> NDArray[Any]:
        """[samples, 2, length]: logits of the first and of the last token."""
        return torch.stack([_without_padding(outputs[name], batch) for name in self.outputs], 1).cpu().numpy()

    def scores(self, split: str, said: Rows) -> dict[str, float]:
        """SQuAD's, and the best F1 that a threshold on "no answer" gives, as the official script reports it."""
        decoded = self._decoded(split, said)
        golds = {e.id: [text for text, _ in e.answers] for e in self.examples(split) if e.id in decoded}
        found = metrics.squad({key: d.text for key, d in decoded.items()}, golds)
        if self.config.task.null_answers:
            differences = {key: d.null_score_difference for key, d in decoded.items()}
            f1 = {key: metrics.token_f1(d.answer, golds[key]) for key, d in decoded.items()}
            best = windows.best_threshold(differences, f1, {key: bool(texts) for key, texts in golds.items()})
            found |= {"best_f1": best.score, "best_f1_threshold": best.threshold}
        return found

    def _decoded(self, split: str, said: Rows) -> dict[str, windows.Decoded]:
        """The answer to each question all windows of which were read, by its id."""
        task, cuts = self.config.task, self._cuts(split)
        first = np.cumsum([0, *map(len, cuts)])  # a window is a sample
        decoded = {}
        for number, example in enumerate(self.examples(split)):
            mine = range(first[number], first[number + 1])
            if all(i in said for i in mine):
                starts, ends = zip(*(said[i] for i in mine), strict=True)
                decoded[example.id] = windows.decode(
                    cuts[number], starts, ends, example.context,
                    n_best=task.n_best, max_answer=task.max_answer, null_answers=task.null_answers,
                )  # fmt: skip
        return decoded

    @lru_cache(maxsize=4)  # noqa: B019 - one task a run
    def _cuts(self, split: str) -> list[list[windows.Window]]:
        return _windows(self.config, self.tokenizer, self.examples(split))

    def files(self, split: str, said: Rows, labelled: bool) -> Mapping[str, str]:
        """The answer of each question by its id, as SQuAD's scripts and servers read it; n best, odds of no answer."""
        decoded = self._decoded(split, said)
        n_best = {key: [{"text": t, "probability": p} for t, p in d.n_best] for key, d in decoded.items()}
        texts: dict[str, Any] = {"json": {key: d.text for key, d in decoded.items()}, "nbest.json": n_best}
        if self.config.task.null_answers:
            odds = {key: d.null_score_difference for key, d in decoded.items()}
            texts["null_odds.json"] = {key: odd if math.isfinite(odd) else 1e9 for key, odd in odds.items()}
        return {suffix: json.dumps(tree, indent=1, ensure_ascii=False) + "\n" for suffix, tree in texts.items()}


def _out_of_reach(example: Any, cuts: list[windows.Window], longest: int) -> str | None:
    answers = [(start, text) for text, start in example.answers]
    spans = [(cut, *span) for cut in cuts if (span := windows.answer_span(cut, answers)) != (0, 0)]
    if not spans:
        return "cut"
    if min(last - first for _, first, last in spans) >= longest:
        return "long"
    ends = [(cut.spans[first - cut.offset][0], cut.spans[last - cut.offset][1]) for cut, first, last in spans]
    texts = {text.strip() for _, text in answers}
    return None if any(example.context[start:end] in texts for start, end in ends) else "inside"


def _windows(config: RunConfig, tokenizer: Any, examples: list[Any]) -> list[list[windows.Window]]:
    return windows.windows(
        tokenizer,
        [e.question for e in examples],
        [e.context for e in examples],
        max_length=config.data.max_length,
        max_question=config.task.max_question,
        stride=config.task.stride,
    )


def _without_padding(logits: Tensor, batch: Batch) -> Tensor:
    """No answer begins in the padding, of which another layout has another number."""
    return logits.float().masked_fill(batch["attention_mask"] == 0, -torch.inf)
