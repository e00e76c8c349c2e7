"""Masked LM with next sentence prediction (or sentence order, or neither) on prepared text."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from toolkit.data import loader, text
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.masked import MaskedText
from toolkit.data.order import Split, Stream
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.models.build import model_config
from toolkit.models.pretraining import MODELS
from toolkit.plan import flops
from toolkit.run.directory import Run

Watch = Callable[[Iterator[Batch]], Iterator[Batch]]


class Pretrain:
    """Each loss is a sum over what was predicted; the engine divides by the global batch's count."""

    inputs = ("input_ids", "attention_mask", "token_type_ids", "mlm_positions")
    labels = ("mlm_labels", "nsp_labels")
    outputs = ("mlm", "pair")  # the model's, in the order of a pipeline's
    new_head = False  # weights without its heads are refused
    best = None  # no metric chooses between checkpoints: the last is the one

    def __init__(self, run: Run) -> None:
        config = self.config = run.config
        self.replica = run.replica
        # A cache on a shared disk is made once, under a lock, even by the first ranks of several hosts.
        self.prepared = ranks.in_turn(lambda: text.prepare(config, console=run.console, progress=ranks.rank() == 0))
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
        run.write_model(self.hf_config, self.model_class.saved_as, self.prepared.tokenizer)
        run.write_json("audit.json", self.prepared.audit)
        if len(self._dataset("eval")):
            run.notes["unigram entropy (nats)"] = self.prepared.audit["entropy"]["eval_under_train_unigram"]
        self.pair = {"mlm_nsp": "nsp", "sop": "sop", "mlm": None}[config.task.objective]
        self.predicted = ("mlm", self.pair) if self.pair else ("mlm",)  # the names of losses and of their counts
        self.judged = self.predicted  # those with an accuracy
        self.order = Stream(len(train), config.seed, size)
        run.lasts(self.order.steps)
        self.split = Split(size, config.batch.micro_size, run.replica.rank, run.replica.world)
        self.flops = flops.bert(self.hf_config, vocab_size=self.vocab_size, length=config.data.max_length)

    def train_batches(self, start_sample: int) -> Iterator[Batch]:
        """This rank's micro-batches from the sample at ``start_sample`` of the endless stream."""
        return loader.train_batches(
            self._dataset("train"),
            self.order,
            self.split,
            start_sample=start_sample,
            workers=self.config.data.workers,
        )

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of the held-out samples, the same ones and the same masks each time."""
        return loader.eval_batches(self._dataset("eval"), self.split, limit=self.config.train.eval_samples)

    def evaluate(self, engine: Any, watch: Watch) -> dict[str, float]:
        """Mean losses and accuracies on what is held out."""
        return engine.evaluate(watch(self.eval_batches()))  # type: ignore[no-any-return]

    def predict(self, engine: Any, watch: Watch) -> None:
        """Nothing of a pretrained model is worth a file."""

    def _dataset(self, split: str) -> MaskedText:
        config = self.config
        return MaskedText(self.prepared, config.data, config.task.objective, config.seed, split)

    def counts(self, batch: Batch) -> dict[str, int]:
        """What this micro-batch holds: predicted tokens, labelled pairs, sequences, tokens without and with padding."""
        counts = {
            "mlm": int((batch["mlm_labels"] != IGNORED).sum()),
            "sequences": len(batch["input_ids"]),
            "tokens": int(batch["attention_mask"].sum()),
            "positions": batch["input_ids"].numel(),
        }
        return counts | ({self.pair: int((batch["nsp_labels"] != IGNORED).sum())} if self.pair else {})

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """Summed cross-entropies in nats: ``mlm`` over predicted tokens, ``nsp`` or ``sop`` over pairs."""
        losses = {"mlm": _sum(outputs["mlm"], batch["mlm_labels"])}
        return losses | ({self.pair: _sum(outputs["pair"], batch["nsp_labels"])} if self.pair else {})

    def correct(self, outputs: Batch, batch: Batch) -> Batch:
        """How many of the predictions are right, under the same names as the losses."""
        right = {"mlm": _right(outputs["mlm"], batch["mlm_labels"])}
        return right | ({self.pair: _right(outputs["pair"], batch["nsp_labels"])} if self.pair else {})

    def useful_flops(self, counts: dict[str, float]) -> float:
        """Forward and backward of real tokens and real predictions; padding is no use to anyone."""
        sequences = counts["tokens"] / self.config.data.max_length
        pairs = counts.get(self.pair, 0) if self.pair else 0
        return self.flops.step(sequences=sequences, predictions=counts["mlm"], pairs=pairs)


def _sum(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.sum((logits.argmax(-1) == labels) & (labels != IGNORED))
