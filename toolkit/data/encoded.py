"""Labelled examples as token ids on disk, and the batches drawn from them, padded no further than needed.

    split = Encoded(folder / "train")
    split.collate(np.array([3, 5, -1]), pad_id=0)    # tensors; -1 is an empty sample that nothing counts

A sample is one sequence, or as many as it has choices. Arrays are memory-mapped: ranks of a host share them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.data.arrays import Spool, open_columns, seal
from toolkit.data.grouping import Batches, Indices, share

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label that cross_entropy leaves out
MULTIPLE = 8  # of which widths are: what tensor cores like


@dataclass(frozen=True)
class Sample:
    """``sequences`` (ids, types) of one sample; ``labels`` one number, or one per token of its only sequence."""

    sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    labels: Sequence[float]
    example: int  # which one it was made of: windows of one context share it


def write(folder: Path, samples: Iterator[Sample], *, float_labels: bool = False) -> None:
    """Write the samples as columns of flat arrays and the bounds between them."""
    folder.mkdir(parents=True)
    kinds = {"ids": np.int32, "types": np.int8, "labels": np.float32 if float_labels else np.int32}
    tokens = {name: Spool(folder / name, kind) for name, kind in kinds.items()}
    bounds = {name: Spool(folder / name, np.int64) for name in ("sequence_end", "label_end", "example")}
    ends = {"sequence_end": 0, "label_end": 0}
    for name in ends:
        bounds[name].append([0])
    for sample in samples:
        for ids, types in sample.sequences:
            tokens["ids"].append(ids)
            tokens["types"].append(types)
            ends["sequence_end"] += len(ids)
            bounds["sequence_end"].append([ends["sequence_end"]])
        tokens["labels"].append(sample.labels)
        ends["label_end"] += len(sample.labels)
        bounds["label_end"].append([ends["label_end"]])
        bounds["example"].append([sample.example])
    for name, spool in (tokens | bounds).items():
        seal(folder / f"{name}.arrow", {name: spool})


class Encoded:
    """One split. ``choices`` sequences a sample (1 for all tasks but multiple choice); labels ``per_token`` or not."""

    def __init__(self, folder: Path, *, choices: int = 1, per_token: bool = False) -> None:
        self.folder, self.choices, self.per_token = folder, choices, per_token

    def __len__(self) -> int:
        return len(self["example"])

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self._columns[column]

    @cached_property
    def _columns(self) -> dict[str, NDArray[Any]]:
        return {f.stem: open_columns(f)[f.stem] for f in self.folder.glob("*.arrow")}

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample's longest sequence, int64 [samples]."""
        lengths: NDArray[np.int64] = np.diff(self["sequence_end"]).reshape(-1, self.choices).max(1)
        return lengths

    def collate(self, indices: Indices, *, pad_id: int, width: int | None = None) -> "dict[str, Tensor]":
        """``input_ids``, ``attention_mask``, ``token_type_ids`` int64 [samples, length] (of choices: [samples, choices,
        length]), ``labels`` [samples], [samples, labels] or [samples, length], ``index`` [samples]. What has no label
        is -100, or NaN where labels are floats."""
        import torch

        longest = int(self.lengths[indices[indices >= 0]].max(initial=1))
        width = width or -(-longest // MULTIPLE) * MULTIPLE
        shape = (len(indices), self.choices, width)
        ids, mask, types = np.full(shape, pad_id), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        mask[indices < 0, :, 0] = 1  # attention over nothing is no number
        labels = self._labels(indices, width)
        for row, index in enumerate(indices.tolist()):
            for choice in range(self.choices if index >= 0 else 0):
                low, high = self["sequence_end"][index * self.choices + choice : index * self.choices + choice + 2]
                ids[row, choice, : high - low] = self["ids"][low:high]
                types[row, choice, : high - low] = self["types"][low:high]
                mask[row, choice, : high - low] = 1
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        if self.choices == 1:
            arrays = {name: array[:, 0] for name, array in arrays.items()}
        arrays |= {"labels": labels, "index": indices}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def _labels(self, indices: Indices, width: int) -> NDArray[Any]:
        ends, values = self["label_end"], self["labels"]
        number = width if self.per_token else int(ends[1])
        floats = values.dtype.kind == "f"
        found = np.full((len(indices), number), np.nan if floats else IGNORED, np.float32 if floats else np.int64)
        for row, index in enumerate(indices.tolist()):
            if index >= 0:
                mine = values[ends[index] : ends[index + 1]]
                found[row, : len(mine)] = mine
        return found[:, 0] if number == 1 else found


@dataclass(frozen=True)
class Split:
    """How a global batch is divided: this rank's micro-batches of each, over all copies of the model."""

    global_size: int
    micro_size: int
    rank: int
    world: int

    @property
    def parts(self) -> int:
        return self.global_size // self.micro_size

    def micro_batches(self, indices: Indices) -> Iterator[Indices]:
        """This rank's micro-batches of one step; one without samples has an empty one."""
        for part in range(self.rank, self.parts, self.world):
            mine = share(indices, parts=self.parts, part=part)
            yield mine if len(mine) else np.array([-1])


def train_batches(
    data: Encoded, order: Batches, split: Split, *, start_step: int, pad_id: int, width: int | None
) -> "Iterator[dict[str, Tensor]]":
    """This rank's micro-batches, for ever. With ``width`` all have one shape, for a pipeline."""
    for _, indices in order.from_step(start_step):
        for mine in split.micro_batches(indices):
            yield data.collate(_filled(mine, split.micro_size) if width else mine, pad_id=pad_id, width=width)


def eval_batches(
    data: Encoded, split: Split, *, limit: int | None, pad_id: int, width: int | None
) -> "Iterator[dict[str, Tensor]]":
    """Each of the first ``limit`` samples once over all ranks, the longest first, equally many batches on each."""
    order = np.argsort(-data.lengths[:limit], kind="stable")
    size = split.micro_size
    for start in range(0, len(order), size * split.world):
        low = start + split.rank * size
        mine = order[low : low + size]
        yield data.collate(_filled(mine, size if width else 1), pad_id=pad_id, width=width)


def _filled(indices: Indices, size: int) -> Indices:
    return np.concatenate([indices, np.full(max(0, size - len(indices)), -1)])
