"""How a configuration lies on its ranks: all that memory and time depend on besides the model and the machine.

layout = Layout.of(config, ds, world=8, device="cuda")     # ds: what DeepSpeed gets, see toolkit.deepspeed.ds_config
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.config.kinds import KINDS
from toolkit.config.schema import RunConfig
from toolkit.deepspeed.facts import Facts, canonical

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed's defaults, in elements (runtime/zero/config.py)
ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_reuse_distance": 1e9,
    "stage3_max_live_parameters": 1e9,
}


@dataclass(frozen=True)
class Layout:
    """Sizes in elements and samples; dtypes as fp32, bf16, fp16; devices of offload as none, cpu, nvme."""

    device: str
    data: int  # copies of the model, which ZeRO shares states over
    pipe: int
    tensor: int
    schedule: str
    partition: Any
    stage: int  # ZeRO's
    dtype: str
    accumulation_dtype: str
    communication_dtype: str
    bf16_optimizer: bool  # DeepSpeed's own class for ZeRO 1 in bf16 with fp32 accumulation
    optimizer: str  # its class, as DeepSpeed picks it
    states: int  # fp32 numbers that it keeps for each parameter, at most
    offload: str
    offload_params: str
    pinned: bool
    swap_buffers: int
    param_swap: tuple[int, int]  # buffers of weights on NVMe, and elements of each
    overlap: bool
    zero: Mapping[str, int]  # ZERO_DEFAULTS, or what is given
    micro: int
    accumulation: int
    samples: int  # of an optimizer step, over all ranks
    sequences: int  # that a sample makes: the endings of a choice
    length: int
    predictions: int  # of the vocabulary, of one sequence
    attention: str
    dropout: float
    attention_dropout: float
    act: str
    recompute: bool
    offload_activations: bool

    @classmethod
    def of(cls, config: RunConfig, ds: Mapping[str, Any], *, world: int, device: str) -> "Layout":
        """``ds`` is completed; ``world`` counts all ranks."""
        copies = world // config.split
        facts = Facts(ds, copies, device)
        zero = facts["zero_optimization"] or {}
        swap = zero.get("offload_param") or {}
        can = KINDS[config.task.kind].can
        overlap = zero.get("overlap_comm")
        length, predictions = _lengths(config)
        return cls(
            device=device, data=copies, pipe=config.pipeline.stages, tensor=config.tensor_size,
            schedule=config.pipeline.schedule, partition=config.pipeline.partition,
            stage=facts.stage, dtype=facts.dtype, accumulation_dtype=facts.accumulation,
            communication_dtype=canonical(facts["communication_data_type"]) or facts.dtype,
            bf16_optimizer=facts.bf16_optimizer,
            optimizer=facts.optimizer, states=facts.states,
            offload=facts.offload, offload_params=facts.param_offload,
            pinned=bool(facts["zero_optimization.offload_optimizer.pin_memory"]), swap_buffers=facts.swap_buffers,
            param_swap=(int(swap.get("buffer_count", 5)), int(swap.get("buffer_size", 1e8))),
            overlap=(facts.stage == 3 if overlap is None else overlap) and config.pipeline.stages == 1,
            zero={k: int(zero.get(k, zero.get(k.removeprefix("stage3_"), d))) for k, d in ZERO_DEFAULTS.items()},
            micro=config.batch.micro_size, accumulation=int(ds["gradient_accumulation_steps"]),
            samples=config.batch.global_size,
            sequences=len(config.data.columns.endings) if "choices" in can else 1,
            length=length, predictions=predictions,
            attention=config.model.attention, dropout=config.model.dropout,
            attention_dropout=0.0 if "decoder" in can else config.model.dropout,  # Marian's own is 0
            act=config.model.hidden_act,
            recompute=config.activation.recompute, offload_activations=config.activation.offload,
        )  # fmt: skip

    @property
    def ranks(self) -> int:
        return self.data * self.pipe * self.tensor

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on one side of an encoder-decoder."""
        return self.micro * self.sequences * self.length

    @property
    def bytes(self) -> int:
        """Of a weight, and of an activation."""
        return BYTES[self.dtype]


def _lengths(config: RunConfig) -> tuple[int, int]:
    """Tokens of a sequence, and how many of them are predicted from the whole vocabulary; at the most."""
    length, can = config.data.max_length, KINDS[config.task.kind].can
    if "decoder" in can:
        if config.batch.tokens:
            length = min(length, max(1, config.batch.tokens // config.batch.global_size))
        return length, length
    return length, config.data.max_predictions if "masks" in can else 0
