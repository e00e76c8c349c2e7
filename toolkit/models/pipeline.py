"""BERT as a list of layers for DeepSpeed's pipeline engine; weights and their names stay Hugging Face's.

    model = build_pipeline(run, task)           # this rank's stage
    model.hf_name("3.attention.self.query.weight")   # bert.encoder.layer.1.attention.self.query.weight

Between the layers travel hidden states (float) and what later layers need of the batch (int: no gradient is
sent for those). Layers 0 and 1 embed, 2 to L+1 are the encoder's, L+2 and following are the heads: those of
pretraining, or the one of a fine-tuning task.
"""

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.utils import partition_balanced, partition_uniform
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert import modeling_bert as bert

from toolkit.errors import ConfigError
from toolkit.job import ranks
from toolkit.models import Described
from toolkit.models.pretraining import at_positions
from toolkit.run.directory import Run

Tensors = tuple[Tensor, ...]


class Words(nn.Embedding):
    """Ids, mask, types [batch, length], positions [batch, predictions] -> the ids looked up, the rest as it is; of
    multiple choice [batch, choices, length] each choice becomes a sequence of its own."""

    def forward(self, inputs: Tensors) -> Tensors:  # type: ignore[override]
        ids, mask, types = (t.flatten(0, -2) for t in inputs[:3])
        return super().forward(ids), mask, types, *inputs[3:]


class Embeddings(bert.BertEmbeddings):  # type: ignore[misc]
    """Position and type embeddings; the word embeddings are a layer of their own, for they are tied."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(type(config)(**config.to_dict() | {"vocab_size": 1, "pad_token_id": None}))
        del self.word_embeddings

    def forward(self, inputs: Tensors) -> Tensors:
        words, mask, types, *positions = inputs
        return super().forward(inputs_embeds=words, token_type_ids=types), mask, *positions


class Encoder(bert.BertLayer):  # type: ignore[misc]
    """One encoder layer."""

    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__(config, layer_idx=index)
        self.config = config

    def forward(self, inputs: Tensors) -> Tensors:
        hidden, mask, *positions = inputs
        attended = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=mask)
        return super().forward(hidden, attended), mask, *positions


class Heads(nn.Module):
    """Hidden states -> transformed ones at the predicted positions, and the logits of the pair if there are any."""

    def __init__(self, config: BertConfig, pair: bool) -> None:
        super().__init__()
        transform = nn.ModuleDict({"transform": bert.BertPredictionHeadTransform(config)})
        self.cls = nn.ModuleDict({"predictions": transform})
        if pair:
            self.bert = nn.ModuleDict({"pooler": bert.BertPooler(config)})
            self.cls["seq_relationship"] = nn.Linear(config.hidden_size, 2)

    def forward(self, inputs: Tensors) -> Tensors:
        hidden, _, positions = inputs
        transformed = self.cls["predictions"]["transform"](at_positions(hidden, positions))  # type: ignore[index]
        if "seq_relationship" not in self.cls:
            return transformed, positions  # never alone: PipelineModule hands a tuple of one on as its tensor
        return transformed, self.cls["seq_relationship"](self.bert["pooler"](hidden))


def decode(words: Words, inputs: Tensors) -> Tensors:
    """Logits by the word embeddings, which this layer shares with layer 0."""
    return functional.linear(inputs[0], words.weight), *inputs[1:]


class Bias(nn.Module):
    """The decoder's bias."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        bias = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(config.vocab_size))})
        self.cls = nn.ModuleDict({"predictions": bias})

    def forward(self, inputs: Tensors) -> Tensors:
        return inputs[0] + self.cls["predictions"]["bias"], *inputs[1:]  # type: ignore[index]


class TaskHead(nn.Module):
    """The head of a fine-tuned BERT, made as Hugging Face makes it: hidden states -> its outputs, and the mask."""

    def __init__(self, skeleton: Any, choices: int) -> None:
        super().__init__()
        self.choices = choices
        config, body = skeleton.config, skeleton.base_model
        if body.pooler is not None:
            self.bert = nn.ModuleDict({"pooler": bert.BertPooler(config)})
        if hasattr(skeleton, "qa_outputs"):
            self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        else:
            self.dropout = nn.Dropout(skeleton.dropout.p)
            self.classifier = nn.Linear(config.hidden_size, skeleton.classifier.out_features)

    def forward(self, inputs: Tensors) -> Tensors:
        hidden, mask = inputs
        if hasattr(self, "qa_outputs"):
            start, end = self.qa_outputs(hidden).unbind(-1)
            return start, end, mask
        if hasattr(self, "bert"):
            hidden = self.bert["pooler"](hidden)
        logits = self.classifier(self.dropout(hidden))
        return logits.view(-1, self.choices) if self.choices > 1 else logits, mask


# What Hugging Face puts before the names of a layer's parameters; the heads' own are whole
PREFIX: dict[type, str] = {
    Words: "bert.embeddings.word_embeddings.", Embeddings: "bert.embeddings.", Encoder: "bert.encoder.layer.{}.",
}  # fmt: skip


