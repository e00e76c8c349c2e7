"""The order of training: an endless stream of samples of which each rank takes its share.

    batches = train_batches(
        dataset, start_sample=0, global_size=256, micro_size=16, rank=0, world=2, workers=1
    )
    next(batches)["input_ids"]   # int64 [16, max_length]

Position p of the stream is sample ``Shuffle(n, seed, epoch)(p % n)`` of epoch ``p // n``. Resuming is
starting at another position; there is no other state.
"""

import os
import select
import signal
from collections.abc import Iterator
from functools import partial
from itertools import count
from threading import Thread
from typing import Any

import numpy as np
from torch import Generator, Tensor, cuda, set_num_threads
from torch.utils.data import DataLoader

from toolkit.data.draws import Shuffle
from toolkit.data.pairs import PairDataset
from toolkit.data.prepared import require
from toolkit.errors import DataError
from toolkit.job.workers import begin

Batch = dict[str, Tensor]
Key = tuple[int, int]  # (epoch, index)


def keys(dataset: PairDataset, start: int, number: int) -> list[Key]:
    """The samples at positions ``start`` to ``start + number`` of the stream."""
    n = len(dataset)
    epochs, positions = np.divmod(np.arange(start, start + number), n)
    found: list[Key] = []
    for epoch in np.unique(epochs).tolist():
        order = Shuffle(n, dataset.seed, epoch)(positions[epochs == epoch])
        found += [(epoch, index) for index in order.tolist()]
    return found


class MicroBatches:
    """The keys of one rank's micro-batches: micro-batch m of a step that starts at position s takes the
    ``micro_size`` positions from ``s + (m * world + rank) * micro_size``.
    """

    def __init__(
        self,
        dataset: PairDataset,
        start_sample: int,
        global_size: int,
        micro_size: int,
        rank: int,
        world: int,
    ) -> None:
        assert global_size % (micro_size * world) == 0, (global_size, micro_size, world)
        self.dataset, self.micro_size = dataset, micro_size
        self.first, self.stride = start_sample + rank * micro_size, world * micro_size

    def __iter__(self) -> Iterator[list[Key]]:
        for start in count(self.first, self.stride):
            yield keys(self.dataset, start, self.micro_size)


def train_batches(
    dataset: PairDataset,
    *,
    start_sample: int,
    global_size: int,
    micro_size: int,
    rank: int,
    world: int,
    workers: int,
) -> Iterator[Batch]:
    """This rank's micro-batches, for ever. Raises DataError if an epoch is smaller than one step."""
    require(dataset.prepared, global_size)
    parallel: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": True,
        "prefetch_factor": 4,
        "worker_init_fn": partial(_begin_worker, os.getpid()),
        "multiprocessing_context": "forkserver",
    }
    if workers:
        begin()
    return iter(
        DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=MicroBatches(dataset, start_sample, global_size, micro_size, rank, world),
            collate_fn=dataset.collate,
            pin_memory=cuda.is_available(),
            generator=Generator(),  # else the loader draws from the global one, which a resume restores
            **parallel if workers else {},
        )
    )


def _begin_worker(owner: int, worker: int) -> None:
    """Stopping is the rank's business: a signal to all of a job must not take the data from its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_num_threads(1)
    Thread(target=_end_with, args=(owner,), daemon=True).start()


def _end_with(owner: int) -> None:
    """SIGTERM is blocked in all threads (job/workers.py). A rank that is killed sends none: look for it, too."""
    try:
        ended = [os.pidfd_open(owner)]
    except ProcessLookupError:
        os._exit(0)
    except OSError:  # a kernel or a sandbox without it
        ended = []
    while not select.select(ended, [], [], 0)[0]:
        found = signal.sigtimedwait({signal.SIGTERM}, 2)
        if found and found.si_pid == owner:
            break
    os._exit(0)


def eval_batches(dataset: PairDataset, *, micro_size: int, rank: int, world: int, limit: int | None) -> Iterator[Batch]:
    """Each of the first ``limit`` samples (None: all) once over all ranks, equally many batches on each.

    The last batches are filled up with empty samples, so sums over ranks count nothing twice.
    """
    number = len(dataset) if limit is None else min(limit, len(dataset))
    if not number:
        raise DataError("data.holdout=0: nothing is held out to evaluate on. Set data.holdout above 0.")
    for start in range(0, number, micro_size * world):
        low = start + rank * micro_size
        indices = range(low, min(low + micro_size, number))
        samples = [dataset.sample(0, index) for index in indices]
        yield dataset.collate(samples + [dataset.empty()] * (micro_size - len(samples)))
