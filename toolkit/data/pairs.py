"""Masked sentence pairs, as BERT's create_pretraining_data.py makes them, drawn anew for each epoch.

    dataset = PairDataset(prepared, config.data, "mlm_nsp", config.seed, "train")
    sample = dataset.sample(epoch=0, index=5)
    batch = dataset.collate([sample])           # tensors of fixed shapes

Every choice is a function of (seed, split, epoch, index): never of rank, worker or order.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolkit.config.schema import Data
from toolkit.data.chunks import SPLITS, rule
from toolkit.data.draws import generator
from toolkit.data.prepared import Prepared

if TYPE_CHECKING:
    from torch import Tensor

Ids = NDArray[np.integer[Any]]
IGNORED = -100  # the label that cross_entropy leaves out


class Sample(NamedTuple):
    """One sequence without padding."""

    input_ids: NDArray[np.int64]  # [CLS] A [SEP] B [SEP], masked; or [CLS] A [SEP]
    first_length: int  # tokens of type 0: [CLS] A [SEP]
    positions: NDArray[np.int64]  # of the predictions, ascending
    labels: Ids  # what stood there
    pair_label: int  # next sentence: 1 = random; sentence order: 1 = swapped; -100: no pair
    cut: int  # tokens that did not fit


class Segments(NamedTuple):
    """Two runs of tokens, the second empty without a pair."""

    first: Ids
    second: Ids
    label: int


class PairDataset:
    """The samples of one split; ``(epoch, index)`` is the key that a DataLoader's sampler gives."""

    def __init__(self, prepared: Prepared, data: Data, objective: str, seed: int, split: str = "train") -> None:
        self.prepared, self.data, self.objective, self.seed, self.split = (
            prepared,
            data,
            objective,
            seed,
            split,
        )
        self.room = rule(data, objective, seed).room
        self.static = split == "eval" or not data.dynamic

    def __len__(self) -> int:
        """Samples per epoch."""
        return self.prepared.train_samples if self.split == "train" else self.prepared.eval_samples

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.sample(*key)

    def __getstate__(self) -> dict[str, Any]:
        cached = {"chunks", "members", "regular"}  # each worker maps them itself
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    @cached_property
    def chunks(self) -> dict[str, NDArray[Any]]:
        return self.prepared.chunks(self.split)

    @cached_property
    def members(self) -> NDArray[np.int64]:
        return self.prepared.members(self.split)

    @cached_property
    def regular(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.prepared.vocabulary["regular"])

    def sample(self, epoch: int, index: int) -> Sample:
        """Sample ``index`` as it is drawn in ``epoch``; evaluation and static data always draw epoch 0."""
        rng = generator(self.seed, SPLITS.index(self.split), 0 if self.static else epoch, index)
        drawn = SEGMENTS[self.objective](self, rng, index)
        first, second = truncate(drawn.first, drawn.second, self.room, rng)
        cut = len(drawn.first) + len(drawn.second) - len(first) - len(second)
        if self.objective == "sop" and drawn.label == 1:
            first, second = second, first
        special = self.prepared.special
        ids = np.empty(len(first) + len(second) + (3 if len(second) else 2), np.int64)
        ids[0], ids[len(first) + 1], ids[-1] = special.cls, special.sep, special.sep
        ids[1 : len(first) + 1] = first
        ids[len(first) + 2 : -1] = second
        positions = self._positions(first, second, rng)
        labels = ids[positions]
        ids[positions] = self._replaced(labels, rng)
        return Sample(ids, len(first) + 2, positions, labels, drawn.label, cut)

    def _positions(self, first: Ids, second: Ids, rng: np.random.Generator) -> NDArray[np.int64]:
        """Where to predict: ``mask_rate`` of the tokens between the special ones, at least one."""
        length = len(first) + len(second)
        number = min(self.data.max_predictions, max(1, round(self.data.mask_rate * length)))
        if self.data.whole_word:
            heads = ~self.prepared.vocabulary["piece"][np.concatenate([first, second])]
            heads[0] = heads[len(first) % length] = True  # truncation may have cut a word's head off
            chosen = whole_words(np.flatnonzero(heads), length, number, self.data.max_predictions, rng)
        else:
            chosen = np.sort(rng.permutation(length)[:number])
        return chosen + 1 + (chosen >= len(first))  # past [CLS], and past the first [SEP]

    def _replaced(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """80 % [MASK], 10 % a random token, 10 % unchanged (BERT, appendix A.1)."""
        draw = rng.random(len(labels))
        random = self.regular[rng.integers(len(self.regular), size=len(labels))]
        return np.where(draw < 0.8, self.prepared.special.mask, np.where(draw < 0.9, random, labels))

    def empty(self) -> Sample:
        """A sample that predicts nothing and counts for nothing: it fills up the last batches."""
        special = self.prepared.special
        none = np.empty(0, np.int64)
        return Sample(np.array([special.cls, special.sep]), 2, none, none, IGNORED, 0)

    def collate(self, samples: list[Sample]) -> dict[str, "Tensor"]:
        """int64 tensors, whatever the samples' lengths: input_ids, attention_mask, token_type_ids
        [samples, max_length]; mlm_positions (padding 0), mlm_labels (padding -100)
        [samples, max_predictions]; nsp_labels [samples].
        """
        import torch

        shape, predictions = (len(samples), self.data.max_length), (len(samples), self.data.max_predictions)
        arrays = {
            "input_ids": np.full(shape, self.prepared.pad_id),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.zeros(shape, np.int64),
            "mlm_positions": np.zeros(predictions, np.int64),
            "mlm_labels": np.full(predictions, IGNORED),
            "nsp_labels": np.array([sample.pair_label for sample in samples]),
        }
        for row, sample in enumerate(samples):
            length, masked = len(sample.input_ids), len(sample.positions)
            arrays["input_ids"][row, :length] = sample.input_ids
            arrays["attention_mask"][row, :length] = 1
            arrays["token_type_ids"][row, sample.first_length : length] = 1
            arrays["mlm_positions"][row, :masked] = sample.positions
            arrays["mlm_labels"][row, :masked] = sample.labels
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def truncate(first: Ids, second: Ids, room: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Both parts cut to ``room`` tokens together, as if one token after the other were removed from the
    longer part (the second when equal), at its front or its back by the toss of a coin.
    """
    excess = len(first) + len(second) - room
    if excess <= 0:
        return first, second
    levelling = min(excess, abs(len(first) - len(second)))
    from_first = (excess - levelling) // 2 + (levelling if len(first) > len(second) else 0)
    return _trim(first, from_first, rng), _trim(second, excess - from_first, rng)


def _trim(part: Ids, number: int, rng: np.random.Generator) -> Ids:
    front = int(rng.binomial(number, 0.5))
    return part[front : len(part) - (number - front)]


def whole_words(
    heads: NDArray[np.int64], length: int, number: int, most: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Up to ``number`` positions that make up whole words, in random order of words; a word that no
    longer fits is passed over. If none fits, the shortest word, up to ``most`` of its pieces.
    """
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


def _next_sentence(dataset: PairDataset, rng: np.random.Generator, index: int) -> Segments:
    """A: sentences of a chunk. B: the chunk's other ones (0), or ones of another document (1)."""
    chunks, prepared = dataset.chunks, dataset.prepared
    first, count = int(chunks["first"][index]), int(chunks["count"][index])
    end = first + (int(rng.integers(1, count)) if count > 1 else 1)
    a = prepared.tokens[prepared.sentences[first] : prepared.sentences[end]]
    if count > 1 and rng.random() < 0.5:
        return Segments(a, prepared.tokens[prepared.sentences[end] : prepared.sentences[first + count]], 0)
    other = int(rng.integers(len(dataset.members) - 1))
    other += other >= chunks["document"][index]  # every other document of the split is equally likely
    wanted = max(1, int(chunks["target"][index]) - len(a))
    return Segments(a, _run_of_sentences(prepared, int(dataset.members[other]), wanted, rng), 1)


def _run_of_sentences(prepared: Prepared, document: int, wanted: int, rng: np.random.Generator) -> Ids:
    """Sentences of a document from a random one on, up to ``wanted`` tokens or its end."""
    low, high = int(prepared.documents[document]), int(prepared.documents[document + 1])
    bounds = prepared.sentences[int(rng.integers(low, high)) : high + 1]
    last = min(int(np.searchsorted(bounds, bounds[0] + wanted)), len(bounds) - 1)
    return prepared.tokens[bounds[0] : bounds[last]]


def _single(dataset: PairDataset, rng: np.random.Generator, index: int) -> Segments:
    """The whole chunk as one segment."""
    chunks, bounds = dataset.chunks, dataset.prepared.sentences
    first, count = int(chunks["first"][index]), int(chunks["count"][index])
    tokens = dataset.prepared.tokens[bounds[first] : bounds[first + count]]
    return Segments(tokens, tokens[:0], IGNORED)


def _sentence_order(dataset: PairDataset, rng: np.random.Generator, index: int) -> Segments:
    """Two consecutive parts of a chunk, to be swapped (1) or not (0); one sentence is cut within."""
    chunks, bounds = dataset.chunks, dataset.prepared.sentences
    first, count = int(chunks["first"][index]), int(chunks["count"][index])
    start, end = int(bounds[first]), int(bounds[first + count])
    middle = int(bounds[first + rng.integers(1, count)]) if count > 1 else int(rng.integers(start + 1, end))
    tokens = dataset.prepared.tokens
    return Segments(tokens[start:middle], tokens[middle:end], int(rng.random() < 0.5))


SEGMENTS: dict[str, Callable[[PairDataset, np.random.Generator, int], Segments]] = {
    "mlm_nsp": _next_sentence,
    "mlm": _single,
    "sop": _sentence_order,
}
