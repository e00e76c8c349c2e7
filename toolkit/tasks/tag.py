"""A tag for each word: named entities. The label stands on the word's first token, as in BERT's paper.

A sentence is read as people write it, its words joined by ``data.joiner``, so that an export tags plain text alike.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from toolkit.config.schema import RunConfig
from toolkit.data import schemes
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.examples import Labels
from toolkit.data.labelled import Sample
from toolkit.data.tokenizer import encoder
from toolkit.tasks import metrics
from toolkit.tasks.finetune import DOUBTFUL, Finetune, Rows

# Letters of scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


@dataclass(frozen=True)
class Sentence:
    """As the model reads it. ``token`` is the position of the token that holds a word's first character, by the word's
    number; without those that are cut off at data.max_length, or that the tokenizer drops."""

    input_ids: list[int]
    token_type_ids: list[int]
    token: dict[int, int]


class Tag(Finetune):
    """Entities are judged whole, by seqeval."""

    models = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"
    per_token = True

    @classmethod
    def encode(cls, config: RunConfig, tokenizer: Any, examples: list[Any]) -> Iterator[Sample]:
        for example, read in zip(examples, _sentences(config, tokenizer, examples), strict=True):
            tags = example.tags or [0] * len(example.words)  # without tags too, a label marks where one is asked for
            labels = [IGNORED] * len(read.input_ids)
            for word in reversed(read.token):  # of several in a token, the first has the label
                labels[read.token[word]] = tags[word]
            yield Sample([(read.input_ids, read.token_type_ids)], labels)

    @classmethod
    def warnings(cls, config: RunConfig, tokenizer: Any, examples: list[Any], labels: Labels) -> Iterator[str]:
        yield from _misspelt(config.task.scheme, examples, labels)
        words = [word for example in examples for word in example.words]
        unspaced = sum(bool(_UNSPACED.search(word)) for word in words) / len(words)
        if config.data.joiner and unspaced > 0.5:
            yield (
                f"{unspaced:.0%} of the words are of a script without spaces, but are read with blanks between them. "
                "Set data.joiner='' to read them as people write them."
            )
        wrong = tagged = 0
        for example, read in zip(examples, _sentences(config, tokenizer, examples), strict=True):
            gold = [labels[tag] for tag in example.tags]
            learnt = {position: gold[word] for word, position in reversed(read.token.items())}
            wrong += sum(a != b for a, b in zip(gold, _of_words(read, learnt, len(gold)), strict=True))
            tagged += sum(tag != "O" for tag in gold)
        if wrong > DOUBTFUL * tagged:
            yield (
                f"{wrong:,} words never get their tag ({tagged:,} are tagged): they are beyond data.max_length="
                f"{config.data.max_length}, are dropped by the tokenizer, or share a token with the word before. Set a "
                "larger data.max_length, or another tokenizer.path."
            )

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
            read = self._sentences(split)[index]
            asked = zip(sorted(set(read.token.values())), (self.names[tag] for tag in tags), strict=True)
            named.append(_of_words(read, dict(asked), len(self.examples(split)[index].words)))
        return named

    @lru_cache(maxsize=4)  # noqa: B019 - one task a run
    def _sentences(self, split: str) -> list[Sentence]:
        return _sentences(self.config, self.tokenizer, self.examples(split))

    def files(self, split: str, said: Rows, labelled: bool) -> Mapping[str, str]:
        """A word, its tag and the prediction a line, in IOB2, as conlleval reads them: white space in one is '_'."""
        lines = []
        for index, tags in zip(said, self._named(split, said), strict=True):
            example = self.examples(split)[index]
            gold = [[self.names[tag] for tag in example.tags]] if labelled else []
            rows = zip(example.words, *gold, tags, strict=True)
            lines += [*(" ".join(re.sub(r"\s+", "_", cell) or "_" for cell in row) for row in rows), ""]
        return {"conll": "\n".join(lines) + "\n"}


def _misspelt(scheme: str, examples: list[Any], labels: Labels) -> Iterator[str]:
    number: Counter[str] = Counter()
    for example in examples:
        number.update(example.misspelt)
    if number[scheme]:
        entities = sum(labels[tag][0] == "B" for example in examples for tag in example.tags)
        best = min(schemes.LETTERS, key=lambda other: number[other])
        fits = f"Set task.scheme={best}, which fits {entities - number[best]:,}" if best != scheme else "Correct them"
        first = " ".join(next(example for example in examples if example.misspelt.get(scheme)).words)
        yield (
            f"{number[scheme]:,} of {entities:,} entities are not as task.scheme={scheme} spells them, the first in "
            f"{first[:50]!r}; they are read as conlleval reads them. {fits}."
        )


def _sentences(config: RunConfig, tokenizer: Any, examples: list[Any]) -> list[Sentence]:
    backend, joiner = encoder(tokenizer), config.data.joiner
    backend.enable_truncation(config.data.max_length)
    found = backend.encode_batch([joiner.join(example.words) for example in examples])
    return [_sentence(encoding, example.words, joiner) for encoding, example in zip(found, examples, strict=True)]


def _sentence(encoding: Any, words: list[str], joiner: str) -> Sentence:
    of: list[int] = []  # each character's word; -1: none's
    for number, word in enumerate(words):
        of += [number] * len(word) + [-1] * len(joiner)
    token: dict[int, int] = {}
    for position, (begin, end) in enumerate(encoding.offsets):
        for number in of[begin:end]:
            token.setdefault(number, position)
    token.pop(-1, None)
    return Sentence(encoding.ids, encoding.type_ids, token)


def _of_words(read: Sentence, tags: Mapping[int, str], words: int) -> list[str]:
    """The tags of words from those of tokens; a token's other words go on with the entity of its first."""
    found, before = ["O"] * words, None
    for word, position in read.token.items():
        tag = tags[position]
        found[word] = f"I-{tag[2:]}" if position == before and tag != "O" else tag
        before = position
    return found
