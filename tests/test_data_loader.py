"""Training sees one endless stream of samples, whatever the world size, the workers or the first step."""

import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import dataset, random_lengths, toy
from torch import Tensor

from toolkit.config.schema import RunConfig
from toolkit.data import labelled
from toolkit.data.labelled import Encoded
from toolkit.data.loader import eval_batches, train_batches
from toolkit.data.masked import MaskedText
from toolkit.data.order import Grouped, Split, Stream, shuffled
from toolkit.data.parallel import Translations
from toolkit.data.prepared import RaggedWriter
from toolkit.data.text import require
from toolkit.errors import DataError

Step = dict[str, Tensor]
GLOBAL, MICRO = 16, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return toy(tmp_path_factory.mktemp("loader"), random_lengths(10, 30), holdout=0.3)


@pytest.fixture(scope="module")
def pairs(config: RunConfig) -> MaskedText:
    return dataset(config)


@pytest.fixture(scope="module")
def held(config: RunConfig) -> MaskedText:
    return dataset(config, "eval")


def steps(pairs: MaskedText, number: int, *, world: int = 1, workers: int = 0, start: int = 0) -> list[Step]:
    """The samples of ``number`` optimizer steps from sample ``start``, put together from all ranks."""
    order = Stream(len(pairs), pairs.seed, GLOBAL)
    splits = [Split(GLOBAL, MICRO, rank, world) for rank in range(world)]
    ranks = [train_batches(pairs, order, split, start_sample=start, workers=workers) for split in splits]
    micro = GLOBAL // (MICRO * world)
    rounds = [[next(rank) for rank in ranks] for _ in range(number * micro)]
    batches = [batch for one in rounds for batch in one]
    size = len(batches) // number
    return [merged(batches[i * size : (i + 1) * size]) for i in range(number)]


