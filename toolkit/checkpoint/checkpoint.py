"""Checkpoints that are either whole or not there: staged, hashed, renamed; verified before they are loaded.

    checkpoints/step-200/  manifest.json  rng.rank0.pt …  state/ (DeepSpeed's own files)

A name without a dot in front is a whole checkpoint. DeepSpeed's own ``latest`` file is not used: it is
written in place and can name a broken one.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.checkpoint import ds_state
from toolkit.engine.plain import Engine
from toolkit.errors import CheckpointError, go_on
from toolkit.job import ranks
from toolkit.run.directory import Run
from toolkit.run.files import as_json, replace

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class State:
    """Where training stands: optimizer steps done, samples taken from the stream."""

    step: int = 0
    samples: int = 0


def save(run: Run, engine: Engine, state: State, keep: int | None = None) -> None:
    """Write ``checkpoints/step-N`` and drop all but the newest ``train.keep_checkpoints`` and that of step ``keep``.
    Raises CheckpointError on every rank if any cannot write; the checkpoints before stay as they are."""
    final = run.dir / "checkpoints" / f"step-{state.step}"
    staging = final.with_name(f".{final.name}.staging")
    try:
        with _agreed(final):
            if ranks.rank() == 0:
                _sweep(final.parent)
                (staging / ds_state.TAG).mkdir(parents=True)
        with _agreed(final):
            mine, name = ds_state.write(engine.ds, staging), f"rng.rank{ranks.rank()}.pt"
            rng = {"cpu": torch.get_rng_state()}  # dropout's generators; data draws from none (toolkit/data/order.py)
            rng |= {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
            mine[name] = ds_state.save_file(rng, staging / name)
        files = {name: digest for part in ranks.gathered(mine) for name, digest in part.items()}
        with _agreed(final):
            if ranks.rank() == 0:
                _seal(staging, {**asdict(state), **_layout(engine), "order": _order(engine), "files": files})
                if final.exists():  # a broken one of that name
                    final.rename(final.with_name(f".{final.name}.old"))
                staging.rename(final)
                _sync_folder(final.parent)
                _prune(final, run.config.train.keep_checkpoints, keep)
    except CheckpointError:
        if ranks.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the space
        raise
    run.log({"step": state.step, "checkpoint": final.name})


def resume(run: Run, engine: Engine) -> State:
    """Load what ``resume`` names. The run's first steps, if there is nothing to load; never unasked."""
    path = _chosen(run)
    if path is None:
        return State()
    manifest = ranks.from_rank0(_manifest(path))
    _compare(path, manifest, _layout(engine))
    compare_order(path, manifest, _order(engine))
    # Every rank looks at its share of the files before any rank reads one.
    mine = [path / name for name in sorted(manifest["files"])[ranks.rank() :: ranks.world()]]
    for found in ranks.gathered([f"{file} {code}" for file in mine if (code := ds_state.foreign_code(file))]):
        for message in found:
            raise CheckpointError(f"{message}. Nothing of it was run; do not trust where this checkpoint comes from.")
    ds_state.read(engine.ds, path)
    rng = torch.load(path / f"rng.rank{ranks.rank()}.pt", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    run.console.print(f"Resuming from {path}.")
    return State(manifest["step"], manifest["samples"])


def load_best(run: Run, engine: Engine, step: int) -> None:
    """Load the weights of the step that evaluated best. Raises CheckpointError."""
    path = run.dir / "checkpoints" / f"step-{step}"
    if (problem := _problem(path)) is not None:
        raise CheckpointError(
            f"{path}: this was the best step, and {problem}. Restore it, or train again under another name."
        )
    ds_state.read(engine.ds, path)
    run.console.print(f"The best weights are those of step {step}.")


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest first. Staging names do not count."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [p for _, p in sorted(found, reverse=True)]


def newest(run_dir: Path) -> Path:
    """The best checkpoint of a run where it has a metric to tell, else the newest whole one. Raises CheckpointError."""
    best = run_dir / "best.json"
    chosen = [run_dir / "checkpoints" / f"step-{json.loads(best.read_text())['step']}"] if best.exists() else []
    for path in (*chosen, *list_checkpoints(run_dir / "checkpoints")):
        if verify(path) is None:
            return path
    raise CheckpointError(f"{run_dir}: no whole checkpoint in {run_dir / 'checkpoints'}.")


def verify(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every ``shares``-th file, from ``share`` on."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        files = _manifest(path)["files"]
    except CheckpointError as error:
        return str(error)
    extra = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {*files, MANIFEST}
    if extra:
        return f"{min(extra)} is not of this checkpoint"
    for name in sorted(files)[share::shares]:
        file, expected = path / name, files[name]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _chosen(run: Run) -> Path | None:
    """The checkpoint to load, verified by all ranks together."""
    if run.config.resume == "never":
        return None
    if run.config.resume != "auto":
        path = Path(run.config.resume)
        if (problem := _problem(path)) is not None:
            hint = " A run is named by its checkpoint: <run>/checkpoints/step-N." if path.is_dir() else ""
            raise CheckpointError(f"resume={path}: {problem}.{hint}")
        return path
    folder = run.dir / "checkpoints"
    newest_first = ranks.from_rank0(list_checkpoints(folder))
    for path in newest_first:
        if (problem := _problem(path)) is None:
            return path  # type: ignore[no-any-return]
        run.console.print(f"Checkpoint {path} is broken ({problem}); trying the one before it.")
    if newest_first or ranks.from_rank0(any("checkpoint" in r for r in run.records())):
        raise CheckpointError(
            f"{folder}: this run has saved checkpoints, and none is whole. "
            "Restore one, or start over under another name."
        )
    return None


def _problem(path: Path) -> str | None:
    """:func:`verify`, the reading shared between the ranks."""
    found = ranks.gathered(verify(path, ranks.rank(), ranks.world()))
    return next((p for p in found if p is not None), None)


@contextmanager
def _agreed(final: Path) -> Iterator[None]:
    """What fails on one rank fails on all, with that rank's words. The body must not leave a collective early."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError) as error:
        problem = f"rank {ranks.rank()}: {error}"
    for found in ranks.gathered(problem):
        if found is not None:
            raise CheckpointError(
                f"{final}: cannot be saved: {found}. The checkpoints before it are as they were: make room or "
                f"permit writing. {go_on()}"
            )


def _layout(engine: Engine) -> dict[str, Any]:
    """What must be the same for a checkpoint to be loaded."""
    zero = engine.ds._config.zero_config
    layout: dict[str, Any] = {
        "world_size": ranks.world(),
        "tensor_size": max(1, engine.ds.autotp_size()),
        "tensor_split": engine.ds.tensor_parallel_config().partition_config,  # None: as AutoTP finds the layers
        "zero_stage": int(zero.stage),
        "dtype": engine.dtype,
        "pipe_parts": getattr(engine.ds.module, "parts", None),  # the first layer of each pipe stage
        "optimizer": engine.ds.optimizer_name(),
        "scheduler": type(engine.ds.lr_scheduler).__name__,
        "model": engine.task.hf_config.to_diff_dict() | {"transformers_version": None},
    }
    if zero.stage == 3:
        layout["sub_group_size"] = zero.sub_group_size
    elif zero.stage:
        layout["round_robin_gradients"] = zero.round_robin_gradients
    return json.loads(json.dumps(layout))  # type: ignore[no-any-return]


def _order(engine: Engine) -> dict[str, Any]:
    """What a place in the training data rests on besides the number of samples taken (toolkit/data/order.py)."""
    return dict(engine.task.order.rests_on) if hasattr(engine.task, "order") else {}


def compare_order(path: Path, manifest: dict[str, Any], order: dict[str, Any]) -> None:
    """Raises CheckpointError where the place in the data would be another one; of a manifest without its order the
    batch's size is known."""
    saved = manifest.get("order", {"batch.global_size": manifest["samples"] // manifest["step"]})
    _compare(path, saved, {key: value for key, value in order.items() if key in saved})


def _compare(path: Path, manifest: dict[str, Any], layout: dict[str, Any]) -> None:
    for key, here in layout.items():
        there = manifest.get(key)
        if there != here:
            if isinstance(here, dict) and isinstance(there, dict):
                own = next(k for k in sorted({*here, *there}) if there.get(k) != here.get(k))
                key, there, here = f"{key}.{own}", there.get(own), here.get(own)
            raise CheckpointError(
                f"{path}: saved with {key}={there}, this run has {key}={here}. Use the saved value, or start a "
                "new run from its weights: toolkit export, then model.weights=<that export>."
            )


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which carries its own hash. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.pop("manifest_sha256") == _own_hash(manifest):
            return manifest  # type: ignore[no-any-return]
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{MANIFEST}: {error!r}") from error
    raise CheckpointError(f"{MANIFEST} has changed since it was written")


def _own_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(staging: Path, manifest: dict[str, Any]) -> None:
    if missing := [name for name in manifest["files"] if not (staging / name).is_file()]:
        raise OSError(f"{missing[0]} was written by another host and is not here: output_dir must be a shared disk")
    replace(staging / MANIFEST, as_json(manifest | {"manifest_sha256": _own_hash(manifest)}))
    for folder in (staging / ds_state.TAG, staging):
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(final: Path, keep: int, best: int | None) -> None:
    """Keep ``final``, the ``keep`` - 1 before it and the best. Later ones are of steps that this run went back on."""
    newest_first = list_checkpoints(final.parent)
    here = newest_first.index(final)
    for path in newest_first[:here] + newest_first[here + keep :]:
        if path.name != f"step-{best}":
            path.rename(path.with_name(f".{path.name}.old"))  # by one rename: never a half-deleted checkpoint
    _sweep(final.parent)


def _sweep(folder: Path) -> None:
    """Remove what is on its way in or out, of a killed save too."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
