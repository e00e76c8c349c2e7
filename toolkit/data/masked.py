"""Masked text, in pairs of segments or alone, as BERT's create_pretraining_data.py makes it, drawn anew each epoch.

    dataset = MaskedText(prepared, config.data, "mlm_nsp", config.seed, "train")
    sample = dataset.sample(epoch=0, index=5)
    batch = dataset[np.array([[0, 5]])]         # tensors of fixed shapes

Every choice is a function of (seed, split, epoch, index): never of rank, worker or order.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import Data
from toolkit.data.batch import IGNORED, Batch, padded, tensors
from toolkit.data.corpus import SPLITS, Corpus, room
from toolkit.data.order import Keys, generator, shuffled
from toolkit.data.prepared import Mapped, Prepared, open_columns

Ids = NDArray[np.integer[Any]]
Segments = tuple[Ids, Ids, int]  # two runs of tokens, the second empty without a pair, and their label
AUDITED = 2000  # samples of epoch 0, in training order


class Masked(NamedTuple):
    """One sequence without padding."""

    input_ids: NDArray[np.int64]  # [CLS] A [SEP] B [SEP], masked; or [CLS] A [SEP]
    first_length: int  # tokens of type 0: [CLS] A [SEP]
    positions: NDArray[np.int64]  # of the predictions, ascending
    labels: Ids  # what stood there
    pair_label: int  # next sentence: 1 = random; sentence order: 1 = swapped; -100: no pair
    cut: int  # tokens that did not fit


class MaskedText(Mapped):
    """The samples of one split."""

    full = True

    def __init__(self, prepared: Prepared, data: Data, objective: str, seed: int, split: str = "train") -> None:
        self.prepared, self.data, self.objective, self.seed, self.split = prepared, data, objective, seed, split
        self.room = room(data, objective)
        self.static = split == "eval" or not data.dynamic
        self.corpus = Corpus(prepared.path.parent / prepared.facts["corpus"])

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.chunks["first"])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.full(len(self), self.data.max_length)

    @cached_property
    def chunks(self) -> dict[str, NDArray[Any]]:
        """The sample index: columns document (its rank in the split), first, count, target."""
        return open_columns(self.prepared.path / f"{self.split}_chunks.arrow")

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """The documents of the split, ascending."""
        return open_columns(self.prepared.path / f"{self.split}_documents.arrow")["document"]

    @cached_property
    def regular(self) -> NDArray[np.int64]:
        """Tokens that masking may draw."""
        return np.flatnonzero(self.corpus.vocabulary["regular"])

    def bounds(self, index: int) -> tuple[int, int]:
        """The first sentence of a chunk, and the one after its last."""
        first = int(self.chunks["first"][index])
        return first, first + int(self.chunks["count"][index])

    def sample(self, epoch: int, index: int) -> Masked:
        """Sample ``index`` as it is drawn in ``epoch``; evaluation and static data always draw epoch 0."""
        rng = generator(self.seed, SPLITS.index(self.split), 0 if self.static else epoch, index)
        draw_segments = self._pair if self.objective == "mlm_nsp" else self._chunk
        one, two, label = draw_segments(index, rng)
        first, second = truncate(one, two, self.room, rng)
        cut = len(one) + len(two) - len(first) - len(second)
        if self.objective == "sop" and label == 1:
            first, second = second, first
        special = self.corpus.facts["special"]
        ids = np.empty(len(first) + len(second) + (3 if len(second) else 2), np.int64)
        ids[0], ids[len(first) + 1], ids[-1] = special["cls"], special["sep"], special["sep"]
        ids[1 : len(first) + 1] = first
        ids[len(first) + 2 : -1] = second
        positions = self._positions(first, second, rng)
        labels = ids[positions]
        # 80 % [MASK], 10 % a random token, 10 % unchanged (BERT, appendix A.1)
        draw = rng.random(len(labels))
        random = self.regular[rng.integers(len(self.regular), size=len(labels))]
        ids[positions] = np.where(draw < 0.8, special["mask"], np.where(draw < 0.9, random, labels))
        return Masked(ids, len(first) + 2, positions, labels, label, cut)

    def _pair(self, index: int, rng: np.random.Generator) -> Segments:
        """A: sentences of a chunk. B: the chunk's other ones (0), or ones of another document (1)."""
        chunks, corpus = self.chunks, self.corpus
        first, end = self.bounds(index)
        count = end - first
        middle = first + (int(rng.integers(1, count)) if count > 1 else 1)
        a = corpus.run(first, middle)
        if count > 1 and rng.random() < 0.5:
            return a, corpus.run(middle, end), 0
        other = int(rng.integers(len(self.members) - 1))
        other += other >= chunks["document"][index]  # every other document of the split is equally likely
        wanted = max(1, int(chunks["target"][index]) - len(a))
        # Its sentences from a random one on, up to so many tokens or its end
        low, high = (int(bound) for bound in corpus.documents[self.members[other] :][:2])
        bounds = corpus.sentences[int(rng.integers(low, high)) : high + 1]
        last = min(int(np.searchsorted(bounds, bounds[0] + wanted)), len(bounds) - 1)
        return a, corpus.tokens[bounds[0] : bounds[last]], 1

    def _chunk(self, index: int, rng: np.random.Generator) -> Segments:
        """A chunk; for sentence order in two parts, to be swapped (1) or not (0): a single sentence is cut within."""
        first, end = self.bounds(index)
        tokens, bounds = self.corpus.run(first, end), self.corpus.sentences
        if self.objective == "mlm":
            return tokens, tokens[:0], IGNORED
        if end - first > 1:
            middle = int(bounds[first + rng.integers(1, end - first)] - bounds[first])
        else:
            middle = int(rng.integers(1, len(tokens)))
        return tokens[:middle], tokens[middle:], int(rng.random() < 0.5)

    def _positions(self, first: Ids, second: Ids, rng: np.random.Generator) -> NDArray[np.int64]:
        """Where to predict: ``mask_rate`` of the tokens between the special ones, at least one."""
        length = len(first) + len(second)
        number = min(self.data.max_predictions, max(1, round(self.data.mask_rate * length)))
        if self.data.whole_word:
            heads = ~self.corpus.vocabulary["piece"][np.concatenate([first, second])]
            heads[0] = heads[len(first) % length] = True  # truncation may have cut a word's head off
            chosen = whole_words(np.flatnonzero(heads), length, number, self.data.max_predictions, rng)
        else:
            chosen = np.sort(rng.permutation(length)[:number])
        return chosen + 1 + (chosen >= len(first))  # past [CLS], and past the first [SEP]

    def empty(self) -> Masked:
        """A sample that predicts nothing and counts for nothing: it fills up the last batches."""
        special, none = self.corpus.facts["special"], np.empty(0, np.int64)
        return Masked(np.array([special["cls"], special["sep"]]), 2, none, none, IGNORED, 0)

    def __getitem__(self, keys: Keys) -> Batch:
        return self.collate([self.sample(*key) if key[1] >= 0 else self.empty() for key in keys.tolist()])

    def collate(self, samples: Sequence[Masked]) -> Batch:
        """int64 tensors, whatever the samples' lengths: input_ids, attention_mask, token_type_ids [samples,
        max_length]; mlm_positions (padding 0), mlm_labels (padding -100) [samples, max_predictions]; nsp_labels
        [samples]."""
        length, predictions = self.data.max_length, self.data.max_predictions
        types = [np.arange(len(s.input_ids)) >= s.first_length for s in samples]
        return tensors(
            input_ids=padded([s.input_ids for s in samples], self.corpus.facts["special"]["pad"], length),
            attention_mask=padded([np.ones(len(s.input_ids)) for s in samples], 0, length),
            token_type_ids=padded(types, 0, length),
            mlm_positions=padded([s.positions for s in samples], 0, predictions),
            mlm_labels=padded([s.labels for s in samples], IGNORED, predictions),
            nsp_labels=np.array([s.pair_label for s in samples]),
        )


