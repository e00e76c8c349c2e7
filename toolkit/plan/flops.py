"""Floating-point operations of a BERT with its pretraining heads, or of an encoder-decoder, as matrix products.

    bert(config.model, vocab_size=30522, length=512).step(sequences=8, predictions=600)
    seq2seq(shape).step({"source": 900, "target": 850, …})

A multiply-add is two operations; the backward pass costs twice the forward pass. With
``intermediate = 4h`` this is, per token, the well-known ``72 h² L + 12 h s L + r·6 (h V + h²)``,
r being the share of predicted positions. Softmax, LayerNorm and other element-wise work is left out, as
in Narayanan et al. 2021 (arXiv 2104.04473, appendix).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol


class Shape(Protocol):
    """What counts of a model: our Model has it, and so has a Hugging Face BertConfig."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int


@dataclass(frozen=True)
class Flops:
    """Forward plus backward: per sequence of ``length`` tokens, per predicted position, per pooled [CLS]."""

    sequence: float
    prediction: float
    pair: float

    def step(self, *, sequences: float, predictions: float, pairs: float = 0) -> float:
        return self.sequence * sequences + self.prediction * predictions + self.pair * pairs


def encoder(model: Any, *, tokens: float, squares: float) -> float:
    """Forward plus backward of an encoder's layers: ``squares`` is the sum of the squared lengths of the sequences.

    A Hugging Face configuration without ``intermediate_size`` is taken to have the usual four times the width.
    """
    h, layers = model.hidden_size, model.num_hidden_layers
    projections = 4 * h * h + 2 * h * getattr(model, "intermediate_size", 4 * h)
    return float(6 * layers * (projections * tokens + 2 * h * squares))


def bert(model: Shape, *, vocab_size: int, length: int) -> Flops:
    """``length`` tokens a sequence; attention over all of them."""
    h, layers, inner = model.hidden_size, model.num_hidden_layers, model.intermediate_size
    projections = 4 * h * h + 2 * h * inner  # query, key, value, output; up, down
    attention = 2 * length * h  # scores and weighted values
    return Flops(
        sequence=6 * length * layers * (projections + attention),
        prediction=6 * (h * h + h * vocab_size),
        pair=6 * (h * h + 2 * h),
    )


@dataclass(frozen=True)
class Seq2SeqShape:
    """An encoder-decoder: ``width`` of all heads together; ``matrices`` 2, or 3 where the feed-forward is gated."""

    hidden: int
    width: int
    intermediate: int
    encoder_layers: int
    decoder_layers: int
    vocab_size: int
    matrices: int = 2
    transform: bool = False  # BERT's dense layer before the vocabulary


@dataclass(frozen=True)
class Seq2SeqFlops:
    """Forward plus backward: per token of each side, and per pair of tokens of which one looks at the other."""

    source: float
    target: float
    source_source: float
    target_target: float
    target_source: float

    def step(self, counts: Mapping[str, float]) -> float:
        """``counts`` has the names above, each summed over sentences: source_source is the sum of their length²."""
        return sum(float(getattr(self, field.name)) * counts[field.name] for field in fields(self))


def seq2seq(shape: Seq2SeqShape) -> Seq2SeqFlops:
    """A Transformer as in Vaswani et al. 2017; causal attention counts in full, as the kernels compute it.

    A decoder layer projects its queries and outputs twice per target token, for itself and for the source;
    keys and values of the source are made per source token.
    """
    square, feed_forward = shape.hidden * shape.width, shape.matrices * shape.hidden * shape.intermediate
    head = shape.hidden * shape.vocab_size + (shape.hidden**2 if shape.transform else 0)
    attention = 2 * shape.width  # scores and weighted values
    return Seq2SeqFlops(
        source=6 * (shape.encoder_layers * (4 * square + feed_forward) + shape.decoder_layers * 2 * square),
        target=6 * (shape.decoder_layers * (6 * square + feed_forward) + head),
        source_source=6 * shape.encoder_layers * attention,
        target_target=6 * shape.decoder_layers * attention,
        target_source=6 * shape.decoder_layers * attention,
    )
