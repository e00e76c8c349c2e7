"""Floating-point operations of a BERT with its pretraining heads, counted as matrix products.

    bert(config.model, vocab_size=30522, length=512).step(sequences=8, predictions=600)

A multiply-add is two operations; the backward pass costs twice the forward pass. With
``intermediate = 4h`` this is, per token, the well-known ``72 h² L + 12 h s L + r·6 (h V + h²)``,
r being the share of predicted positions. Softmax, LayerNorm and other element-wise work is left out, as
in Narayanan et al. 2021 (arXiv 2104.04473, appendix).
"""

from dataclasses import dataclass
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
