"""How large the model of a configuration is, and what of it goes to files and to host memory; nothing is allocated.

parameters(config)          # 4_384_316, or None where only the data would tell
checkpoint_bytes(job)       # of one checkpoint
"""

from statistics import mean

from toolkit.cluster.doctor.finding import Job
from toolkit.config.schema import RunConfig
from toolkit.deepspeed import ds_config
from toolkit.errors import ConfigError, PlanError
from toolkit.plan.layout import Layout
from toolkit.plan.memory import memory_of
from toolkit.plan.shapes import model_shape


def parameters(config: RunConfig) -> int | None:
    """As the plan counts them; of weights that it cannot read, without a head, if this host has them."""
    try:
        return model_shape(config).parameters
    except PlanError:
        return _of_weights(config.model.weights) if config.model.weights else None


def _of_weights(name: str) -> int | None:
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    from toolkit.models.build import read_config

    try:  # what the hub has and this host has not is not asked for
        hf_config = read_config(name, AutoConfig, local_files_only=True)
    except (ConfigError, OSError):
        return None
    with torch.device("meta"), no_init_weights():
        return int(AutoModel.from_config(hf_config).num_parameters())


def checkpoint_bytes(job: Job, count: int) -> int:
    """One checkpoint of ``count`` parameters: weights in their type (ZeRO 3: none), their fp32 copy, the states."""
    facts = job.facts
    weight = 0 if facts.stage == 3 else 4 if facts.dtype == "fp32" else 2
    master = 4 if facts.stage else 0
    size = weight + master + 4 * facts.states
    if job.config.pipeline.stages == 1:
        return count * size
    # the vocabulary's matrix is in the first stage and in the last; ds_state adds fp32 weights for toolkit export
    return (count + ds_config.largest_parameter(job.config)) * size + count * 4


def host_bytes(job: Job) -> int | None:
    """What the plan says that this host's ranks keep in its memory; None of a model that has no plan."""
    try:
        shape = model_shape(job.config)
    except PlanError:
        return None
    layout = Layout.of(job.config, job.ds, world=job.world, device=job.device)
    return int(job.slots * mean(memory_of(shape, layout, stage).total("host") for stage in range(layout.pipe)))
