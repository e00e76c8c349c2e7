"""What people type after a recipe comes to the run, or ends in one line and the code of a refusal."""

import sys
from pathlib import Path

import pytest
from launching import ROOT
from world_cases import Case, cases, parts, told

from toolkit import errors
from toolkit.cluster.launchers.job import load_recipe
from toolkit.config.compose import compose
from toolkit.config.overrides import keys, quoted
from toolkit.deepspeed.ds_config import complete


def typed(words: list[str], case: Case, monkeypatch: pytest.MonkeyPatch) -> int:
    """The recipe of the case in this process, as far as its exit code."""
    path = str(ROOT / "recipes" / f"{case.recipe}.py")
    monkeypatch.setattr(sys, "argv", [path, *words])
    monkeypatch.setenv("COMP_LINE", f"python {path} {case.line}")
    monkeypatch.setenv("COMP_POINT", "999")
    monkeypatch.setenv("COMP_CWORD", "2")
    try:
        load_recipe(Path(path))()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        errors.typed([], alone=False)
    return 0


@pytest.mark.parametrize("case", cases("overrides"))
def test_what_is_typed_is_taken_or_refused_in_one_line(
    case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not case.recipe:
        with told(case):
            complete(compose(case.typed), world=2, device="cpu")
        return
    code = typed(case.typed, case, monkeypatch)
    out, err = capfd.readouterr()
    assert code == (2 if case.error else 0), err
    assert not case.error or len([line for line in err.splitlines() if "usage:" not in line and line[:1] != " "]) == 1
    for part in parts(case.error):
        assert part in err
    for part in parts(case.printed):
        assert part in out


@pytest.mark.parametrize(
    "text", ["grün.txt", "a=b", "it's", "a[1]", "~/x", "a,b", "${x}", '"', "a#b", "null", "1e3", "x y"]
)
def test_what_was_quoted_as_the_message_says_is_just_the_text(text: str) -> None:
    assert compose([f"data.column={quoted(text)}", "data=jsonl"]).data.column == text


def test_keys_that_were_typed_are_known_and_options_of_groups_are_none() -> None:
    given = [
        "zero=stage3",
        "+train.steps=5",
        "++seed=1",
        "~loss",
        "a={b: {c: 1}, d: []}",
        "hydra.verbose=true",
        "task.kind=tag",
    ]
    assert keys(given) == {"train.steps", "seed", "a.b.c", "a.d", "task.kind"}
    assert compose(["train.steps=5"]).typed == {"train.steps"} and compose(["zero=stage1"]).typed == set()
    assert compose(["train.steps=1000"]) == compose([]), "who has set it makes no other configuration"
