"""The rules between the parts of a run's whole configuration, in the form of toolkit/deepspeed/rules.py.

broken(RUN_RULES, facts, "deepspeed.")       # toolkit.deepspeed.ds_config does this; facts.run is the configuration
"""

from collections.abc import Callable
from functools import partial, reduce
from math import inf

from toolkit.config.kinds import KINDS, Asked
from toolkit.deepspeed.facts import Facts
from toolkit.deepspeed.rules import Rule, number

# What a pipeline reads of DeepSpeed's own block; pipe_ and grad_partitioned are for tensor parallel stages.
STAGE_RECOMPUTE = ("activation_checkpoint_interval", "use_reentrant")
# Blocks of DeepSpeed's that this toolkit does by other means, and by which.
UNUSED = {
    "activation_checkpointing": "activation=recompute",
    "autotuning": "`toolkit plan`",
    "data_efficiency": "the data group",
    "dataloader_drop_last": "nothing: only whole batches are trained on",
    "hybrid_engine": "nothing: it is for reinforcement learning",
}


def _splits_features(f: Facts) -> bool:
    return "linear" in str(f["tensor_parallel.partition_config"])


def _bad_cuts(f: Facts) -> bool:
    pipeline = f.run.pipeline
    cuts, parts = pipeline.partition, pipeline.stages * (2 if pipeline.schedule == "dualpipev" else 1)
    return isinstance(cuts, tuple) and (len(cuts) != parts - 1 or list(cuts) != sorted(set(cuts)))


def _set(key: str) -> Callable[[Facts], str | bool]:
    """Whether a key of the run has another value than by default, and which."""
    return lambda f: key in f.changed and f"{key}={f.changed[key]}"


# What a run can ask for that not every kind of task does: how it asks, and why another kind refuses.
ASKED: dict[Asked, tuple[Callable[[Facts], str | bool], str]] = {
    "pipeline": (_set("pipeline.stages"), "its model is not cut into stages. Use pipeline=none."),
    "tensor": (lambda f: f.run.tensor_size > 1 and not _splits_features(f)
        and f"deepspeed.tensor_parallel.autotp_size={f.run.tensor_size}",
        "its layers are not split as a BERT's are. Use parallel=none, or parallel=features for a linear regression."),
    "features": (lambda f: _splits_features(f) and "parallel=features",
        "it splits a linear regression. Use parallel=tensor."),
    "activation": (lambda f: ", ".join(f"{key}=true" for key in f.changed if key.startswith("activation.")),
        "it is for Transformers. Drop it."),
    "weights": (_set("model.weights"), "it is for Transformers. Drop it."),
    "new_head": (lambda f: f.run.model.new_head and f.run.model.weights is not None and "model.new_head=true",
        "it is for model.weights of another fine-tuning task. Drop it."),
    "vocab_size": (_set("model.vocab_size"), "without effect: the tokenizer or model.weights decides. Drop it."),
    "metrics": (_set("task.metrics"), "it computes none. Drop it."),
    "seeds": (_set("seeds"), "several trainings in one launch are for fine-tuning. Use seed, or --multirun seed=1,2."),
    "loss": (lambda f: f.run.task.loss != "mse" and f"loss={f.run.task.loss}", "it is of task=linear. Drop it."),
    "decoder": (_set("model.type"), "an encoder-decoder translates. Use a model of type bert, or task=translate."),
    "tokens": (_set("batch.tokens"), "it counts the tokens of sentence pairs. Use batch.global_size alone."),
    "subwords": (_set("tokenizer.model"),
        "a BERT's tokenizer is trained as wordpiece. Drop it, or name one by tokenizer.path."),
}  # fmt: skip


# Which formats of data a key is for; None is that of each file, hub of a preset, beside which files may be named
_HEADED = ("csv", "tsv", "columns", None)
FORMATS: dict[str, tuple[str | None, ...]] = {
    "data.column": ("jsonl", "parquet", "hub"), "data.documents": ("text",), "data.split": ("hub", None),
    "data.streaming": ("hub", None), "data.header": (*_HEADED, "hub"), **dict.fromkeys(("data.target", "data.drop"),
    (*_HEADED, "jsonl", "json", "parquet", "hub")), **dict.fromkeys(("data.rows", "data.features", "data.noise"),
    ("synthetic",)),
}  # fmt: skip
PLACES = ("data.path", "data.train", "data.eval", "data.test")
# What weights bring with them
OF_WEIGHTS = (
    "model.hidden_size model.num_hidden_layers model.decoder_layers model.num_attention_heads model.intermediate_size "
    "model.hidden_act model.max_position_embeddings model.initializer_range model.layer_norm_eps"
)


