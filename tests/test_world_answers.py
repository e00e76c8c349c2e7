"""Answers in texts as people have them come back as they are, from the tokens of every architecture."""

from typing import Any

import numpy as np
import pytest
from architectures import ARCHITECTURES, tokenizer_of
from composing import compose
from world_cases import Case, cases

from toolkit.data import windows
from toolkit.data.examples import Question
from toolkit.tasks.span_qa import SpanQA

QUESTION = "Who?"


def learnt(case: Case, config: Any, tokenizer: Any, text: str) -> str:
    """The answer of a model that has learnt this one."""
    sizes = {"max_length": config.data.max_length, "max_question": 8, "stride": config.task.stride}
    (cuts,) = windows.windows(tokenizer, [QUESTION], [case.context], **sizes)
    spans = [windows.answer_span(cut, [(case.context.index(text), text)]) for cut in cuts]
    one_hot = [10 * np.eye(len(cut.input_ids)) for cut in cuts]
    logits = ([some[span[n]] for some, span in zip(one_hot, spans, strict=True)] for n in (0, 1))
    options = {"n_best": 5, "max_answer": config.task.max_answer, "null_answers": True}
    decoded = windows.decode(cuts, *logits, case.context, **options)
    assert all(answer == answer.strip() for answer, _ in decoded.n_best)
    return decoded.text


PAIRS = [
    pytest.param(row.values[0], name, id=f"{row.id}, {name}")
    for row in cases("answers")
    for name in row.values[0].of or ARCHITECTURES
]


@pytest.mark.parametrize(("case", "architecture"), PAIRS)
def test_answers(case: Case, architecture: str) -> None:
    config = compose("task=squad_v2", *(case.set or []))
    tokenizer = tokenizer_of(architecture, [case.known or case.context] * 3)
    said = [learnt(case, config, tokenizer, text) for text in case.answers]
    assert said == (case.says or case.answers)
    examples = [Question("q", QUESTION, case.context, ((text, case.context.index(text)),)) for text in case.answers]
    assert list(SpanQA.warnings(config, tokenizer, examples, ())) == (case.counted or [])
