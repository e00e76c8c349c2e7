"""Writes toolkit/deepspeed/keys.json: every key that the installed DeepSpeed reads, with its type.

    python tests/make_ds_keys.py         # after an upgrade of DeepSpeed or torch; then read the diff

A type is bool, int, number, string, list, block, object (of any keys), any, or the list of allowed
values; a trailing ``?`` allows null. Blocks parsed by pydantic give theirs by their fields; the others are
found by handing DeepSpeed a dict that records each key it is asked for, typed by the default it is asked with.
"""

import enum
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import config as ds_config
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum, HybridEngineConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

FILE = Path(__file__).parents[1] / "toolkit" / "deepspeed" / "keys.json"

PYDANTIC: dict[str, type[BaseModel]] = {
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "csv_monitor": CSVConfig,
    "fp16": DeepSpeedFP16Config,
    "hybrid_engine": HybridEngineConfig,
    "tensor_parallel": TPTrainingConfig,
    "tensorboard": TensorBoardConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "wandb": WandbConfig,
    "weight_quantization": WeightQuantConfig,
    "zero_optimization": DeepSpeedZeroConfig,
}
# Blocks that DeepSpeed reads key by key. Below data_efficiency and expert_parallel any key goes.
PLAIN = {
    "activation_checkpointing", "aio", "autotuning", "checkpoint", "checkpoint.parallel_write",
    "checkpoint.writer", "data_efficiency", "data_types", "flops_profiler", "optimizer", "scheduler",
    "timers", "torch_autocast",
}  # fmt: skip
DTYPES = sorted(n for d in DtypeEnum for n in d._all_values if isinstance(n, str) and "int" not in n)
COMM_DTYPES = ["fp32", "fp16", "bf16"]
# Types that the default (None, mostly) does not tell; each is what the reading code asks of the value.
KNOWN: dict[str, Any] = {
    "activation_checkpointing.number_checkpoints": "int?",
    "autotuning.arg_mappings": "any",
    "autotuning.model_info": "any",
    "checkpoint.tag_validation": ["Warn", "Ignore", "Fail"],
    "checkpoint.writer.type": "string",
    "communication_data_type": [*COMM_DTYPES, None],
    "data_efficiency.data_routing": "any",
    "data_parallel_size": "int",
    "data_types.buffer_dtype": [*DTYPES, None],
    "data_types.grad_accum_dtype": [*DTYPES, None],
    "data_types.keep_in_fp32_modules": "any",
    "data_types.param_dtype": [*DTYPES, None],
    "datastates_ckpt": "any",
    "expert_parallel": "any",
    "flops_profiler.output_file": "string?",
    "gradient_accumulation_steps": "int",
    "gradient_allreduce_op": ["mean", "sum"],
    "log_level": "string?",
    "optimizer.legacy_fusion": "bool",
    "optimizer.params": "object?",
    "optimizer.type": "string",
    "scheduler.params": "object?",
    "scheduler.type": "string",
    "seq_parallel_communication_data_type": [*COMM_DTYPES, None],
    "sequence_parallel_size": "int",
    "steps_per_print": "int?",
    "torch_autocast.dtype": DTYPES,
    "torch_autocast.lower_precision_safe_modules": "list?",
    "train_batch_size": "int",
    "train_micro_batch_size_per_gpu": "int",
    "vocabulary_size": "int?",
    "zero_optimization": "block",
}

# Schedulers that need a function or other schedulers, which no JSON can hold.
NOT_IN_JSON = {
    "ChainedScheduler", "LambdaLR", "LRScheduler", "MultiplicativeLR", "SequentialLR", "_LRScheduler",
}  # fmt: skip


class Recorder(dict[str, Any]):
    """An empty dict that notes the keys it is asked for, and claims to hold the blocks of PLAIN."""

    def __init__(self, keys: dict[str, Any], path: str = "") -> None:
        super().__init__()
        self.seen, self.path = keys, path

    def _note(self, key: str, kind: Any) -> str:
        full = f"{self.path}{key}"
        if self.seen.get(full, "any?") == "any?":
            self.seen[full] = kind
        return full

    def __contains__(self, key: object) -> bool:
        return self._note(str(key), "any?") in PLAIN

    def __getitem__(self, key: str) -> Any:
        full = self._note(key, "block")
        if full not in PLAIN:
            return super().__getitem__(key)
        self.seen[full] = "block"
        return Recorder(self.seen, f"{full}.")

    def get(self, key: str, default: Any = None) -> Any:
        if f"{self.path}{key}" in PLAIN:
            return self[key]
        self._note(key, default_kind(default))
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __bool__(self) -> bool:
        return True

    def __copy__(self) -> "Recorder":
        return self

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return {}


def default_kind(value: Any) -> str:
    kinds = {bool: "bool", int: "int", float: "number", str: "string", list: "list", tuple: "list"}
    return kinds.get(type(value), "any?" if value is None else "any")