def _ignored(f: Facts) -> str:
    """What is set and only other kinds of task read, for a message; of what presets set, only where data comes from."""
    found = [key for key in f.changed if f.kind.ignores(key) and (key in f.run.typed or key.startswith(PLACES))]
    if not found:
        return ""
    own = next((key for key in PLACES if key not in found and not f.kind.ignores(key)), "")
    readers = ", ".join(name for name, kind in KINDS.items() if not kind.ignores(found[0]))
    why = f"its data is {own}" if own and found[0].startswith(PLACES) else f"it is for {readers}"
    return f"{', '.join(f'{key}={f.changed[key]}' for key in found)} without effect with task.kind={f.kind.name}: {why}"


def _unread_path(f: Facts) -> str:
    """Why nobody reads data.path."""
    data, reads = f.run.data, f.kind.reads or frozenset()
    if data.path is None or "data.path" not in reads:
        return ""
    if "data.train" not in reads:
        own = {"python_docs": "the text that comes with Python", "synthetic": "drawn"}.get(str(data.format))
        way = "data=text, jsonl, parquet or hub" if "data.column" in reads else "data=table"
        return f"data.format={data.format} is {own}. Use {way}" if own else ""
    given = [place for key, place in f.changed.items() if key.startswith(PLACES[1:])]
    inside = any(str(place).startswith(f"{str(data.path).rstrip('/')}/") for place in given)
    return "" if inside or not data.train else f"data.train={data.train} is what is read. Use data.train, or drop it"


def _of_another_format(f: Facts) -> str:
    presets = ("data.header", "data.streaming")  # set these for files that the user may replace
    keys = (key for key in f.changed if key in FORMATS and (key not in presets or key in f.run.typed))
    return ", ".join(k for k in keys if not f.kind.ignores(k) and f.run.data.format not in FORMATS[k])


def _held_out(f: Facts) -> bool:
    return bool(f.run.data.holdout or (f.run.data.eval and not f.kind.ignores("data.eval")))


def _typed(keys: str, when: Callable[[Facts], object], f: Facts) -> str:
    """Those of ``keys`` that the command line set, and this kind of task reads: presets may set what has no effect."""
    read = (key for key in keys.split() if key in f.run.typed and not f.kind.ignores(key))
    return ", ".join(key for key in read if reduce(getattr, key.split("."), f.run)) if when(f) else ""


# What is typed without effect, when, and why
TYPED: dict[str, tuple[str, Callable[[Facts], object], str]] = {
    "unread_holdout": ("data.holdout", lambda f: f.run.data.eval, ": data.eval is held out. Drop one of the two."),
    "patience_of_nothing": ("train.patience", lambda f: f.run.train.eval_every is None or not _held_out(f),
        ": it counts evaluations, and there is one at most, at the end. Set train.eval_every, and hold something out "
        "(data.holdout or data.eval)."),
    "eval_of_nothing": ("train.eval_every train.eval_samples", lambda f: "loss" not in f.kind.can and not _held_out(f),
        ": nothing is held out. Set data.holdout, or drop it."),
    "unread_tokenizer": ("tokenizer.model tokenizer.vocab_size tokenizer.min_frequency tokenizer.coverage",
        # weights that are pretrained further do not bring their own
        lambda f: f.run.tokenizer.path or (f.run.model.weights and "masks" not in f.kind.can),
        ": the tokenizer is that of tokenizer.path or model.weights, none is trained. Drop it."),
    "unread_shape": (OF_WEIGHTS, lambda f: f.run.model.weights,
        ": model.weights={c.model.weights} has a shape of its own. Drop it, or model.weights."),
    "init_of_nothing": ("model.init", lambda f: f.run.model.weights is None,
        ": there are no weights to begin with. Set model.weights to a BERT."),
    "huber_delta": ("task.huber_delta", lambda f: f.run.task.loss != "huber",
        " with loss={c.task.loss}. Use loss=huber, or drop it."),
    "length_penalty": ("task.length_penalty", lambda f: max(f.run.task.beams, f.run.task.eval_beams) == 1,
        ": a search with one beam compares no lengths. Raise task.beams, or drop it."),
    "decay_steps": ("schedule.decay_steps", lambda f: f.run.schedule.name not in ("linear", "cosine"),
        " with schedule.name={c.schedule.name}: only linear and cosine reach 0. Drop it."),
    "unread_warmup": ("schedule.warmup", lambda f: f.run.schedule.name == "none",
        " with schedule.name=none. Use schedule=linear, cosine, inverse_sqrt or constant, or drop it."),
}  # fmt: skip
# Keys that nothing reads in this combination. It takes neither ranks nor DeepSpeed to say so.
UNREAD: dict[str, Rule] = {
    "unread": (_ignored, "{got}. Drop it."),
    "unread_path": (_unread_path, "data.path={c.data.path} without effect: {got}."),
    "other_format": (_of_another_format, "{got} without effect with data.format={c.data.format}. Drop it."),
    **{
        rule: (partial(_typed, keys, when), f"{{got}} without effect{why}") for rule, (keys, when, why) in TYPED.items()
    },
}


