"""Labelled examples as token ids on disk, and the batches drawn from them, padded no further than needed.

    data = Encoded(folder / "train", pad_id=0)
    data.collate(np.array([3, 5, -1]))    # tensors; -1 is an empty sample that nothing counts

A sample is one sequence, or as many as it has choices. Arrays are memory-mapped: ranks of a host share them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.data.arrays import Mapped, Ragged, RaggedWriter
from toolkit.data.batch import IGNORED, Batch, tensors
from toolkit.data.order import Indices, Keys

MULTIPLE = 8  # of which widths are: what tensor cores like


@dataclass(frozen=True)
class Sample:
    """``sequences`` (ids, types) of one sample; ``labels`` one number, or one per token of its only sequence."""

    sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    labels: Sequence[float]


def write(folder: Path, samples: Iterator[Sample], *, float_labels: bool = False) -> None:
    """Write the samples: their sequences a row each, their labels a row for each sample."""
    folder.mkdir(parents=True)
    sequences = RaggedWriter(folder / "sequences", ids=np.int32, types=np.int8)
    labels = RaggedWriter(folder / "labels", value=np.float32 if float_labels else np.int32)
    for sample in samples:
        for ids, types in sample.sequences:
            sequences.append(ids=ids, types=types)
        labels.append(value=sample.labels)
    sequences.seal()
    labels.seal()


@dataclass(frozen=True)
class Encoded(Mapped):
    """One split. ``choices`` sequences a sample (1 for all tasks but multiple choice); labels ``per_token`` or not.

    With ``width`` all batches have one shape, for a pipeline.
    """

    folder: Path
    pad_id: int
    choices: int = 1
    per_token: bool = False
    width: int | None = None

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, keys: Keys) -> Batch:
        return self.collate(keys[:, 1])

    @property
    def full(self) -> bool:
        return self.width is not None

    @cached_property
    def sequences(self) -> Ragged:
        return Ragged(self.folder / "sequences")

    @cached_property
    def _labels(self) -> Ragged:
        return Ragged(self.folder / "labels")

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample's longest sequence, int64 [samples]."""
        lengths: NDArray[np.int64] = self.sequences.lengths.reshape(-1, self.choices).max(1)
        return lengths

    def collate(self, indices: Indices) -> Batch:
        """``input_ids``, ``attention_mask``, ``token_type_ids`` int64 [samples, length] (of choices: [samples, choices,
        length]), ``labels`` [samples], [samples, labels] or [samples, length], ``index`` [samples]. What has no label
        is -100, or NaN where labels are floats."""
        longest = int(self.lengths[indices[indices >= 0]].max(initial=1))
        width = self.width or -(-longest // MULTIPLE) * MULTIPLE
        shape = (len(indices), self.choices, width)
        ids, mask, types = np.full(shape, self.pad_id), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        mask[indices < 0, :, 0] = 1  # attention over nothing is no number
        for row, index in enumerate(indices.tolist()):
            for choice in range(self.choices if index >= 0 else 0):
                sequence = index * self.choices + choice
                some = self.sequences.row("ids", sequence)
                ids[row, choice, : len(some)] = some
                types[row, choice, : len(some)] = self.sequences.row("types", sequence)
                mask[row, choice, : len(some)] = 1
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        if self.choices == 1:
            arrays = {name: array[:, 0] for name, array in arrays.items()}
        return tensors(**arrays, labels=self._label_rows(indices, width), index=indices)

    def _label_rows(self, indices: Indices, width: int) -> NDArray[Any]:
        number = width if self.per_token else int(self._labels.ends[1])
        floats = self._labels.columns["value"].dtype.kind == "f"
        found = np.full((len(indices), number), np.nan if floats else IGNORED, np.float32 if floats else np.int64)
        for row, index in enumerate(indices.tolist()):
            if index >= 0:
                mine = self._labels.row("value", index)
                found[row, : len(mine)] = mine
        return found[:, 0] if number == 1 else found
