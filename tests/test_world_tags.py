"""Tagged words as people have them become the words and tags that are meant, and a row each in the predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composing import compose
from rich.console import Console
from transformers import AutoTokenizer
from world_cases import Case, cases, parts, told, warnings

from toolkit.config.schema import RunConfig
from toolkit.data import labelled
from toolkit.data.batch import IGNORED
from toolkit.data.prepared import Prepared
from toolkit.tasks.tag import Tag


def config_of(case: Case, folder: Path) -> RunConfig:
    case.write(folder)
    name, *test = sorted((case.files or {}), reverse=True)
    conll = ["data.columns.tokens=0", "data.columns.tags=-1"] if name.endswith("conll") else []
    data = [
        f"data.train={folder / name}",
        "data.holdout=0",
        f"data.cache_dir={folder}/cache",
        "tokenizer.min_frequency=1",
        "tokenizer.max_unknown=1",
    ]
    return compose("task=tag", *data, *conll, *(case.set or []), *(f"data.test={folder / name}" for name in test))


def task_of(config: RunConfig, prepared: Prepared) -> Any:
    task = Tag.__new__(Tag)
    task.config, task.prepared, task.names = config, prepared, tuple(prepared.facts["labels"])
    task.tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer)
    return task


@pytest.mark.parametrize("case", cases("tags"))
def test_tagged_words(case: Case, tmp_path: Path) -> None:
    config = config_of(case, tmp_path)
    with told(case):
        prepared = Tag.prepare(config, Console(quiet=True))
        task = task_of(config, prepared)
        found = task.examples("train")
        said = [line for line in warnings(prepared) if "labels have one row" not in line]
        assert [part for part in parts(case.warning) if part not in " ".join(said)] == []
        assert bool(said) == bool(case.warning), said
        if case.read:
            read = [
                [cell for word, tag in zip(e.words, e.tags, strict=True) for cell in (word, task.names[tag])]
                for e in found
            ]
            assert read == case.read
        if case.labels:
            assert list(task.names) == case.labels
        if case.test:
            assert [example.words for example in task.examples("test")] == case.test
        if case.predictions:
            labels = labelled.Encoded(prepared.path / "train", 0, per_token=True).labels
            learnt = [labels.row("value", n) for n in range(len(found))]
            said = {n: row[row != IGNORED] for n, row in enumerate(learnt)}
            assert task.files("train", said, True)["conll"] == case.predictions
            assert np.mean([len(line.split()) for line in case.predictions.split("\n") if line]) == 3
