"""The same small training in every layout, made once per test session, and what to compare of two runs.

run = whole() / "stage3-nvme"
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from launching import launch_many, read, runnable

from toolkit.checkpoint import checkpoint, ds_state

# One layer, but matrices of 1 MiB per rank and more: DeepSpeed keeps smaller tensors off the NVMe.
WIDE = ["model.hidden_size=512", "model.intermediate_size=1024", "model.num_hidden_layers=1", "train.steps=6"]
ALL = {
    "stage0": ["zero=stage0"],
    "stage1": ["zero=stage1"],
    "stage2": ["zero=stage2"],
    "stage3": ["zero=stage3"],
    "stage2-cpu": ["zero=stage2", "offload=cpu"],
    "stage3-cpu": ["zero=stage3", "offload=cpu"],
    "stage3-cpu-params": ["zero=stage3", "offload=cpu_params"],
    "stage3-nvme": ["zero=stage3", "offload=nvme", *WIDE],
    "bf16-stage1": ["zero=stage1", "precision=bf16"],
    "bf16-stage2": ["zero=stage2", "precision=bf16"],
    "bf16-stage3": ["zero=stage3", "precision=bf16"],
    "pipe-stage0": ["zero=stage0", "pipeline=two"],
    "pipe-stage1": ["zero=stage1", "pipeline=two", "pipeline.schedule=gpipe", "activation=recompute"],
    "pipe-stage1-cpu": ["zero=stage1", "pipeline=two", "offload=cpu", "pipeline.partition=time"],
    "pipe-dualpipev": ["zero=stage1", "pipeline=two", "pipeline.schedule=dualpipev", "pipeline.partition=uniform"],
    "bf16-pipe": ["zero=stage1", "precision=bf16", "pipeline=two", "pipeline.partition=[3]"],
}
LAYOUTS = runnable(ALL)
# Of these betas the float product over 4 steps differs from the power, so that a resume by the power shows at once.
DROPOUT = ["model.dropout=0.1", "deepspeed.optimizer.params.betas=[0.88,0.98]"]


@cache
def whole() -> Path:
    """Every layout, uninterrupted, saved after step 4 and at the end."""
    folder = Path(tempfile.mkdtemp(prefix="toolkit-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    done = launch_many(folder, {name: [*DROPOUT, *o] for name, o in LAYOUTS.items()})
    assert not done.errors, done.errors
    return folder


def copy_run(source: Path, target: Path, *, without: str | None = "step-last") -> Path:
    """A run directory as it was when only its first checkpoint had been written."""
    shutil.copytree(source, target)
    for path in checkpoint.list_checkpoints(target / "checkpoints")[: 1 if without else 0]:
        shutil.rmtree(path)
    return target


def trained(run: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in read(run / "metrics.jsonl") if "loss" in r]


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of what DeepSpeed saves, without the paths in its copy of the configuration."""
    if isinstance(tree, dict):
        for key in tree.keys() - {"ds_config"}:
            yield from tensors(tree[key], f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from tensors(value, f"{name}.{i}")
    elif isinstance(tree, torch.Tensor | int | float | bool):
        yield name, tree


def final_state(run: Path) -> dict[str, Any]:
    newest = checkpoint.newest(run)
    with ds_state.safe_loading():
        return dict(
            leaf for f in sorted(newest.rglob("*.pt")) for leaf in tensors(torch.load(f, map_location="cpu"), f.name)
        )


def assert_same_state(run: Path, other: Path) -> None:
    """Weights, moments, counters, generators: every number in the last checkpoints."""
    mine, theirs = final_state(run), final_state(other)
    assert mine.keys() == theirs.keys() and any(isinstance(v, torch.Tensor) and v.numel() > 99 for v in mine.values())
    assert [k for k, v in mine.items() if not torch.equal(torch.as_tensor(v), torch.as_tensor(theirs[k]))] == []


def edit_manifest(path: Path, *, sealed: bool, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    if sealed:
        del manifest["manifest_sha256"]
        manifest["manifest_sha256"] = checkpoint._own_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


class Evil:
    """A pickle that touches a file when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def plant(path: Path, file: str, proof: Path) -> None:
    """A hostile file, and a manifest that vouches for it."""
    torch.save({"module": Evil(proof), "optimizer_state_dict": Evil(proof), "torch": Evil(proof)}, path / file)
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / file).read_bytes()
    digest = {"bytes": len(data), "sha256": checkpoint._sha256(path / file)}
    edit_manifest(path, sealed=True, files=manifest["files"] | {file: digest})
