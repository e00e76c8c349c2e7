"""What keeps a checkpoint whole and a run's state its own, without training: test_checkpoint has real runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import on_ranks
from safetensors.torch import load_file

from toolkit.checkpoint import checkpoint, ds_state, export
from toolkit.checkpoint.checkpoint import State
from toolkit.errors import CheckpointError
from toolkit.job import ranks

FILE = f"{ds_state.TAG}/weights.pt"


def whole(folder: Path, step: int) -> Path:
    """A checkpoint as save() leaves it, of one small file."""
    path = folder / f"step-{step}"
    (path / ds_state.TAG).mkdir(parents=True)
    digest = ds_state.save_file({"w": torch.arange(8.0) + step}, path / FILE)
    checkpoint._seal(path, {"step": step, "samples": 4 * step, "files": {FILE: digest}})
    return path


def flip(path: Path) -> None:
    """Another byte, of the same size."""
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 1
    path.write_bytes(found)


def restep(path: Path) -> None:
    found = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(found | {"step": 99}))


DAMAGES: dict[str, Any] = {
    f"{FILE} is missing": lambda path: (path / FILE).unlink(),
    " bytes, not ": lambda path: (path / FILE).write_bytes((path / FILE).read_bytes() + b"0"),
    f"{FILE} has changed since it was written": lambda path: flip(path / FILE),
    "stray is not of this checkpoint": lambda path: (path / "stray").touch(),
    "manifest.json has changed since it was written": restep,
    "manifest.json: FileNotFoundError": lambda path: (path / checkpoint.MANIFEST).unlink(),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_said_and_the_one_before_it_is_taken(problem: str, tmp_path: Path) -> None:
    before, path = whole(tmp_path / "checkpoints", 9), whole(tmp_path / "checkpoints", 10)
    assert checkpoint.verify(path) is None and checkpoint.newest(tmp_path) == path, "step 10 is newer than step 9"
    DAMAGES[problem](path)
    assert problem in str(checkpoint.verify(path))
    assert checkpoint.newest(tmp_path) == before
    DAMAGES[problem](before)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoint.newest(tmp_path)


def test_resuming_takes_the_newest_whole_checkpoint_and_never_starts_over_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "gathered", lambda value: [value])
    monkeypatch.setattr(ranks, "from_rank0", lambda value: value)
    said: list[str] = []
    run: Any = SimpleNamespace(dir=tmp_path, config=SimpleNamespace(resume="auto"), records=lambda: [])
    run.console = SimpleNamespace(print=said.append)
    assert checkpoint._chosen(run) is None, "a run that has saved nothing begins"
    before, path = whole(tmp_path / "checkpoints", 9), whole(tmp_path / "checkpoints", 10)
    assert checkpoint._chosen(run) == path and not said
    flip(path / FILE)
    assert checkpoint._chosen(run) == before
    assert said == [f"Checkpoint {path} is broken ({FILE} has changed since it was written); trying the one before it."]
    flip(before / FILE)
    with pytest.raises(CheckpointError, match="this run has saved checkpoints, and none is whole"):
        checkpoint._chosen(run)


def test_every_rank_gets_its_own_random_state_back_and_the_place_in_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ds_state, "write", lambda ds, folder: {})
    monkeypatch.setattr(ds_state, "read", lambda ds, folder: None)
    for part in ("_layout", "_order"):
        monkeypatch.setattr(checkpoint, part, lambda engine: {})
    config = SimpleNamespace(resume="auto", train=SimpleNamespace(keep_checkpoints=2))
    console = SimpleNamespace(print=print)
    run: Any = SimpleNamespace(dir=tmp_path, config=config, console=console, log=print, records=lambda: [])
    engine: Any = SimpleNamespace(ds=None)

    def work(rank: int) -> Any:
        torch.manual_seed(rank)
        checkpoint.save(run, engine, State(step=3, samples=24))
        after = torch.rand(4)
        state = checkpoint.resume(run, engine)
        return after, torch.rand(4), state

    ended = on_ranks(2, tmp_path, work)
    assert {e.code for e in ended} == {0}, [e.printed for e in ended]
    for one in ended:
        after, again, state = one.result
        assert torch.equal(after, again) and state == State(3, 24)
    assert not torch.equal(ended[0].result[0], ended[1].result[0])


def test_of_a_tied_weight_the_first_stage_counts_and_one_name_is_written(tmp_path: Path) -> None:
    for stage, state in enumerate([{"words": torch.zeros(2), "layer.0": torch.ones(1)}, {"words": torch.ones(2)}]):
        torch.save(state, tmp_path / ds_state.STAGE.format(f"{stage:02}"))
    found = export._stages(tmp_path)
    assert found["words"].tolist() == [0, 0] and found.keys() == {"words", "layer.0"}
    export._save({"words": found["words"], "decoder": found["words"]}, tmp_path / export.MODEL)
    assert load_file(tmp_path / export.MODEL).keys() == {"words"}
