"""Builds a Hugging Face model for the engine: the same initial weights in every layout.

    model = build_model(run, task, plan.ds)

Under ZeRO 3 every parameter is partitioned as it is made, so no rank ever holds the whole model;
values are then drawn, or copied from a checkpoint that rank 0 alone reads, one module at a time.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BertConfig
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from toolkit.config.schema import Model
from toolkit.errors import CheckpointError, ConfigError
from toolkit.job import ranks
from toolkit.models import Described, activation
from toolkit.run.directory import Run, weights_folder


def bert_config(model: Model, *, vocab_size: int, pad_id: int) -> BertConfig:
    """The Hugging Face configuration of a model made from scratch."""
    names = BertConfig().to_dict().keys() & Model.model_fields.keys()
    shape = model.model_dump(include=names)
    dropout = {"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": model.dropout}
    return BertConfig(**(shape | dropout | {"vocab_size": vocab_size, "pad_token_id": pad_id}))


def model_config(model: Model, *, vocab_size: int, pad_id: int) -> BertConfig:
    """From ``model.weights`` if given (shape and vocabulary are its own), else from the keys."""
    if model.weights is None:
        return bert_config(model, vocab_size=vocab_size, pad_id=pad_id)
    config = read_config(model.weights, BertConfig)
    if config.vocab_size != vocab_size:
        raise ConfigError(
            f"model.weights={model.weights}: its vocabulary has {config.vocab_size} entries, the tokenizer "
            f"{vocab_size}. Use the tokenizer of these weights: tokenizer.path={model.weights}."
        )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = model.dropout
    return config


def read_config(weights: str, kind: Any, **changes: Any) -> Any:
    """The Hugging Face configuration of ``weights``; ``kind`` is AutoConfig or a class. Raises ConfigError."""
    try:
        return kind.from_pretrained(weights_folder(weights), **changes)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.weights={weights}: neither a folder with a config.json, nor a run, nor a hub name that "
            f"can be reached: {str(error).splitlines()[0]}"
        ) from error


def build_model(run: Run, task: Described, ds: Mapping[str, Any]) -> nn.Module:
    """The task's model in the layout of ``ds``, on the CPU or partitioned; its activations where asked for."""
    config, hf_config, staged = run.config, task.hf_config, run.config.pipeline.stages > 1
    if hasattr(hf_config, "num_attention_heads"):
        hf_config._attn_implementation = config.model.attention
    model: nn.Module = _stage(run, task) if staged else _dense(task, ds, config.tensor_size)
    if not config.model.weights or task.new_head:
        initialise(model, config.seed)
    if config.model.weights:
        # Every pipe stage takes its own of all weights; else the ranks of the first copy read for the others
        state = ranks.agreed(lambda: _read(task, config.model) if staged or run.replica.rank == 0 else {})
        (_fill if staged else _copy)(model, state)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    activation.apply(layers, **config.activation.model_dump())
    return model


def _stage(run: Run, task: Described) -> Any:
    from toolkit.models.pipeline import build_pipeline

    return build_pipeline(run, task)


def _dense(task: Described, ds: Mapping[str, Any], tensor_size: int) -> Any:
    with no_init_weights(), _partitioned(ds, tensor_size):
        model = task.model_class(task.hf_config)
    model.tie_weights()
    return model


def parameters(task: Described) -> int:
    """How many the task's model has, without memory for one."""
    with torch.device("meta"), no_init_weights():
        return int(task.model_class(task.hf_config).num_parameters())


def _partitioned(ds: Mapping[str, Any], tensor_size: int) -> AbstractContextManager[Any]:
    """``deepspeed.zero.Init`` at stage 3, over the ranks that hold the same tensor shards; nothing below."""
    if ds.get("zero_optimization", {}).get("stage", 0) < 3:
        return nullcontext()
    import deepspeed

    mpu = ranks.tensor_groups(tensor_size)
    group = mpu and mpu.get_data_parallel_group()
    return deepspeed.zero.Init(config_dict_or_path=dict(ds), mpu=mpu, data_parallel_group=group)  # type: ignore[no-any-return]