def annotation_kind(annotation: Any) -> Any:
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        rest = [annotation_kind(o) for o in options if o is not type(None)]
        if len(rest) > 1:
            return "any?"
        return [*rest[0], None] if isinstance(rest[0], list) else f"{rest[0]}?"
    if origin is typing.Literal:
        return list(options)
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return sorted({member.value for member in annotation})
    if origin in (list, tuple):
        return "list"
    kinds = {bool: "bool", int: "int", float: "number", str: "string", Path: "string", torch.dtype: "string",
             list: "list", tuple: "list"}  # fmt: skip
    return kinds.get(annotation, "any")


def model_keys(model: type[BaseModel], path: str, keys: dict[str, Any], replaced: dict[str, str]) -> None:
    for name, field in model.model_fields.items():
        nested = [o for o in (field.annotation, *typing.get_args(field.annotation))
                  if inspect.isclass(o) and issubclass(o, BaseModel)]  # fmt: skip
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        for key in {name, field.alias or name}:
            full = f"{path}.{key}"
            if nested:
                optional = type(None) in typing.get_args(field.annotation)
                keys[full] = "block?" if optional else "block"
                model_keys(nested[0], full, keys, replaced)
            else:
                keys[full] = annotation_kind(field.annotation)
            if extra.get("deprecated"):
                replaced[full] = f"{path}.{extra['new_param']}"


def outside_keys() -> set[str]:
    """Keys read from the raw dict elsewhere than in DeepSpeedConfig."""
    root = Path(deepspeed.__file__).parent
    sources = [root / "__init__.py", root / "runtime" / "config.py", root / "runtime" / "engine.py"]
    pattern = r'(?:\bconfig\["(\w+)"\]|"(\w+)" in (?:self\.)?config\b(?!\[)|\bconfig\.get\("(\w+)")'
    return {next(filter(None, m)) for s in sources for m in re.findall(pattern, s.read_text())}


def parameters(cls: type, numeric: str) -> dict[str, str]:
    """Parameters of an optimizer or scheduler after the first (what it works on); ``!``: without a default.

    A numeric default tells little (weight_decay=0 may be 0.01), so those get the type ``numeric``.
    """
    kinds = {}
    for p in list(inspect.signature(cls).parameters.values())[1:]:
        required = p.default is inspect.Parameter.empty
        kind = "any" if required else default_kind(p.default)
        kind = {"number": numeric, "int": numeric, "any?": "any"}.get(kind, kind)
        kinds[p.name] = ("int" if p.name.endswith("num_steps") else kind) + ("!" if required else "")
    return kinds


def muon_parameters() -> dict[str, str]:
    """Muon drops every other key in silence (DeepSpeedEngine._muon_param_groups)."""
    numbers = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr"}
    others = {"betas": "list", "ns_method": "string", "per_head_muon": "bool"}
    return dict.fromkeys(sorted(numbers), "number") | others


def optimizers() -> dict[str, dict[str, str]]:
    ours = [FusedAdam, DeepSpeedCPUAdam, FusedLamb, FusedLion, DeepSpeedCPULion, DeepSpeedCPUAdagrad]
    found = {c.__name__: parameters(c, "number") for c in ours} | {"MuonWithAuxAdam": muon_parameters()}
    del found["DeepSpeedCPUAdam"]["adamw_mode"]  # given by the engine, from adam_w_mode
    for name, value in vars(torch.optim).items():
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer":
            found[f"torch.{name}"] = parameters(value, "number")
    return found


def schedulers() -> dict[str, dict[str, str]]:
    base = torch.optim.lr_scheduler.LRScheduler
    found = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    for name, value in vars(torch.optim.lr_scheduler).items():
        if inspect.isclass(value) and issubclass(value, base) and name not in NOT_IN_JSON:
            found.setdefault(name, value)
    return {name: parameters(value, "any") for name, value in found.items()}


def generate() -> dict[str, Any]:
    keys: dict[str, Any] = {}
    replaced = {"bfloat16": "bf16"}
    recorder = Recorder(keys)
    recorder["train_batch_size"] = 1  # DeepSpeed reads no further without one
    DeepSpeedConfig(recorder)
    keys |= {key: "any?" for key in outside_keys() if key not in keys}
    for key in ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS:
        keys.pop(key, None)
    for path, model in PYDANTIC.items():
        keys[path] = "block"
        model_keys(model, path, keys, replaced)
    # use_reentrant has no default there; PipelineEngine.__init__ reads it
    keys |= {f"pipeline.{k}": "any" for k in ds_config.get_pipeline_config({})}
    keys |= {"pipeline": "block", "pipeline.use_reentrant": "bool", "pipeline.activation_checkpoint_interval": "int"}
    keys |= KNOWN
    removed = dict(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    removed |= {f"zero_optimization.{k}": v for k, v in ds_config._REMOVED_ZERO_CONFIG_KEYS.items()}
    removed = {key: re.sub(r" *See +https\S+", "", reason).strip() for key, reason in removed.items()}
    return {
        "deepspeed": deepspeed.__version__.split("+")[0],
        "keys": keys,
        "removed": removed,
        "replaced": replaced,
        "optimizers": optimizers(),
        "schedulers": schedulers(),
    }


def text() -> str:
    return json.dumps(generate(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
