"""BERT's pretraining heads on the predicted positions only; weights and names are Hugging Face's.

The logits over the vocabulary at every position are most of a small BERT's cost, and the loss reads
15 % of them: the hidden states are gathered first. Equal to the stock head, loss and gradients.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BertForMaskedLM, BertForPreTraining


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """``hidden`` [batch, length, size] at ``positions`` [batch, predictions] -> [batch, predictions, size]."""
    return torch.gather(hidden, 1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


class _OnPositions:
    """The forward pass that both models share."""

    bert: Any
    cls: Any

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, mlm_positions: Tensor
    ) -> dict[str, Tensor]:
        """Ids, mask, types [batch, length] -> mlm [batch, predictions, vocab], pair [batch, 2] where there is one."""
        output = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        logits = {"mlm": self.cls.predictions(at_positions(output.last_hidden_state, mlm_positions))}
        if hasattr(self.cls, "seq_relationship"):
            logits["pair"] = self.cls.seq_relationship(output.pooler_output)
        return logits


class PairBert(_OnPositions, BertForPreTraining):  # type: ignore[misc]
    """Masked LM and a label for each sentence pair (next sentence, or sentence order)."""

    saved_as = "BertForPreTraining"


class MaskedBert(_OnPositions, BertForMaskedLM):  # type: ignore[misc]
    """Masked LM alone."""

    saved_as = "BertForMaskedLM"


MODELS: dict[str, Any] = {"mlm_nsp": PairBert, "sop": PairBert, "mlm": MaskedBert}
