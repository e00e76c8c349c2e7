"""Masked LM with next sentence prediction (or sentence order, or neither) on prepared text."""

from collections.abc import Iterator

from rich.console import Console
from transformers import BertConfig

from toolkit.config.schema import RunConfig
from toolkit.data import loader, text
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.masked import MaskedText
from toolkit.data.order import Stream
from toolkit.data.prepared import Prepared
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.models import build
from toolkit.models.pretraining import MODELS
from toolkit.plan import flops
from toolkit.run.directory import Run
from toolkit.tasks.task import Task, summed_loss

# Of each objective the losses: the output and the labels of it that are compared
_MLM, _PAIR = ("mlm", "mlm_labels"), ("pair", "nsp_labels")
COMPARED = {"mlm_nsp": {"mlm": _MLM, "nsp": _PAIR}, "sop": {"mlm": _MLM, "sop": _PAIR}, "mlm": {"mlm": _MLM}}


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
        sizes = self.vocab_size, self.prepared.pad_id
        self.hf_config = build.encoder_config(config, *sizes, exact=True, kind=BertConfig)
        self.model_class = MODELS[config.task.objective]
        build.require_fit(config, self.hf_config, self.model_class, self.prepared.pad_id)
        run.write_model(self.hf_config, build.class_name(self.model_class), self.prepared.tokenizer)
        run.write_json("audit.json", self.prepared.audit)
        self.tell(self.prepared)
        if len(self._dataset("eval")):
            self.notes["unigram entropy (nats)"] = self.prepared.audit["entropy"]["eval_under_train_unigram"]
        self.compared = COMPARED[config.task.objective]
        self.predicted = self.judged = tuple(self.compared)
        self.learns(train, Stream(len(train), config.seed, size))

    @classmethod
    def prepare(cls, config: RunConfig, console: Console) -> Prepared:
        return text.prepare(config, console=console, progress=ranks.rank() == 0)

    def eval_batches(self) -> Iterator[Batch]:
        """The same samples and the same masks each time."""
        return loader.eval_batches(self._dataset("eval"), self.split, limit=self.config.train.eval_samples)

    def _dataset(self, split: str) -> MaskedText:
        config = self.config
        return MaskedText(self.prepared, config.data, config.task.objective, config.seed, split)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Predicted tokens, labelled pairs, sequences, tokens without and with padding."""
        counts = {name: int((batch[labels] != IGNORED).sum()) for name, (_, labels) in self.compared.items()}
        return {
            **counts,
            "sequences": len(batch["input_ids"]),
            "tokens": int(batch["attention_mask"].sum()),
            "positions": batch["input_ids"].numel(),
        }

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """Summed cross-entropies in nats: ``mlm`` over predicted tokens, ``nsp`` or ``sop`` over pairs."""
        return {name: summed_loss(outputs[said], batch[labels]) for name, (said, labels) in self.compared.items()}

    def correct(self, outputs: Batch, batch: Batch) -> Batch:
        """How many of the predictions are right, under the same names as the losses."""
        compared = {name: (outputs[said], batch[labels]) for name, (said, labels) in self.compared.items()}
        return {name: ((o.argmax(-1) == y) & (y != IGNORED)).sum() for name, (o, y) in compared.items()}

    def useful_flops(self, counts: dict[str, float]) -> float:
        """Forward and backward of real tokens and real predictions; padding is no use to anyone."""
        length, pairs = self.config.data.max_length, sum(counts[name] for name in self.predicted if name != "mlm")
        return flops.bert(
            self.hf_config, vocab_size=self.vocab_size, length=length, sequences=counts["tokens"] / length,
            predictions=counts["mlm"], pairs=pairs,
        )  # fmt: skip
