"""How large the model of a configuration is, and what of it goes to files and to host memory; nothing is allocated.

parameters(config)          # 4_384_316, or None where only the data would tell
checkpoint_bytes(job)       # of one checkpoint
"""

from typing import Any

from toolkit import ds_config
from toolkit.config import RunConfig
from toolkit.doctor.finding import Job
from toolkit.errors import ConfigError

STATES = {"Adam": 2, "AdamW": 2, "LAMB": 2, "Lion": 2, "Muon": 2, "SGD": 1}  # fp32 numbers a parameter, at most


def parameters(config: RunConfig) -> int | None:
    """Of the model with its pretraining head, the vocabulary being what the tokenizer was asked for."""
    if config.task.kind in ("linear", "denoise"):
        return None
    import torch
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    try:
        hf_config, build = _described(config)
    except (ConfigError, OSError):
        return None
    with torch.device("meta"), no_init_weights():
        model = (build or AutoModel.from_config)(hf_config)
    model.tie_weights()
    return int(model.num_parameters())


def _described(config: RunConfig) -> tuple[Any, Any]:
    """The Hugging Face configuration and the class that is built from it; None: what AutoModel takes."""
    from transformers import AutoConfig, BertForPreTraining, MarianMTModel

    from toolkit.models.build import bert_config, read_config
    from toolkit.models.seq2seq import Special, marian_config

    model, vocabulary = config.model, config.model.vocab_size or config.tokenizer.vocab_size
    if model.weights:  # what the hub has and this host has not is not asked for
        return read_config(model.weights, AutoConfig, local_files_only=True), None
    if config.task.kind == "translate":
        return marian_config(model, Special(0, 1, 0), vocabulary), MarianMTModel
    return bert_config(model, vocab_size=vocabulary, pad_id=0), BertForPreTraining


def checkpoint_bytes(job: Job, count: int) -> int:
    """One checkpoint of ``count`` parameters: weights in their type (ZeRO 3: none), their fp32 copy, the states."""
    facts = job.facts
    weight = 0 if facts.stage == 3 else 4 if facts.dtype == "fp32" else 2
    master = 4 if facts.stage else 0
    states = 4 * STATES.get(str(facts["optimizer.type"]), 2)
    size = weight + master + states
    if job.config.pipeline.stages == 1:
        return count * size
    # the vocabulary's matrix is in the first stage and in the last; ds_state adds fp32 weights for toolkit export
    return (count + ds_config.largest_parameter(job.config)) * size + count * 4


def host_bytes(job: Job, count: int) -> int:
    """What offloading keeps in this host's memory: master copy, two states and gradient in fp32; the weights."""
    facts, share = job.facts, job.slots / job.world
    optimizer = 16 if facts.offload == "cpu" else 0
    weights = (4 if facts.dtype == "fp32" else 2) if facts.param_offload == "cpu" else 0
    return int(count * share * (optimizer + weights))
