"""Labels as other people have them: read sensibly, refused by row, or said; and numbered as the weights number them."""

from pathlib import Path
from typing import Any

import pytest
from composing import compose
from rich.console import Console
from world_cases import Case, cases, told, warnings

from toolkit.data import labelled
from toolkit.tasks import task_class


@pytest.mark.parametrize("case", cases("labels"))
def test_labels_as_other_people_have_them(case: Case, tmp_path: Path) -> None:
    folder = case.write(tmp_path)
    given = [override.replace("{}", str(folder)) for override in case.task or ()]
    splits = [f"data.{path.stem}={path}" for path in folder.iterdir() if path.suffix in (".csv", ".jsonl")]
    task = [] if any(override.startswith("task=") for override in given) else ["task=classify"]
    common = ["data.holdout=0", "tokenizer.vocab_size=60", f"data.cache_dir={tmp_path / 'cache'}"]
    config = compose(*task, *given, *splits, *common)
    with told(case):
        prepared = task_class(config.task.kind).prepare(config, Console(quiet=True))
        assert case.labels in (None, prepared.facts["labels"])
        assert case.train in (None, labels(config, tuple(prepared.facts["labels"])))
        wanted = case.warning or []
        assert all(any(part in line for line in warnings(prepared)) for part in wanted), warnings(prepared)
        assert bool(warnings(prepared)) == bool(wanted), warnings(prepared)
        assert not any("\n" in line for line in warnings(prepared))


def labels(config: Any, names: tuple[str, ...]) -> list[Any]:
    """Of the training rows, as they are learned."""
    found = [
        getattr(e, "label", None) if config.task.kind != "tag" else e.tags
        for e in labelled.read(config, "train", names)
    ]
    return [list(label) if isinstance(label, tuple) else label for label in found]