def merged(batches: list[Step]) -> Step:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(left: list[Step], right: list[Step]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_another_world_size_sees_the_same_samples_and_masks(pairs: MaskedText, world: int, workers: int) -> None:
    assert_same(steps(pairs, 3, world=world, workers=workers), steps(pairs, 3))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resuming_is_starting_at_another_sample(pairs: MaskedText, workers: int) -> None:
    whole = steps(pairs, 20)  # 320 samples: more than two epochs
    assert len(pairs) < 160
    assert_same(steps(pairs, 9, world=2, workers=workers, start=11 * GLOBAL), whole[11:])


def test_an_epoch_has_every_sample_once_and_the_next_one_another_order(pairs: MaskedText) -> None:
    n = len(pairs)
    order = Stream(n, pairs.seed, GLOBAL)
    first, second = order.keys(0, n).tolist(), order.keys(n, n).tolist()
    assert sorted(first) == [[0, i] for i in range(n)] and sorted(second) == [[1, i] for i in range(n)]
    assert [i for _, i in first] != [i for _, i in second]
    assert order.keys(n - 3, 6).tolist() == first[-3:] + second[:3]
    assert next(order.from_sample(0)).tolist() == first[:GLOBAL], "none is passed over"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_the_shuffle_is_a_permutation(n: int) -> None:
    for epoch in range(3):
        assert sorted(shuffled(n, 7, epoch, np.arange(n)).tolist()) == list(range(n))


def test_the_shuffle_differs_by_seed_and_epoch_and_looks_random() -> None:
    n = 4000
    orders = [shuffled(n, seed, epoch, np.arange(n)) for seed in (1, 2) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        assert (order == np.arange(n)).sum() < 10  # a random permutation has one fixed point on average
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / n**0.5
        assert (np.abs(np.diff(order)) == 1).sum() < 20  # neighbours are torn apart
        assert all((order == other).sum() < 10 for other in orders[:i])


def test_a_shuffle_of_a_trillion_costs_no_memory() -> None:
    images = shuffled(10**12, 1, 0, np.arange(1000))
    assert len(set(images.tolist())) == 1000 and images.max() < 10**12 and images.max() > 10**11


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 1, 7, 10**6])
def test_evaluation_counts_each_sample_once_over_the_ranks(held: MaskedText, world: int, limit: int | None) -> None:
    ranks = [list(eval_batches(held, Split(4, 4, r, world), limit=limit)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = merged([batch for batches in ranks for batch in batches])
    real = rows["nsp_labels"] != -100
    number = min(limit or len(held), len(held))
    assert real.sum() == number
    expected = held.collate([held.sample(0, i) for i in range(number)])
    assert sorted(rows["input_ids"][real].tolist()) == sorted(expected["input_ids"].tolist())
    assert (rows["mlm_labels"] != -100).sum() == (expected["mlm_labels"] != -100).sum()
    assert (rows["attention_mask"].sum(1) > 0).all()  # a row of padding only would make NaN


def test_evaluation_draws_the_same_each_time_and_other_than_training(held: MaskedText) -> None:
    once, again = (list(eval_batches(held, Split(8, 8, 0, 1), limit=8)) for _ in range(2))
    assert_same(once, again)
    assert all(np.array_equal(held.sample(5, i).input_ids, held.sample(0, i).input_ids) for i in range(5))


def test_a_corpus_smaller_than_a_step_says_how_many_samples_there_are(pairs: MaskedText) -> None:
    n = len(pairs)
    with pytest.raises(DataError, match=rf"batch.global_size={n + 1}: .* only {n} training samples. Use a smaller"):
        require(n, n + 1)
    require(n, n)


def test_without_a_holdout_there_is_nothing_to_evaluate_on(tmp_path: Path) -> None:
    nothing = dataset(toy(tmp_path, random_lengths(3, 5)), "eval")
    assert not list(eval_batches(nothing, Split(1, 1, 0, 1)))


def test_loading_leaves_the_global_random_state_alone(pairs: MaskedText) -> None:
    before = torch.random.get_rng_state()
    steps(pairs, 1, workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled samples and sentence pairs of many lengths."""
    folder, rng = tmp_path_factory.mktemp("others"), np.random.default_rng(0)
    rows = [rng.integers(5, 99, rng.integers(1, 30)).tolist() for _ in range(101)]
    labelled.write(folder / "labelled", (labelled.Sample([(row, [0] * len(row))], [i]) for i, row in enumerate(rows)))
    (folder / "pairs").mkdir()
    for side in ("source", "target"):
        writer = RaggedWriter(folder / "pairs" / side, id=np.uint16)
        for row in rng.permutation(101):
            writer.append(id=rows[row])
        writer.seal()
    return folder


@pytest.mark.parametrize("kind", ["labelled", "pairs"])
def test_workers_hand_over_what_the_rank_itself_would_make(folder: Path, kind: str) -> None:
    data = Translations(folder / "pairs", 0, 1) if kind == "pairs" else Encoded(folder / "labelled", 0)
    order = Grouped(data.lengths, 3, size=GLOBAL, tokens=120 if kind == "pairs" else None)
    for workers in (1, 2):
        split, start = Split(GLOBAL, MICRO, rank=workers - 1, world=2), 3 * GLOBAL  # in the middle of an epoch
        alone, drawn = (
            list(islice(train_batches(data, order, split, start_sample=start, workers=w), 40)) for w in (0, workers)
        )
        assert_same(alone, drawn)
        assert [list(batch) for batch in alone] == [list(batch) for batch in drawn]


def test_a_worker_gets_no_arrays(folder: Path) -> None:
    for data in (Translations(folder / "pairs", 0, 1), Encoded(folder / "labelled", 0)):
        data[np.array([[0, 5]])]
        assert data.lengths.nbytes > 100 and len(pickle.dumps(data)) < 800


def test_workers_end_when_the_stream_is_dropped(pairs: MaskedText) -> None:
    import gc
    import multiprocessing

    order = Stream(len(pairs), pairs.seed, GLOBAL)
    stream = train_batches(pairs, order, Split(GLOBAL, MICRO, 0, 1), start_sample=0, workers=1)
    assert len(list(islice(stream, 3))) == 3
    del stream
    gc.collect()
    assert not multiprocessing.active_children()
