"""Batches of labelled samples: the same in every layout, each sample once, padded no further than needed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.checkpoint.checkpoint import compare_order
from toolkit.data import labelled
from toolkit.data.labelled import Encoded, Sample
from toolkit.data.loader import eval_batches, train_batches
from toolkit.data.order import Grouped, Order, Rounds, Split, Stream, keyed
from toolkit.errors import CheckpointError

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(5, 120, 1003)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    folder = tmp_path_factory.mktemp("encoded") / "train"
    samples = (Sample([(range(1, n + 1), [0] * n)], [i % 3]) for i, n in enumerate(LENGTHS.tolist()))
    labelled.write(folder, samples)
    return Encoded(folder, pad_id=0)


@pytest.mark.parametrize("tokens", [None, 2048])
def test_an_epoch_takes_each_sample_once_and_the_next_in_another_order(tokens: int | None) -> None:
    order = Grouped(LENGTHS, seed=1, size=32, tokens=tokens)
    epochs = [np.concatenate(order.epoch(e)) for e in range(2)]
    assert all(sorted(e.tolist()) == list(range(len(LENGTHS))) for e in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert order.steps(2) == len(order.epoch(0)) + len(order.epoch(1))
    assert order.steps(0.5) == pytest.approx(len(order.epoch(0)) / 2, abs=1)


def test_a_batch_of_tokens_holds_no_more_and_hardly_fewer() -> None:
    batches = Grouped(LENGTHS, seed=1, size=32, tokens=2048).epoch(0)
    padded = [LENGTHS[b].max() * len(b) for b in batches]
    assert max(padded) <= 2048
    assert np.mean(padded) > 0.85 * 2048


def test_a_sample_longer_than_the_tokens_of_a_batch_has_one_of_its_own() -> None:
    batches = Grouped(np.array([10, 500, 10]), seed=1, size=32, tokens=100).epoch(0)
    assert sorted(len(b) for b in batches) == [1, 2]


def test_the_first_batch_is_the_largest_so_that_too_little_memory_shows_at_once() -> None:
    batches = Grouped(LENGTHS, seed=1, size=32).epoch(0)
    padded = [LENGTHS[b].max() * len(b) for b in batches]
    assert padded[0] == max(padded)
    assert padded[1:] != sorted(padded[1:], reverse=True), "a rate that falls shall not meet ever shorter samples"


def test_starting_at_a_step_gives_the_rest_of_the_stream() -> None:
    order = Grouped(LENGTHS, seed=3, size=64)
    whole = list(islice(order.from_sample(0), 40))
    late = list(islice(order.from_sample(17 * 64), 23))
    assert [keys.tolist() for keys in whole[17:]] == [keys.tolist() for keys in late]


def samples_of(data: Encoded, world: int, micro: int, step: int = 0) -> list[int]:
    """All samples of one optimizer step over all ranks."""
    found: list[int] = []
    order = Grouped(data.lengths, seed=5, size=32)
    for rank in range(world):
        split = Split(32, micro, rank, world)
        batches = train_batches(data, order, split, start_sample=32 * step)
        for _ in range(32 // micro // world):
            found += next(batches)["index"].tolist()
    return sorted(i for i in found if i >= 0)


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 16), (4, 2), (2, 4)])
def test_every_layout_trains_on_the_same_samples(data: Encoded, world: int, micro: int) -> None:
    for step in (0, 7, len(LENGTHS) // 32):  # the last is that of few samples
        assert samples_of(data, world, micro, step) == samples_of(data, 1, 32, step)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("width", [None, 128])
def test_evaluation_sees_each_sample_once_and_every_rank_as_many_batches(
    data: Encoded, world: int, width: int | None
) -> None:
    seen: Counter[int] = Counter()
    lengths = []
    for rank in range(world):
        batches = list(eval_batches(replace(data, width=width), Split(48, 16, rank, world)))
        lengths.append(len(batches))
        seen.update(i for b in batches for i in b["index"].tolist())
        assert width is None or {b["input_ids"].shape for b in batches} == {(16, 128)}
    seen.pop(-1, None)
    assert set(seen.values()) == {1} and len(seen) == len(LENGTHS) and len(set(lengths)) == 1


def padding(data: Encoded, grouped: bool) -> float:
    order = Grouped(data.lengths, seed=5, size=32, grouped=grouped)
    batches = train_batches(data, order, Split(32, 8, 0, 1), start_sample=0)
    some = [next(batches) for _ in range(4 * 32)]
    return 1 - sum(int(b["attention_mask"].sum()) for b in some) / sum(b["input_ids"].numel() for b in some)


def test_samples_of_like_length_need_little_padding(data: Encoded) -> None:
    assert padding(data, grouped=True) < 0.07 < 0.3 < padding(data, grouped=False)


def test_a_batch_holds_what_was_written(data: Encoded) -> None:
    indices = np.array([3, 10, -1])
    batch = replace(data, pad_id=9)[keyed(0, indices)]
    for row, index in enumerate(indices[:2]):
        n = LENGTHS[index]
        assert batch["input_ids"][row, :n].tolist() == list(range(1, n + 1))
        assert set(batch["input_ids"][row, n:].tolist()) <= {9}
        assert int(batch["attention_mask"][row].sum()) == n
    assert batch["labels"].tolist() == [0, 1, -100]
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["input_ids"][2].tolist() == batch["input_ids"][1].tolist(), "a whole sequence, which nothing counts"


def test_labels_of_tokens_are_as_wide_as_the_tokens_even_where_all_are_equally_many(tmp_path: Path) -> None:
    labelled.write(tmp_path / "a", iter([Sample([([1, 2, 3], [0, 0, 0])], [5, 6, 7]) for _ in range(2)]))
    batch = Encoded(tmp_path / "a", pad_id=0, per_token=True)[keyed(0, np.array([0, 1]))]
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 8)
    assert batch["labels"][0].tolist() == [5, 6, 7, *[-100] * 5]


def test_choices_are_sequences_of_one_sample_and_missing_scores_are_no_numbers(tmp_path: Path) -> None:
    two = [([1, 2], [0, 0]), ([3, 4, 5], [0, 1, 1])]
    labelled.write(tmp_path / "a", iter([Sample(two, [0.5])]), float_labels=True)
    batch = Encoded(tmp_path / "a", pad_id=0, choices=2)[keyed(0, np.array([0, -1]))]
    assert batch["input_ids"].shape == (2, 2, 8)
    assert batch["input_ids"][0, 1, :3].tolist() == [3, 4, 5] and batch["token_type_ids"][0, 1, :3].tolist() == [
        0,
        1,
        1,
    ]
    assert batch["labels"][0] == 0.5 and batch["labels"][1].isnan()


def test_shares_are_neighbours_of_almost_equal_number() -> None:
    step = keyed(0, np.arange(11))
    parts = [keys[:, 1].tolist() for rank in range(4) for keys in Split(12, 3, rank, 4).micro_batches(step)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


SAVED = {"step": 100, "samples": 3200}
ORDERS: dict[str, Callable[..., Order]] = {
    "grouped": lambda **other: Grouped(LENGTHS, **{"seed": 1, "size": 32} | other),
    "by tokens": lambda **other: Grouped(LENGTHS, **{"seed": 1, "size": 32, "tokens": 2048} | other),
    "rounds": lambda **other: Rounds(**{"n": 1000, "seed": 1, "size": 32} | other),
    "stream": lambda **other: Stream(**{"n": 1000, "seed": 1, "size": 32} | other),
}


@pytest.mark.parametrize("kind", ["grouped", "by tokens", "rounds"])
def test_a_place_that_another_batch_size_would_shift_is_refused(kind: str) -> None:
    was, now = ORDERS[kind](), ORDERS[kind](size=16)
    here, there = (next(order.from_sample(SAVED["samples"])).tolist() for order in (was, now))
    assert there != here[: len(there)], "100 steps of 32 are not 200 of 16: an epoch's last step takes fewer"
    message = r"step-100: saved with batch.global_size=32, this run has batch.global_size=16. Use the saved value, or"
    for manifest in (SAVED | {"order": was.rests_on}, SAVED):  # older ones do not keep it
        compare_order(Path("step-100"), manifest, was.rests_on)
        with pytest.raises(CheckpointError, match=message):
            compare_order(Path("step-100"), manifest, now.rests_on)


@pytest.mark.parametrize(
    ("kind", "other", "message"),
    [
        ("grouped", {"grouped": False}, "data.group_by_length=True, this run has data.group_by_length=False"),
        ("by tokens", {"tokens": 4096}, "batch.tokens=2048, this run has batch.tokens=4096"),
        ("rounds", {"n": 999}, "training samples=1000, this run has training samples=999"),
        ("stream", {"seed": 2}, "seed=1, this run has seed=2"),
    ],
)
def test_what_else_a_place_rests_on_is_refused(kind: str, other: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        compare_order(Path("step-100"), SAVED | {"order": ORDERS[kind]().rests_on}, ORDERS[kind](**other).rests_on)


def test_a_stream_goes_on_under_another_batch_size() -> None:
    was, now = ORDERS["stream"](), ORDERS["stream"](size=16)
    compare_order(Path("step-100"), SAVED | {"order": was.rests_on}, now.rests_on)
    compare_order(Path("step-100"), SAVED, now.rests_on)
    two = islice(now.from_sample(SAVED["samples"]), 2)
    assert np.concatenate(list(two)).tolist() == next(was.from_sample(SAVED["samples"])).tolist()
