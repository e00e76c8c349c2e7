"""Sentence pairs for translation as a data set: token ids mapped from disk, and the batches made of them.

    data = Translations(prepared.path / "train", pad=0, start=0)
    data.source(7)                      # token ids, special tokens included
    data[keys]                          # one micro-batch

A batch holds input_ids and attention_mask [pairs, source], decoder_input_ids and labels [pairs, target].
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.data.aligned import SIDES
from toolkit.data.arrays import Mapped, Ragged
from toolkit.data.batch import IGNORED, Batch, padded, tensors
from toolkit.data.order import Keys


@dataclass(frozen=True)
class Translations(Mapped):
    """The pairs of train, eval or test, padded to the longest of a batch, or to ``width``."""

    path: Path
    pad: int
    start: int  # what the decoder begins with
    width: int = 0

    full = False

    def __len__(self) -> int:
        return len(self._sides["source"])

    @cached_property
    def _sides(self) -> dict[str, Ragged]:
        return {side: Ragged(self.path / side) for side in SIDES}

    def source(self, index: int) -> NDArray[Any]:
        return self._sides["source"].row("id", index)

    def target(self, index: int) -> NDArray[Any]:
        return self._sides["target"].row("id", index)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each pair's longer side."""
        return np.maximum(*(self._sides[side].lengths for side in SIDES))

    @cached_property
    def texts(self) -> list[tuple[str, str]]:
        """Sources and references as they were read; not kept for training pairs."""
        return [tuple(pair) for pair in json.loads((self.path / "texts.json").read_text())]

    def __getitem__(self, keys: Keys) -> Batch:
        """No pair at all becomes one whose labels count nothing: every rank has its forward."""
        chosen = [index for index in keys[:, 1].tolist() if index >= 0]
        sources = [self.source(i) for i in chosen or [0]]
        targets = [self._predicted(i) for i in chosen or [0]]
        long, wide = (max(self.width, *map(len, rows), 1) for rows in (sources, targets))
        labels = padded(targets, IGNORED, wide)
        shifted = np.roll(labels, 1, axis=1)
        shifted[:, 0] = self.start
        mask = padded([np.ones(len(s)) for s in sources], 0, long)
        if not chosen:
            labels[:] = IGNORED
            mask[:, 1:] = 0
        return tensors(
            input_ids=padded(sources, self.pad, long),
            attention_mask=mask,
            decoder_input_ids=np.where(shifted == IGNORED, self.pad, shifted),
            labels=labels,
        )

    def _predicted(self, index: int) -> NDArray[Any]:
        """BERT's tokenizer begins a text with the [CLS] that the decoder is started with: it is not to be predicted."""
        target = self.target(index)
        return target[1:] if len(target) and target[0] == self.start else target
