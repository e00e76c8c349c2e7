"""Floating-point operations of a BERT with its pretraining heads, or of an encoder-decoder, as matrix products.

    bert(config.model, vocab_size=30522, length=512, sequences=8, predictions=600)
    Seq2SeqShape(512, 512, 2048, 6, 6, 32000).step({"source": 900, "target": 850, …})

A multiply-add is two operations; the backward pass costs twice the forward pass. With
``intermediate = 4h`` this is, per token, the well-known ``72 h² L + 12 h s L + r·6 (h V + h²)``,
r being the share of predicted positions. Softmax, LayerNorm and other element-wise work is left out, as
in Narayanan et al. 2021 (arXiv 2104.04473, appendix).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def encoder(model: Any, *, tokens: float, squares: float) -> float:
    """Forward plus backward of an encoder's layers: ``squares`` is the sum of the squared lengths of the sequences.

    A Hugging Face configuration without ``intermediate_size`` is taken to have the usual four times the width.
    """
    h, layers = model.hidden_size, model.num_hidden_layers
    projections = 4 * h * h + 2 * h * getattr(model, "intermediate_size", 4 * h)  # query, key, value, output; up, down
    return float(6 * layers * (projections * tokens + 2 * h * squares))  # scores and weighted values


def bert(model: Any, *, vocab_size: int, length: int, sequences: float, predictions: float, pairs: float = 0) -> float:
    """The same with its heads: of sequences of ``length`` tokens, of predicted positions, of pooled [CLS].

    ``model`` is our Model or a Hugging Face BertConfig; attention is over all tokens of a sequence.
    """
    h: int = model.hidden_size
    sequence = encoder(model, tokens=length, squares=length**2)
    return sequence * sequences + 6 * (h * h + h * vocab_size) * predictions + 6 * (h * h + 2 * h) * pairs


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

    def step(self, counts: Mapping[str, float]) -> float:
        """Forward plus backward of a Transformer as in Vaswani et al. 2017.

        ``counts`` are tokens of each side, and pairs of tokens of which one looks at the other, each summed over
        sentences: source_source is the sum of their length². Causal attention counts in full, as the kernels compute
        it. A decoder layer projects its queries and outputs twice per target token, for itself and for the source;
        keys and values of the source are made per source token.
        """
        square, feed_forward = self.hidden * self.width, self.matrices * self.hidden * self.intermediate
        head = self.hidden * self.vocab_size + (self.hidden**2 if self.transform else 0)
        attention = 2 * self.width  # scores and weighted values
        each = {
            "source": self.encoder_layers * (4 * square + feed_forward) + self.decoder_layers * 2 * square,
            "target": self.decoder_layers * (6 * square + feed_forward) + head,
            "source_source": self.encoder_layers * attention,
            "target_target": self.decoder_layers * attention,
            "target_source": self.decoder_layers * attention,
        }
        return sum(6.0 * flops * counts[name] for name, flops in each.items())
