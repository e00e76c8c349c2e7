"""`toolkit curves` draws what metrics.jsonl holds, and says what it does not hold."""

import json
from pathlib import Path

import pytest

from toolkit.cli.main import main
from toolkit.report import figures


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    records = [{"step": s, "loss": 5 - s, "eval_f1": s / 9, "eval_seconds": 1.0} for s in range(4)]
    records += [{"step": 3, "checkpoint": "step-3"}, {"step": 3, "eval_once": 1.0}, {"step": 2, "loss": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_every_loss_and_metric_with_a_course_is_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["curves", str(run)])
    text = (run / "curves.svg").read_text()
    assert (run / "curves.png").stat().st_size > 5000 and str(run / "curves.png") in capsys.readouterr().out
    assert text.count("<!-- optimizer step -->") == 2, "a panel for loss and one for f1, none for what came once"


def test_of_a_step_that_comes_twice_the_last_counts(run: Path) -> None:
    assert figures.curve(run, "loss") == [(0, 5), (1, 4), (2, 2.5), (3, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key", "eval_fl"], "--key eval_fl: no record has it. Did you mean 'eval_f1'?"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_is_not_there_is_said(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [] if arguments == ["nowhere"] else [str(run)]
    with pytest.raises(SystemExit) as ended:
        main(["curves", *runs, *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err
