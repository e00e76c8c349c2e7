"""Windows cover long contexts exactly, and their logits decode to answers as in BERT's run_squad.py."""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from toolkit.config.schema import Tokenizer
from toolkit.data.tokenizer import save
from toolkit.data.windows import Window, answer_span, best_threshold, decode, windows
from toolkit.errors import ConfigError
from toolkit.tasks.metrics import squad

DATA = Path(__file__).parents[2] / "shared" / "data"
SQUAD = DATA / "squad" / "squad2_dev_half.json.gz"
VOCAB = DATA / "vocab" / "bert-base-uncased-vocab.txt"
needs_data = pytest.mark.skipif(
    not (SQUAD.exists() and VOCAB.exists()), reason=f"no SQuAD or BERT vocabulary in {DATA}"
)
OPTIONS = {"n_best": 20, "max_answer": 30, "null_answers": True}


@dataclass(frozen=True)
class Row:
    id: str
    question: str
    context: str
    answers: list[tuple[int, str]]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import BertTokenizer

    tokens = VOCAB.read_text("utf-8").splitlines()
    return BertTokenizer({token: number for number, token in enumerate(tokens)}, do_lower_case=True)


@pytest.fixture(scope="module")
def rows():
    articles = json.loads(gzip.decompress(SQUAD.read_bytes()))["data"]
    return [
        Row(q["id"], q["question"], p["context"], [(a["answer_start"], a["text"]) for a in q["answers"]])
        for article in articles
        for p in article["paragraphs"]
        for q in p["qas"]
    ]


def cut(tokenizer, rows, max_length=384, max_question=64, stride=128):
    return windows(
        tokenizer,
        [row.question for row in rows],
        [row.context for row in rows],
        max_length=max_length,
        max_question=max_question,
        stride=stride,
    )


