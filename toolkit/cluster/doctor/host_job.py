"""The job as one of its hosts sees it, and how large its model is; nothing is allocated.

job = HostJob(config, device="cpu", world=4, slots=2, hosts=2, build=False)
job.parameters          # 4_384_316, or None where only the data would tell
job.checkpoint_bytes    # of one checkpoint
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

from toolkit.config.schema import RunConfig
from toolkit.deepspeed import ds_config
from toolkit.deepspeed.facts import Facts
from toolkit.errors import PlanError
from toolkit.plan.layout import BYTES, Layout
from toolkit.plan.memory import memory_of
from toolkit.plan.shapes import ModelShape, model_shape


@dataclass(frozen=True)
class HostJob:
    """The configuration, this host's device, its ranks of how many, on how many hosts."""

    config: RunConfig
    device: str
    world: int
    slots: int
    hosts: int
    build: bool

    @property
    def run_dir(self) -> Path:
        return Path(self.config.output_dir) / (self.config.name or self.config.task.name)

    @cached_property
    def ds(self) -> dict[str, Any]:
        """Exactly what DeepSpeed would get. Raises ConfigError."""
        return ds_config.complete(self.config, world=self.world, device=self.device, run_dir=self.run_dir)

    @property
    def facts(self) -> Facts:
        return Facts(self.ds, self.world, self.device)

    @property
    def ops(self) -> list[str]:
        """The class names of the op builders that the job loads."""
        return ds_config.required_ops(self.ds, device=self.device, world=self.world)

    @cached_property
    def shape(self) -> ModelShape | None:
        """None of a model that has no plan."""
        with suppress(PlanError):
            return model_shape(self.config)
        return None

    @property
    def layout(self) -> Layout:
        return Layout.of(self.config, self.ds, world=self.world, device=self.device)

    @cached_property
    def parameters(self) -> int | None:
        """As the plan counts them; of weights that have no plan, as many as their files on this host hold."""
        weights = self.config.model.weights
        return self.shape.parameters if self.shape else _in_files(weights) if weights else None

    @property
    def checkpoint_bytes(self) -> int | None:
        """Of one checkpoint: weights in their type (ZeRO 3: none), their fp32 copy, the optimizer's states."""
        if (count := self.parameters) is None:
            return None
        weight = 0 if self.facts.stage == 3 else BYTES[self.facts.dtype]
        size = weight + (4 if self.facts.stage else 0) + 4 * self.facts.states
        if self.config.pipeline.stages == 1:
            return count * size
        # the vocabulary's matrix is in the first stage and in the last; ds_state adds fp32 weights for toolkit export
        return (count + ds_config.largest_parameter(self.config)) * size + count * 4

    @property
    def host_bytes(self) -> int | None:
        """What the plan says that this host's ranks keep in its memory."""
        if self.shape is None:
            return None
        stages = range(self.layout.pipe)
        return int(self.slots * mean(memory_of(self.shape, self.layout, stage).total("host") for stage in stages))


def _in_files(weights: str) -> int | None:
    """Of a folder, or of what this host has of the hub already; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder, count = Path(weights), 0
    try:
        folder = folder if folder.is_dir() else Path(snapshot_download(weights, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of the hub's
        return None
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            count += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.offset_keys())
    return count or None
