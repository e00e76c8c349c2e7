"""The only deepspeed.initialize.

engine = start_engine(model, task, run, plan.ds)     # an Engine, or a PipeEngine if pipeline.stages > 1
"""

import copy
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from toolkit.config.schema import cache_dir
from toolkit.engine.learning_rate import factor
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
    schedule = None
    if config.schedule.name != "none":
        chosen, steps = config.schedule, task.steps
        schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(  # noqa: E731
            optimizer, lambda step: factor(chosen, step, steps)
        )
    decay = ds["optimizer"].get("params", {}).get("weight_decay", 0.0)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=decay_groups(model, decay),
        lr_scheduler=schedule,
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

    DeepSpeedEngine.clip_fp32_gradients drops the return value of clip_grad_norm_ (0.19.8).
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip_fp32_gradients() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu
        )

    engine.clip_fp32_gradients = clip_fp32_gradients