@needs_data
def test_windows_are_those_of_hugging_face_with_the_overlap_for_a_stride(tokenizer, rows):
    several = 0
    for row, cuts in zip(rows[::20], cut(tokenizer, rows[::20], max_length=96, stride=40), strict=True):
        room = 96 - cuts[0].offset - 1
        encoded = tokenizer(
            row.question,
            row.context,
            truncation="only_second",
            max_length=96,
            stride=room - 40,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        assert [w.input_ids for w in cuts] == encoded["input_ids"]
        assert [w.token_type_ids for w in cuts] == encoded["token_type_ids"]
        assert [w.spans for w in cuts] == [
            offsets[w.offset : -1] for w, offsets in zip(cuts, encoded["offset_mapping"], strict=True)
        ]
        several += len(cuts) > 2
    assert several > 100


@needs_data
@pytest.mark.parametrize(("max_length", "max_question", "stride"), [(384, 64, 128), (64, 8, 16), (32, 20, 500)])
def test_every_token_of_the_context_is_in_a_window(tokenizer, rows, max_length, max_question, stride):
    for row, cuts in zip(rows[::10], cut(tokenizer, rows[::10], max_length, max_question, stride), strict=True):
        whole = tokenizer(row.context, add_special_tokens=False)["input_ids"]
        seen = {}
        for window in cuts:
            part = window.input_ids[window.offset : -1]
            assert len(window.input_ids) == len(window.token_type_ids) <= max_length
            assert window.offset <= max_question + 2
            assert len(part) == len(window.spans)
            seen |= dict(enumerate(part, window.first))
        assert [seen[n] for n in range(len(whole))] == whole == list(seen.values())
        steps = np.diff([window.first for window in cuts])
        assert set(steps) <= {min(stride, max_length - cuts[0].offset - 1)}


@needs_data
def test_spans_give_the_text_of_each_token_back(tokenizer, rows):
    checked = 0
    for row, cuts in zip(rows[::10], cut(tokenizer, rows[::10]), strict=True):
        for window in cuts:
            tokens = tokenizer.convert_ids_to_tokens(window.input_ids[window.offset : -1])
            for token, (start, end) in zip(tokens, window.spans, strict=True):
                text = row.context[start:end]
                if text.isascii():
                    assert token == "[UNK]" or token.removeprefix("##") == text.lower()
                    checked += 1
    assert checked > 50_000


@needs_data
def test_a_perfect_model_gets_the_exact_answer(tokenizer, rows):
    predictions, inexact = {}, 0
    for row, cuts in zip(rows, cut(tokenizer, rows, max_length=192, stride=64), strict=True):
        spans = [answer_span(window, row.answers[:1]) for window in cuts]
        one_hot = [10 * np.eye(len(window.input_ids), dtype=np.float32) for window in cuts]
        starts = [logits[start] for logits, (start, _) in zip(one_hot, spans, strict=True)]
        ends = [logits[end] for logits, (_, end) in zip(one_hot, spans, strict=True)]
        predictions[row.id] = decode(cuts, starts, ends, row.context, **OPTIONS).text
        inexact += bool(row.answers) and predictions[row.id] != row.answers[0][1]
    result = squad(predictions, {row.id: [text for _, text in row.answers] for row in rows})
    assert result["no_answer_accuracy"] == 1
    assert inexact / sum(bool(row.answers) for row in rows) < 0.01  # they begin or end inside a token
    assert result["has_answer_exact_match"] > 0.99


@needs_data
def test_a_long_question_is_cut_and_leaves_room(tokenizer):
    (cuts,) = windows(tokenizer, ["who " * 50], ["it is a cat"], max_length=32, max_question=6, stride=8)
    tokens = tokenizer.convert_ids_to_tokens(cuts[0].input_ids)
    assert tokens == ["[CLS]", *["who"] * 6, "[SEP]", "it", "is", "a", "cat", "[SEP]"]
    assert cuts[0].token_type_ids == [0] * 8 + [1] * 5
    with pytest.raises(ConfigError, match=r"data\.max_length=32: a question of 31 tokens leaves no room"):
        windows(tokenizer, ["who " * 50], ["it is a cat"], max_length=32, max_question=29, stride=8)


@needs_data
def test_a_marker_in_a_text_is_only_text(tokenizer, tmp_path):
    tokenizer = save(tokenizer, tmp_path, Tokenizer())
    (cuts,) = windows(tokenizer, ["[SEP]"], ["[CLS] [SEP]"], max_length=32, max_question=6, stride=8)
    assert cuts[0].input_ids.count(tokenizer.sep_token_id) == 2
    assert cuts[0].input_ids.count(tokenizer.cls_token_id) == 1


@needs_data
def test_an_empty_context_has_one_window_without_an_answer(tokenizer):
    (cuts,) = windows(tokenizer, ["who?"], [""], max_length=32, max_question=6, stride=8)
    assert [window.spans for window in cuts] == [[]]
    logits = [np.zeros(len(cuts[0].input_ids))]
    for null_answers in (True, False):
        decoded = decode(cuts, logits, logits, "", n_best=5, max_answer=5, null_answers=null_answers)
        assert (decoded.text, decoded.null_score_difference, decoded.n_best) == ("", np.inf, [("", 1.0)])


def test_roberta_gets_its_own_separators():
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>", "Ġ", *"abc"])}
    backend = Tokenizer(BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (cuts,) = windows(tokenizer, ["ab"], ["abc"], max_length=8, max_question=2, stride=1)
    assert [w.input_ids for w in cuts] == [[0, 4, 5, 2, 2, 4, 5, 2], [0, 4, 5, 2, 2, 5, 6, 2]]
    assert (cuts[1].token_type_ids, cuts[1].offset, cuts[1].first) == ([0] * 8, 5, 1)
    assert cuts[1].spans == [(1, 2), (2, 3)]


CONTEXT = "aa bb cc dd ee ff gg hh"


def toy(first, length, offset=3):
    """A window over words of CONTEXT, after [CLS], a question's token and [SEP]."""
    spans = [(3 * n, 3 * n + 2) for n in range(first, first + length)]
    tokens = offset + length + 1
    covers = (3 * first - 1 if first else 0, 3 * (first + length))
    return Window(list(range(tokens)), [0] * tokens, offset, first, spans, covers)


@pytest.mark.parametrize(
    ("answers", "span"),
    [
        ([(9, "dd ee")], (4, 5)),
        ([(5, " cc ")], (3, 3)),  # blanks are in no token
        ([(14, " ff ")], (6, 6)),
        ([(10, "d e")], (4, 5)),  # begins and ends inside a token
        ([(0, "aa"), (15, "ff")], (6, 6)),  # the first that is in the window
        ([(3, "bb cc")], (0, 0)),  # begins before the window
        ([(15, "ff gg")], (0, 0)),  # ends after it
        ([(9, " ")], (0, 0)),
        ([], (0, 0)),
    ],
)
def test_the_span_of_an_answer(answers, span):
    assert answer_span(toy(2, 4), answers) == span  # cc dd ee ff


def best_of_all(cuts, starts, ends, max_answer):
    """Scores of all answers by text: every span of every window whose first token has most context there."""
    best = {}
    for number, window in enumerate(cuts):
        for i in range(len(window.spans)):
            shares = []  # run_squad.py, _check_is_max_context
            for other in cuts:
                left, right = window.first + i - other.first, other.first + len(other.spans) - 1 - window.first - i
                shares.append(min(left, right) + 0.01 * len(other.spans) if min(left, right) >= 0 else -1)
            if shares.index(max(shares)) != number:
                continue
            for j in range(i, min(i + max_answer, len(window.spans))):
                text = CONTEXT[window.spans[i][0] : window.spans[j][1]]
                score = starts[number][window.offset + i] + ends[number][window.offset + j]
                best[text] = max(score, best.get(text, -np.inf))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_decoding_finds_the_best_of_all_spans(seed):
    draw = np.random.default_rng(seed)
    cuts = [toy(0, 4), toy(0, 7), toy(2, 5), toy(4, 4)]
    starts, ends = ([draw.normal(size=12) for _ in cuts] for _ in range(2))  # some padding after each window
    decoded = decode(cuts, starts, ends, CONTEXT, n_best=100, max_answer=3, null_answers=True)
    best = best_of_all(cuts, starts, ends, 3)
    null = min(start[0] + end[0] for start, end in zip(starts, ends, strict=True))
    assert decoded.answer == max(best, key=best.get)
    assert decoded.null_score_difference == pytest.approx(null - max(best.values()))
    assert decoded.text == (decoded.answer if max(best.values()) >= null else "")
    best |= {"": null}
    ranked = sorted(best, key=lambda text: -best[text])
    total = sum(np.exp(score) for score in best.values())
    assert [text for text, _ in decoded.n_best] == ranked
    assert [share for _, share in decoded.n_best] == pytest.approx([np.exp(best[text]) / total for text in ranked])


def peaks(positions, size=12, height=5.0):
    return [height * np.eye(size)[position] for position in positions]


def test_a_token_counts_only_where_it_has_most_context():
    cuts = [toy(0, 6), toy(2, 6)]  # 'cc' is the third of six words, then the first of six
    decoded = decode(cuts, peaks([4, 3]), peaks([4, 3]), CONTEXT, n_best=1, max_answer=5, null_answers=False)
    assert decoded.text == "bb"
    decoded = decode(
        cuts, peaks([5, 3], height=1.0), peaks([5, 3]), CONTEXT, n_best=9, max_answer=1, null_answers=False
    )
    assert decoded.text == "cc"
    assert decoded.n_best[0][1] == pytest.approx(np.exp(6) / sum(np.exp(s) for s in [6] + [0] * 7))


def test_an_answer_neither_begins_with_blanks_nor_is_one():
    cut = Window([0] * 7, [0] * 7, 3, 0, [(0, 2), (3, 3), (5, 7)], (0, 7))  # in "aa   bb" the second token is a blank
    for end, text in ((5, "bb"), (4, "aa")):
        logits = [5 * np.eye(7)[4] + np.eye(7)[3]], [5 * np.eye(7)[end] + np.eye(7)[3]]
        assert decode([cut], *logits, "aa   bb", n_best=9, max_answer=9, null_answers=False).text == text


def test_a_text_counts_once_with_its_best_score():
    logits = [np.array([0.0, 0, 0, 3, 0, 2, 0])]
    decoded = decode([toy(0, 3)], logits, logits, "aa bb aa", n_best=9, max_answer=1, null_answers=False)
    assert [text for text, _ in decoded.n_best] == ["aa", "bb"]
    assert decoded.n_best[0][1] == pytest.approx(1 / (1 + np.exp(-6)))


@pytest.mark.parametrize(("null_answers", "texts"), [(False, ["aa"]), (True, ["aa", ""])])
def test_the_n_best_end_with_no_answer_where_that_is_worse(null_answers, texts):
    logits = [*peaks([3]), *peaks([3], height=2)]  # 'aa' and 'ee'
    options = {"n_best": 1, "max_answer": 1, "null_answers": null_answers}
    decoded = decode([toy(0, 4), toy(4, 4)], logits, logits, CONTEXT, **options)
    assert [text for text, _ in decoded.n_best] == texts


def test_questions_and_ends_of_windows_are_no_answers():
    decoded = decode([toy(0, 4)], peaks([1]), peaks([7]), CONTEXT, n_best=1, max_answer=5, null_answers=True)
    assert (decoded.text, decoded.answer, decoded.null_score_difference) == ("", "", np.inf)


def test_no_answer_is_told_where_it_exceeds_the_best():
    logits = [np.array([3.0, 0, 0, 2, 0, 0, 0]), np.array([9.0, 0, 0, 0, 0, 0, 0])]
    cuts = [toy(0, 3), toy(3, 3)]
    options = {"n_best": 2, "max_answer": 1}
    decoded = decode(cuts, logits, logits, CONTEXT, null_answers=True, **options)
    assert (decoded.text, decoded.answer, decoded.null_score_difference) == ("", "aa", 2.0)  # 3 + 3 - 2 - 2
    assert decode(cuts, logits, logits, CONTEXT, null_answers=False, **options).text == "aa"


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_of_all(seed):
    draw = random.Random(seed)
    ids = [str(n) for n in range(12)]
    differences = {key: float(draw.randrange(-5, 5)) for key in ids}  # with ties
    has_answer = {key: draw.random() < 0.5 for key in ids}
    f1 = {key: draw.choice([0, 0.5, 1]) * has_answer[key] for key in ids}

    def score(threshold):
        return sum(f1[key] if differences[key] <= threshold else not has_answer[key] for key in ids) / len(ids)

    best = best_threshold(differences, f1, has_answer)
    assert best.score == pytest.approx(score(best.threshold))
    assert best.score == pytest.approx(max(map(score, [-6, *differences.values()])))


def test_the_threshold_of_a_model_that_is_always_wrong_answers_nothing():
    best = best_threshold({"1": -3.0, "2": 1.0}, {"1": 0.0, "2": 0.0}, {"1": False, "2": False})
    assert (best.threshold, best.score) == (-4.0, 1.0)
