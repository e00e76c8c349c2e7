"""Checkpoints that are either whole or not there: staged, hashed, renamed; verified before they are loaded.

    checkpoints/step-200/  manifest.json  rng.rank0.pt …  state/ (DeepSpeed's own files)

DeepSpeed's own ``latest`` file is not used: it is written in place and can name a broken checkpoint.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit import ranks
from toolkit.engine import Engine
from toolkit.errors import CheckpointError
from toolkit.run import Run

TAG = "state"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class State:
    """Where training stands: optimizer steps done, samples taken from the stream."""

    step: int = 0
    samples: int = 0


def save(run: Run, engine: Engine, state: State) -> None:
    """Write ``checkpoints/step-N`` and drop all but the newest ``train.keep_checkpoints``."""
    final = run.dir / "checkpoints" / f"step-{state.step}"
    staging = final.with_name(f".{final.name}.staging")
    if ranks.rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    ranks.wait()
    engine.ds.save_checkpoint(str(staging), tag=TAG, save_latest=False)
    torch.save(_rng(), staging / f"rng.rank{ranks.rank()}.pt")
    ranks.wait()
    files = sorted(str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file())
    mine = {name: _synced_digest(staging / name) for name in files[ranks.rank() :: ranks.world()]}
    digests = {name: digest for part in ranks.gathered(mine) for name, digest in part.items()}
    if ranks.rank() == 0:
        _seal(staging, {**asdict(state), **_layout(run, engine), "files": digests})
        _swap(staging, final)
        _prune(final.parent, run.config.train.keep_checkpoints)
        run.log({"step": state.step, "checkpoint": final.name})
    ranks.wait()


def resume(run: Run, engine: Engine) -> State:
    """Load what ``resume`` names. The run's first steps, if there is nothing to load; never unasked."""
    chosen = run.config.resume
    if chosen == "never":
        return State()
    if chosen != "auto":
        return _load(run, engine, Path(chosen))
    folder = run.dir / "checkpoints"
    newest_first = list_checkpoints(folder)
    for path in newest_first:
        problem = _problem(path)
        if problem is None:
            return _load(run, engine, path)
        run.console.print(f"Checkpoint {path} is broken ({problem}); trying the one before it.")
    if newest_first or any("checkpoint" in r for r in run.records()):
        raise CheckpointError(
            f"{folder}: this run has saved checkpoints, and none is whole. "
            "Restore one, or start over under another name."
        )
    return State()


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest first. Staging names do not count."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [p for _, p in sorted(found, reverse=True)]


def newest(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run. Raises CheckpointError."""
    for path in list_checkpoints(run_dir / "checkpoints"):
        if verify(path) is None:
            return path
    raise CheckpointError(f"{run_dir}: no whole checkpoint in {run_dir / 'checkpoints'}.")


def verify(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every ``shares``-th file, from ``share`` on."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in sorted(manifest["files"].items())[share::shares]:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if _digest(file)["sha256"] != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


@contextmanager
def safe_loading() -> Iterator[None]:
    """Inside, torch.load executes nothing that a file carries, whatever the caller asked of it."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})


def _load(run: Run, engine: Engine, path: Path) -> State:
    problem = _problem(path)
    if problem is not None:
        raise CheckpointError(f"resume={path}: {problem}.")
    manifest = json.loads((path / MANIFEST).read_text())
    _compare(path, manifest, _layout(run, engine))
    with safe_loading():
        engine.ds.load_checkpoint(str(path), tag=TAG)
        _restore_rng(torch.load(path / f"rng.rank{ranks.rank()}.pt", weights_only=True))
    run.console.print(f"Resuming from {path}.")
    return State(manifest["step"], manifest["samples"])


def _problem(path: Path) -> str | None:
    """:func:`verify`, the reading shared between the ranks."""
    found = ranks.gathered(verify(path, ranks.rank(), ranks.world()))
    return next((p for p in found if p is not None), None)


def _layout(run: Run, engine: Engine) -> dict[str, Any]:
    """What must be the same for a checkpoint to be loaded."""
    return {
        "world_size": ranks.world(),
        "zero_stage": int(engine.ds.zero_optimization_stage()),
        "dtype": engine.dtype,
        "optimizer": engine.ds.optimizer_name(),
        "model": engine.task.hf_config.to_diff_dict() | {"transformers_version": None},
    }


def _compare(path: Path, manifest: dict[str, Any], layout: dict[str, Any]) -> None:
    for key, here in json.loads(json.dumps(layout)).items():
        there = manifest.get(key)
        if there != here:
            if isinstance(here, dict) and isinstance(there, dict):
                key, there, here = next(
                    (f"{key}.{k}", there.get(k), here.get(k))
                    for k in sorted({*here, *there})
                    if there.get(k) != here.get(k)
                )
            raise CheckpointError(
                f"{path}: saved with {key}={there}, this run has {key}={here}. Use the saved value, or start a "
                "new run from its weights: toolkit export, then model.weights=<that export>."
            )


def _rng() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _digest(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _synced_digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return _digest(file)


def _seal(staging: Path, manifest: dict[str, Any]) -> None:
    with (staging / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for folder in (p for p in [staging, *staging.rglob("*")] if p.is_dir()):
        _sync_folder(folder)


def _swap(staging: Path, final: Path) -> None:
    """Rename ``staging`` to ``final``; an older (broken) one of that name is in nobody's way."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    for path in list_checkpoints(folder)[keep:]:
        shutil.rmtree(path)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
