"""Translation by an encoder-decoder: cross-entropy with label smoothing, beam search, BLEU."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import GenerationConfig

from toolkit.config.schema import RunConfig
from toolkit.data import loader, parallel
from toolkit.data.batch import IGNORED, Batch
from toolkit.data.order import Grouped, Split
from toolkit.data.parallel import Translations
from toolkit.data.prepared import Prepared
from toolkit.data.tokenizer import digest, load, vocab_size
from toolkit.errors import ConfigError, DataError
from toolkit.job import ranks
from toolkit.models import seq2seq
from toolkit.models.build import class_name
from toolkit.run.directory import Run
from toolkit.tasks import metrics
from toolkit.tasks.task import Evaluates, Task, Watch, summed_loss


class Translate(Task):
    """The loss is a sum over target tokens; the engine divides by their number in the global batch."""

    inputs = ("input_ids", "attention_mask", "decoder_input_ids")
    labels = ("labels",)
    outputs = ("logits",)
    prepares = "pairs"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.config
        metrics.check(config.task)
        self.prepared = ranks.in_turn(lambda: self.prepare(config, run.console))
        self.tokenizer = load(self.prepared.tokenizer, config.tokenizer)
        if len(set(ranks.gathered(digest(self.tokenizer)))) > 1:
            raise DataError(
                "tokenizer.model=unigram: the hosts have trained vocabularies that number their entries differently "
                "(its training is not exact to the last digit). Use a data.cache_dir that they share, or "
                "tokenizer.model=bpe."
            )
        self.hf_config = seq2seq.seq2seq_config(config.model, self.tokenizer, vocab_size(self.tokenizer))
        self.model_class = seq2seq.model_class(self.hf_config, config.model.init)
        self.new_head = seq2seq.made_of_bert(self.hf_config, config.model.weights)
        self.special = seq2seq.special(self.tokenizer, self.hf_config)
        self.vocab_size = seq2seq.shape(self.hf_config).vocab_size
        longest = seq2seq.positions(self.hf_config)
        for key, value in (("data.max_length", config.data.max_length), ("task.max_target", config.task.max_target)):
            if longest is not None and value > longest:
                raise ConfigError(f"{key}={value}: the model has only {longest} positions. Lower it.")
        fixed = config.data.max_length if config.data.padding == "max_length" else 0
        self.splits = {
            name: Translations(self.prepared.path / name, self.special.pad, self.special.start, fixed)
            for name in self.prepared.facts["splits"]
        }
        self.held_out = {name: split for name, split in self.splits.items() if name.startswith("eval")}
        self.best = f"{_prefix(next(iter(self.held_out)))}{config.task.best or 'bleu'}" if self.held_out else None
        self.generation = seq2seq.generation(config.model.weights, self.hf_config, self.tokenizer, self.special)
        run.write_model(self.hf_config, class_name(self.model_class), self.prepared.tokenizer)
        run.write_text("model/generation_config.json", self._search(config.task.beams).to_json_string())
        run.write_json("audit.json", self.prepared.audit)
        self.tell(self.prepared)
        self._tell_of_languages(getattr(self.tokenizer, "supported_language_codes", ()))
        seq2seq.without_cache(self.hf_config)
        batch, train, grouped = config.batch, self.splits["train"], config.data.group_by_length
        size, tokens = batch.global_size, batch.tokens
        self.learns(train, Grouped(train.lengths, config.seed, size=size, tokens=tokens, grouped=grouped))
        self.flops = seq2seq.shape(self.hf_config)

    def _tell_of_languages(self, marks: Sequence[str]) -> None:
        """Of a Marian into several languages, which the source is to begin with."""
        config, first = self.config, self.tokenizer.convert_ids_to_tokens(int(self.splits["train"].source(0)[0]))
        if len(marks) > 1 and first not in marks:
            self.run.warn(
                f"task.prefix={config.task.prefix!r}: model.weights={config.model.weights} translates into "
                f"{len(marks)} languages, and nothing tells it which. Begin task.prefix with one of "
                f"{', '.join(marks[:5])} …"
            )

    @classmethod
    def prepare(cls, config: RunConfig, console: Console) -> Prepared:
        return parallel.prepare(config)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Predicted tokens, pairs, tokens of both sides with and without padding, and what FLOPs depend on."""
        source, target = batch["attention_mask"].sum(1), (batch["labels"] != IGNORED).sum(1)
        real = target > 0  # a batch without pairs holds one that counts nothing
        source = source * real
        return {
            "loss": int(target.sum()),
            "sequences": int(real.sum()),
            "tokens": int(source.sum() + target.sum()),
            "positions": batch["input_ids"].numel() + batch["labels"].numel(),
            "source": int(source.sum()),
            "source_source": int((source * source).sum()),
            "target_target": int((target * target).sum()),
            "target_source": int((target * source).sum()),
        }

    def losses(self, outputs: Batch, batch: Batch) -> Batch:
        """Summed cross-entropy in nats; smoothed where gradients are wanted, plain where it is only measured."""
        smoothing = self.config.task.label_smoothing if torch.is_grad_enabled() else 0.0
        return {"loss": summed_loss(outputs["logits"], batch["labels"], smoothing)}

    def useful_flops(self, counts: dict[str, float]) -> float:
        """Forward and backward of real tokens."""
        return self.flops.step(counts | {"target": counts["loss"]})

    def evaluate(self, engine: Evaluates, watch: Watch) -> dict[str, float]:
        """Loss in nats a target token, perplexity and BLEU of ``task.eval_beams`` on the held-out pairs."""
        result: dict[str, float] = {}
        limit, task = self.config.train.eval_samples, self.config.task
        for name, split in self.held_out.items():
            loss = engine.evaluate(watch(loader.eval_batches(split, self.split, limit=limit)))["loss"]
            _, bleu = self._translated(engine, split, limit, task.eval_beams, watch)
            found = {"loss": loss, "perplexity": math.exp(min(loss, 100)), "bleu": bleu.score}
            result |= {f"{_prefix(name)}{key}": value for key, value in found.items()}
        return result

    def predict(self, engine: Evaluates, watch: Watch) -> dict[str, float]:
        """Translate every held-out and test pair with ``task.beams``: predictions.*, samples.md. Returns BLEU."""
        run, task = self.run, self.config.task
        facts: dict[str, Any] = {}
        samples: list[str] = []
        for name, split in self.splits.items():
            if name == "train":
                continue
            texts, bleu = self._translated(engine, split, None, task.beams, watch)
            file = f"predictions.{name}.{task.target}"
            run.write_text(file, "".join(f"{' '.join(text.split())}\n" for text in texts))
            facts[name] = {
                "bleu": bleu.score, "signature": bleu.signature, "sentences": len(texts), "file": file,
                "beams": task.beams, "length_penalty": task.length_penalty,
            }  # fmt: skip
            samples += _samples(name, split.texts, texts)
            self.notes[f"{name} BLEU, {task.beams} beams"] = bleu.score
            run.console.print(f"{name}: BLEU {bleu.score:.2f}  {bleu.signature}", highlight=False)
        if facts:
            run.write_json("predictions.json", facts)
            run.write_text("samples.md", "\n".join(samples))
        return {self._key(name): found["bleu"] for name, found in facts.items()}

    def _key(self, split: str) -> str:
        """``test_bleu``; a held-out set has a BLEU of ``task.eval_beams`` already: ``eval_bleu_4_beams``."""
        split = split.replace(".", "_")
        return f"{split}_bleu" if split.startswith("test") else f"{split}_bleu_{self.config.task.beams}_beams"

    @torch.no_grad()
    def _translated(
        self, engine: Evaluates, split: Translations, limit: int | None, beams: int, watch: Watch
    ) -> tuple[list[str], metrics.Bleu]:
        """Translations of the first ``limit`` pairs, on every rank, each searched for once over all; and their BLEU.

        In ZeRO 3 each forward gathers weights, so all ranks make equally many of them; a rank whose sentences have
        ended, or that is left without any, goes on with the others.
        """
        engine.ds.eval()
        model, synced, size = engine.ds.module, engine.ds.zero_optimization_stage() == 3, self.config.batch.micro_size
        model.generation_config = search = self._search(beams)  # what is unset is not to come from another one
        lengths = np.array([len(split.source(i)) for i in range(len(split))[:limit]])
        unpadded = replace(split, width=0)
        found: dict[int, list[int]] = {}
        for keys in watch(Split(size, size, self.replica.rank, self.replica.world).held_out(lengths)):
            indices = [index for index in keys[:, 1].tolist() if index >= 0]
            if not indices and not synced:
                continue
            batch = unpadded[keys]
            sources = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            out = model.generate(**sources, generation_config=search, synced_gpus=synced)
            found |= zip(indices, out.tolist(), strict=False)  # none of them where indices is empty
        ids = dict(pair for part in ranks.gathered(found) for pair in part.items())
        ordered = [ids[i] for i in range(len(lengths))]
        texts = [text.strip() for text in self.tokenizer.batch_decode(ordered, skip_special_tokens=True)]
        return texts, metrics.bleu(texts, [target for _, target in split.texts[:limit]])

    def _search(self, beams: int) -> GenerationConfig:
        """The model's own configuration with this run's search."""
        task, penalty = self.config.task, self.config.task.length_penalty if beams > 1 else 1.0
        own = {"num_beams": beams, "max_new_tokens": task.max_target, "length_penalty": penalty}
        plain = {"max_length": None, "early_stopping": False, "do_sample": False, "use_cache": True}
        return GenerationConfig(**self.generation.to_dict() | own | plain)


def _prefix(split: str) -> str:
    """``eval.flickr`` has records named flickr_bleu, plain ``eval`` bleu."""
    name = split.partition(".")[2]
    return f"{name}_" if name else ""


def _samples(name: str, pairs: list[tuple[str, str]], texts: list[str]) -> list[str]:
    """Ten sentences, evenly spread, with reference and translation, as Markdown."""
    chosen = range(0, len(texts), max(1, len(texts) // 10))[:10]
    lines = [f"# {name}\n"]
    for i in chosen:
        lines.append(f"{i + 1}. source: {pairs[i][0]}\n   - reference: {pairs[i][1]}\n   - translation: {texts[i]}\n")
    return lines
