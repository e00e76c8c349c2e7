"""Encoder-decoder models: from scratch as in Vaswani et al. 2017, pretrained, or made of two BERTs.

    hf_config = seq2seq_config(config.model, tokenizer, vocab_size=6000)
    model_class(hf_config)             # MarianMTModel, T5ForConditionalGeneration, …, or Bert2Bert

From scratch it is Hugging Face's Marian: sinusoidal positions, LayerNorm after each residual sum, one embedding
for source, target and output, scaled by sqrt(hidden_size). Its bias on the output stays zero.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    MarianConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from toolkit.config.schema import Model
from toolkit.errors import ConfigError
from toolkit.models.build import read_config, require_vocabulary, set_dropout, skeleton
from toolkit.plan.flops import Seq2SeqShape
from toolkit.run.directory import weights_folder


@dataclass(frozen=True)
class Special:
    """Token ids: padding, end of a sentence, and what the decoder reads first."""

    pad: int
    eos: int
    start: int


class Bert2Bert(EncoderDecoderModel):  # type: ignore[misc]
    """Two BERTs, the second with attention to the first's states (Rothe et al. 2020, arXiv 1907.12461)."""

    saved_as = "EncoderDecoderModel"
    halves: tuple[str, ...] = ("encoder", "decoder")  # those that begin as the BERT that is loaded

    def __init__(self, config: Any = None, encoder: Any = None, decoder: Any = None) -> None:
        super().__init__(config, encoder, decoder)
        self.encoder.pooler = None  # nothing reads it

    @classmethod
    def from_pretrained(cls, folder: str, *, config: Any, **options: Any) -> Any:
        """(model, loading info) of a BERT for ``halves``, or of a model that was made of two."""
        if read_config(folder).model_type != "bert":
            return super().from_pretrained(folder, config=config, **options)
        bert, info = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
        found = {name: t for name, t in bert.state_dict().items() if name not in info["missing_keys"]}
        state = {f"decoder.{name}": tensor for name, tensor in found.items()}
        state |= {f"encoder.{n.removeprefix('bert.')}": t for n, t in found.items() if n.startswith("bert.")}
        model = cls(config)
        state = {n: t for n, t in state.items() if n.split(".")[0] in cls.halves and n in model.state_dict()}
        model.load_state_dict(state, strict=False)
        return model, {"missing_keys": set(model.state_dict()) - set(state), "mismatched_keys": set()}


class HalfBert2Bert(Bert2Bert):
    halves = ("encoder",)


class NewBert2Bert(Bert2Bert):
    halves = ()


BERT_INIT = {"both": Bert2Bert, "encoder": HalfBert2Bert, "none": NewBert2Bert}


def seq2seq_config(model: Model, tokenizer: Any, vocab_size: int) -> Any:
    """The Hugging Face configuration: of ``model.weights`` where given, else from the keys. Raises ConfigError."""
    if model.weights is None:
        return marian_config(model, special(tokenizer), vocab_size)
    config = read_config(model.weights)
    if isinstance(config, BertConfig):
        config = bert2bert_config(config, special(tokenizer))
    elif type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"model.weights={model.weights}: a {config.model_type} model does not translate. Use an encoder-decoder "
            "(Marian, T5, BART), or a BERT to make one of."
        )
    try:
        there = shape(config).vocab_size
    except AttributeError as error:
        raise ConfigError(
            f"model.weights={model.weights}: the sizes of a {config.model_type} model are not known here ({error}). "
            "Use a Marian, T5, BART, mBART or M2M100."
        ) from error
    require_vocabulary(model.weights, there, vocab_size, exact=False)
    if config.pad_token_id not in (None, tokenizer.pad_token_id):
        raise ConfigError(
            f"model.weights={model.weights}: pads with id {config.pad_token_id}, the tokenizer with "
            f"{tokenizer.pad_token_id}. Use the tokenizer of these weights: tokenizer.path=null."
        )
    set_dropout(config, model.dropout)
    return config


