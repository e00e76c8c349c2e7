"""Builds a Hugging Face model for the engine: the same initial weights in every layout.

    model = build_model(run, task, plan.ds)

Under ZeRO 3 every parameter is partitioned as it is made, so no rank ever holds the whole model;
values are then drawn, or copied from a checkpoint that rank 0 alone reads, one module at a time.
"""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BertConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from toolkit.config.schema import Model, RunConfig
from toolkit.errors import CheckpointError, ConfigError
from toolkit.job import ranks
from toolkit.models import Described, activation
from toolkit.run.directory import Run, weights_folder

# What transformers' classes say of themselves
SUPPORTS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


def bert_config(model: Model, *, vocab_size: int, pad_id: int) -> BertConfig:
    """The Hugging Face configuration of a model made from scratch."""
    shape = model.model_dump(include=BertConfig().to_dict().keys() & Model.model_fields.keys())
    dropout = {"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": model.dropout}
    return BertConfig(**(shape | dropout | {"vocab_size": vocab_size, "pad_token_id": pad_id}))


def encoder_config(
    config: RunConfig, vocab_size: int, pad_id: int, *, exact: bool, kind: Any = AutoConfig, tokenizer: str = ""
) -> Any:
    """From ``model.weights`` if given (shape and vocabulary are its own), else from the keys. Raises ConfigError. For
    ``kind`` see :func:`read_config`, for ``exact`` and ``tokenizer`` :func:`require_vocabulary`."""
    model = config.model
    if model.weights is None:
        return bert_config(model, vocab_size=vocab_size, pad_id=pad_id)
    found = read_config(model.weights, kind)
    require_vocabulary(model.weights, found.vocab_size, vocab_size, exact, tokenizer)
    set_dropout(found, model.dropout)
    if (heads := getattr(found, "num_attention_heads", 0)) % config.tensor_size:
        raise ConfigError(
            f"deepspeed.tensor_parallel.autotp_size={config.tensor_size}: does not divide the {heads} heads of "
            f"model.weights={model.weights}. Lower it."
        )
    return found


def require_fit(config: RunConfig, hf_config: Any, model_class: Any, pad_id: int) -> None:
    """The longest sequence has a position for every token, and model and data agree on what padding is. Raises
    ConfigError."""
    model, length, name = skeleton(hf_config, model_class), config.data.max_length, class_name(model_class)
    given = f"model.weights={config.model.weights}"
    first, limit = _first_position(model), positions(model)
    if limit is not None and length > limit:
        raise ConfigError(f"data.max_length={length}: {given} has only {limit} positions. Lower data.max_length.")
    if first and first != pad_id + 1:
        raise ConfigError(
            f"{given}: its positions are numbered by padding of id {first - 1}, the tokenizer's is {pad_id}. Use the "
            "tokenizer of these weights: tokenizer.path=null."
        )
    if getattr(getattr(model, "sequence_summary", None), "summary_type", None) == "last":
        raise ConfigError(
            f"{given}: {name} reads the last position, which is padding in all but the longest of a "
            "batch. Use weights of another architecture."
        )
    if config.tokenizer.special_in_text and hf_config.is_encoder_decoder and name.endswith("SequenceClassification"):
        raise ConfigError(
            f"tokenizer.special_in_text=true: {name} reads the last </s>, and every text is to have as many. Drop it."
        )
    # GPT-2, Llama and their like classify the last token before it
    getattr(hf_config, "text_config", hf_config).pad_token_id = pad_id


def positions(model: Any) -> int | None:
    """How many tokens a sequence may have; None: any number, as with relative positions (T5, DeBERTa v3)."""
    limit = getattr(model.config, "max_position_embeddings", None) or 0  # XLNet's is -1
    absolute = getattr(model.config, "position_biased_input", True)
    return int(limit) - _first_position(model) if limit > 0 and absolute else None


def _first_position(model: Any) -> int:
    """RoBERTa and its like number positions from the one after padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def read_config(weights: str, kind: Any = AutoConfig) -> Any:
    """The Hugging Face configuration of ``weights``, of any kind or of a class. Raises ConfigError."""
    try:
        return kind.from_pretrained(weights_folder(weights))
    except (OSError, ValueError, AttributeError, TypeError) as error:  # of values of another type
        raise ConfigError(
            f"model.weights={weights}: neither a folder with a config.json, nor a run, nor a hub name that "
            f"can be reached: {str(error).splitlines()[0]}"
        ) from error


def require_vocabulary(weights: str, there: int, here: int, exact: bool, tokenizer: str = "") -> None:
    """The tokenizer's largest id must be a row of the weights, and the last where ``exact``; ``tokenizer``: how that
    of the weights is had, else by their own name. Raises ConfigError."""
    if there < here or (exact and there != here):
        raise ConfigError(
            f"model.weights={weights}: its vocabulary has {there} entries, the tokenizer {here}. "
            f"Use the tokenizer of these weights: tokenizer.path={tokenizer or weights}."
        )


def set_dropout(hf_config: Any, dropout: float) -> None:
    """Under whichever names this kind of model and its parts have for it; what is None follows another. No layer is
    left out (layerdrop): ranks would leave out different ones."""
    for name, value in list(vars(hf_config).items()):
        if isinstance(value, PreTrainedConfig):
            set_dropout(value, dropout)
        elif "drop" in name and "path" not in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(hf_config, name, 0.0 if "layerdrop" in name else dropout)
    if not hasattr(hf_config, "classifier_dropout"):
        hf_config.classifier_dropout = dropout  # GPT-2's and Llama's heads for tags read it nevertheless


def attention(run: Run, model_class: Any) -> str:
    """``model.attention``, or what a class without PyTorch's fused attention has instead. Raises ConfigError."""
    asked, name = run.config.model.attention, class_name(model_class)
    if asked == "eager" or getattr(model_class, SUPPORTS[asked]):
        return asked
    if asked != "sdpa":
        raise ConfigError(f"model.attention={asked}: transformers' {name} has none. Use model.attention=sdpa.")
    run.warn(
        f"model.attention=sdpa: transformers' {name} has none and computes its own, which takes more memory and "
        "time. model.attention=eager is the same without this line."
    )
    return "eager"


