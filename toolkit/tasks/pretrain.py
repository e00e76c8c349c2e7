"""Masked LM with next sentence prediction (or sentence order, or neither) on prepared text."""

from collections.abc import Iterator

import torch
from rich.console import Console
from torch import Tensor

from toolkit.config.schema import RunConfig
from toolkit.data import loader, text
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.masked import MaskedText
from toolkit.data.order import Stream
from toolkit.data.prepared import Prepared
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.models.build import class_name, model_config
from toolkit.models.pretraining import MODELS
from toolkit.plan import flops
from toolkit.run.directory import Run
from toolkit.tasks.task import Task, summed_loss


class Pretrain(Task):
    """Of weights all heads are used, and no metric chooses between checkpoints: the last is the one."""

    inputs = ("input_ids", "attention_mask", "token_type_ids", "mlm_positions")
    labels = ("mlm_labels", "nsp_labels")
    outputs = ("mlm", "pair")
    prepares = "corpus"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        # A cache on a shared disk is made once, under a lock, even by the first ranks of several hosts.
        self.prepared = ranks.in_turn(lambda: self.prepare(config, run.console))
        train, size = self._dataset("train"), config.batch.global_size
        text.require(len(train), size)
        self.vocab_size = self.prepared.vocab_size
        if config.model.vocab_size not in (None, self.vocab_size):
            raise ConfigError(
                f"model.vocab_size={config.model.vocab_size}: the tokenizer has {self.vocab_size} entries. "
                "Leave it null, or choose the tokenizer that belongs to the model."
            )
        self.hf_config = model_config(config.model, vocab_size=self.vocab_size, pad_id=self.prepared.pad_id)
        if config.data.max_length > self.hf_config.max_position_embeddings:
            raise ConfigError(
                f"data.max_length={config.data.max_length}: model.weights={config.model.weights} has only "
                f"{self.hf_config.max_position_embeddings} positions. Lower data.max_length."
            )
        if self.hf_config.num_attention_heads % config.tensor_size:
            raise ConfigError(
                f"deepspeed.tensor_parallel.autotp_size={config.tensor_size}: does not divide the "
                f"{self.hf_config.num_attention_heads} heads of model.weights={config.model.weights}. Lower it."
            )
        self.model_class = MODELS[config.task.objective]
        run.write_model(self.hf_config, class_name(self.model_class), self.prepared.tokenizer)
        run.write_json("audit.json", self.prepared.audit)
        if len(self._dataset("eval")):
            self.notes["unigram entropy (nats)"] = self.prepared.audit["entropy"]["eval_under_train_unigram"]
        self.pair = {"mlm_nsp": "nsp", "sop": "sop", "mlm": None}[config.task.objective]
        self.predicted = self.judged = ("mlm", self.pair) if self.pair else ("mlm",)
        self.learns(train, Stream(len(train), config.seed, size))

    @classmethod
    def prepare(cls, config: RunConfig, console: Console) -> Prepared:
        return text.prepare(config, console=console, progress=ranks.rank() == 0)

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of the held-out samples, the same ones and the same masks each time."""
        return loader.eval_batches(self._dataset("eval"), self.split, limit=self.config.train.eval_samples)

    def _dataset(self, split: str) -> MaskedText:
        config = self.config
        return MaskedText(self.prepared, config.data, config.task.objective, config.seed, split)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Predicted tokens, labelled pairs, sequences, tokens without and with padding."""
        counts: dict[str, float] = {
            "mlm": int((batch["mlm_labels"] != IGNORED).sum()),
            "sequences": len(batch["input_ids"]),
            "tokens": int(batch["attention_mask"].sum()),
            "positions": batch["input_ids"].numel(),
        }
        return counts | ({self.pair: int((batch["nsp_labels"] != IGNORED).sum())} if self.pair else {})

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """Summed cross-entropies in nats: ``mlm`` over predicted tokens, ``nsp`` or ``sop`` over pairs."""
        losses = {"mlm": summed_loss(outputs["mlm"], batch["mlm_labels"])}
        return losses | ({self.pair: summed_loss(outputs["pair"], batch["nsp_labels"])} if self.pair else {})

    def correct(self, outputs: Batch, batch: Batch) -> Batch:
        """How many of the predictions are right, under the same names as the losses."""
        right = {"mlm": _right(outputs["mlm"], batch["mlm_labels"])}
        return right | ({self.pair: _right(outputs["pair"], batch["nsp_labels"])} if self.pair else {})

    def useful_flops(self, counts: dict[str, float]) -> float:
        """Forward and backward of real tokens and real predictions; padding is no use to anyone."""
        length = self.config.data.max_length
        return flops.bert(
            self.hf_config, vocab_size=self.vocab_size, length=length, sequences=counts["tokens"] / length,
            predictions=counts["mlm"], pairs=counts.get(self.pair, 0) if self.pair else 0,
        )  # fmt: skip


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.sum((logits.argmax(-1) == labels) & (labels != IGNORED))
