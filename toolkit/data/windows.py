"""Extractive question answering: long contexts cut into overlapping windows, and logits back into answers.

    for cuts in windows(tokenizer, questions, contexts, max_length=384, max_question=64, stride=128):
        start, end = answer_span(cuts[0], [(159, "France")])   # token positions to learn, (0, 0): none here
    decoded = decode(cuts, start_logits, end_logits, context, n_best=20, max_answer=30, null_answers=True)

As in BERT's run_squad.py, but that answers are exact slices of the context.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.data.tokenizer import encoder
from toolkit.errors import ConfigError

Logits = Sequence[NDArray[Any]]  # of each window, [its tokens, or more: padding]


@dataclass(frozen=True)
class Window:
    """A question with a part of its context, as the model reads it: [CLS] question [SEP] part [SEP]."""

    input_ids: list[int]
    token_type_ids: list[int]
    offset: int  # position of the part's first token in input_ids
    first: int  # number of that token in the context
    spans: list[tuple[int, int]]  # characters (start, end) of each of the part's tokens in the context, without blanks
    covers: tuple[int, float]  # characters from the end of the token before the part to the begin of that after it


@dataclass(frozen=True)
class Decoded:
    """The answer to one question."""

    text: str  # "": no answer
    answer: str  # the best that is not ""
    null_score_difference: float  # by how much logits "no answer" exceeds that answer; inf: no window has one
    n_best: list[tuple[str, float]]  # texts and their probabilities, the best first


@dataclass(frozen=True)
class Threshold:
    """A question has no answer where its null_score_difference exceeds ``threshold``; F1 is then ``score``."""

    threshold: float
    score: float


def windows(
    tokenizer: Any, questions: list[str], contexts: list[str], *, max_length: int, max_question: int, stride: int
) -> list[list[Window]]:
    """The windows of each question, at most ``max_length`` tokens long; they start ``stride`` context tokens apart.
    Hugging Face's ``stride`` is another number: by how much windows overlap. Questions end after ``max_question``
    tokens. Raises ConfigError if that leaves no room for the context."""
    backend = encoder(tokenizer)
    distinct = list(dict.fromkeys(contexts))
    encoded = backend.encode_batch(distinct, add_special_tokens=False)
    tokens = {text: (e.ids, _without_blanks(text, e.offsets)) for text, e in zip(distinct, encoded, strict=True)}
    any_token = backend.encode("a", add_special_tokens=False)
    cuts = []
    for question, context in zip(backend.encode_batch(questions, add_special_tokens=False), contexts, strict=True):
        question.truncate(max_question)
        cuts.append(_cut(backend.post_process(question, any_token), *tokens[context], max_length, stride))
    return cuts


def _without_blanks(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Tokens of DeBERTa and ModernBERT hold the blank before their word, but no answer begins or ends with one."""
    begins = [end - len(text[start:end].lstrip()) for start, end in spans]
    return [(b, max(b, start + len(text[start:end].rstrip()))) for b, (start, end) in zip(begins, spans, strict=True)]


def _cut(frame: Any, ids: list[int], spans: list[tuple[int, int]], max_length: int, stride: int) -> list[Window]:
    """Windows of the context ``ids``; ``frame`` is the question with another context in its place."""
    offset = frame.sequence_ids.index(1)
    head, tail = frame.ids[:offset], frame.ids[offset + frame.sequence_ids.count(1) :]
    types, context_type = frame.type_ids[:offset], frame.type_ids[offset : offset + 1]
    room = max_length - len(head) - len(tail)
    if room < 1:
        raise ConfigError(
            f"data.max_length={max_length}: a question of {offset} tokens leaves no room for its context. "
            "Use a larger one, or a smaller task.max_question."
        )
    step = min(stride, room)  # so that no token is between two windows
    result = []
    for first in range(0, max(1, len(ids) - room + step), step):
        part = ids[first : first + room]
        token_type_ids = types + context_type * (len(part) + len(tail))
        covers = spans[first - 1][1] if first else 0, spans[first + room][0] if first + room < len(ids) else math.inf
        result.append(Window(head + part + tail, token_type_ids, offset, first, spans[first : first + room], covers))
    return result