def pipe_layers(skeleton: Any, choices: int = 1) -> list[LayerSpec]:
    """BERT with the heads of ``skeleton``, Hugging Face's model of it: for pretraining, or for a task."""
    config = skeleton.config
    table = (config.vocab_size, config.hidden_size, config.pad_token_id)
    if hasattr(skeleton, "cls"):
        # DeepSpeed saves a tied weight only for a layer without forward_fn (PipelineModule.save_state_dict).
        words = TiedLayerSpec("words", Words, *table)
        again = TiedLayerSpec("words", Words, *table, forward_fn=decode)
        pair = hasattr(skeleton.cls, "seq_relationship")
        heads = [LayerSpec(Heads, config, pair), again, LayerSpec(Bias, config)]
    else:
        words, heads = LayerSpec(Words, *table), [LayerSpec(TaskHead, skeleton, choices)]
    encoder = (LayerSpec(Encoder, config, i) for i in range(config.num_hidden_layers))
    return [words, LayerSpec(Embeddings, config), *encoder, *heads]


class Pipe(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's module, cut where it is told to, that knows its parameters' names at Hugging Face."""

    def __init__(self, layers: Sequence[LayerSpec], parts: list[int], skeleton: Any, stages: int) -> None:
        self.layers = layers
        self.chosen_parts = parts
        super().__init__(list(layers), num_stages=stages)
        self._init_weights = skeleton._init_weights
        for p in self.parameters():
            # At ZeRO 0 the norm for clipping takes all of the first stage, and of the others what is marked so
            # (runtime/utils.py, clip_grad_norm_); unmarked, it would be that of the first stage alone.
            p.model_parallel = not p.ds_pipe_replicated

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.chosen_parts
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def hf_name(self, name: str) -> str:
        """What Hugging Face calls the module or parameter that is ``name`` here."""
        first, _, rest = name.partition(".")
        if first == "tied_modules":
            prefix, rest = PREFIX[Words], rest.partition(".")[2]
        else:
            prefix = PREFIX.get(self.layers[int(first)].typename, "").format(int(first) - 2) if first else ""
        return f"{prefix}{rest}".removesuffix(".")


class DualPipe(DualPipeVModule, Pipe):  # type: ignore[misc]
    """The same for DualPipeV, where each rank holds two of twice as many stages."""


def build_pipeline(run: Run, task: Described) -> Pipe:
    """This rank's stage of the task's model, on the device; its weights are still to be filled in."""
    config = run.config.pipeline
    with torch.device("meta"), no_init_weights():
        skeleton = task.model_class(task.hf_config)
    if type(task.hf_config) is not BertConfig:
        raise ConfigError(
            f"pipeline.stages={config.stages}: only a BERT is cut into stages, and model.weights="
            f"{run.config.model.weights} is another model. Use pipeline=none."
        )
    layers = pipe_layers(skeleton, task.choices)
    chunks = config.stages * (2 if config.schedule == "dualpipev" else 1)
    parts = partition(layers, config.partition, chunks, task)
    with no_init_weights():
        model = (DualPipe if config.schedule == "dualpipev" else Pipe)(layers, parts, skeleton, config.stages)
    run.console.print(f"Pipe stages begin at layers {', '.join(map(str, parts[:-1]))} of {len(layers)}.")
    return model


def partition(layers: Sequence[LayerSpec], how: str | tuple[int, ...], stages: int, task: Described) -> list[int]:
    """The first layer of each stage, and the number of layers. Raises ConfigError for a stage without any."""
    # The heads are never cut apart: two float tensors between them would need two backwards.
    blocks = 2 + max(i for i, layer in enumerate(layers) if layer.typename is Encoder)
    if how == "uniform":
        parts = partition_uniform(num_items=blocks, num_parts=stages)
    elif isinstance(how, tuple):
        parts = [0, *how, blocks]
    else:
        measured = how == "time"
        each = ranks.from_rank0(times(layers, task) if ranks.rank() == 0 else None) if measured else parameters(layers)
        parts = partition_balanced([*each[: blocks - 1], sum(each[blocks - 1 :])], num_parts=stages)
    if len(parts) != stages + 1 or any(a >= b for a, b in pairwise(parts)):
        raise ConfigError(
            f"pipeline.partition={how}: stages would begin at layers {parts[:-1]} of {blocks} (0 and 1 embed, "
            f"{blocks - 1} is the heads), and each of {stages} needs one at least. Use fewer stages, "
            f"pipeline.partition=uniform, or {stages - 1} rising numbers below {blocks}."
        )
    return [*map(int, parts[:-1]), len(layers)]  # some are numpy's


def parameters(layers: Sequence[LayerSpec]) -> list[int]:
    """Parameters per layer, the tied ones in both places, as DeepSpeed counts them."""
    with torch.device("meta"), no_init_weights():
        return [sum(p.numel() for p in layer.build().parameters()) for layer in layers]


def times(layers: Sequence[LayerSpec], task: Described) -> list[int]:
    """Microseconds that forward and backward of each layer take on one micro-batch, the best of three."""
    batch = next(task.train_batches(start_sample=0))
    device = torch.device(ranks.device())
    inputs = tuple(batch[name].to(device) for name in task.inputs)
    found = []
    for layer in layers:
        module = layer.build().to(device)
        call = getattr(layer, "forward_fn", None) or type(module).__call__
        best = math.inf
        for _ in range(3):
            get_accelerator().synchronize()
            start = time.perf_counter()
            fresh = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in inputs)
            outputs = call(module, fresh)
            torch.autograd.backward([t.float().sum() for t in outputs if t.is_floating_point()])
            get_accelerator().synchronize()
            best = min(best, time.perf_counter() - start)
        inputs = outputs
        found.append(max(1, round(best * 1e6)))
    return found
