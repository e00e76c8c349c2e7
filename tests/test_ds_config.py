"""Every rule on a DeepSpeed config has a row here; every preset passes them and DeepSpeed itself."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from composing import compose

from toolkit.config.compose import changed
from toolkit.config.schema import RunConfig, conf_dir, load
from toolkit.deepspeed import rules, run_rules
from toolkit.deepspeed.ds_config import complete, examine, problems, required_ops
from toolkit.deepspeed.facts import Facts
from toolkit.errors import ConfigError

ZERO = "deepspeed.zero_optimization"
OPT = "deepspeed.optimizer"
SCHEDULER = "schedule=none deepspeed.scheduler.type"
PARAMS = "deepspeed.scheduler.params"

# rule, device, overrides, a part of the message; two ranks
ROWS = [
    # batch
    ("batch_split", "cpu", "batch.global_size=250", "Use batch.global_size=224 or 256, or batch.micro_size=5 or 25."),
    ("batch_split", "cpu", "batch.global_size=15", "batch.global_size=32."),
    ("batch_split", "cpu", "batch.global_size=4 batch.micro_size=16", "batch.micro_size=2"),
    ("batch_twice", "cpu", "deepspeed.train_batch_size=128", "Drop deepspeed.train_batch_size, or set batch.global_"),
    ("batch_twice", "cpu", "deepspeed.gradient_accumulation_steps=2", "give 8 on 2 ranks"),
    ("layout", "cpu", "pipeline.stages=3", "does not divide 2 ranks. Start 3 ranks"),
    # pipeline
    (
        "pipeline_zero",
        "cpu",
        "pipeline=two zero=stage2",
        "pipelines need ZeRO 0 or 1. Use zero=stage1 or pipeline=none",
    ),
    ("pipeline_zero", "cpu", "pipeline=two zero=stage3", "zero_optimization.stage=3 with pipeline.stages=2"),
    ("pipeline_tensor", "cpu", "pipeline=two zero=stage1 deepspeed.tensor_parallel.autotp_size=2", "parallel=none"),
    ("pipeline_compile", "cpu", "pipeline=two zero=stage1 train.compile=true", "Use train.compile=false."),
    ("pipeline_off", "cpu", "pipeline.schedule=gpipe", "pipeline.schedule without effect: pipeline.stages is 1"),
    ("pipeline_cuts", "cpu", "pipeline=two zero=stage1 pipeline.partition=[3,5]", "name the first layer of each part"),
    ("pipeline_cuts", "cpu", "pipeline.stages=2 pipeline.schedule=dualpipev pipeline.partition=[5,3,7]", "rising"),
    (
        "dualpipev_micro_batches",
        "cpu",
        "pipeline=two pipeline.schedule=dualpipev batch.global_size=48",
        "with 3 micro-batches a step",
    ),
    ("pipeline_block", "cpu", "deepspeed.pipeline.stages=2", "deepspeed.pipeline.stages without effect"),
    ("pipeline_reentrant", "cpu", "pipeline=two deepspeed.pipeline.use_reentrant=true", "which carry no gradient"),
    ("pipeline_block", "cpu", "deepspeed.pipeline.use_reentrant=false", "use_reentrant without effect"),
    ("pipeline_block", "cpu", "pipeline=two deepspeed.pipeline.pipe_partitioned=true", "Use the keys of pipeline"),
    # keys and types
    ("unknown_key", "cpu", "deepspeed.gradient_clip=1", "Did you mean 'gradient_clipping'?"),
    ("unknown_key", "cpu", f"{ZERO}.stag=1", "deepspeed.zero_optimization.stag: DeepSpeed knows no such key"),
    ("unknown_key", "cpu", f"{ZERO}.offload_optimizer.devise=cpu", "Did you mean 'device'?"),
    ("unknown_key", "cpu", "deepspeed.activation_checkpointing.partitioned=true", "no such key"),
    ("unknown_key", "cpu", "deepspeed.data_types.grad_dtype=fp32", "no such key"),
    ("unknown_key", "cpu", "deepspeed.aio.blocksize=4096", "Did you mean 'block_size'?"),
    ("unknown_key", "cpu", "deepspeed.pipeline.stage=2", "Did you mean 'stages'?"),
    ("unknown_key", "cpu", "deepspeed.checkpoint.tag=Warn", "no such key"),
    ("unknown_key", "cpu", "deepspeed.flops_profiler.step=5", "no such key"),
    ("removed_key", "cpu", "deepspeed.elasticity.enabled=true", "Elastic training has been removed"),
    ("removed_key", "cpu", "deepspeed.amp.enabled=true", "'torch_autocast' instead"),
    ("removed_key", "cpu", f"{ZERO}.mics_shard_size=2", "MiCS ZeRO-3 sharding has been removed"),
    ("replaced_key", "cpu", "deepspeed.bfloat16.enabled=true", "Use deepspeed.bf16."),
    ("replaced_key", "cpu", f"{ZERO}.cpu_offload=true", "Use deepspeed.zero_optimization.offload_optimizer."),
    ("auto", "cpu", "deepspeed.gradient_clipping=auto", "deepspeed.gradient_clipping='auto'"),
    ("auto", "cpu", f"{OPT}.params.lr=auto", "Write a value"),
    ("auto", "cpu", "deepspeed.train_batch_size=auto", "Write a value"),
    ("type", "cpu", f"{ZERO}.stage=4", "must be one of 0, 1, 2, 3"),
    ("type", "cpu", f"{ZERO}.stage=two", "zero_optimization.stage='two': must be one of"),
    ("type", "cpu", f"{ZERO}.reduce_bucket_size=big", "must be a whole number"),
    ("type", "cpu", f"{ZERO}.overlap_comm=1", "must be true or false"),
    ("type", "cpu", f"{ZERO}.offload_optimizer.device=disk", "must be one of cpu, none, nvme"),
    ("type", "cpu", "deepspeed.zero_optimization=true", "must be a block"),
    ("type", "cpu", "deepspeed.gradient_clipping=true", "must be a number"),
    ("type", "cpu", "deepspeed.communication_data_type=fp64", "must be one of fp32, fp16, bf16, null"),
    # precision
    ("two_precisions", "cuda", "precision=fp16 deepspeed.bf16.enabled=true", "a model has one precision"),
    ("fp16_on_cpu", "cpu", "precision=fp16", "Use precision=fp32 or precision=bf16."),
    ("fp16_options", "cpu", "deepspeed.fp16.loss_scale=128", "fp16.loss_scale without effect"),
    ("bf16_options", "cpu", "deepspeed.bf16.check_grad_overflow=true", "bf16.check_grad_overflow without effect"),
    (
        "static_scale",
        "cuda",
        "precision=fp16 deepspeed.fp16.loss_scale=128 deepspeed.fp16.hysteresis=4",
        "fp16.hysteresis have no effect",
    ),
    ("accumulation_at_stage0", "cpu", "precision=bf16 zero=stage0", "Use zero=stage1, or"),
    ("accumulation_at_stage0", "cpu", "zero=stage0 deepspeed.data_types.grad_accum_dtype=bf16", "fp32 weights"),
    ("param_dtype", "cpu", "deepspeed.data_types.param_dtype=bf16", "but the weights are fp32"),
    ("master_weights", "cuda", "precision=bf16 deepspeed.bf16.bf16_master_weights_and_grads=true", "offload=cpu"),
    ("bf16_states", "cuda", "precision=bf16 deepspeed.bf16.bf16_optimizer_states=true", "Set both, or drop it."),
    ("autocast_dtype", "cpu", "deepspeed.torch_autocast.enabled=true", "deepspeed.torch_autocast.dtype=bfloat16"),
    # ZeRO
    ("zero_keys_at_stage0", "cpu", f"zero=stage0 {ZERO}.overlap_comm=true", "overlap_comm without effect"),
    ("zero_keys_at_stage0", "cpu", f"zero=stage0 {ZERO}.reduce_bucket_size=1e6", "Use zero=stage1 (or 2, 3)"),
    ("stage3_keys", "cpu", f"zero=stage2 {ZERO}.stage3_prefetch_bucket_size=1e6", "only ZeRO 3 reads them"),
    ("stage3_keys", "cpu", f"zero=stage1 {ZERO}.sub_group_size=1e6", "sub_group_size without effect"),
    ("stage12_keys", "cpu", f"zero=stage3 {ZERO}.allgather_bucket_size=1e6", "only ZeRO 1 and 2 read them"),
    ("legacy_stage1", "cpu", f"zero=stage1 {ZERO}.legacy_stage1=true", "Drop it."),
    ("sum_at_stage3", "cpu", "zero=stage3 deepspeed.gradient_allreduce_op=sum", "ZeRO 3 only averages"),
    ("scaled_reduction", "cpu", "deepspeed.prescale_gradients=true", "reduce_scatter=false"),
    ("scaled_reduction", "cpu", "deepspeed.gradient_predivide_factor=2", "reduce_scatter=false"),
    ("no_grad_norm", "cpu", f"{ZERO}.compute_grad_norm=false", "gradient_clipping=0"),
    ("odd_bucket", "cpu", f"{ZERO}.allgather_bucket_size=4097", "must be even"),
    ("unmanaged_overlap", "cpu", "zero=stage1 deepspeed.managed_gradient_accumulation=false", "below stage 2"),
    ("bucket_size", "cpu", f"{ZERO}.reduce_bucket_size=0", "it must be 1 at least"),
    # a stage that was typed, and what a preset has set of another
    (
        "stage12_keys",
        "cpu",
        f"{ZERO}.stage=3",
        "zero_optimization.stage=3 alone leaves zero_optimization.allgather_buc",
    ),
    ("stage3_keys", "cpu", f"zero=stage3 {ZERO}.stage=1", "of a preset, without effect there. Use zero=stage1."),
    ("zero_keys_at_stage0", "cpu", f"{ZERO}.stage=0", "Use zero=stage0."),
    ("zero_keys_at_stage0", "cpu", f"{ZERO}.stage=0 {ZERO}.overlap_comm=true", "Use zero=stage1 (or 2, 3), or drop"),
    (
        "unknown_param",
        "cpu",
        f"{OPT}.type=SGD",
        "type=torch.SGD alone leaves params of a preset that it does not take: betas, eps",
    ),
    # offload
    ("offload_at_stage0", "cpu", "zero=stage0 offload=cpu", "there is no ZeRO to offload"),
    ("param_offload_stage", "cpu", "zero=stage2 offload=cpu_params", "only ZeRO 3 offloads parameters"),
    ("nvme_stage", "cuda", "zero=stage2 offload=nvme", "it would stay in CPU memory"),
    (
        "nvme_buffer_size",
        "cuda",
        f"zero=stage3 offload=nvme {ZERO}.offload_param.buffer_size=1e6",
        "largest parameter (23440896 elements)",
    ),
    (
        "nvme_buffer_count",
        "cuda",
        f"zero=stage3 offload=nvme {ZERO}.offload_optimizer.buffer_count=3",
        "Set it to 4",
    ),
    ("nvme_sub_groups", "cuda", f"zero=stage3 offload=nvme {ZERO}.sub_group_size=1e9", "trains on garbage"),
    ("partial_offload", "cpu", f"offload=cpu {ZERO}.offload_optimizer.ratio=0.5", "needs ZeRO 3"),
    ("super_offload", "cpu", f"offload=cpu {ZERO}.offload_optimizer.super_offload=true", "only ZeRO 3 reads it"),
    ("aio_without_nvme", "cpu", "deepspeed.aio.queue_depth=32", "nothing is offloaded to NVMe"),
    ("gds_on_cpu", "cpu", "precision=bf16 zero=stage3 offload=nvme deepspeed.aio.use_gds=true", "CUDA's"),
    # optimizer
    ("optimizer_type", "cpu", "~deepspeed.optimizer.type", "Set deepspeed.optimizer.type=AdamW."),
    ("unknown_optimizer", "cpu", f"{OPT}.type=AdmW", "Did you mean 'AdamW'?"),
    ("removed_optimizer", "cpu", f"{OPT}.type=OneBitAdam", "removed from DeepSpeed, as all 1-bit optimizers are"),
    ("removed_optimizer", "cpu", f"{OPT}.type=OneBitLamb", "Use Lamb."),
    ("unknown_param", "cpu", f"{OPT}.params.beta=[0.9,0.95]", "FusedAdam takes no such parameter. Did you mean"),
    ("unknown_param", "cpu", f"offload=cpu {OPT}.params.set_grad_none=true", "DeepSpeedCPUAdam takes no such"),
    ("unknown_param", "cpu", f"{SCHEDULER}=WarmupLR deepspeed.scheduler.params.steps=5", "WarmupLR takes no such"),
    ("param_type", "cpu", f"{OPT}.params.lr=fast", "must be a number"),
    ("param_type", "cpu", f"{SCHEDULER}=WarmupLR deepspeed.scheduler.params.warmup_num_steps=0.1", "a whole number"),
    ("max_grad_norm", "cpu", f"{OPT}.params.max_grad_norm=1.0", "Use deepspeed.gradient_clipping"),
    ("fused_on_cpu", "cpu", "optimizer=lion", "Lion also runs with zero=stage1 (or 2, 3) offload=cpu"),
    ("fused_on_cpu", "cpu", "zero=stage0 optimizer=lamb", "has no implementation on a CPU"),
    ("lamb_offload", "cuda", "optimizer=lamb offload=cpu", "cannot be offloaded"),
    (
        "lamb_scale",
        "cuda",
        "zero=stage0 optimizer=lamb precision=fp16 deepspeed.fp16.loss_scale=128",
        "it needs a dynamic scale",
    ),
    ("needs_matrices", "cuda", "optimizer=lamb zero=stage1", "would depend on the ranks. Use zero=stage0"),
    ("untested_optimizer", "cpu", "~deepspeed.zero_allow_untested_optimizer optimizer=sgd", "allow_untested"),
    ("tensor_matrices", "cpu", "optimizer=muon parallel=tensor", "a rank has only a part of them"),
    ("muon_scatter", "cpu", "optimizer=muon zero=stage3", "reduce_scatter=false"),
    ("muon_clipping", "cpu", "optimizer=muon deepspeed.gradient_clipping=1", "Set deepspeed.gradient_clipping=0"),
    # scheduler
    ("scheduler_type", "cpu", "schedule=none deepspeed.scheduler.params.warmup_num_steps=5", "scheduler.type="),
    ("unknown_scheduler", "cpu", f"{SCHEDULER}=WarmUpLR", "Did you mean 'WarmupLR'?"),
    ("scheduler_params", "cpu", f"{SCHEDULER}=WarmupLR", "deepspeed.scheduler.params={}"),
    ("scheduler_params", "cpu", f"{SCHEDULER}=WarmupCosineLR", "Set deepspeed.scheduler.params.total_num_steps."),
    (
        "scheduler_rate",
        "cpu",
        f"{SCHEDULER}=WarmupDecayLR deepspeed.scheduler.params.total_num_steps=100",
        "replaces optimizer.params.lr=0.0001 by its own default of 0.001. Set deepspeed.scheduler.params.warmup_max_lr",
    ),
    ("scheduler_rate", "cpu", f"{SCHEDULER}=LRRangeTest {PARAMS}={{}}", "Set deepspeed.scheduler.params.lr_range_test"),
    ("warmup_steps", "cpu", f"{SCHEDULER}=WarmupLR {PARAMS}.warmup_num_steps=0", "it must be 1 at least"),
    ("warmup_longer", "cpu", f"{SCHEDULER}=WarmupCosineLR {PARAMS}.total_num_steps=500", "never be reached"),
    ("warmup_type", "cpu", f"{SCHEDULER}=WarmupLR {PARAMS}.warmup_type=cosine", "would take log"),
    ("torch_scheduler", "cpu", f"{SCHEDULER}=StepLR deepspeed.scheduler.params.step_size=5", "is torch's"),
    # the rest
    ("ignored", "cpu", "deepspeed.disable_allgather=true", "reads it and does nothing with it"),
    ("enabled", "cpu", "deepspeed.tensorboard.job_name=mine", "tensorboard without effect: it is off"),
    ("packages", "cpu", "deepspeed.wandb.enabled=true", "whose package is missing: wandb"),
    ("deepcompile_stage", "cpu", "zero=stage0 train.compile=true deepspeed.compile.deepcompile=true", "stage=0"),
    ("compile_options", "cpu", "deepspeed.compile.debug_log=true", "compile.deepcompile is false"),
    # what the kind of task can do, and what it needs
    ("pipeline", "cpu", "task=translate model=transformer_tiny pipeline=two zero=stage1", "Use pipeline=none"),
    ("pipeline", "cpu", "task=linear pipeline=two zero=stage1", "pipeline.stages=2 with task.kind=linear"),
    ("tensor", "cpu", "task=translate model=transformer_base parallel=tensor", "Use parallel=none"),
    ("tensor", "cpu", "task=linear parallel=tensor", "parallel=features for a linear regression"),
    ("features", "cpu", "parallel=features", "parallel=features with task.kind=pretrain"),
    ("activation", "cpu", "task=linear activation=recompute", "activation.recompute=true with task.kind=linear"),
    ("weights", "cpu", "task=linear model.weights=runs/bert", "model.weights=runs/bert with task.kind=linear"),
    ("new_head", "cpu", "model.new_head=true model.weights=runs/bert", "model.new_head=true with task.kind=pretrain"),
    ("vocab_size", "cpu", "task=classify model.vocab_size=9", "model.vocab_size=9 with task.kind=classify"),
    ("metrics", "cpu", "task.metrics=[f1]", "task.metrics=['f1'] with task.kind=pretrain"),
    ("seeds", "cpu", "seeds=[1,2]", "several trainings in one launch are for fine-tuning"),
    ("loss", "cpu", "loss=mae", "loss=mae with task.kind=pretrain"),
    ("decoder", "cpu", "model=transformer_base", "model.type=marian with task.kind=pretrain"),
    ("tokens", "cpu", "batch.tokens=4096", "batch.tokens=4096 with task.kind=pretrain"),
    ("subwords", "cpu", "tokenizer.model=bpe", "tokenizer.model=bpe with task.kind=pretrain"),
    ("no_decoder", "cpu", "task=translate", "needs an encoder and a decoder. Use model=transformer_tiny"),
    ("no_metric", "cpu", "task.kind=classify", "task.metrics is empty with task.kind=classify"),
    ("head_of_nothing", "cpu", "model.new_head=true", "model.new_head=true without effect"),
    # what nothing reads
    (
        "unread",
        "cpu",
        "data.train=a.csv",
        "data.train=a.csv without effect with task.kind=pretrain: its data is data.pa",
    ),
    ("unread", "cpu", "data=files/sst2 data.path=/d", "data.train=/d/SST-2/train.tsv.gz, data.eval=/d/SST-2/dev.tsv"),
    ("unread", "cpu", "task=linear data.train=a.csv", "with task.kind=linear: its data is data.path. Drop it."),
    ("unread", "cpu", "data.eval={b:b.csv}", "data.eval.b=b.csv without effect"),
    (
        "unread",
        "cpu",
        "train.patience=3",
        "train.patience=3 without effect with task.kind=pretrain: it is for classify",
    ),
    ("unread", "cpu", "task=classify data.mask_rate=0.3", "data.mask_rate=0.3 without effect with task.kind=classify"),
    ("unread", "cpu", "task=classify task.threshold=0.3", "it is for multi_label. Drop it."),
    ("unread", "cpu", "task=classify data.columns.tags=x", "it is for tag. Drop it."),
    ("unread", "cpu", "task=linear model.dropout=0", "model.dropout=0.0 without effect with task.kind=linear"),
    ("unread", "cpu", "task=linear tokenizer.lowercase=false", "it is for pretrain, classify, regress, tag, span_qa"),
    (
        "unread_path",
        "cpu",
        "data.path=a.txt",
        "data.format=python_docs is the text that comes with Python. Use data=text",
    ),
    ("unread_path", "cpu", "task=linear data=synthetic data.path=a.csv", "data.format=synthetic is drawn. Use data=ta"),
    ("unread_path", "cpu", "task=classify data.train=a.csv data.path=b.csv", "data.train=a.csv is what is read"),
    ("other_format", "cpu", "data.column=body", "data.column without effect with data.format=python_docs"),
    (
        "other_format",
        "cpu",
        "data=jsonl data.path=a data.documents=file",
        "data.documents without effect with data.format",
    ),
    ("other_format", "cpu", "task=linear data.rows=9", "data.rows without effect with data.format=None"),
    (
        "other_format",
        "cpu",
        "task=linear data=synthetic data.drop=[a]",
        "data.drop without effect with data.format=syn",
    ),
    ("other_format", "cpu", "task=tag data.format=conll data.header=false", "data.header without effect"),
    (
        "unread_holdout",
        "cpu",
        "task=classify data.eval=a.csv data.holdout=0.2",
        "data.holdout without effect: data.eval",
    ),
    ("patience_of_nothing", "cpu", "task=translate train.patience=2", "Set train.eval_every, and hold something out"),
    ("patience_of_nothing", "cpu", "task=classify train.patience=2 data.holdout=0", "train.patience without effect"),
    ("eval_of_nothing", "cpu", "data.holdout=0 train.eval_every=9", "train.eval_every without effect: nothing is held"),
    ("unread_tokenizer", "cpu", "tokenizer.path=x tokenizer.vocab_size=9", "tokenizer.vocab_size without effect"),
    (
        "unread_tokenizer",
        "cpu",
        "task=sst2 model.weights=x tokenizer.min_frequency=1",
        "or model.weights, none is trained",
    ),
    ("unread_shape", "cpu", "model.weights=x model.hidden_size=64", "model.weights=x has a shape of its own"),
    ("init_of_nothing", "cpu", "task=translate model=transformer_tiny model.init=none", "Set model.weights to a BERT"),
    ("huber_delta", "cpu", "task=linear task.huber_delta=2", "Use loss=huber, or drop it."),
    ("length_penalty", "cpu", "task=translate task.beams=1 task.length_penalty=1", "one beam compares no lengths"),
    ("decay_steps", "cpu", "schedule=constant schedule.decay_steps=9", "only linear and cosine reach 0"),
    (
        "unread_warmup",
        "cpu",
        "schedule=none schedule.warmup=9",
        "schedule.warmup without effect with schedule.name=none",
    ),
    # the run
    ("heads", "cpu", "model.num_attention_heads=7", "does not divide by model.num_attention_heads=7"),
    ("tensor_heads", "cpu", "parallel=tensor model.num_attention_heads=3", "every rank takes as many heads"),
    ("max_length", "cpu", "data.max_length=1024", "above model.max_position_embeddings=512"),
    ("decoder_without_effect", "cpu", "model.decoder_layers=3", "model.type=bert: it has no decoder of its own"),
    ("max_predictions", "cpu", "data.max_predictions=200", "above data.max_length=128"),
    ("flash_on_cpu", "cpu", "model.attention=flash_attention_2", "Use model.attention=sdpa"),
    ("flash_in_fp32", "cuda", "model.attention=flash_attention_2", "Use precision=bf16"),
    ("warmup", "cpu", "schedule.warmup=2000", "schedule.warmup=2000 steps is above train.steps=1000"),
    ("half_at_stage0", "cuda", "zero=stage0 precision=fp16", "one step ahead"),
    ("learning_rate", "cpu", "deepspeed.optimizer.params.lr=-1", "a negative rate climbs"),
    ("two_schedules", "cpu", "deepspeed.scheduler.type=WarmupLR", "Use schedule=none"),
    ("no_optimizer", "cpu", "~deepspeed.optimizer", "Use optimizer=adamw"),
    ("deepcompile_off", "cpu", "deepspeed.compile.deepcompile=true", "Set train.compile=true"),
    ("unused", "cpu", "deepspeed.activation_checkpointing.profile=true", "Use activation=recompute instead"),
]

# rule, a DeepSpeed file from elsewhere, a part of the message
FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("batch_product", {"train_batch_size": 100, "train_micro_batch_size_per_gpu": 16}, "train_batch_size=100 is not"),
    ("type", {"train_batch_size": 2, "optimizer": {"type": "Adam", "params": [1]}}, "must be an object or null"),
    ("batch_product", {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2}, "x 2 ranks. Give two of the three"),
    ("batch_positive", {"train_batch_size": 2, "gradient_accumulation_steps": 0}, "accumulation_steps is below 1"),
    ("batch_missing", {"gradient_accumulation_steps": 2}, "Set train_micro_batch_size_per_gpu"),
    (
        "nvme_path",
        {"train_batch_size": 2, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "offload_optimizer.nvme_path to a folder",
    ),
    (
        "nvme_params_on_cpu",
        {"train_batch_size": 2, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        "stores such parameters in bf16",
    ),
]
# Asked for in ds_config.py itself, not in the tables of rules.py.
SHAPE_RULES = {
    "auto", "batch_split", "batch_twice", "layout", "param_type", "removed_key", "removed_optimizer",
    "replaced_key", "scheduler_params", "type", "unknown_key", "unknown_optimizer", "unknown_param",
    "unknown_scheduler",
}  # fmt: skip


@pytest.mark.parametrize(("rule", "device", "overrides", "message"), ROWS, ids=lambda v: str(v)[:60])
def test_a_wrong_config_is_refused_saying_why(
    rule: str, device: str, overrides: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda package: None)
    config = compose(*overrides.split())
    with pytest.raises(ConfigError) as error:
        complete(config, world=2, device=device)
    line = next((text for text in str(error.value).splitlines() if message in text), None)
    assert line, f"no line of {error.value} has {message!r}"
    assert (rule, line) in [(p.rule, p.text) for p in examine(config, world=2, device=device).problems]


@pytest.mark.parametrize(("rule", "ds", "message"), FOREIGN)
def test_a_file_from_elsewhere_is_refused_saying_why(rule: str, ds: dict[str, Any], message: str) -> None:
    found = problems(Facts(ds, 2, "cpu"), prefix="")
    assert [p.rule for p in found if message in p.text] == [rule]


def test_every_rule_has_a_row() -> None:
    rows = {row[0] for row in ROWS} | {row[0] for row in FOREIGN}
    assert rows == {*rules.RULES, *run_rules.RUN_RULES, *SHAPE_RULES}


def test_a_wrong_type_does_not_hide_other_problems() -> None:
    config = compose(f"{ZERO}.stage=two", "deepspeed.bfloat16.enabled=true", *f"{SCHEDULER}=WarmupLR".split())
    found = [p.rule for p in examine(config, world=2, device="cpu").problems]
    assert found == ["type", "replaced_key", "scheduler_params"]


def test_all_problems_are_told_at_once() -> None:
    config = compose("batch.global_size=250", "deepspeed.gradient_clip=1", "precision=fp16", "schedule.warmup=5000")
    with pytest.raises(ConfigError) as error:
        complete(config, world=2, device="cpu")
    assert [line.split(":")[0].split(" ")[0] for line in str(error.value).splitlines()] == [
        "batch.global_size=250",
        "deepspeed.gradient_clip",
        "deepspeed.fp16.enabled=True",
        "schedule.warmup=5000",
    ]


def test_no_preset_sets_what_its_task_does_not_read() -> None:
    presets = {group: [*(conf_dir() / group).rglob("*.yaml")] for group in ("task", "data", "experiment")}
    own = {f.stem: f.stem for f in presets["task"]} | {"table": "linear", "synthetic": "linear", "codah": "choose"}
    wrong = []
    for group, file in ((group, file) for group, files in presets.items() for file in files):
        option = f"{group}={file.relative_to(conf_dir() / group).with_suffix('')}"
        more = [f"task={own.get(file.stem)}"] * (group == "data" and file.stem in own)
        more += ["data.path=/data"] * option.startswith("data=files") + ["model.weights=x"] * (group == "experiment")
        if file.stem != "denoise":  # of a recipe's own kind
            facts = Facts({}, 2, "cpu", config=compose(option, *more))
            wrong += [(option, rule) for rule, (when, _) in run_rules.UNREAD.items() if when(facts)]
    assert not wrong


GROUPS = {
    "zero": ["stage0", "stage1", "stage2", "stage3"],
    "offload": ["none", "cpu", "cpu_params", "nvme"],
    "precision": ["fp32", "bf16", "fp16"],
    "optimizer": ["adamw", "lamb", "lion", "muon", "sgd"],
}


def allowed(zero: str, offload: str, precision: str, optimizer: str, device: str) -> bool:
    """The combinations of presets that are meant to work, said a second time and in other words."""
    stage = int(zero[-1])
    if device == "cpu" and precision == "fp16":
        return False
    if precision == "bf16" and stage == 0:  # accumulates in fp32
        return False
    if precision == "fp16" and stage == 0 and optimizer in ("adamw", "muon"):
        return False
    if optimizer == "lamb" and (stage or device == "cpu"):
        return False
    if optimizer == "lion" and device == "cpu" and offload == "none":
        return False
    if optimizer == "muon" and stage == 3:
        return False
    return stage >= {"none": 0, "cpu": 1, "cpu_params": 3, "nvme": 3}[offload]


def combined() -> Iterator[tuple[tuple[str, ...], RunConfig]]:
    """Every combination: what each option changes of the defaults, group by group, for to compose all takes minutes."""
    base = compose()
    trees = {o: compose(o).model_dump(mode="json") for o in (f"{g}={n}" for g, names in GROUPS.items() for n in names)}
    for options in itertools.product(*GROUPS.values()):
        tree = before = base.model_dump(mode="json")
        for group, option in zip(GROUPS, options, strict=True):
            tree = changed(tree, before, trees[f"{group}={option}"])
        yield options, load(tree)


def test_presets_pass_in_every_combination_that_is_meant_to_work() -> None:
    wrong, told = [], ("stage3", "nvme", "bf16", "lion")
    for options, config in combined():
        if options == told:
            assert config == compose(*(f"{g}={o}" for g, o in zip(GROUPS, told, strict=True)))
        for device in ("cpu", "cuda"):
            passed = not examine(config, world=2, device=device).problems
            if passed != allowed(*options, device):
                wrong.append((device, *options))
    assert not wrong


@pytest.mark.parametrize("zero", GROUPS["zero"])
def test_deepspeed_itself_accepts_what_was_completed(zero: str, tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    for offload, precision in itertools.product(GROUPS["offload"], GROUPS["precision"]):
        if allowed(zero, offload, precision, "adamw", "cuda"):
            config = compose(f"zero={zero}", f"offload={offload}", f"precision={precision}")
            ds = complete(config, world=1, device="cuda", run_dir=tmp_path)
            assert DeepSpeedConfig(ds).train_batch_size == 256


def test_numbers_that_deepspeed_wants_whole_become_whole() -> None:
    ds = complete(compose("zero=stage3", f"{ZERO}.sub_group_size=1e8"), world=1, device="cpu")
    sizes = {k: v for k, v in ds["zero_optimization"].items() if k.endswith(("size", "threshold"))}
    assert len(sizes) == 4
    assert all(type(v) is int for v in sizes.values())


def test_completing_leaves_the_config_as_it_was() -> None:
    config = compose("zero=stage3", "offload=nvme", "precision=bf16")
    before = config.model_dump()
    complete(config, world=2, device="cpu")
    assert config.model_dump() == before


def test_nvme_buffers_hold_a_ranks_part_of_the_largest_parameter_and_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    config = compose("zero=stage3", "offload=nvme", "precision=bf16", "model=bert_large")
    zero = complete(config, world=2, device="cpu", vocab_size=30528, run_dir=tmp_path)["zero_optimization"]
    assert 30528 * 1024 / 2 <= zero["offload_param"]["buffer_size"] < 30528 * 1024 / 2 + 2**20
    assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == str(tmp_path / "nvme")


def test_overlapping_nvme_reads_get_twice_the_buffers() -> None:
    pipelined = f"{ZERO}.offload_optimizer.pipeline_read=true"
    ds = complete(compose("zero=stage3", "offload=nvme", pipelined), world=2, device="cuda")
    assert ds["zero_optimization"]["offload_optimizer"]["buffer_count"] == 8


def test_what_the_user_says_about_nvme_stays() -> None:
    config = compose(
        "zero=stage3", "offload=nvme", "precision=bf16", f"{ZERO}.offload_param.buffer_size=5e7",
        f"{ZERO}.offload_param.nvme_path=/nvme",
    )  # fmt: skip
    block = complete(config, world=2, device="cpu")["zero_optimization"]["offload_param"]
    assert (block["buffer_size"], block["nvme_path"]) == (50_000_000, "/nvme")


def test_monitors_write_into_the_run_directory(tmp_path: Path) -> None:
    config = compose("deepspeed.csv_monitor.enabled=true")
    ds = complete(config, world=1, device="cpu", run_dir=tmp_path)
    assert ds["csv_monitor"] == {"enabled": True, "output_path": str(tmp_path), "job_name": "csv_monitor"}


@pytest.mark.parametrize(
    ("overrides", "device", "ops"),
    [
        ("", "cpu", ["ShareMemCommBuilder", "FusedAdamBuilder"]),
        ("", "cuda", ["FusedAdamBuilder"]),
        ("offload=cpu", "cpu", ["ShareMemCommBuilder", "CPUAdamBuilder"]),
        ("offload=cpu optimizer=lion", "cuda", ["CPULionBuilder"]),
        ("optimizer=lion", "cuda", ["FusedLionBuilder"]),
        ("zero=stage0 optimizer=lamb", "cuda", ["FusedLambBuilder"]),
        ("optimizer=sgd offload=cpu", "cuda", []),
        ("optimizer=muon offload=cpu", "cuda", ["CPUAdamBuilder"]),
        ("deepspeed.optimizer.params.torch_adam=true", "cuda", []),
        ("zero=stage3 offload=nvme", "cuda", ["CPUAdamBuilder", "PinMemoryBuilder", "AsyncIOBuilder"]),
    ],
)
def test_the_ops_to_build_are_known_before_training(overrides: str, device: str, ops: list[str]) -> None:
    ds = complete(compose(*overrides.split()), world=2, device=device)
    assert required_ops(ds, device=device, world=2) == ops


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    import make_ds_keys

    assert make_ds_keys.text() == make_ds_keys.FILE.read_text(), "run python tests/make_ds_keys.py, read the diff"


def test_checking_needs_no_torch() -> None:
    code = "import sys, toolkit.deepspeed.ds_config; print({'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