def _beyond(capability: Asked, f: Facts) -> str | bool:
    """What is asked of a kind of task that cannot do it, for a message."""
    return capability not in f.kind.can and ASKED[capability][0](f)


RUN_RULES: dict[str, Rule] = {
    # ---- what the kind of task can do, and what it needs
    **{can: (partial(_beyond, can), f"{{got}} with task.kind={{c.task.kind}}: {why}")
        for can, (_, why) in ASKED.items()},
    "no_decoder": (lambda f: "decoder" in f.kind.needs and f.run.model.type == "bert" and f.run.model.weights is None,
        "task.kind={c.task.kind} with model.type=bert: it needs an encoder and a decoder. Use model=transformer_tiny, "
        "transformer_base or transformer_big, or model.weights of a T5, BART, Marian or BERT."),
    "no_metric": (lambda f: "metrics" in f.kind.needs and not f.run.task.metrics,
        "task.metrics is empty with task.kind={c.task.kind}: nothing would choose the best weights. Use a preset "
        "(task={c.task.kind}), or name one."),
    "head_of_nothing": (lambda f: f.run.model.new_head and f.run.model.weights is None,
        "model.new_head=true without effect: it is for model.weights of another fine-tuning task. Drop it."),
    # ---- what nothing reads
    **UNREAD,
    # ---- the model and its data
    "heads": (lambda f: f.run.model.hidden_size % f.run.model.num_attention_heads,
        "model.hidden_size={c.model.hidden_size} does not divide by "
        "model.num_attention_heads={c.model.num_attention_heads}. Change one of them."),
    # uneven shares draw unequally many random numbers, and then dropout differs where it must not
    "tensor_heads": (lambda f: f.run.model.num_attention_heads % f.run.tensor_size and f.run.model.weights is None,
        "model.num_attention_heads={c.model.num_attention_heads} does not divide by "
        "deepspeed.tensor_parallel.autotp_size={c.tensor_size}: every rank takes as many heads. Change one of them, or "
        "use parallel=none."),
    "max_length": (lambda f: f.run.model.weights is None  # which have their own
        and not f.kind.ignores("data.max_length") and f.run.data.max_length > f.run.model.max_position_embeddings,
        "data.max_length={c.data.max_length} is above model.max_position_embeddings={c.model.max_position_embeddings}: "
        "the model has no such position. Lower the one or raise the other."),
    "max_predictions": (lambda f: "masks" in f.kind.can and f.run.data.max_predictions > f.run.data.max_length,
        "data.max_predictions={c.data.max_predictions} is above data.max_length={c.data.max_length}: there are not so "
        "many tokens to predict. Lower data.max_predictions."),
    "decoder_without_effect": (lambda f: f.run.model.type != "marian" and f.run.model.decoder_layers,
        "model.decoder_layers={c.model.decoder_layers} with model.type={c.model.type}: it has no decoder of its own. "
        "Drop it."),
    "flash_on_cpu": (lambda f: f.run.model.attention == "flash_attention_2" and f.device != "cuda",
        "model.attention=flash_attention_2 on {f.device}: it is for CUDA devices. Use model.attention=sdpa."),
    "flash_in_fp32": (lambda f: f.run.model.attention == "flash_attention_2"
        and f.device == "cuda" and f.dtype == "fp32" and not f["torch_autocast.enabled"],
        "model.attention=flash_attention_2 in fp32: it computes in bf16 and fp16 only. Use precision=bf16, or "
        "model.attention=sdpa."),
    "warmup": (lambda f: f.run.schedule.name != "none" and f.run.schedule.warmup > (f.run.train.steps or inf),
        "schedule.warmup={c.schedule.warmup:g} steps is above train.steps={c.train.steps}: the rate would never be "
        "reached. Lower it; below 1 it is a share of train.steps."),
    "two_schedules": (lambda f: f.run.schedule.name != "none" and f["scheduler"],
        "{v[scheduler.type]} beside schedule.name={c.schedule.name}: one has to go. Use schedule=none, or drop "
        "deepspeed.scheduler."),
    "learning_rate": (lambda f: [k for k in ("lr", "muon_lr", "adam_lr") if number(f[f"optimizer.params.{k}"], 0) < 0],
        "deepspeed.optimizer.params.{got[0]} is negative: a negative rate climbs. Use a positive one."),
    # fused_optimizer.py: FP16_Optimizer runs one empty optimizer.step() at its start
    "half_at_stage0": (lambda f: f.stage == 0 and f.dtype != "fp32" and "Adam" in f.optimizer,
        "zero_optimization.stage=0 in {f.dtype}: DeepSpeed's optimizer for it takes an empty step first, so Adam's "
        "bias correction is one step ahead and the losses differ. Use zero=stage1."),
    "no_optimizer": (lambda f: not f["optimizer"],
        "deepspeed.optimizer is missing. Use optimizer=adamw, lamb, lion, muon or sgd."),
    # ---- pipeline
    "pipeline_zero": (lambda f: f.run.pipeline.stages > 1 and f.stage >= 2,  # pipe/engine.py, __init__ asserts it
        "deepspeed.zero_optimization.stage={f.stage} with pipeline.stages={c.pipeline.stages}: DeepSpeed pipelines "
        "need ZeRO 0 or 1. Use zero=stage1 or pipeline=none."),
    "pipeline_tensor": (lambda f: f.run.pipeline.stages > 1 and f.run.tensor_size > 1,
        "deepspeed.tensor_parallel.autotp_size={c.tensor_size} with pipeline.stages={c.pipeline.stages}: DeepSpeed "
        "splits no layers of a pipeline. Use parallel=none or pipeline=none."),
    "pipeline_compile": (lambda f: f.run.pipeline.stages > 1 and f.run.train.compile,
        "train.compile=True with pipeline.stages={c.pipeline.stages} is not supported. Use train.compile=false."),
    "pipeline_off": (lambda f: f.run.pipeline.stages == 1
        and ", ".join(sorted(key for key in f.changed if key.startswith("pipeline."))),
        "{got} without effect: pipeline.stages is 1. Use pipeline=two, or drop it."),
    "pipeline_cuts": (lambda f: f.run.pipeline.stages > 1 and _bad_cuts(f),
        "pipeline.partition={c.pipeline.partition}: name the first layer of each part but the first, rising: one "
        "number less than pipeline.stages (dualpipev: less than twice as many). Or use parameters, time or uniform."),
    "dualpipev_micro_batches": (  # pipe/schedule.py, DualPipeVSchedule raises
        lambda f: f.run.pipeline.schedule == "dualpipev" and f.run.pipeline.stages > 1
        and (f["gradient_accumulation_steps"] or 0) < 2 * f.run.pipeline.stages,
        "pipeline.schedule=dualpipev with {f[gradient_accumulation_steps]} micro-batches a step: it needs two for each "
        "of pipeline.stages={c.pipeline.stages}. Raise batch.global_size, lower batch.micro_size, or use "
        "pipeline.schedule=1f1b."),
    "pipeline_block": (lambda f: f.others("pipeline", *(STAGE_RECOMPUTE if f.run.pipeline.stages > 1 else ())),
        "deepspeed.{got} without effect here. Use the keys of pipeline (stages, schedule, partition), or drop it."),
    # pipe/engine.py, _exec_load_micro_batch: its default; seen to fail
    "pipeline_reentrant": (lambda f: f.run.pipeline.stages > 1 and f["pipeline.use_reentrant"],
        "deepspeed.pipeline.use_reentrant=True: the first stage reads ids, which carry no gradient. Drop it."),
    "deepcompile_off": (lambda f: f["compile.deepcompile"] and not f.run.train.compile,
        "deepspeed.compile.deepcompile=True without effect: nothing is compiled. Set train.compile=true."),
    "unused": (lambda f: next(((key, way) for key, way in UNUSED.items() if f[key]), None),
        "deepspeed.{got[0]} without effect in this toolkit. Use {got[1]} instead."),
}  # fmt: skip
