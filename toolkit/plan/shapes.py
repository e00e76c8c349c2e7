"""How large a model is: every parameter by name and shape, layer by layer, from the keys or a Hugging Face config.json.

shape = model_shape(config)                  # of config.model, with the heads of config.task
shape.parameters                             # 336,226,108 for bert_large
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from toolkit.config.compose import compose
from toolkit.config.kinds import KINDS, Kind
from toolkit.config.schema import Model, RunConfig
from toolkit.errors import PlanError, nearest

TYPES = ("bert", "marian")


@dataclass(frozen=True)
class Parameter:
    """One tensor; ``split`` is the axis along which tensor parallelism cuts it, None where every rank has it whole."""

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    trained: bool = True

    @cached_property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class LayerShape:
    """What is never cut apart between pipe stages; ``kind`` is embeddings, encoder, decoder or head."""

    kind: str
    parameters: tuple[Parameter, ...]

    def __hash__(self) -> int:  # quick: a search looks layers up again and again
        return hash((self.kind, self.size))

    @cached_property
    def size(self) -> int:
        return sum(p.size for p in self.parameters)


@dataclass(frozen=True)
class ModelShape:
    """The model as layers. ``tied``: the decoder over the vocabulary is the word embedding, counted once."""

    type: str
    hidden: int
    heads: int
    intermediate: int
    vocab_size: int
    positions: int
    tied: bool
    layers: tuple[LayerShape, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.size for layer in self.layers)

    def count(self, kind: str) -> int:
        """Layers of a kind."""
        return sum(layer.kind == kind for layer in self.layers)

    def by_part(self) -> dict[str, int]:
        """Parameters of the embeddings, of all encoder layers, of all decoder layers, of the heads."""
        parts: dict[str, int] = {}
        for layer in self.layers:
            parts[layer.kind] = parts.get(layer.kind, 0) + layer.size
        return parts


def model_shape(config: RunConfig) -> ModelShape:
    """The model that a run of ``config`` trains. Raises PlanError where it cannot be known without the network.

    A vocabulary that is still to be trained is taken to become as large as tokenizer.vocab_size allows.
    """
    model, kind = config.model, KINDS[config.task.kind]
    if "plan" not in kind.can:
        raise PlanError(f"task.kind={kind.name}: there is no plan for it. Use a task on text.")
    keys = _own_keys(model, config.tokenizer.vocab_size) if model.weights is None else _read(model.weights)
    if keys["model_type"] not in TYPES:
        raise PlanError(
            f"model.weights={model.weights}: a {keys['model_type']} model cannot be planned. Known: {', '.join(TYPES)}."
        )
    if (keys["model_type"] == "marian") != ("decoder" in kind.can):
        raise PlanError(
            f"task.kind={kind.name} with a {keys['model_type']} model: there is no plan for it. Use task=translate "
            "with model=transformer_base, or a BERT with any task on text."
        )
    if keys["model_type"] == "marian":
        return _marian(keys)
    # Those of the data are not known before it is read; a row each
    labels = len(config.data.labels or keys.get("id2label") or ()) or 2
    return _bert(keys, kind, config.task.objective, labels)


def named_shape(name: str) -> ModelShape:
    """Of a preset of conf/model or a local Hugging Face folder, with pretraining's or translation's heads.

    Raises ConfigError and PlanError.
    """
    if Path(name).is_dir():
        keys = _read(name)
    else:
        config = compose([f"model={name}"])
        keys = _own_keys(config.model, config.tokenizer.vocab_size)
    if keys["model_type"] not in TYPES:
        raise PlanError(f"{name}: a {keys['model_type']} model's size is not known here. Known: {', '.join(TYPES)}.")
    try:
        return _marian(keys) if keys["model_type"] == "marian" else _bert(keys, KINDS["pretrain"], "mlm_nsp", 2)
    except (KeyError, TypeError) as error:
        raise PlanError(f"{name}: its config.json lacks a size ({error}). Name another folder.") from error


def _own_keys(model: Model, vocab_size: int) -> dict[str, Any]:
    keys = model.model_dump() | {"model_type": model.type, "vocab_size": model.vocab_size or vocab_size}
    if model.type == "marian":
        keys |= {"d_model": model.hidden_size, "encoder_layers": model.num_hidden_layers}
        keys |= {"decoder_layers": model.decoder_layers or model.num_hidden_layers}
        keys |= {"encoder_ffn_dim": model.intermediate_size, "encoder_attention_heads": model.num_attention_heads}
        keys |= {"decoder_ffn_dim": model.intermediate_size}
    return keys


def _read(weights: str) -> dict[str, Any]:
    """A local Hugging Face folder's config.json, or that of a run's export. Raises PlanError."""
    places = [Path(weights) / name for name in ("config.json", "export/config.json")]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        if (Path(weights) / "metrics.jsonl").is_file():
            raise PlanError(f"model.weights={weights}: this run has no export yet. Run: toolkit export {weights}")
        around = [p.name for p in Path(weights).parent.glob("*") if p != Path(weights)]
        raise PlanError(
            f"model.weights={weights}: no config.json there, and a plan reads local folders only."
            f"{nearest(Path(weights).name, around)} Name a Hugging Face folder, or a run with an export."
        )
    try:
        keys = json.loads(file.read_text())
        # BertConfig's defaults, which its config.json may leave out
        keys = {"max_position_embeddings": 512, "type_vocab_size": 2, "tie_word_embeddings": True} | keys
        missing = {"bert": "hidden_size", "marian": "d_model"}.get(keys["model_type"], "model_type")
        keys[missing], keys["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{file}: no configuration of a Hugging Face model ({error}). Name another folder.") from error
    return dict(keys)


def _linear(name: str, outputs: int, inputs: int, split: int | None = None) -> Iterator[Parameter]:
    """Weight and bias; a split of the weight's rows (outputs) splits the bias, too."""
    yield Parameter(f"{name}.weight", (outputs, inputs), split)
    yield Parameter(f"{name}.bias", (outputs,), 0 if split == 0 else None)


