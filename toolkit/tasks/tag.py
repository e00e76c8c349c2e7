"""A tag for each word: named entities. The label stands on the first sub-word, as in BERT's paper."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.config.schema import RunConfig
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.labelled import Sample
from toolkit.tasks import metrics
from toolkit.tasks.finetune import Finetune, Rows


class Tag(Finetune):
    """Entities are judged whole, by seqeval."""

    models = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"
    per_token = True

    @classmethod
    def encode(cls, config: RunConfig, tokenizer: Any, examples: list[Any]) -> Iterator[Sample]:
        for example in examples:
            found = _tokens(config, tokenizer, example.words)
            tags = example.tags or [0] * len(example.words)  # without tags too, a label marks where one is asked for
            labels, before = [], None
            for word in found.word_ids():
                labels.append(IGNORED if word is None or word == before else tags[word])
                before = word
            yield Sample([(found["input_ids"], found["token_type_ids"])], labels)

    def rows(self, outputs: Batch, batch: Batch) -> list[Any]:
        """The tags that are asked for, of each sentence."""
        decided, labels = outputs["logits"].argmax(-1).cpu().numpy(), batch["labels"].cpu().numpy()
        return [d[asked != IGNORED] for d, asked in zip(decided, labels, strict=True)]

    def scores(self, split: str, said: Rows) -> dict[str, float]:
        gold = [[self.names[t] for t in self.examples(split)[i].tags] for i in said]
        found = metrics.tagging(self._named(split, said), gold)
        return {name: found[name] for name in self.config.task.metrics}

    def _named(self, split: str, said: Rows) -> list[list[str]]:
        """A tag for every word: those cut off at data.max_length, or of no token, are outside."""
        named = []
        for index, tags in said.items():
            words = self.examples(split)[index].words
            asked = {word for word in _tokens(self.config, self.tokenizer, words).word_ids() if word is not None}
            whole = ["O"] * len(words)
            for word, tag in zip(sorted(asked), tags.tolist(), strict=True):
                whole[word] = self.names[tag]
            named.append(whole)
        return named

    def files(self, split: str, said: Rows, labelled: bool) -> Mapping[str, str]:
        """A word, its tag and the prediction a line, as conlleval reads them."""
        lines = []
        for index, tags in zip(said, self._named(split, said), strict=True):
            example = self.examples(split)[index]
            gold = [self.names[t] for t in example.tags] if labelled else [None] * len(tags)
            lines += [" ".join(filter(None, row)) for row in zip(example.words, gold, tags, strict=True)] + [""]
        return {"conll": "\n".join(lines) + "\n"}


def _tokens(config: RunConfig, tokenizer: Any, words: list[str]) -> Any:
    if _reads_spaces(tokenizer):
        words = [*words[:1], *(word and f" {word}" for word in words[1:])]
    options = {"truncation": True, "max_length": config.data.max_length, "return_token_type_ids": True}
    return tokenizer(words, is_split_into_words=True, **options)


@functools.lru_cache(1)
def _reads_spaces(tokenizer: Any) -> bool:
    """Whether words without the space before them are other tokens, as those of RoBERTa, GPT-2 and ModernBERT are."""
    whole, words = tokenizer("a a"), tokenizer(["a", "a"], is_split_into_words=True)
    return bool(whole["input_ids"] != words["input_ids"])