def answer_span(window: Window, answers: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """Positions in input_ids of the first and the last token of the first answer that is whole in the window.
    ``answers`` are (first character in the context, text). (0, 0), which is [CLS], where none is in the window."""
    for begin, text in answers:
        begin += len(text) - len(text.lstrip())
        end = begin + len(text.strip())
        if begin < end and window.covers[0] <= begin and end <= window.covers[1]:
            inside = [n for n, (left, right) in enumerate(window.spans) if left < end and right > begin]
            if inside:  # nothing is of an answer whose characters give no token
                # tokens of single bytes share characters: those that begin and end as the answer does come first
                first = next((n for n in inside if window.spans[n][0] == begin), inside[0])
                last = next((n for n in reversed(inside) if window.spans[n][1] == end), inside[-1])
                return window.offset + first, window.offset + last
    return 0, 0


def decode(
    cuts: list[Window], starts: Logits, ends: Logits, context: str, *, n_best: int, max_answer: int, null_answers: bool
) -> Decoded:
    """The answer from the logits of all windows of one question. Candidates are the ``n_best`` starts with the
    ``n_best`` ends of each window (run_squad.py, write_predictions). With ``null_answers`` the text is "" if [CLS] in
    the window where it is least likely exceeds the best answer of at most ``max_answer`` tokens."""
    null = min(float(start[0]) + float(end[0]) for start, end in zip(starts, ends, strict=True))
    found = [(null, "")] if null_answers else []
    for cut, owned, start, end in zip(cuts, _max_context(cuts), starts, ends, strict=True):
        firsts, lasts = (np.argsort(-logits, kind="stable")[:n_best] - cut.offset for logits in (start, end))
        firsts, lasts = (tokens[(tokens >= 0) & (tokens < len(owned))] for tokens in (firsts, lasts))
        firsts = firsts[owned[firsts]]
        length = lasts - firsts[:, None] + 1
        for i, j in np.argwhere((length > 0) & (length <= max_answer)):
            score = float(start[cut.offset + firsts[i]]) + float(end[cut.offset + lasts[j]])
            if answer := context[cut.spans[firsts[i]][0] : cut.spans[lasts[j]][1]].strip():  # of blanks alone is none
                found.append((score, answer))
    found.sort(key=lambda pair: -pair[0])
    best, answer = next(((score, text) for score, text in found if text), (-np.inf, ""))
    scores: dict[str, float] = {}
    for score, text in found:
        if len(scores) < n_best:
            scores.setdefault(text, score)
    if null_answers or not scores:
        scores.setdefault("", null)
    text = "" if null_answers and null > best else answer
    shares = np.exp(np.array(list(scores.values())) - max(scores.values()))
    return Decoded(text, answer, float(null - best), list(zip(scores, (shares / shares.sum()).tolist(), strict=True)))


def _max_context(cuts: list[Window]) -> list[NDArray[np.bool_]]:
    """For each window, which of its context tokens have more context there than in the windows that overlap it."""
    context = np.full((len(cuts), max(cut.first + len(cut.spans) for cut in cuts)), -np.inf)
    for row, cut in zip(context, cuts, strict=True):
        left = np.arange(len(cut.spans))
        row[cut.first : cut.first + len(left)] = np.minimum(left, left[::-1]) + 0.01 * len(left)
    best = context.argmax(axis=0)
    return [best[cut.first : cut.first + len(cut.spans)] == number for number, cut in enumerate(cuts)]


def best_threshold(
    differences: Mapping[str, float], f1: Mapping[str, float], has_answer: Mapping[str, bool]
) -> Threshold:
    """The threshold of the best F1 over all questions, and that F1 (find_best_thresh of SQuAD's evaluate-v2.0.py).
    ``f1`` is that of :attr:`Decoded.answer` against the gold answers. Thresholds are the differences, and one below
    them all, where nothing is answered; the official search calls this one 0."""
    ids = sorted(differences, key=differences.__getitem__)
    thresholds = np.array([differences[ids[0]] - 1, *(differences[key] for key in ids)])
    unanswered = sum(not has_answer[key] for key in ids)
    totals = unanswered + np.cumsum([0.0, *(f1[key] - (not has_answer[key]) for key in ids)])
    totals[:-1][thresholds[:-1] == thresholds[1:]] = -np.inf  # equal differences are all answered or none
    best = int(totals.argmax())
    return Threshold(float(thresholds[best]), float(totals[best] / len(ids)))
