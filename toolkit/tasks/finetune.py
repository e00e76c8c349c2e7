"""What all fine-tuning tasks share: examples to batches, evaluation over ranks, files of predictions.

A kind of task (classify.py, tag.py, span_qa.py) says how examples become token ids, and outputs losses and predictions.
"""

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import transformers
from numpy.typing import NDArray
from rich.console import Console

from toolkit.config.schema import RunConfig
from toolkit.data import labelled, loader
from toolkit.data import tokenizer as tokenizers
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.examples import Labels
from toolkit.data.labelled import Encoded, Sample
from toolkit.data.order import Grouped
from toolkit.data.prepared import Prepared
from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.models import build
from toolkit.plan import flops
from toolkit.run.directory import Run
from toolkit.tasks import metrics
from toolkit.tasks.task import Evaluates, Task, Watch, summed_loss

Rows = dict[int, Any]  # sample -> what the model said of it
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")  # name their heads alike
DOUBTFUL = 0.01  # share of the labels that no prediction can meet from which on it is said


class Finetune(Task):
    """The body may be of any weights; the head is drawn."""

    labels = ("labels", "index", "attention_mask")
    outputs: tuple[str, ...] = ("logits",)
    new_head = True
    prepares = "rows"
    models: str  # transformers' table of model classes
    label_names: tuple[str, ...] = ()  # of the head's outputs, where the data has none
    problem: str | None = None  # what transformers calls it
    float_labels = per_token = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        metrics.check(config.task)
        self.best = config.task.best or config.task.metrics[0]
        # A cache on a shared disk is made once, under a lock, even by the first ranks of several hosts.
        self.prepared = ranks.in_turn(lambda: self.prepare(config, run.console))
        self.tokenizer = tokenizers.load(self.prepared.tokenizer, config.tokenizer)
        self.vocab_size = self.prepared.vocab_size
        self.names = tuple(self.prepared.facts["labels"]) or self.label_names
        given = config.tokenizer.path is not None  # with a tokenizer of its own, a model may have more rows
        sizes = self.vocab_size, self.prepared.pad_id
        self.hf_config = build.encoder_config(config, *sizes, exact=given, tokenizer="null")
        self.hf_config.id2label = dict(enumerate(self.names))  # num_labels is its length
        self.hf_config.label2id = {name: i for i, name in enumerate(self.names)}
        self.hf_config.problem_type = self.problem
        models = getattr(transformers, self.models)
        if type(self.hf_config) not in models:
            kind = type(self.hf_config).__name__.removesuffix("Config")
            raise ConfigError(
                f"model.weights={config.model.weights}: transformers has no {kind} for task.kind={config.task.kind}. "
                "Use weights of a BERT."
            )
        self.model_class = models[type(self.hf_config)]
        build.require_fit(config, self.hf_config, self.model_class, self.prepared.pad_id)
        takes = ("input_ids", "attention_mask", "token_type_ids")
        typed = {*self.tokenizer.model_input_names} & {*inspect.signature(self.model_class.forward).parameters}
        self.inputs = takes if "token_type_ids" in typed else takes[:2]
        run.write_model(self.hf_config, self.model_class.__name__, self.prepared.tokenizer)
        self.hf_config.use_cache = False  # of keys and values, which only generating needs
        run.write_json("audit.json", self.prepared.audit)
        fixed = config.data.padding == "max_length" or config.pipeline.stages > 1  # a pipeline needs one shape
        self.width = config.data.max_length if fixed else None
        train, grouped = self._split("train"), config.data.group_by_length
        self.learns(train, Grouped(train.lengths, config.seed, size=config.batch.global_size, grouped=grouped))
        self._said: dict[str, Rows] = {}  # rank 0's, of the newest evaluation of each split
        self.tell(self.prepared)

    @classmethod
    def prepare(cls, config: RunConfig, console: Console) -> Prepared:
        head = cls._head(config)
        reader = labelled.Reader(cls.encode, cls.warnings, cls.float_labels, () if cls.label_names else head)
        return labelled.prepare(config, reader)

    @classmethod
    def _head(cls, config: RunConfig) -> tuple[str, ...]:
        """The labels of the head that comes with the weights, in the order of their numbers; () where it is drawn.
        Raises ConfigError where it is that of another kind of task, for its shape could be the same."""
        weights = config.model.weights
        if weights is None or config.model.new_head:
            return ()
        found = build.read_config(weights)
        there = (found.architectures or [""])[0]
        here = getattr(transformers, cls.models).get(type(found), type(None)).__name__
        if there.endswith(CLASSIFIERS) and here.endswith(CLASSIFIERS) and there != here:
            raise ConfigError(
                f"model.weights={weights}: a {there}, whose head is not that of task.kind={config.task.kind}. "
                "model.new_head=true draws one."
            )
        names = tuple(str(name) for _, name in sorted(found.id2label.items()))  # a file may have 10 before 2
        return names if there == here or (not there and labelled.UNNAMED not in names) else ()

    # What a kind of task says of itself ------------------------------------------------------------------------------

    @classmethod
    def encode(cls, config: RunConfig, tokenizer: Any, examples: list[Any]) -> Iterator[Sample]:
        """The samples that examples become."""
        raise NotImplementedError

    @classmethod
    def warnings(cls, config: RunConfig, tokenizer: Any, examples: list[Any], labels: Labels) -> Iterator[str]:
        """What makes results on labelled examples doubtful: a line each, with how much, and the way out."""
        return iter(())

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """``loss``: the cross-entropy of classes."""
        return {"loss": summed_loss(outputs["logits"], batch["labels"])}

    def rows(self, outputs: Batch, batch: Batch) -> Iterable[NDArray[Any]]:
        """What the model says of each sample, in the order of the batch: float32."""
        return outputs["logits"].float().cpu().numpy()

    def scores(self, split: str, said: Rows) -> dict[str, float]:
        """The metrics of a split."""
        raise NotImplementedError

    def files(self, split: str, said: Rows, labelled: bool) -> Mapping[str, str]:
        """The texts of the files of predictions, by suffix."""
        raise NotImplementedError

    # What they share -------------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, float]:
        """Labels, samples, tokens without and with padding, squares of the lengths."""
        lengths = batch["attention_mask"][batch["index"] >= 0].sum(-1)
        return {
            "loss": self.count(batch),
            "sequences": int((batch["index"] >= 0).sum()),
            "tokens": int(lengths.sum()),
            "positions": batch["input_ids"].numel(),
            "squares": int((lengths**2).sum()),
        }

    def count(self, batch: Batch) -> int:
        labels = batch["labels"]
        return int((~labels.isnan() if self.float_labels else labels != IGNORED).sum())

    def useful_flops(self, counts: dict[str, float]) -> float:
        """Forward and backward of real tokens; the head on top is too small to count."""
        return flops.encoder(self.hf_config, tokens=counts["tokens"], squares=counts["squares"])

    def evaluate(self, engine: Evaluates, watch: Watch) -> dict[str, float]:
        """Losses and metrics of each held-out split; the first one's have plain names."""
        results: dict[str, float] = {}
        for number, name in enumerate(self.prepared.names("eval")):
            means = self._run(engine, watch, name)
            prefix = f"{name.partition('.')[2]}_" if number else ""
            results |= {f"{prefix}{key}": value for key, value in self._scored(name, means).items()}
        return results

    def predict(self, engine: Evaluates, watch: Watch) -> dict[str, float]:
        """Write what the model says of the held-out splits, and of the test splits."""
        found: dict[str, float] = {}
        for name in self.prepared.names("test"):
            means = self._run(engine, watch, name)
            if not self.prepared.audit["splits"][name]["unlabelled"]:
                found |= {f"{name.replace('.', '_')}_{key}": v for key, v in self._scored(name, means).items()}
        self.notes |= {key.replace("_", " "): value for key, value in found.items()}
        held_out = self.prepared.names("eval")
        for name, said in self._said.items():
            files = self.files(name, said, name in held_out)
            stem = "predictions" if [name] == held_out[:1] else f"predictions.{name}"
            for suffix, text in files.items():
                self.run.write_text(f"{stem}.{suffix}", text)
        return found

    def _scored(self, name: str, means: dict[str, float]) -> dict[str, float]:
        """The losses of a split that was just run, and its metrics."""
        scores = ranks.from_rank0(self.scores(name, self._said[name]) if ranks.rank() == 0 else None)
        return {**means, **scores}

    def _run(self, engine: Evaluates, watch: Watch, name: str) -> dict[str, float]:
        """Mean losses of a split; on rank 0, ``_said`` then holds what the model says of every sample, in order."""
        said: Rows = {}

        def collect(outputs: Batch, batch: Batch) -> None:
            rows = zip(batch["index"].tolist(), self.rows(outputs, batch), strict=True)
            said.update((index, row) for index, row in rows if index >= 0)

        limit = self.config.train.eval_samples if name.startswith("eval") else None
        batches = loader.eval_batches(self._split(name), self.split, limit=limit)
        means = engine.evaluate(watch(batches), collect)
        parts = ranks.gathered_on_rank0(said)
        if ranks.rank() == 0:
            whole = {index: row for part in parts for index, row in part.items()}
            self._said[name] = dict(sorted(whole.items()))
        return means

    @functools.cache  # noqa: B019 - one task a run
    def examples(self, split: str) -> list[Any]:
        """The examples of a split, read again from where they come: once, on the ranks that ask."""
        return labelled.read(self.config, split, tuple(self.prepared.facts["labels"]))

    @functools.cache  # noqa: B019 - one task a run
    def warn_once(self, line: str) -> None:
        """What is found out in every evaluation is said in the first."""
        self.run.warn(line)

    def _split(self, name: str) -> Encoded:
        pad_id = self.prepared.pad_id
        return Encoded(self.prepared.path / name, pad_id, self.choices, self.per_token, self.width)
