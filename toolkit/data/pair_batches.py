"""Micro-batches of sentence pairs: the same global batches in every layout, each rank its share.

    maker = PairBatches(config, special, replica)
    maker.train(prepared.splits["train"], step=0)      # for ever
    maker.held_out(prepared.splits["eval"], limit=64)  # each pair once over all ranks

A batch holds input_ids and attention_mask [pairs, source], decoder_input_ids and labels [pairs, target].
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.config.schema import RunConfig
from toolkit.data.grouping import Batches, share
from toolkit.data.parallel import Split

Batch = dict[str, Tensor]
IGNORED = -100


class PairBatches:
    """``special`` are the ids pad, eos and start of :mod:`toolkit.models.seq2seq`."""

    def __init__(self, config: RunConfig, special: Any, replica: Any) -> None:
        self.config, self.special, self.replica = config, special, replica

    def order(self, split: Split) -> Batches:
        """Which pairs each optimizer step takes."""
        batch = self.config.batch
        return Batches(
            split.lengths,
            self.config.seed,
            size=batch.global_size,
            tokens=batch.tokens,
            grouped=self.config.data.group_by_length,
        )

    def train(self, split: Split, step: int) -> Iterator[Batch]:
        """This rank's micro-batches from the one after ``step`` optimizer steps."""
        batch, replica = self.config.batch, self.replica
        parts = batch.global_size // batch.micro_size
        for _, indices in self.order(split).from_step(step):
            for first in range(0, parts, replica.world):
                yield self._collate(split, share(indices, parts=parts, part=first + replica.rank).tolist())

    def held_out(self, split: Split, limit: int | None) -> Iterator[Batch]:
        """Each of the first ``limit`` pairs (None: all) once over all ranks, equally many batches on each rank."""
        for batches in dealt(split.lengths[:limit], self.config.batch.micro_size, self.replica.world):
            yield self._collate(split, batches[self.replica.rank])

    def _collate(self, split: Split, indices: Sequence[int]) -> Batch:
        """Padded to the longest. No pair at all becomes one whose labels count nothing: every rank has its forward."""
        pad, start = self.special.pad, self.special.start
        chosen = list(indices) or [0]
        sources = [split.source(i) for i in chosen]
        targets = [_after(split.target(i), start) for i in chosen]
        fixed = self.config.data.max_length if self.config.data.padding == "max_length" else 0
        input_ids, labels = _padded(sources, pad, fixed), _padded(targets, IGNORED, fixed)
        attention_mask = _padded([np.ones(len(s)) for s in sources], 0, fixed)
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = start
        if not len(indices):
            labels.fill_(IGNORED)
            attention_mask[:, 1:] = 0
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": shifted.masked_fill(shifted == IGNORED, pad),
            "labels": labels,
        }


def dealt(lengths: Any, size: int, world: int) -> Iterator[list[list[int]]]:
    """Lists of up to ``size`` samples of like length, one for each rank at a time; [] for ranks that are left over."""
    order = np.argsort(-lengths, kind="stable")
    lists = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    for first in range(0, len(lists), world):
        some = lists[first : first + world]
        yield some + [[]] * (world - len(some))


def _after(target: Any, start: int) -> Any:
    """BERT's tokenizer begins a text with the [CLS] that the decoder is started with: it is not to be predicted."""
    return target[1:] if len(target) and target[0] == start else target


def _padded(rows: Sequence[Any], value: int, width: int) -> Tensor:
    result = torch.full((len(rows), max(width, *map(len, rows), 1)), value, dtype=torch.long)
    for row, ids in zip(result, rows, strict=True):
        row[: len(ids)] = torch.from_numpy(np.asarray(ids, np.int64))
    return result