def truncate(first: Ids, second: Ids, room: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Both parts cut to ``room`` tokens together, as if one token after the other were removed from the longer part
    (the second when equal), at its front or its back by the toss of a coin."""
    excess = len(first) + len(second) - room
    if excess <= 0:
        return first, second
    levelling = min(excess, abs(len(first) - len(second)))
    from_first = (excess - levelling) // 2 + (levelling if len(first) > len(second) else 0)
    parts = []
    for part, number in ((first, from_first), (second, excess - from_first)):
        front = int(rng.binomial(number, 0.5))
        parts.append(part[front : len(part) - (number - front)])
    return parts[0], parts[1]


def whole_words(
    heads: NDArray[np.int64], length: int, number: int, most: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Up to ``number`` positions that make up whole words, in random order of words; a word that no longer fits is
    passed over. If none fits, the shortest word, up to ``most`` of its pieces."""
    words = [range(*bounds) for bounds in pairwise([*heads.tolist(), length])]
    chosen: list[int] = []
    for word in rng.permutation(len(words)).tolist():
        if len(chosen) + len(words[word]) <= number:
            chosen += words[word]
        if len(chosen) == number:
            break
    if not chosen:
        chosen += min(words, key=len)[:most]
    return np.sort(np.array(chosen, np.int64))


def sampled(dataset: MaskedText) -> dict[str, Any]:
    """For the audit: what some samples of epoch 0 are like."""
    width = dataset.data.max_length
    order = shuffled(len(dataset), dataset.seed, 0, np.arange(min(AUDITED, len(dataset))))
    samples = [dataset.sample(0, index) for index in order.tolist()]
    lengths = np.array([len(sample.input_ids) for sample in samples])
    tokens = int(sum(len(s.input_ids) - 2 - (s.pair_label >= 0) for s in samples))
    labels = [sample.pair_label for sample in samples if sample.pair_label >= 0]
    histogram, edges = np.histogram(lengths, bins=8, range=(0, width))
    return {
        "samples": len(samples),
        "pair_label_1_share": float(np.mean(labels)) if labels else None,
        "mask_rate": sum(len(s.positions) for s in samples) / tokens,
        "truncated_share": float(np.mean([s.cut > 0 for s in samples])),
        "tokens_cut_share": sum(s.cut for s in samples) / (tokens + sum(s.cut for s in samples)),
        "short_share": float(np.mean(lengths < width / 2)),
        "padding_share": float(1 - lengths.sum() / (len(samples) * width)),
        "length_histogram": {f"{int(edge)}": int(n) for edge, n in zip(edges[1:], histogram, strict=True)},
    }
