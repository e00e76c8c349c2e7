"""A checkpoint as a Hugging Face folder: config.json, model.safetensors, tokenizer.

toolkit export runs/bert            # -> runs/bert/export, for AutoModel….from_pretrained
"""

import io
import json
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from deepspeed.checkpoint.affine import ParamAffineMap
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file

from toolkit.checkpoint import checkpoint, ds_state
from toolkit.errors import CheckpointError

MODEL = "model.safetensors"


def export(run_dir: Path, out: Path | None = None) -> Path:
    """Export the best checkpoint of a run in fp32, or the newest whole one: it replaces an earlier export alone."""
    out = (out or run_dir / "export").absolute()
    if not (run_dir / "model" / "config.json").exists():
        raise CheckpointError(f"{run_dir}: not the directory of a run that has begun (no model/config.json).")
    if out.exists() and not (out / MODEL).exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: holds something else than an export. Remove it, or choose another --out.")
    source = checkpoint.newest(run_dir)
    staging, old = (out.with_name(f".{out.name}.{kind}") for kind in ("staging", "old"))
    try:
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(run_dir / "model", staging)
        _save(weights(source), staging / MODEL)
        if out.exists():
            out.rename(old)
        staging.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot export {source}: {error}.") from error
    return out


def weights(path: Path) -> dict[str, Any]:
    """The full fp32 state dict of a checkpoint of any ZeRO stage; tied names share one tensor."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    for file in (path / ds_state.TAG).iterdir():
        if (code := ds_state.foreign_code(file)) is not None:
            raise CheckpointError(f"{file} {code}. Nothing of it was run.")
    with ds_state.safe_loading():
        if manifest.get("pipe_parts"):
            return _stages(path / ds_state.TAG)
        shards = [_shard(path / ds_state.TAG, manifest["zero_stage"], i) for i in range(manifest.get("tensor_size", 1))]
        return shards[0] if len(shards) == 1 else _merged(shards, path / ds_state.TAG)


def _stages(folder: Path) -> dict[str, Any]:
    """What the stages of a pipeline held."""
    state: dict[str, Any] = {}
    # The first stage last: of a tied weight its copy counts
    for file in sorted(folder.glob(ds_state.STAGE.format("*")), reverse=True):
        state |= torch.load(file, map_location="cpu", weights_only=True)
    return state


def _shard(folder: Path, stage: int, tensor_rank: int) -> dict[str, Any]:
    """What one of the ranks that share layers held, the parts of ZeRO put together."""
    files = list(folder.glob(f"*mp_rank_{tensor_rank:02d}_*"))
    if stage == 0:
        return dict(torch.load(files[0], map_location="cpu", weights_only=True)["module"])
    with TemporaryDirectory() as own:  # zero_to_fp32 takes every file of a folder for a part of one shard
        (Path(own) / ds_state.TAG).mkdir()
        for file in files:
            (Path(own) / ds_state.TAG / file.name).symlink_to(file.absolute())
        with redirect_stdout(None), redirect_stderr(io.StringIO()):  # its progress bars
            return dict(get_fp32_state_dict_from_zero_checkpoint(own, ds_state.TAG))


def _merged(shards: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Whole tensors, by the maps that AutoTP leaves in each checkpoint."""
    file = next(folder.glob("*mp_rank_00_model_states.pt"))
    info = torch.load(file, map_location="cpu", weights_only=True)["universal_checkpoint_info"]
    whole: dict[int, Any] = {}  # by address: a tied weight is described under its first name only
    merged = {}
    for name, tensor in shards[0].items():
        pattern = f"^{re.escape(name)}$"
        if pattern in info["tp_replicated_parameter_patterns"]:  # at ZeRO 3 its map says that it is empty
            whole[tensor.data_ptr()] = tensor
        elif tensor.data_ptr() not in whole:
            places = ParamAffineMap.from_dict(info["affine_map"]["params"][pattern])
            whole[tensor.data_ptr()] = places.rebuild({i: shard[name] for i, shard in enumerate(shards)})
        merged[name] = whole[tensor.data_ptr()]
    return merged


def _save(state: dict[str, Any], file: Path) -> None:
    """One file; of tensors that are tied the first name is written, as Hugging Face does."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr(), name)
    save_file({name: state[name].float().contiguous() for name in first.values()}, file, metadata={"format": "pt"})
    with file.open("rb") as written:
        os.fsync(written.fileno())
