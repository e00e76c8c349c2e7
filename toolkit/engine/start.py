"""The only deepspeed.initialize, and the learning rate as a factor of the optimizer's own for every step of the run.

engine = start_engine(model, task, run, plan.ds)     # an Engine, or a PipeEngine if pipeline.stages > 1
factor(Schedule(name="linear", warmup=0.1), step=0, total=1000)   # 1/100: the first step trains, too
"""

import copy
import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import clip_grad_norm_
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from toolkit.config.schema import Schedule, cache_dir
from toolkit.engine.plain import Engine
from toolkit.job import ranks
from toolkit.models.build import decay_groups
from toolkit.run.directory import Run
from toolkit.tasks.task import Task


def start_engine(model: nn.Module, task: Task, run: Run, ds: Mapping[str, Any]) -> Engine:
    """Hand the model to DeepSpeed; ``ds``, what DeepSpeed gets, is written to ds_config.json."""
    config = run.config
    run.write_json("ds_config.json", ds)
    torch.manual_seed(config.seed + ranks.rank() // config.tensor_size)  # ranks that share layers share dropout
    if config.train.tf32:
        torch.set_float32_matmul_precision("high")
    rate = partial(LambdaLR, lr_lambda=lambda step: factor(config.schedule, step, task.steps))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=decay_groups(model, ds["optimizer"].get("params", {}).get("weight_decay", 0.0)),
        lr_scheduler=None if config.schedule.name == "none" else rate,
        config=copy.deepcopy(dict(ds)),
        mpu=ranks.tensor_groups(config.tensor_size),
    )
    _keep_stage0_norm(engine)
    if config.train.compile:
        # Ranks that share one of inductor's caches can read each other's half-written files.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir("inductor") / f"rank{ranks.local_rank()}"))
        engine.compile()
    if config.pipeline.stages > 1:
        from toolkit.engine.pipe import PipeEngine

        return PipeEngine(engine, task, run.replica, config.pipeline.schedule)
    return Engine(engine, task, run.replica)


def _keep_stage0_norm(engine: Any) -> None:
    """At ZeRO 0 in fp32 DeepSpeed clips but forgets the norm that it computed; keep it.
    DeepSpeedEngine.clip_fp32_gradients drops the return value of clip_grad_norm_ (0.19.8)."""

    def clip_fp32_gradients() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu
        )

    engine.clip_fp32_gradients = clip_fp32_gradients


def factor(schedule: Schedule, step: int, total: int) -> float:
    """The factor for the optimizer step that follows ``step`` finished ones, in [0, 1].

    Warm-up is linear, over as many steps as given or a share of the run. Then linear and cosine reach 0 at
    ``decay_steps`` (or ``total``), inverse_sqrt falls with ``sqrt(warmup / step)`` (Vaswani et al. 2017, section 5.3).
    """
    warmup = int(schedule.warmup) if schedule.warmup >= 1 else round(schedule.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, (schedule.decay_steps or total) - warmup))
    if schedule.name == "linear":
        return 1 - done
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule.name == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / max(1, step + 1))
    return 1.0