def skeleton(hf_config: Any, model_class: Any) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"), no_init_weights():
        return model_class(hf_config)


def build_model(run: Run, task: Described, ds: Mapping[str, Any]) -> nn.Module:
    """The task's model in the layout of ``ds``, on the CPU or partitioned; its activations where asked for."""
    config, hf_config, staged = run.config, task.hf_config, run.config.pipeline.stages > 1
    if hasattr(hf_config, "num_attention_heads") or hf_config.is_encoder_decoder:
        hf_config._attn_implementation = attention(run, task.model_class)
    model: Any
    if staged:
        from toolkit.models.pipeline import build_pipeline

        model = build_pipeline(run, task)
    else:
        with no_init_weights(), _partitioned(ds, config.tensor_size):
            model = task.model_class(hf_config)
        model.tie_weights()
    if not config.model.weights or task.new_head:
        initialise(model, config.seed)
    if config.model.weights:
        # Every pipe stage takes its own of all weights; else the ranks of the first copy read for the others
        state = ranks.agreed(lambda: _read(task, config.model) if staged or run.replica.rank == 0 else {})
        _copy(model, state, staged)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    activation.apply(layers, **config.activation.model_dump())
    return model  # type: ignore[no-any-return]


def parameters(task: Described) -> int:
    """How many the task's model has, without memory for one."""
    return int(skeleton(task.hf_config, task.model_class).num_parameters())


def _partitioned(ds: Mapping[str, Any], tensor_size: int) -> AbstractContextManager[Any]:
    """``deepspeed.zero.Init`` at stage 3, over the ranks that hold the same tensor shards; nothing below."""
    if ds.get("zero_optimization", {}).get("stage", 0) < 3:
        return nullcontext()
    import deepspeed

    mpu = ranks.tensor_groups(tensor_size)
    group = mpu and mpu.get_data_parallel_group()
    return deepspeed.zero.Init(config_dict_or_path=dict(ds), mpu=mpu, data_parallel_group=group)  # type: ignore[no-any-return]


def initialise(model: Any, seed: int) -> None:
    """Draw every module's parameters as Hugging Face does, from (seed, module name): the weights depend neither on the
    ZeRO stage nor on which modules this rank holds."""
    seen: set[int] = set()
    hf_name = getattr(model, "hf_name", str)  # a pipe stage has names of its own
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if not own:
            continue  # nothing here, or only weights tied to a module already drawn
        seen.update(id(p) for p in own)
        with _whole(own), torch.random.fork_rng(devices=[]), torch.no_grad():
            digest = hashlib.sha256(f"{seed}/{hf_name(name)}".encode()).digest()
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # the CPU's, and no other
            places = [p.data for p in own]
            for p, place in zip(own, places, strict=True):
                p.data = torch.zeros(place.shape)  # on the CPU in fp32: the same draws on every device and dtype
            model._init_weights(module)
            for p, place in zip(own, places, strict=True):
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
        found = read_config(weights)
        lacks = f"{len(missing)} of the {len(model.state_dict())} weights of {class_name(task.model_class)}"
        raise CheckpointError(
            f"model.weights={weights}: a {(found.architectures or [found.model_type])[0]}, which lacks {lacks}, such "
            f"as {', '.join(missing[:3])}. Use weights of that architecture."
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


def _copy(model: Any, state: Mapping[str, torch.Tensor], staged: bool) -> None:
    """``state`` into the model, a tensor at a time: each pipe stage has its own, else the first copy's goes to all."""
    hf_name, saved = getattr(model, "hf_name", str), model.state_dict().keys()
    buffers = [(n, b) for n, b in model.named_buffers() if n in saved]  # as the bias on Marian's and BART's logits
    for name, tensor in [*model.named_parameters(), *buffers]:
        with _whole([tensor]), torch.no_grad():
            if (found := state.get(hf_name(name))) is not None:
                tensor.copy_(found)
            if not (staged or hasattr(tensor, "ds_id")):
                torch.distributed.broadcast(tensor.data, src=0, group=ranks._control)


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Gather parameters that ZeRO 3 has partitioned; rank 0's changes are kept."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)  # type: ignore[no-any-return]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: weight matrices decay, biases and LayerNorm do not (Devlin et al., A.2)."""
    decays: dict[nn.Parameter, bool] = {}  # a tied one counts where it is first
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            exempt = name.endswith("bias") or "LayerNorm" in type(module).__name__  # T5 has one of its own
            decays.setdefault(parameter, not exempt)
    groups = [
        {"params": [p for p, decayed in decays.items() if decayed is of and p.requires_grad], "weight_decay": rate}
        for of, rate in ((True, weight_decay), (False, 0.0))
    ]
    return [g for g in groups if g["params"]]
