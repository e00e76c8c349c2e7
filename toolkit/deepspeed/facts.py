"""What a DeepSpeed config says, in one place: dtypes, offload, the optimizer that DeepSpeed picks; pure, no torch.

facts = Facts(ds, ranks=8, device="cuda")
facts["zero_optimization.stage"], facts.dtype, facts.optimizer, facts.states

Sources in comments are files of DeepSpeed 0.19.8; "seen" means tried on two CPU ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from toolkit.config.kinds import KINDS, Kind
from toolkit.config.schema import RunConfig, dotted

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DTYPES = {
    "fp32": ("fp32", "float32", "float", "torch.float32"),
    "fp16": ("fp16", "float16", "half", "torch.float16"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
}
# DeepSpeed's own "auto"
AUTO = ("data_types.keep_in_fp32_modules", "pipeline.stages", "expert_parallel.", "zero_optimization.zenflow.")
# DeepSpeedEngine._configure_basic_optimizer: the class by its name in lower case, on the device and offloaded
CLASSES = {
    "adam": ("FusedAdam", "DeepSpeedCPUAdam"),
    "adamw": ("FusedAdam", "DeepSpeedCPUAdam"),
    "adagrad": ("torch.Adagrad", "DeepSpeedCPUAdagrad"),
    "lamb": ("FusedLamb", "FusedLamb"),
    "lion": ("FusedLion", "DeepSpeedCPULion"),
    "muon": ("MuonWithAuxAdam", "MuonWithAuxAdam"),
}
# fp32 numbers of state for each parameter, besides the master weight; of a class that is not here, 2
STATES = {
    "FusedLion": 1,
    "DeepSpeedCPULion": 2,  # the second is never used (ops/lion/cpu_lion.py)
    "MuonWithAuxAdam": 2,  # but for matrices that are no embeddings: one
    "torch.Adagrad": 1, "DeepSpeedCPUAdagrad": 1, "torch.RMSprop": 1, "torch.Adafactor": 0, "torch.ASGD": 1,
}  # fmt: skip


class Unknown(Exception):
    """A rule asks for what cannot be known: a value that others fill in, or the number of ranks."""


@dataclass(frozen=True)
class Facts:
    """A DeepSpeed config (``facts["zero_optimization.stage"]``) and what it is going to run on."""

    ds: Mapping[str, Any]
    ranks: int | None  # data-parallel ones; None: unknown, as in a file from elsewhere
    device: str  # cpu, cuda, …
    largest: int | None = None  # elements of the model's largest parameter, where known
    config: RunConfig | None = None  # None: a file from elsewhere
    parameters: int | None = None  # of the model, where known

    def __getitem__(self, path: str) -> Any:
        node: Any = self.ds
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
            if node == "auto" and not path.startswith(AUTO):
                raise Unknown(path)
        return node

    @property
    def run(self) -> RunConfig:
        assert self.config is not None
        return self.config

    @cached_property
    def changed(self) -> dict[str, Any]:
        """Dotted keys of the run that differ from the defaults, and their values."""
        return dotted(self.run.model_dump(mode="json", exclude_defaults=True, exclude={"deepspeed"}))

    @property
    def kind(self) -> Kind:
        return KINDS[self.run.task.kind]

    @property
    def world(self) -> int:
        """Data-parallel ranks. Raises Unknown."""
        if self.ranks is None:
            raise Unknown("ranks")
        return self.ranks

    def given(self, block: str, keys: tuple[str, ...]) -> str:
        """Those of ``keys`` that ``block`` holds, for a message; empty if none."""
        return ", ".join(f"{block}.{key}" for key in keys if key in (self[block] or {}))

    def others(self, block: str, *known: str) -> str:
        """The keys of ``block`` besides ``known``, for a message; empty if none."""
        return ", ".join(f"{block}.{key}" for key in self[block] or {} if key not in known)

    @property
    def stage(self) -> int:
        return int(self["zero_optimization.stage"] or 0)

    @property
    def dtype(self) -> str:
        """What weights and activations are: fp16 first, as in DeepSpeedEngine.get_data_types."""
        return "fp16" if self["fp16.enabled"] else "bf16" if self["bf16.enabled"] else "fp32"

    @property
    def accumulation(self) -> str:
        return canonical(self["data_types.grad_accum_dtype"]) or self.dtype

    @property
    def offload(self) -> str:
        return str(self["zero_optimization.offload_optimizer.device"] or "none")

    @property
    def param_offload(self) -> str:
        return str(self["zero_optimization.offload_param.device"] or "none")

    @property
    def nvme(self) -> bool:
        return "nvme" in (self.offload, self.param_offload)

    @property
    def clipping(self) -> float:
        return 1.0 if self["gradient_clipping"] is None else float(self["gradient_clipping"])

    @property
    def optimizer(self) -> str:
        """The class that DeepSpeed picks, or ''."""
        name = str(self["optimizer.type"] or "")
        if name.lower() in ("adam", "adamw") and self["optimizer.params.torch_adam"]:
            adamw = name.lower() == "adamw" or self["optimizer.params.adam_w_mode"] is not False
            return "torch.AdamW" if adamw else "torch.Adam"
        if name.lower() in CLASSES:
            return CLASSES[name.lower()][self.offload != "none"]
        return f"torch.{name}" if name else ""

    @property
    def states(self) -> int:
        """fp32 numbers that the optimizer keeps for each parameter besides the master weight, at most."""
        if self.optimizer == "torch.SGD":
            return 1 if self["optimizer.params.momentum"] else 0
        return STATES.get(self.optimizer, 2)

    @property
    def bf16_optimizer(self) -> bool:
        """Stage 1 then runs BF16_Optimizer, not ZeRO's own (DeepSpeedEngine._do_optimizer_sanity_check)."""
        return (self.stage, self.dtype, self.accumulation) == (1, "bf16", "fp32") and self.offload != "cpu"

    @property
    def swap_buffers(self) -> int:
        """Buffers that one parameter's optimizer state on NVMe takes, twice where steps overlap. Seen."""
        block = self["zero_optimization.offload_optimizer"] or {}
        return 8 if block.get("pipeline_read") or block.get("pipeline_write") else 4

    @property
    def batch_found(self) -> int:
        """train_batch_size as micro x accumulation x ranks, a missing one taken as DeepSpeed does."""
        micro, steps = self["train_micro_batch_size_per_gpu"], self["gradient_accumulation_steps"]
        total = self["train_batch_size"] or (micro or 0) * (steps or 1) * self.world
        steps = steps or (total // micro // self.world if micro else 1)
        micro = micro or total // self.world // steps
        return int(micro * steps * self.world)


def canonical(name: Any) -> str | None:
    """fp32, fp16 or bf16."""
    return next((short for short, names in DTYPES.items() if name in names), None)
