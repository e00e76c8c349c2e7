"""A run that ended early is taken up again: the command that does so is told, and a run that waits for it is found."""

import json
import os
from pathlib import Path

import pytest

from toolkit import errors
from toolkit.config.compose import compose
from toolkit.job import ranks
from toolkit.run.directory import Run, unfinished


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "from_rank0", lambda value: value)


TYPED = ["recipes/pretrain.py", "data.path='a b/*.txt'", "train.steps=9"]


def test_the_command_has_the_name_that_the_run_was_given(tmp_path: Path) -> None:
    assert errors.go_on() == "Start it again under its name= to go on."
    errors.typed(TYPED, alone=True)
    try:
        run = Run.open(compose([f"output_dir={tmp_path}"]))
        line = f"""python recipes/pretrain.py 'data.path='"'"'a b/*.txt'"'"'' train.steps=9 name={run.dir.name}"""
        assert errors.go_on() == f"Go on with: {line}"
        assert json.loads((run.dir / "env.json").read_text())["command"][1:] == [*TYPED[1:], f"name={run.dir.name}"]
        Run.open(compose([f"output_dir={tmp_path}", "name=of-one-seed"]))
        assert errors.go_on() == f"Go on with: {line}"
        errors.typed([*TYPED, "name=x"], alone=False)
        Run.open(compose([f"output_dir={tmp_path}", "name=x"]))
        assert errors.go_on().startswith("Go on with the same launcher and: recipes/pretrain.py ")
        assert errors.go_on().endswith(" train.steps=9 name=x"), "once"
    finally:
        errors.typed([], alone=False)


@pytest.mark.parametrize(
    ("overrides", "last", "alive", "found"),
    [
        (["seed=1"], {"step": 6, "checkpoint": "step-6"}, False, True),
        (["seed=2"], {"step": 6, "checkpoint": "step-6"}, False, False),  # another configuration
        (["seed=1"], {"step": 9, "eval_loss": 1.0}, False, False),  # that has ended
        (["seed=1"], {"step": 1000, "loss": 1.0}, False, False),  # that has ended, and nothing was held out
        (["seed=1"], {"step": 6, "loss": 1.0}, True, False),  # that runs
    ],
)
def test_the_same_configuration_is_found_where_it_ended_early(
    overrides: list[str], last: dict[str, object], alive: bool, found: bool, tmp_path: Path
) -> None:
    run = Run.open(compose([*overrides, "name=before", f"output_dir={tmp_path}"]))
    run.log({"step": 3, "eval_loss": 2.0})
    run.log(last)
    env = json.loads((run.dir / "env.json").read_text())
    run.write_json("env.json", env | {"process": os.getpid() if alive else 2**22 + 1})  # above any of Linux's
    line = unfinished(compose(["seed=1", f"output_dir={tmp_path}"]))
    told = f"{run.dir} has the same configuration and ended at step 6: name=before would go on with it."
    assert line == (told if found else "")
    assert unfinished(compose(["output_dir=nowhere"])) == ""
