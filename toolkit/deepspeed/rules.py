"""The rules that a DeepSpeed config must keep, each a condition and the line that is shown when it holds.

    [say.format(...) for when, say in RULES.values() if when(facts)]     # toolkit.deepspeed.ds_config does this

Sources in comments are files of DeepSpeed 0.19.8; "seen" means tried on two CPU ranks.
"""

from collections.abc import Callable
from importlib.util import find_spec
from math import ceil, inf
from typing import Any

from toolkit.deepspeed.facts import BATCH_KEYS, Facts, canonical

# runtime/zero/utils.py, ZERO_SUPPORTED_OPTIMIZERS
TESTED = {
    "torch.Adam", "torch.AdamW", "torch.Adagrad", "FusedAdam", "FusedLion",
    "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "MuonWithAuxAdam",
}  # fmt: skip
# They look at a whole matrix, but ZeRO hands every optimizer flat pieces of all parameters together.
NEED_MATRICES = {"FusedLamb", "torch.Adafactor", "torch.LBFGS", "torch.SparseAdam"}
# Keys of zero_optimization by the stages that read them
STAGE3_ONLY = (
    "allgather_sequential", "gather_16bit_weights_on_model_save", "max_live_parameters", "max_reuse_distance",
    "model_persistence_threshold", "module_granularity_threshold", "param_persistence_threshold",
    "prefetch_bucket_size", "use_all_reduce_for_fetch_params",
)  # fmt: skip
STAGE3_KEYS = (
    *STAGE3_ONLY, *(f"stage3_{key}" for key in STAGE3_ONLY), "leaf_module", "log_trace_cache_warnings",
    "memory_efficient_linear", "override_module_apply", "save_muon_momentum_buffer_in_memory", "sub_group_size",
    "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)  # fmt: skip
STAGE12_KEYS = (
    "allgather_bucket_size", "allgather_partitions", "ignore_unused_parameters", "parameter_alignment",
    "round_robin_gradients", "use_multi_rank_bucket_allreduce",
)  # fmt: skip
ZERO_KEYS = (*STAGE12_KEYS, "overlap_comm", "reduce_bucket_size", "contiguous_gradients")
DYNAMIC_SCALE = (
    "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale",
)  # fmt: skip
SWITCHED = (
    "fp16", "bf16", "tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "flops_profiler", "torch_autocast",
)  # fmt: skip
DS_SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
# Filled in by Hugging Face: transformers' integrations/deepspeed.py, accelerate's DeepSpeedPlugin
FILLED = {
    "bf16.enabled", "fp16.enabled", "gradient_accumulation_steps", "gradient_clipping", "optimizer.params.betas",
    "optimizer.params.eps", "optimizer.params.lr", "optimizer.params.weight_decay", "scheduler.params.total_num_steps",
    "scheduler.params.warmup_max_lr", "scheduler.params.warmup_min_lr", "scheduler.params.warmup_num_steps",
    "train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path", "zero_optimization.reduce_bucket_size", "zero_optimization.stage",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_param_persistence_threshold", "zero_optimization.stage3_prefetch_bucket_size",
}  # fmt: skip
# lr_schedules.py: these reach 0.001 unless told by this, whatever the optimizer's rate is
OWN_RATE = {"WarmupDecayLR": "warmup_max_lr", "LRRangeTest": "lr_range_test_min_lr"}
# A preset that a rule names, and what it is in a DeepSpeed file
IN_A_FILE = {
    "offload=nvme zero=stage3": "zero_optimization.offload_param.device=nvme",
    "offload=none": "no offload_optimizer",
    "offload=cpu_params": "zero_optimization.offload_param.device=cpu",
    "offload=cpu": "zero_optimization.offload_optimizer.device=cpu",
    "optimizer=adamw or lion": "optimizer.type=AdamW or Lion",
    "optimizer=adamw, muon or sgd": "optimizer.type=AdamW, Muon or SGD",
    "optimizer=adamw": "optimizer.type=AdamW",
    "parallel=none": "autotp_size=1",
    "precision=fp32 or precision=bf16": "bf16.enabled=true, or neither",
    "precision=bf16": "bf16.enabled=true",
    "precision=fp16": "fp16.enabled=true",
    "schedule=linear, cosine, inverse_sqrt or constant, or one": "one",
    "zero=stage": "zero_optimization.stage=",
    " and train.compile=true": "",
    "Drop it: it is derived.": "Raise it.",
    "Use offload=nvme, or set it.": "Set it.",
}  # fmt: skip


def number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def _own_rate(f: Facts) -> tuple[str, str] | None:
    """The optimizer's rate that the scheduler's default replaces, and the scheduler's parameter for it."""
    key, rate = OWN_RATE.get(f["scheduler.type"]), f["optimizer.params.lr"]
    if not key or key in (f["scheduler.params"] or {}) or rate == 0.001:
        return None
    return "the optimizer's rate" if rate is None else f"optimizer.params.lr={rate}", key


Rule = tuple[Callable[[Facts], Any], str]
# {p} is "deepspeed." or empty, {v[key]} the key with it and its value, {f} the facts, {c} the run's config, {got} what
# the condition returned.
RULES: dict[str, Rule] = {
    # ---- batch
    "batch_missing": (lambda f: f["train_batch_size"] is None and f["train_micro_batch_size_per_gpu"] is None,
        "{p}train_batch_size and {p}train_micro_batch_size_per_gpu are both missing: DeepSpeed needs one of them. Set "
        "{p}train_micro_batch_size_per_gpu."),
    "batch_positive": (lambda f: [key for key in BATCH_KEYS if number(f[key], 1) < 1],
        "{p}{got[0]} is below 1. Raise it."),
    "batch_product": (lambda f: (f["train_batch_size"] or f["train_micro_batch_size_per_gpu"])
        and (f.batch_found != (f["train_batch_size"] or f.batch_found) or not f.batch_found),
        "{v[train_batch_size]} is not train_micro_batch_size_per_gpu x gradient_accumulation_steps x {f.world} ranks. "
        "Give two of the three."),
    # ---- precision
    "two_precisions": (lambda f: f["fp16.enabled"] and f["bf16.enabled"],
        "{p}fp16.enabled and {p}bf16.enabled are both true: a model has one precision. Use precision=bf16, or "
        "precision=fp16."),
    "fp16_on_cpu": (lambda f: f["fp16.enabled"] and f.device == "cpu",
        "{p}fp16.enabled=True on a CPU: fp16 does not train there. Use precision=fp32 or precision=bf16."),
    "fp16_options": (lambda f: f["fp16.enabled"] is False and f.others("fp16", "enabled"),
        "{p}{got} without effect: fp16.enabled is false. Use precision=fp16, or drop them."),
    "bf16_options": (lambda f: f["bf16.enabled"] is False and f.others("bf16", "enabled"),
        "{p}{got} without effect: bf16.enabled is false. Use precision=bf16, or drop them."),
    "static_scale": (lambda f: f["fp16.loss_scale"] and f.given("fp16", DYNAMIC_SCALE),
        "{v[fp16.loss_scale]} is fixed, so {got} have no effect. Drop them, or set fp16.loss_scale=0 for a dynamic "
        "scale."),
    # engine.py, _do_optimizer_sanity_check: NotImplementedError
    "accumulation_at_stage0": (lambda f: f.stage == 0 and f["optimizer"] and f.accumulation != f.dtype,
        "{v[data_types.grad_accum_dtype]} with {f.dtype} weights at zero_optimization.stage=0: without ZeRO DeepSpeed "
        "accumulates in the weights' type only. Use zero=stage1, or {p}data_types.grad_accum_dtype={f.dtype}."),
    # engine.py, _assert_valid_mixed_precision_config
    "param_dtype": (lambda f: (canonical(f["data_types.param_dtype"]) or f.dtype) != f.dtype,
        "{v[data_types.param_dtype]} but the weights are {f.dtype}. Drop it, or choose that precision."),
    # base_optimizer.py, _configure_master_weights
    "master_weights": (lambda f: not (f.stage and f.optimizer == "DeepSpeedCPUAdam")
        and (f["fp16.fp16_master_weights_and_grads"]
             or (f["bf16.bf16_master_weights_and_grads"] and not f["bf16.bf16_optimizer_states"])),
        "{p}{f.dtype}.{f.dtype}_master_weights_and_grads=True needs ZeRO 1 to 3 with an Adam optimizer offloaded to "
        "CPU. Use offload=cpu optimizer=adamw, or drop it."),
    "bf16_states": (lambda f: f["bf16.bf16_optimizer_states"]  # config.py, _do_error_check
        and not (f.stage and f["bf16.bf16_master_weights_and_grads"]),
        "{p}bf16.bf16_optimizer_states=True needs bf16_master_weights_and_grads=true and ZeRO 1 to 3. Set both, or "
        "drop it."),
    # engine.py, __init__: if torch then picks fp16, there is no loss scaling
    "autocast_dtype": (lambda f: f["torch_autocast.enabled"] and not f["torch_autocast.dtype"],
        "{p}torch_autocast.enabled=True without a type. Set {p}torch_autocast.dtype=bfloat16 (or float16)."),
    # ---- ZeRO
    "zero_keys_at_stage0": (lambda f: f.stage == 0 and f.given("zero_optimization", ZERO_KEYS),
        "{p}{got} without effect at zero_optimization.stage=0. Use zero=stage1 (or 2, 3), or drop them."),
    "stage3_keys": (lambda f: f.stage < 3 and f.given("zero_optimization", STAGE3_KEYS),
        "{p}{got} without effect at zero_optimization.stage={f.stage}: only ZeRO 3 reads them. Use zero=stage3, or "
        "drop them."),
    "stage12_keys": (lambda f: f.stage == 3 and f.given("zero_optimization", STAGE12_KEYS),
        "{p}{got} without effect at zero_optimization.stage=3: only ZeRO 1 and 2 read them. Drop them."),
    "legacy_stage1": (lambda f: f["zero_optimization.legacy_stage1"],  # engine.py, _configure_zero_optimizer raises
        "{p}zero_optimization.legacy_stage1=True: DeepSpeed has no old ZeRO 1 any more. Drop it."),
    "sum_at_stage3": (lambda f: f.stage == 3 and f["gradient_allreduce_op"] == "sum",  # config.py, _do_error_check
        "{p}gradient_allreduce_op=sum with zero_optimization.stage=3: ZeRO 3 only averages. Use mean, or zero=stage2."),
    # stage_1_and_2.py and stage3.py, __init__
    "scaled_reduction": (lambda f: f.stage >= 2 and f["zero_optimization.reduce_scatter"] is not False
        and ((f["gradient_predivide_factor"] or 1) != 1 or f["prescale_gradients"]),
        "{p}gradient_predivide_factor or prescale_gradients with zero_optimization.reduce_scatter at stage {f.stage}: "
        "not supported. Drop them, or set {p}zero_optimization.reduce_scatter=false."),
    # stage_1_and_2.py, __init__, and zero/config.py
    "no_grad_norm": (lambda f: f["zero_optimization.compute_grad_norm"] is False
        and (f.stage not in (1, 2) or f.clipping > 0 or f.offload != "none" or f.bf16_optimizer),
        "{p}zero_optimization.compute_grad_norm=False needs ZeRO 1 or 2, gradient_clipping=0, no offload, and no fp32 "
        "accumulation of bf16 at stage 1. Drop it."),
    # stage_1_and_2.py: nccl_start_alignment_factor
    "odd_bucket": (lambda f: f.stage in (1, 2) and (f["zero_optimization.allgather_bucket_size"] or 0) % 2,
        "{v[zero_optimization.allgather_bucket_size]} is odd: it must be even."),
    "unmanaged_overlap": (lambda f: f["managed_gradient_accumulation"] is False  # engine.py, _do_sanity_check
        and f.stage < 2 and f["zero_optimization.overlap_comm"],
        "{p}managed_gradient_accumulation=False with zero_optimization.overlap_comm below stage 2. Use zero=stage2, or "
        "{p}zero_optimization.overlap_comm=false."),
    "bucket_size": (lambda f: number(f["zero_optimization.reduce_bucket_size"], 1) < 1,  # zero/config.py: gt=0
        "{v[zero_optimization.reduce_bucket_size]}: it must be 1 at least. Drop it for the default of 5e8 elements."),
    # ---- offload
    "offload_at_stage0": (lambda f: f.stage == 0 and f.offload != "none",
        "{p}zero_optimization.offload_optimizer.device={f.offload} at zero_optimization.stage=0: there is no ZeRO to "
        "offload. Use zero=stage1 (or 2, 3), or offload=none."),
    "param_offload_stage": (lambda f: f.stage < 3 and f.param_offload != "none",  # only stage3.py reads offload_param
        "{p}zero_optimization.offload_param.device={f.param_offload} at zero_optimization.stage={f.stage}: only ZeRO 3 "
        "offloads parameters. Use zero=stage3, or offload=cpu."),
    # stage_1_and_2.py takes any device but none for the CPU, in silence
    "nvme_stage": (lambda f: f.stage in (1, 2) and f.offload == "nvme",
        "{p}zero_optimization.offload_optimizer.device=nvme at zero_optimization.stage={f.stage}: it would stay in CPU "
        "memory, only ZeRO 3 writes to NVMe. Use zero=stage3, or offload=cpu."),
    "nvme_path": (lambda f: [key for key in ("offload_optimizer", "offload_param")
        if f[f"zero_optimization.{key}.device"] == "nvme" and not f[f"zero_optimization.{key}.nvme_path"]],
        "{p}zero_optimization.{got[0]}.device=nvme without nvme_path. Set {p}zero_optimization.{got[0]}.nvme_path to a "
        "folder on the NVMe drive."),
    # partition_parameters.py, Init._set_dtype: bf16 whatever was asked, if deepspeed.initialize partitions
    # the model. Ours is partitioned as it is built, by deepspeed.zero.Init with the config's own type.
    "nvme_params_on_cpu": (lambda f: f.config is None
        and (f.param_offload, f.device, f.dtype) == ("nvme", "cpu", "fp32"),
        "{p}zero_optimization.offload_param.device=nvme in fp32 on a CPU: DeepSpeed stores such parameters in bf16. "
        "Use offload=cpu_params, or precision=bf16."),
    # partitioned_param_swapper.py: a buffer holds one rank's part of one parameter
    "nvme_buffer_size": (lambda f: f.param_offload == "nvme" and f.largest
        and number(f["zero_optimization.offload_param.buffer_size"], inf) < ceil(f.largest / f.world),
        "{v[zero_optimization.offload_param.buffer_size]} is smaller than one of {f.world} parts of the largest "
        "parameter ({f.largest} elements). Drop it: it is derived."),
    # partitioned_ and pipelined_optimizer_swapper.py assert it at the first step
    "nvme_buffer_count": (lambda f: f.offload == "nvme"
        and (f["zero_optimization.offload_optimizer.buffer_count"] or 4) < f.swap_buffers,
        "{p}zero_optimization.offload_optimizer.buffer_count is below {f.swap_buffers}: too few for a parameter, its "
        "gradient and its states (twice, if pipelined). Set it to {f.swap_buffers}."),
    # The swapper reads a gradient with O_DIRECT to where its parameter starts in the sub-group, and
    # gets garbage off a multiple of 512 bytes; alone in its sub-group it starts at 0. Seen.
    "nvme_sub_groups": (lambda f: f.offload == "nvme" and f.stage == 3
        and (f["zero_optimization.sub_group_size"] or 2) > 1,
        "{p}zero_optimization.offload_optimizer.device=nvme needs {p}zero_optimization.sub_group_size=1: in larger "
        "groups DeepSpeed misreads gradients that do not start at a multiple of 512 bytes, and trains on garbage. Use "
        "offload=nvme, or set it."),
    # zero/config.py, offload_ratio_check; stage3.py
    "partial_offload": (lambda f: (f["zero_optimization.offload_optimizer.ratio"] or 1) < 1
        and not (f.stage == 3 and f.optimizer == "DeepSpeedCPUAdam"),
        "{p}zero_optimization.offload_optimizer.ratio below 1 needs ZeRO 3 and an offloaded Adam. Use zero=stage3 "
        "optimizer=adamw, or drop it."),
    "super_offload": (lambda f: f.stage < 3 and f["zero_optimization.offload_optimizer.super_offload"],
        "{p}zero_optimization.offload_optimizer.super_offload=True at stage {f.stage}: only ZeRO 3 reads it. Use "
        "zero=stage3, or drop it."),
    "aio_without_nvme": (lambda f: f["aio"] and not f.nvme and not f["checkpoint.writer"],
        "{p}aio without effect: nothing is offloaded to NVMe. Use offload=nvme zero=stage3, or drop it."),
    "gds_on_cpu": (lambda f: f["aio.use_gds"] and f.device != "cuda",  # swap_tensor/aio_config.py asserts cuda
        "{p}aio.use_gds=True on {f.device}: GPUDirect Storage is CUDA's. Drop it."),
    # ---- optimizer
    # config.py, get_optimizer_name: then there is no optimizer, in silence
    "optimizer_type": (lambda f: "optimizer" in f.ds and not f["optimizer.type"],
        "{p}optimizer without a type: DeepSpeed would train nothing. Set {p}optimizer.type=AdamW."),
    # engine.py, _configure_basic_optimizer raises
    "max_grad_norm": (lambda f: "max_grad_norm" in (f["optimizer.params"] or {}),
        "{p}optimizer.params.max_grad_norm: DeepSpeed clips by itself. Use {p}gradient_clipping."),
    # op_builder/cpu/no_impl.py; seen
    "fused_on_cpu": (lambda f: f.device == "cpu" and f.optimizer in ("FusedLamb", "FusedLion"),
        "{v[optimizer.type]} has no implementation on a CPU. Use optimizer=adamw, muon or sgd; Lion also runs with "
        "zero=stage1 (or 2, 3) offload=cpu."),
    # engine.py builds FusedLamb, a CUDA kernel, for states that are in CPU memory
    "lamb_offload": (lambda f: f.optimizer == "FusedLamb" and f.offload != "none",
        "{v[optimizer.type]} cannot be offloaded: its kernel runs on GPUs only. Use offload=none, or optimizer=adamw "
        "or lion."),
    "lamb_scale": (lambda f: f.optimizer == "FusedLamb" and f["fp16.loss_scale"],  # engine.py, _do_sanity_check
        "{v[fp16.loss_scale]} with Lamb: it needs a dynamic scale. Set {p}fp16.loss_scale=0."),
    "needs_matrices": (lambda f: f.stage and f.optimizer in NEED_MATRICES,
        "{v[optimizer.type]} at zero_optimization.stage={f.stage}: it works on whole matrices, and ZeRO cuts them into "
        "flat parts, so the result would depend on the ranks. Use zero=stage0, or optimizer=adamw."),
    # engine.py, _do_optimizer_sanity_check
    "untested_optimizer": (lambda f: f.stage and f.optimizer not in TESTED | NEED_MATRICES | {""}
        and not f["zero_allow_untested_optimizer"],
        "{v[optimizer.type]} at zero_optimization.stage={f.stage} is untested with ZeRO. Set "
        "{p}zero_allow_untested_optimizer=true, or use zero=stage0."),
    "tensor_matrices": (lambda f: (f["tensor_parallel.autotp_size"] or 0) > 1
        and f.optimizer in NEED_MATRICES | {"MuonWithAuxAdam"},
        "{v[optimizer.type]} with {v[tensor_parallel.autotp_size]}: it works on whole matrices, and a rank has only a "
        "part of them, so the result would depend on the ranks. Use optimizer=adamw, or parallel=none."),
    # stage3.py: "Muon and reduce scatter cannot be used together"; without, it works; seen
    "muon_scatter": (lambda f: f.optimizer == "MuonWithAuxAdam"
        and f.stage == 3 and f["zero_optimization.reduce_scatter"] is not False,
        "{p}optimizer.type=Muon at zero_optimization.stage=3 needs {p}zero_optimization.reduce_scatter=false. Set it, "
        "or use zero=stage2."),
    # ZeRO clips after orthogonalising, stage 0 before; seen
    "muon_clipping": (lambda f: f.optimizer == "MuonWithAuxAdam"
        and f.stage and f.clipping > 0 and not f.bf16_optimizer,
        "{p}gradient_clipping={f.clipping} with Muon at zero_optimization.stage={f.stage}: ZeRO would clip the "
        "finished update and shrink every step. Set {p}gradient_clipping=0."),
    # ---- scheduler
    "scheduler_type": (lambda f: "scheduler" in f.ds and not f["scheduler.type"],
        "{p}scheduler without a type. Set {p}scheduler.type=WarmupLR, or drop it."),
    "scheduler_rate": (_own_rate,  # WarmupLR alone takes the optimizer's
        "{v[scheduler.type]} replaces {got[0]} by its own default of 0.001. Set {p}scheduler.params.{got[1]}."),
    "warmup_steps": (lambda f: "Warmup" in str(f["scheduler.type"])  # lr_schedules.py raises
        and number(f["scheduler.params.warmup_num_steps"], 1) < 1,
        "{v[scheduler.params.warmup_num_steps]}: it must be 1 at least. Use another scheduler for none, or 1."),
    "warmup_longer": (lambda f: "Warmup" in str(f["scheduler.type"])  # lr_schedules.py warns
        and number(f["scheduler.params.total_num_steps"], inf) < number(f["scheduler.params.warmup_num_steps"], 1000),
        "{v[scheduler.params.total_num_steps]} is below warmup_num_steps (1000 if not given): the rate would never be "
        "reached. Lower {p}scheduler.params.warmup_num_steps."),
    "warmup_type": (lambda f: "Warmup" in str(f["scheduler.type"])  # lr_schedules.py warns and takes log
        and f["scheduler.params.warmup_type"] not in (None, "log", "linear"),
        "{v[scheduler.params.warmup_type]}: DeepSpeed would take log. Use linear or log."),
    # engine.py hands it the ZeRO wrapper, which torch refuses; seen
    "torch_scheduler": (lambda f: f.stage and f["scheduler.type"] and f["scheduler.type"] not in DS_SCHEDULERS,
        "{v[scheduler.type]} is torch's and does not accept ZeRO's optimizer. Use schedule=linear, cosine, "
        "inverse_sqrt or constant, or one of DeepSpeed's schedulers."),
    # ---- the rest
    "ignored": (lambda f: f["disable_allgather"],
        "{p}disable_allgather without effect: DeepSpeed reads it and does nothing with it. Drop it."),
    "enabled": (lambda f: ", ".join(block for block in SWITCHED if f[block] and "enabled" not in f[block]),
        "{p}{got} without effect: it is off. Set enabled=true in it, or drop it."),
    "packages": (lambda f: ", ".join(p for block, p in PACKAGES.items() if f[f"{block}.enabled"] and not find_spec(p)),
        "A monitor is on whose package is missing: {got}. Install it, or use {p}csv_monitor.enabled=true."),
    # engine.py: "Falling back to the torch compiler"
    "deepcompile_stage": (lambda f: f["compile.deepcompile"] and f.stage == 0,
        "{p}compile.deepcompile=True without effect at zero_optimization.stage=0. Use zero=stage1 (or 2, 3), or drop "
        "it."),
    "compile_options": (lambda f: not f["compile.deepcompile"] and f.others("compile", "deepcompile", "autoep_non_moe"),
        "{p}{got} without effect: compile.deepcompile is false. Set it and train.compile=true, or drop them."),
}  # fmt: skip