def special(tokenizer: Any, hf_config: Any = None) -> Special:
    """Ours ends with </s> and the decoder starts with <pad>, as in Marian; BERT's are [SEP] and [CLS]. A model's
    configuration says how its decoder starts, or its class: mBART's with the last token that it is to write."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    start, eos = (tokenizer.cls_token_id, tokenizer.sep_token_id) if eos is None else (pad, eos)
    if hf_config is None:
        return Special(pad, eos, start)
    given = getattr(hf_config, "decoder_start_token_id", None)
    hf_config.pad_token_id, hf_config.decoder_start_token_id = pad, start if given is None else given
    around = tokenizer(text_target="")["input_ids"]
    model = skeleton(hf_config, model_class(hf_config))
    if around and (shift := getattr(model, "prepare_decoder_input_ids_from_labels", None)):
        hf_config.decoder_start_token_id = int(shift(labels=torch.tensor([around]))[0, 0])
    return Special(pad, eos, hf_config.decoder_start_token_id)


def generation(weights: str | None, hf_config: Any, tokenizer: Any, special: Special) -> GenerationConfig:
    """How the weights say that their model writes (BART forces its first token, Marian never writes padding), with the
    tokens of this run."""
    try:
        found = weights and GenerationConfig.from_pretrained(weights_folder(weights))
    except OSError:  # older weights have it in their configuration, from where transformers takes it, too
        found = GenerationConfig.from_pretrained(weights_folder(str(weights)), "config.json", _from_model_config=True)
    found = found or GenerationConfig.from_model_config(hf_config)
    config = GenerationConfig(**found.to_dict())
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = special.pad, special.eos, special.start
    if getattr(tokenizer, "tgt_lang", None):  # the language is the first to be written, or, mBART's, what is read first
        first = tokenizer(text_target="")["input_ids"][0]
        config.forced_bos_token_id = None if first == special.eos else first
    return config


def _parts(hf_config: Any) -> list[Any]:
    """The configuration, and those of its halves if it was made of two."""
    halves = (getattr(hf_config, name, None) for name in ("encoder", "decoder"))
    return [hf_config, *(half for half in halves if half is not None)]


def marian_config(model: Model, special: Special, vocab_size: int) -> MarianConfig:
    """The keys of ``model`` under Marian's names."""
    return MarianConfig(
        vocab_size=vocab_size,
        d_model=model.hidden_size,
        encoder_layers=model.num_hidden_layers,
        decoder_layers=model.decoder_layers or model.num_hidden_layers,
        encoder_ffn_dim=model.intermediate_size,
        decoder_ffn_dim=model.intermediate_size,
        encoder_attention_heads=model.num_attention_heads,
        decoder_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.max_position_embeddings,
        activation_function=model.hidden_act,
        dropout=model.dropout,
        init_std=model.initializer_range,
        scale_embedding=True,
        pad_token_id=special.pad,
        eos_token_id=special.eos,
        forced_eos_token_id=special.eos,
        decoder_start_token_id=special.start,
    )


def bert2bert_config(bert: BertConfig, special: Special) -> EncoderDecoderConfig:
    """Encoder and decoder of the same shape."""
    plain = {k: v for k, v in bert.to_dict().items() if k != "architectures"}
    decoder = BertConfig(**(plain | {"is_decoder": True, "add_cross_attention": True}))
    return EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**plain),
        decoder,
        pad_token_id=special.pad,
        eos_token_id=special.eos,
        decoder_start_token_id=special.start,
        tie_word_embeddings=False,
    )


def without_cache(hf_config: Any) -> None:
    """Training keeps no keys and values; call it before the model is made."""
    for part in _parts(hf_config):
        part.use_cache = False


def model_class(hf_config: Any, init: str = "both") -> Any:
    """The class that computes logits from input_ids, attention_mask and decoder_input_ids."""
    if isinstance(hf_config, EncoderDecoderConfig):
        return BERT_INIT[init]
    return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(hf_config)]


def made_of_bert(hf_config: Any, weights: str | None) -> bool:
    """Whether ``weights`` are a BERT's, which lack the decoder's attention to the source."""
    return isinstance(hf_config, EncoderDecoderConfig) and isinstance(read_config(str(weights)), BertConfig)


def positions(hf_config: Any) -> int | None:
    """How many tokens a side may have; None: any number (T5)."""
    return getattr(getattr(hf_config, "encoder", hf_config), "max_position_embeddings", None)


def shape(hf_config: Any) -> Seq2SeqShape:
    """What the count of FLOPs needs, from any of the supported models' configurations."""
    c = hf_config
    if isinstance(c, EncoderDecoderConfig):
        e, d = c.encoder, c.decoder
        return Seq2SeqShape(
            hidden=e.hidden_size, width=e.hidden_size, intermediate=e.intermediate_size, transform=True,
            encoder_layers=e.num_hidden_layers, decoder_layers=d.num_hidden_layers, vocab_size=d.vocab_size,
        )  # fmt: skip
    if hasattr(c, "d_kv"):  # T5 and its like
        return Seq2SeqShape(
            hidden=c.d_model, width=c.num_heads * c.d_kv, intermediate=c.d_ff, matrices=3 if c.is_gated_act else 2,
            encoder_layers=c.num_layers, decoder_layers=c.num_decoder_layers, vocab_size=c.vocab_size,
        )  # fmt: skip
    return Seq2SeqShape(
        hidden=c.d_model, width=c.d_model, intermediate=c.encoder_ffn_dim,
        encoder_layers=c.encoder_layers, decoder_layers=c.decoder_layers, vocab_size=c.vocab_size,
    )  # fmt: skip
