"""Masked pairs are exactly what BERT's recipe says, and a function of (seed, epoch, index) alone."""

import math
import pickle
import random
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from data_helpers import (
    CLS,
    MASK,
    PAD,
    SEP,
    assert_share,
    corpus,
    dataset,
    parts,
    random_lengths,
    toy,
    unmasked,
    write_vocab,
)

from toolkit.config.schema import RunConfig
from toolkit.data.masked import MaskedText, truncate
from toolkit.data.order import generator
from toolkit.data.text import prepare
from toolkit.errors import ConfigError, DataError

LENGTHS = random_lengths(documents=24, sentences=41)
PLACES = {
    token: (d, s)
    for d, document in enumerate(corpus(LENGTHS))
    for s, sentence in enumerate(document)
    for token in sentence
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return toy(tmp_path_factory.mktemp("pairs"), LENGTHS)


@pytest.fixture(scope="module")
def pairs(config: RunConfig) -> MaskedText:
    return dataset(config)


def with_data(pairs: MaskedText, objective: str = "mlm_nsp", **changes: object) -> MaskedText:
    """The same chunks under other settings of the draw."""
    data = pairs.data.model_copy(update=changes)
    return MaskedText(pairs.prepared, data, objective, pairs.seed, pairs.split)


def sentence_starts(document: int) -> set[int]:
    tokens = corpus(LENGTHS)[document]
    return {sentence[0] for sentence in tokens}


def test_the_chunks_tile_every_document(pairs: MaskedText) -> None:
    chunks = pairs.chunks
    covered = [(f, f + c) for f, c in zip(chunks["first"].tolist(), chunks["count"].tolist(), strict=True)]
    bounds = {0, *accumulate(len(d) for d in LENGTHS)}
    assert covered[0][0] == 0 and covered[-1][1] == sum(map(len, LENGTHS))
    assert all(end == start for (_, end), (start, _) in pairwise(covered))
    assert bounds <= {start for start, _ in covered} | {covered[-1][1]}  # none crosses a document's end


def test_a_chunk_closes_at_its_target_with_two_sentences_and_leaves_no_single_one(pairs: MaskedText) -> None:
    flat = [n for document in LENGTHS for n in document]
    ends = set(accumulate(len(d) for d in LENGTHS))
    for first, count in zip(pairs.chunks["first"].tolist(), pairs.chunks["count"].tolist(), strict=True):
        assert count >= 2
        if first + count not in ends:
            assert sum(flat[first : first + count]) >= 29  # max_length 32 - [CLS] - 2 [SEP]
            one_less = sum(flat[first : first + count - 1])
            assert one_less < 29


def test_a_next_sentence_is_the_rest_of_the_chunk_and_a_random_one_comes_from_another_document(
    pairs: MaskedText,
) -> None:
    flat = [sentence for document in corpus(LENGTHS) for sentence in document]
    for index in range(len(pairs)):
        sample = pairs.sample(3, index)
        a, b = parts(sample)
        first, count = int(pairs.chunks["first"][index]), int(pairs.chunks["count"][index])
        here = PLACES[a[0]][0]
        assert {PLACES[t][0] for t in a} == {here}
        if sample.pair_label == 0:
            chunk = [token for sentence in flat[first : first + count] for token in sentence]
            if not sample.cut:
                assert a + b == chunk
            assert b[0] > a[-1] and {PLACES[t][0] for t in b} == {here}
        else:
            (there,) = {PLACES[t][0] for t in b}
            assert there != here
            assert sample.cut or b[0] in sentence_starts(there)
        assert a == list(range(a[0], a[0] + len(a))) and b == list(range(b[0], b[0] + len(b)))


def test_next_sentences_are_half_of_the_pairs(pairs: MaskedText) -> None:
    labels = [pairs.sample(epoch, i).pair_label for epoch in range(8) for i in range(len(pairs))]
    assert_share(sum(labels), len(labels), 0.5)


def test_every_other_document_is_equally_likely_as_the_random_one(pairs: MaskedText) -> None:
    drawn = [pairs.sample(epoch, i) for epoch in range(10) for i in range(len(pairs))]
    seen = np.bincount([PLACES[parts(s)[1][0]][0] for s in drawn if s.pair_label == 1], minlength=24)
    for number in seen:
        assert_share(int(number), int(seen.sum()), 1 / 24)


def test_where_a_document_has_one_sentence_the_next_is_random(tmp_path: Path) -> None:
    config = toy(tmp_path, [[4], [5], [6], [7, 8]])
    prepared = prepare(config)
    lonely = dataset(config, prepared=prepared)
    assert [lonely.sample(e, i).pair_label for e in range(4) for i in range(3)] == [1] * 12
    assert prepared.notes == ["12% of the pairs are real, the others random"]
    (warning,) = prepared.warnings
    assert "75% of the samples are a document of one sentence" in warning and "12% of the pairs" in warning


def test_sentence_order_swaps_half_of_the_pairs_and_keeps_both_parts_adjacent(tmp_path: Path) -> None:
    order = dataset(toy(tmp_path, LENGTHS, objective="sop", max_length=128))
    swapped = 0
    for epoch in range(20):
        for index in range(len(order)):
            sample = order.sample(epoch, index)
            a, b = parts(sample)
            swapped += sample.pair_label
            first, second = (b, a) if sample.pair_label else (a, b)
            if not sample.cut:
                assert second[0] == first[-1] + 1
            assert first[-1] < second[0] and PLACES[a[0]][0] == PLACES[b[0]][0]
    assert_share(swapped, 20 * len(order), 0.5)


def test_sentence_order_cuts_a_single_sentence_and_leaves_out_a_single_word(tmp_path: Path) -> None:
    order = dataset(toy(tmp_path, [[4], [1], [2]], objective="sop"))
    assert len(order) == 2
    samples = [parts(order.sample(e, i)) for e in range(9) for i in range(2)]
    assert all(a and b and sorted(a + b) in ([5, 6, 7, 8], [10, 11]) for a, b in samples)


def test_plain_masked_lm_has_one_segment_and_no_pair_label(tmp_path: Path) -> None:
    single = dataset(toy(tmp_path, LENGTHS, objective="mlm"))
    samples = [single.sample(0, i) for i in range(len(single))]
    batch = single.collate(samples)
    assert (batch["nsp_labels"] == -100).all() and (batch["token_type_ids"] == 0).all()
    for sample in samples:
        ids = unmasked(sample)
        assert ids[0] == CLS and ids[-1] == SEP and ids[1:-1] == list(range(ids[1], ids[1] + len(ids) - 2))


def test_truncation_removes_from_the_longer_part_as_the_papers_loop_does() -> None:
    for first, second, room in [
        (50, 20, 40),
        (20, 50, 40),
        (30, 30, 41),
        (28, 30, 40),
        (30, 29, 41),
        (5, 100, 11),
        (100, 1, 2),
        (3, 4, 9),
    ]:
        a, b = first, second
        while a + b > room:
            a, b = (a - 1, b) if a > b else (a, b - 1)
        cut = truncate(np.arange(first), np.arange(second), room, generator(0, 0, 0, 0))
        assert [len(part) for part in cut] == [a, b]


def test_truncation_takes_front_and_back_alike() -> None:
    fronts = [int(truncate(np.arange(40), np.arange(10), 30, generator(0, 0, 0, i))[0][0]) for i in range(300)]
    assert_share(sum(fronts), 300 * 20, 0.5)


def test_masking_is_15_percent_of_which_80_10_10(pairs: MaskedText) -> None:
    masked = random = same = 0
    for epoch in range(8):
        for index in range(len(pairs)):
            sample = pairs.sample(epoch, index)
            body = len(sample.input_ids) - 3
            assert len(sample.positions) == max(1, round(0.15 * body))
            assert len(set(sample.positions.tolist())) == len(sample.positions)
            assert not np.isin(sample.labels, (PAD, CLS, SEP, MASK)).any()
            shown = sample.input_ids[sample.positions]
            masked += int((shown == MASK).sum())
            same += int((shown == sample.labels).sum())
            random += int(((shown != MASK) & (shown != sample.labels)).sum())
            assert (shown >= MASK).all()  # a random token is never a special one
    total = masked + random + same
    for number, share in ((masked, 0.8), (random, 0.1), (same, 0.1)):
        assert_share(number, total, share)


def test_every_position_is_masked_equally_often(pairs: MaskedText) -> None:
    samples = [s for e in range(60) for i in range(40) if len((s := pairs.sample(e, i)).input_ids) == 32]
    hits = np.bincount(np.concatenate([s.positions - (s.positions >= s.first_length) for s in samples]), minlength=30)
    assert hits[0] == 0
    for number in hits[1:30]:
        assert_share(int(number), len(samples), 4 / 29)


def test_max_predictions_caps_and_one_prediction_is_always_there(pairs: MaskedText, tmp_path: Path) -> None:
    capped = with_data(pairs, mask_rate=0.5, max_predictions=3)
    assert {len(capped.sample(0, i).positions) for i in range(50)} == {3}
    tiny = dataset(toy(tmp_path, [[1], [1], [1, 1]]))
    assert {len(tiny.sample(e, i).positions) for e in range(5) for i in range(3)} == {1}


def test_short_sequences_have_their_share(tmp_path: Path) -> None:
    short = dataset(toy(tmp_path, random_lengths(60, 100), short_rate=0.3, max_length=16))
    targets = short.chunks["target"]
    assert_share(int((targets < 13).sum()), len(targets), 0.3 * 11 / 12)  # one draw in 12 is full length
    assert set(targets.tolist()) == set(range(2, 14))


def test_whole_words_are_masked_whole(tmp_path: Path) -> None:
    pieces = write_vocab(tmp_path, ["play", "##ing", "##s", "game"])
    text = "\n".join(" ".join(["playing", "games", "play", "playings"] * 2) for _ in range(4))
    (tmp_path / "text.txt").write_text("\n\n".join([text] * 4))
    config = RunConfig.model_validate(
        {
            "tokenizer": {"path": str(pieces)},
            "data": {
                "format": "text", "path": str(tmp_path / "text.txt"), "whole_word": True, "holdout": 0,
                "cache_dir": str(tmp_path / "cache"), "max_length": 48,
            },
        }
    )  # fmt: skip
    words = dataset(config)
    piece = words.corpus.vocabulary["piece"]
    sizes = set()
    for epoch in range(50):
        for index in range(len(words)):
            sample = words.sample(epoch, index)
            ids, chosen = np.array(unmasked(sample)), set(sample.positions.tolist())
            assert len(chosen) <= max(1, round(0.15 * (len(ids) - 3)))
            for position in range(2, len(ids)):
                edge = position == sample.first_length  # truncation may cut a word at a segment's start
                if piece[ids[position]] and not edge and ids[position - 1] > MASK:
                    assert (position in chosen) == (position - 1 in chosen)
            sizes.add(len(chosen))
    assert max(sizes) >= 4


def test_whole_words_need_a_vocabulary_with_pieces(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.whole_word=true: nothing in .*'##'.*whole_word=false"):
        prepare(toy(tmp_path, LENGTHS, whole_word=True))


def test_whole_words_that_have_one_piece_each_are_said(tmp_path: Path) -> None:
    config = toy(tmp_path, LENGTHS, objective="mlm", whole_word=True)
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("##ing\n")
    (said,) = prepare(config).warnings
    assert said.startswith("data.whole_word=true: 0.00% of the tokens continue a word, so nearly all words")
    assert prepare(toy(tmp_path, LENGTHS)).warnings == []
    write_vocab(tmp_path, ["w", *(f"##{digit}" for digit in range(10))])
    long = "".join(f'{{"text": "w{number}"}}\n' for number in range(10**7, 10**7 + 4))
    (tmp_path / "corpus.jsonl").write_text(long)
    (said,) = prepare(config).warnings
    assert "88.89% of the tokens continue a word, so long words are never masked" in said


def test_dynamic_draws_anew_each_epoch_and_static_repeats_the_first(pairs: MaskedText) -> None:
    static = with_data(pairs, dynamic=False)
    differs = 0
    for index in range(40):
        first, second = pairs.sample(0, index), pairs.sample(1, index)
        differs += not np.array_equal(first.positions, second.positions)
        for epoch in (0, 1, 7):
            assert np.array_equal(static.sample(epoch, index).input_ids, first.input_ids)
    assert differs >= 38


def test_a_sample_is_a_function_of_seed_epoch_and_index(pairs: MaskedText) -> None:
    forwards = [pairs.sample(e, i) for e in range(2) for i in range(30)]
    jumbled = [(e, i) for e in range(2) for i in range(30)]
    random.Random(0).shuffle(jumbled)
    again = pickle.loads(pickle.dumps(pairs))
    drawn = {key: again.sample(*key) for key in jumbled}
    for sample, key in zip(forwards, sorted(drawn), strict=True):
        assert all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(sample, drawn[key], strict=True))
    other = MaskedText(pairs.prepared, pairs.data, "mlm_nsp", pairs.seed + 1)
    assert any(not np.array_equal(other.sample(0, i).input_ids, pairs.sample(0, i).input_ids) for i in range(5))


def test_a_pickled_dataset_carries_no_arrays(pairs: MaskedText) -> None:
    pairs.sample(0, 0)
    assert len(pickle.dumps(pairs)) < 2000


def test_batches_have_static_shapes_and_say_what_is_padding(pairs: MaskedText) -> None:
    samples = sorted((pairs.sample(0, i) for i in range(40)), key=lambda s: len(s.input_ids))[:6]
    assert len(samples[0].input_ids) < 32, "none without padding"
    batch = pairs.collate([*samples, pairs.empty()])
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "input_ids": (7, 32), "attention_mask": (7, 32), "token_type_ids": (7, 32),
        "mlm_positions": (7, 20), "mlm_labels": (7, 20), "nsp_labels": (7,),
    }  # fmt: skip
    assert {t.dtype.__str__() for t in batch.values()} == {"torch.int64"}
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (32 - length)
        assert batch["input_ids"][row].tolist() == [*sample.input_ids.tolist(), *[PAD] * (32 - length)]
        types = [0] * sample.first_length + [1] * (length - sample.first_length) + [0] * (32 - length)
        assert batch["token_type_ids"][row].tolist() == types
        number = len(sample.labels)
        assert batch["mlm_labels"][row].tolist() == [*sample.labels.tolist(), *[-100] * (20 - number)]
        assert batch["mlm_positions"][row].tolist() == [*sample.positions.tolist(), *[0] * (20 - number)]
    assert (batch["mlm_labels"][6] == -100).all() and batch["nsp_labels"][6] == -100
    assert batch["attention_mask"][6].tolist() == [1, 1] + [0] * 30


def test_a_max_length_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length=4: .*Use 8 or more"):
        prepare(toy(tmp_path, LENGTHS, max_length=4))


def test_pairs_need_another_document(tmp_path: Path) -> None:
    message = r"task.objective=mlm_nsp with data.holdout=0.0: .* 1 document\(s\); .* need 2.*objective=sop or mlm"
    with pytest.raises(DataError, match=message):
        prepare(toy(tmp_path, [[5, 5, 5]]))
    assert len(dataset(toy(tmp_path, [[5, 5, 5]], objective="mlm"))) == 1


def test_entropies_are_those_of_the_definition(tmp_path: Path) -> None:
    audit = prepare(toy(tmp_path, [[8, 8]] * 4)).audit
    assert audit["entropy"]["corpus_unigram"] == pytest.approx(math.log(64))  # 64 words, each once
    assert audit["entropy"]["eval_under_train_unigram"] is None
