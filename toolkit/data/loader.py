"""Batches of any data set in any order, drawn ahead by workers and into pinned memory: the same with or without.

batches = train_batches(dataset, order, split, start_sample=0, workers=1)
next(batches)["input_ids"]                                 # int64 [micro_size, length]
eval_batches(dataset, split, limit=64)                     # each of the first 64 samples once over all ranks
"""

import os
import select
import signal
from collections.abc import Iterable, Iterator
from functools import partial
from threading import Thread
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Generator, cuda, set_num_threads
from torch.utils.data import DataLoader

from toolkit.data.batch import Batch
from toolkit.data.order import Keys, Order, Split
from toolkit.job.workers import begin


class Dataset(Protocol):
    """Micro-batches of samples by their keys; workers get it pickled. ``full``: all have one shape, empty samples fill
    them up. ``lengths``: tokens of each sample, int64 [samples]."""

    @property
    def full(self) -> bool: ...
    @property
    def lengths(self) -> NDArray[np.int64]: ...
    def __getitem__(self, keys: Keys) -> Batch: ...


def train_batches(
    dataset: Dataset, order: Order, split: Split, *, start_sample: int, workers: int = 0
) -> Iterator[Batch]:
    """This rank's micro-batches, for ever."""
    least = split.micro_size if dataset.full else 1
    keys = (micro for step in order.from_sample(start_sample) for micro in split.micro_batches(step, least))
    return _loaded(dataset, keys, workers)


def eval_batches(dataset: Dataset, split: Split, *, limit: int | None = None) -> Iterator[Batch]:
    """Each of the first ``limit`` samples (None: all) once over all ranks, equally many batches on each. The last
    batches are filled up with empty samples, so sums over ranks count nothing twice."""
    return _loaded(dataset, split.held_out(dataset.lengths[:limit], split.micro_size if dataset.full else 1), 0)


def _loaded(dataset: Dataset, keys: Iterable[Keys], workers: int) -> Iterator[Batch]:
    parallel: dict[str, Any] = {}
    if workers:
        begin()
        parallel = {"num_workers": workers, "persistent_workers": True, "prefetch_factor": 4}
        parallel |= {"multiprocessing_context": "forkserver", "worker_init_fn": partial(_begin_worker, os.getpid())}
    return iter(
        DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=None,  # a key of the sampler is one of a whole micro-batch
            sampler=keys,
            pin_memory=cuda.is_available(),
            generator=Generator(),  # else the loader draws from the global one, which a resume restores
            **parallel,
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
