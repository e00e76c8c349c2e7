"""How large a model is: every parameter's shape, layer by layer, from the keys or a Hugging Face config.json.

shape = model_shape(config)                  # of config.model, with the heads of config.task
shape.parameters                             # 336,226,108 for bert_large
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from toolkit.config.compose import compose
from toolkit.config.kinds import KINDS, Kind
from toolkit.config.schema import RunConfig
from toolkit.errors import PlanError, nearest

TYPES = ("bert", "marian")


@dataclass(frozen=True)
class Parameter:
    """One tensor; ``split`` is the axis along which tensor parallelism cuts it, None where every rank has it whole."""

    shape: tuple[int, ...]
    split: int | None = None
    trained: bool = True
    embedding: bool = False

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

    @property
    def words(self) -> int:
        """Elements of the word embedding."""
        return self.layers[0].parameters[0].size

    def by_part(self) -> dict[str, int]:
        """Parameters of the embeddings, of all encoder layers, of all decoder layers, of the heads."""
        kinds = dict.fromkeys(layer.kind for layer in self.layers)
        return {kind: sum(layer.size for layer in self.layers if layer.kind == kind) for kind in kinds}


def model_shape(config: RunConfig) -> ModelShape:
    """The model that a run of ``config`` trains. Raises PlanError where it cannot be known without the network.

    A vocabulary that is still to be trained is taken to become as large as tokenizer.vocab_size allows.
    """
    model, kind = config.model, KINDS[config.task.kind]
    if "plan" not in kind.can:
        raise PlanError(f"task.kind={kind.name}: there is no plan for it. Use a task on text.")
    keys = _own_keys(config) if model.weights is None else _read(model.weights)
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
    labels = len(config.data.labels or config.data.columns.labels or keys.get("id2label") or ()) or 2
    return _bert(keys, kind, config.task.objective, labels)


def named_shape(name: str) -> ModelShape:
    """Of a preset of conf/model or a local Hugging Face folder, with pretraining's or translation's heads.

    Raises ConfigError and PlanError.
    """
    keys = _read(name) if Path(name).is_dir() else _own_keys(compose([f"model={name}"]))
    if keys["model_type"] not in TYPES:
        raise PlanError(f"{name}: a {keys['model_type']} model's size is not known here. Known: {', '.join(TYPES)}.")
    try:
        return _marian(keys) if keys["model_type"] == "marian" else _bert(keys, KINDS["pretrain"], "mlm_nsp", 2)
    except (KeyError, TypeError) as error:
        raise PlanError(f"{name}: its config.json lacks a size ({error}). Name another folder.") from error


def _own_keys(config: RunConfig) -> dict[str, Any]:
    model, vocab_size = config.model, config.model.vocab_size or config.tokenizer.vocab_size
    keys = model.model_dump() | {"model_type": model.type, "vocab_size": vocab_size}
    depth, inner = model.num_hidden_layers, model.intermediate_size
    marian = {
        "d_model": model.hidden_size, "encoder_attention_heads": model.num_attention_heads,
        "encoder_layers": depth, "decoder_layers": model.decoder_layers or depth,
        "encoder_ffn_dim": inner, "decoder_ffn_dim": inner,
    }  # fmt: skip
    return keys | marian if model.type == "marian" else keys


def _read(weights: str) -> dict[str, Any]:
    """A local Hugging Face folder's config.json, or that of a run's export. Raises PlanError."""
    folder = Path(weights)
    file = next((p for p in (folder / "config.json", folder / "export/config.json") if p.is_file()), None)
    if file is None:
        if (folder / "metrics.jsonl").is_file():
            raise PlanError(f"model.weights={weights}: this run has no export yet. Run: toolkit export {weights}")
        around = [p.name for p in folder.parent.glob("*") if p != folder]
        raise PlanError(
            f"model.weights={weights}: no config.json there, and a plan reads local folders only."
            f"{nearest(folder.name, around)} Name a Hugging Face folder, or a run with an export."
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


def _linear(outputs: int, inputs: int, split: int | None = None) -> tuple[Parameter, ...]:
    """Weight and bias; a split of the weight's rows (outputs) splits the bias, too."""
    return Parameter((outputs, inputs), split), Parameter((outputs,), 0 if split == 0 else None)


def _norm(size: int) -> tuple[Parameter, ...]:
    return 2 * (Parameter((size,)),)


def _attention(hidden: int) -> tuple[Parameter, ...]:
    return 3 * _linear(hidden, hidden, split=0) + _linear(hidden, hidden, split=1) + _norm(hidden)


def _feed_forward(hidden: int, inner: int) -> tuple[Parameter, ...]:
    return _linear(inner, hidden, split=0) + _linear(hidden, inner, split=1) + _norm(hidden)


def _bert(keys: Mapping[str, Any], kind: Kind, objective: str, labels: int) -> ModelShape:
    h, inner, vocab = keys["hidden_size"], keys["intermediate_size"], keys["vocab_size"]
    positions, masked = keys["max_position_embeddings"], kind.head == "masked"
    tables = (Parameter((size, h), embedding=True) for size in (vocab, positions, keys.get("type_vocab_size", 2)))
    encoder = LayerShape("encoder", _attention(h) + _feed_forward(h, inner))
    tied = bool(keys.get("tie_word_embeddings", True)) and masked
    pooled = objective != "mlm" if masked else kind.head == "pooled"
    head = _linear(h, h) if pooled else ()
    if masked:
        head += _linear(h, h) + _norm(h) + (Parameter((vocab,)),)
        # Untied, Hugging Face's head has two biases, tied like the weights
        head += () if tied else (Parameter((vocab, h)), Parameter((vocab,)))
        head += _linear(2, h) if pooled else ()
    else:
        head += _linear(kind.outputs or labels, h)
    blocks = [encoder] * keys["num_hidden_layers"]
    layers = (LayerShape("embeddings", (*tables, *_norm(h))), *blocks, LayerShape("head", head))
    return ModelShape("bert", h, keys["num_attention_heads"], inner, vocab, positions, tied, layers)


def _marian(keys: Mapping[str, Any]) -> ModelShape:
    """Sinusoidal positions on both sides are parameters that are not trained."""
    h, vocab, positions = keys["d_model"], keys["vocab_size"], keys["max_position_embeddings"]
    inner = keys["encoder_ffn_dim"]
    tables = (Parameter((vocab, h), embedding=True), *2 * [Parameter((positions, h), trained=False)])
    encoder = LayerShape("encoder", _attention(h) + _feed_forward(h, inner))
    decoder = LayerShape("decoder", 2 * _attention(h) + _feed_forward(h, keys["decoder_ffn_dim"]))
    blocks = (*[encoder] * keys["encoder_layers"], *[decoder] * keys["decoder_layers"])
    layers = (LayerShape("embeddings", tables), *blocks, LayerShape("head", ()))
    return ModelShape("marian", h, keys["encoder_attention_heads"], inner, vocab, positions, True, layers)