def _norm(name: str, size: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (size,))
    yield Parameter(f"{name}.bias", (size,))


def _attention(name: str, hidden: int) -> Iterator[Parameter]:
    for part in ("query", "key", "value"):
        yield from _linear(f"{name}.{part}", hidden, hidden, split=0)
    yield from _linear(f"{name}.output", hidden, hidden, split=1)
    yield from _norm(f"{name}.norm", hidden)


def _feed_forward(hidden: int, inner: int) -> Iterator[Parameter]:
    yield from _linear("intermediate", inner, hidden, split=0)
    yield from _linear("output", hidden, inner, split=1)
    yield from _norm("output.norm", hidden)


def _bert(keys: Mapping[str, Any], kind: Kind, objective: str, labels: int) -> ModelShape:
    h, inner, vocab = keys["hidden_size"], keys["intermediate_size"], keys["vocab_size"]
    embeddings = [
        Parameter("word", (vocab, h)),
        Parameter("position", (keys["max_position_embeddings"], h)),
        Parameter("type", (keys.get("type_vocab_size", 2), h)),
        *_norm("norm", h),
    ]
    encoder = LayerShape("encoder", (*_attention("attention", h), *_feed_forward(h, inner)))
    tied = bool(keys.get("tie_word_embeddings", True)) and kind.head == "masked"
    head = LayerShape("head", tuple(_bert_head(kind, objective, labels, h, vocab, tied)))
    layers = (LayerShape("embeddings", tuple(embeddings)), *[encoder] * keys["num_hidden_layers"], head)
    return ModelShape(
        "bert", h, keys["num_attention_heads"], inner, vocab, keys["max_position_embeddings"], tied, layers
    )


def _bert_head(kind: Kind, objective: str, labels: int, h: int, vocab: int, tied: bool) -> Iterator[Parameter]:
    pooled = objective != "mlm" if kind.head == "masked" else kind.head == "pooled"
    if pooled:
        yield from _linear("pooler", h, h)
    if kind.head != "masked":
        yield from _linear("classifier", kind.outputs or labels, h)
        return
    yield from _linear("transform", h, h)
    yield from _norm("transform.norm", h)
    yield Parameter("decoder.bias", (vocab,))
    if not tied:
        yield Parameter("decoder.weight", (vocab, h))
        yield Parameter("bias", (vocab,))  # Hugging Face's head has two, tied like the weights
    if pooled:
        yield from _linear("seq_relationship", 2, h)


def _marian(keys: Mapping[str, Any]) -> ModelShape:
    """Sinusoidal positions on both sides are parameters that are not trained."""
    h, vocab, positions = keys["d_model"], keys["vocab_size"], keys["max_position_embeddings"]
    encoder = (*_attention("attention", h), *_feed_forward(h, keys["encoder_ffn_dim"]))
    decoder = (*_attention("attention", h), *_attention("cross", h), *_feed_forward(h, keys["decoder_ffn_dim"]))
    table = [Parameter(f"{side}.position", (positions, h), trained=False) for side in ("encoder", "decoder")]
    layers = (
        LayerShape("embeddings", (Parameter("word", (vocab, h)), *table)),
        *[LayerShape("encoder", encoder)] * keys["encoder_layers"],
        *[LayerShape("decoder", decoder)] * keys["decoder_layers"],
        LayerShape("head", ()),
    )
    return ModelShape(
        "marian", h, keys["encoder_attention_heads"], keys["encoder_ffn_dim"], vocab, positions, True, layers
    )