def initialise(model: Any, seed: int) -> None:
    """Draw every module's parameters as Hugging Face does, from (seed, module name).

    So the weights depend neither on the ZeRO stage nor on which modules this rank holds.
    """
    seen: set[int] = set()
    hf_name = getattr(model, "hf_name", str)  # a pipe stage has names of its own
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if not own:
            continue  # nothing here, or only weights tied to a module already drawn
        seen.update(id(p) for p in own)
        with _whole(own), torch.random.fork_rng(devices=[]):
            digest = hashlib.sha256(f"{seed}/{hf_name(name)}".encode()).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # the CPU's, and no other
            _draw(model, module, own)


def _draw(model: Any, module: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Run the model's own initialisation on the CPU in fp32: the same draws on every device and dtype."""
    places = [p.data for p in parameters]
    for p, place in zip(parameters, places, strict=True):
        p.data = torch.zeros(place.shape)
    with torch.no_grad():
        module.apply(lambda m: model._init_weights(m) if m is module else None)
        for p, place in zip(parameters, places, strict=True):
            place.copy_(p.data)
            p.data = place


def _read(task: Described, options: Model) -> dict[str, torch.Tensor]:
    """The state of ``model.weights``, without what a new head is drawn for."""
    weights = str(options.weights)
    # safetensors, or torch.load with weights_only: nothing in the file is executed
    model, info = task.model_class.from_pretrained(
        weights_folder(weights), config=task.hf_config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    body = f"{model.base_model_prefix}."
    may_be_new = {n for n in model.state_dict() if task.new_head and (not n.startswith(body) or ".pooler." in n)}
    if missing := sorted(set(info["missing_keys"]) - may_be_new):
        lacks = f"{len(missing)} of the {len(model.state_dict())} weights of {class_name(task.model_class)}"
        raise CheckpointError(
            f"model.weights={weights}: a {_architecture(weights)}, which lacks {lacks}, such as "
            f"{', '.join(missing[:3])}. Use weights of that architecture."
        )
    for name, there, here in sorted(info["mismatched_keys"]):  # a set: the same one first in every run
        if not (options.new_head and name in may_be_new):
            way = "model.new_head=true leaves it out" if name in may_be_new else "Use weights of this shape"
            raise CheckpointError(
                f"model.weights={weights}: {name} is {tuple(there)} there and {tuple(here)} here. {way}."
            )
    drawn = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
    if options.new_head:
        drawn |= {n for n in may_be_new if not n.startswith(body)}
    return {n: tensor for n, tensor in model.state_dict().items() if n not in drawn}


def class_name(model_class: Any) -> str:
    """What Hugging Face calls it."""
    return str(getattr(model_class, "saved_as", model_class.__name__))


def _architecture(weights: str) -> str:
    """What its config.json says that it is."""
    config = read_config(weights, AutoConfig)
    return str((config.architectures or [config.model_type])[0])


def _fill(model: Any, state: dict[str, torch.Tensor]) -> None:
    """What of ``state`` this pipe stage has."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (found := state.get(model.hf_name(name))) is not None:
                parameter.copy_(found)


def _copy(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The first copy's ``state`` into the model of every rank, one parameter at a time."""
    for name, parameter in model.named_parameters():
        with _whole([parameter]), torch.no_grad():
            if name in state:
                parameter.copy_(state[name])
            if not hasattr(parameter, "ds_id"):
                torch.distributed.broadcast(parameter.data, src=0, group=ranks._control)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():  # such as the bias that Marian and BART add to their logits
        if name in saved:
            if name in state:
                buffer.copy_(state[name])
            torch.distributed.broadcast(buffer, src=0, group=ranks._control)


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Gather parameters that ZeRO 3 has partitioned; rank 0's changes are kept."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)  # type: ignore[no-any-return]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: weight matrices decay, biases and LayerNorm do not (Devlin et al., A.2)."""
    exempt = set(_exempt(model))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if n not in exempt]
    rest = [p for n, p in named if n in exempt]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _exempt(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if name.endswith("bias") or "LayerNorm" in type(module).__name__:  # T5 has one of its own
                yield f"{prefix}.{name}" if prefix else name
