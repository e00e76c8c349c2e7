"""A checkpoint as a Hugging Face folder: config.json, model.safetensors, tokenizer.

toolkit export runs/bert            # -> runs/bert/export, for AutoModel….from_pretrained
"""

import json
import shutil
from pathlib import Path
from typing import Any

from toolkit import checkpoint
from toolkit.errors import CheckpointError


def export(run_dir: Path, out: Path | None = None) -> Path:
    """Export the newest whole checkpoint of a run in fp32; replaces an earlier export of it."""
    out = out or run_dir / "export"
    if not (run_dir / "model" / "config.json").exists():
        raise CheckpointError(f"{run_dir}: not a run directory (no model/config.json).")
    source = checkpoint.newest(run_dir)
    staging = out.with_name(f".{out.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(run_dir / "model", staging)
    _save(weights(source), staging)
    if out.exists():
        shutil.rmtree(out)
    staging.rename(out)
    return out


def weights(path: Path) -> dict[str, Any]:
    """The full fp32 state dict of a checkpoint of any ZeRO stage; tied names share one tensor."""
    import torch

    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    with checkpoint.safe_loading():
        if manifest["zero_stage"] == 0:
            file = path / checkpoint.TAG / "mp_rank_00_model_states.pt"
            state = torch.load(file, map_location="cpu", weights_only=True)["module"]
            return {name: tensor.float() for name, tensor in state.items()}
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(get_fp32_state_dict_from_zero_checkpoint(str(path), checkpoint.TAG))


def _save(state: dict[str, Any], folder: Path) -> None:
    """One file; of tensors that are tied the first name is written, as Hugging Face does."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            unique[name] = tensor.contiguous()
    save_file(unique, folder / "model.safetensors", metadata={"format": "pt"})
