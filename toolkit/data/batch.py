"""What a model gets at a time: tensors by name, made of samples of different lengths.

batch: Batch = dataset[keys]                           # one micro-batch
padded([np.array([5, 6]), np.array([7])], 0, width=4)   # int64 [2, 4]: 5 6 0 0, 7 0 0 0
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Batch = dict[str, Tensor]
IGNORED = -100  # the label that cross_entropy leaves out


def padded(rows: Sequence[Any], value: float, width: int) -> NDArray[Any]:
    """The rows as those of one array [rows, width], ``value`` after their ends."""
    whole = np.full((len(rows), width), value)
    for row, values in zip(whole, rows, strict=True):
        row[: len(values)] = values
    return whole


def tensors(**arrays: NDArray[Any]) -> Batch:
    """The arrays as tensors that share their memory."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
