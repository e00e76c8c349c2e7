"""What a check of a host is given, the job and how large its model is, and what it finds; nothing is allocated.

job = HostJob(config, device="cpu", world=4, slots=2, hosts=2, build=False)
rated("open files", limit >= 1024, f"{limit}", "1024", "ulimit -n 65536")    # ok, or fail with its way out
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal

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
        layout = Layout.of(self.config, self.ds, world=self.world, device=self.device)
        return int(self.slots * mean(memory_of(self.shape, layout, n).total("host") for n in range(layout.pipe)))


def _in_files(weights: str) -> int | None:
    """Of a folder, or of what this host has of the hub already; nothing is downloaded."""
    from huggingface_hub import parse_local_safetensors_file_metadata, snapshot_download

    try:
        folder = Path(weights if Path(weights).is_dir() else snapshot_download(weights, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of the hub's
        return None
    heads = map(parse_local_safetensors_file_metadata, folder.glob("*.safetensors"))
    return sum(sum(head.parameter_count.values()) for head in heads) or None


State = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One check on one host: what was found, what it was held against, and what mends it."""

    name: str
    state: State
    value: str
    rule: str = ""
    way_out: str = ""


def rated(name: str, good: bool | None, value: str, rule: str, way_out: str, bad: State = "fail") -> Finding:
    """``ok``, or ``bad`` with the way out; None: the model's size would tell, which is said and not taken for good."""
    if good is None:
        return Finding(name, "warn", value, "the model's size is not known here")
    return Finding(name, "ok" if good else bad, value, rule, "" if good else way_out)


def unneeded(name: str, why: str) -> Finding:
    return Finding(name, "skipped", f"not needed: {why}")
