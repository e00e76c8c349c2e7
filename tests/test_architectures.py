"""What a run predicts, its export says of the same text as people write it, with every architecture's tokenizer."""

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, model_of, tokenizer_of
from composing import compose
from transformers import AutoModelForTokenClassification, pipeline

from toolkit.data.examples import Tagged
from toolkit.tasks.tag import Tag

SPACED = [
    ["Ann", "met", "Bob", "in", "Paris", "."],
    ["Old", "trees", "do", "n't", "grow", "near", "New", "York", ",", "U.N.", "says"],
    ["naïve", "café", "🙂", "10\u00a0000", "#tag", "\u200b", "O'Hara", "東京", "(", "x-y", ")"],
]
UNSPACED = [["東", "京", "都", "に", "住", "む"], ["กรุงเทพ", "สวย", "มาก"]]
NAMES = ("O", "B-x", "I-x", "B-y", "I-y")


@pytest.mark.parametrize("joiner", [" ", ""])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_export_tags_plain_text_as_the_run_tagged_words(architecture: str, joiner: str, tmp_path: Path) -> None:
    sentences = SPACED if joiner else UNSPACED
    texts = [joiner.join(words) for words in sentences]
    tokenizer = tokenizer_of(architecture, texts * 3)
    model = model_of(architecture, AutoModelForTokenClassification, tokenizer, id2label=dict(enumerate(NAMES)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    exported = pipeline("token-classification", str(tmp_path), ignore_labels=[], device="cpu")
    lines = predictions(tokenizer, model, sentences, joiner).splitlines()
    said = [line.rpartition(" ")[2] for line in lines if line]
    assert len(said) == sum(map(len, sentences)) and (not joiner or len(set(said)) > 1)
    for words, text in zip(sentences, texts, strict=True):
        tokens, end, before = exported(text), 0, None
        for word in words:
            start = end and end + len(joiner)
            end = start + len(word)
            of = [t for t in tokens if t["start"] < end and t["end"] > start]
            expected = of[0]["entity"] if of else "O"
            if of and of[0]["index"] == before:  # a token of several words
                expected = expected.replace("B-", "I-")
            before = of[0]["index"] if of else before
            assert said.pop(0) == expected, (text, word)


def predictions(tokenizer: object, model: torch.nn.Module, sentences: list[list[str]], joiner: str) -> str:
    """The file of a run, of samples as it reads them."""
    task = Tag.__new__(Tag)
    task.config, task.tokenizer, task.names = compose("task=tag", f"data.joiner='{joiner}'"), tokenizer, NAMES
    examples = [Tagged(str(n), words, [0] * len(words)) for n, words in enumerate(sentences)]
    task.examples = lambda split: examples  # type: ignore[method-assign, assignment]
    said = {}
    for number, sample in enumerate(Tag.encode(task.config, tokenizer, examples)):
        ((ids, _),) = sample.sequences
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits
        (said[number],) = task.rows({"logits": logits}, {"labels": torch.tensor([sample.labels])})
    return task.files("eval", said, labelled=False)["conll"]
