"""The largest model on a machine: by the bytes that a paper counts, and by the plan of what DeepSpeed 0.19.8 holds.

rows(published("zero_offload_largest"))
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from studies.published import Row
from studies.superlinear import gpt2
from toolkit.config.compose import compose
from toolkit.deepspeed import ds_config
from toolkit.plan.plan import place, plan_on
from toolkit.plan.shapes import ModelShape, model_shape

MOST = 512  # layers


def rows(data: Mapping[str, Any]) -> list[Row]:
    """Two of each model; ``limits`` are pairs of bytes a parameter and the GB that there are for them."""
    found = []
    for model in data["models"]:
        by_bytes = min(gb / size for size, gb in model["limits"])
        for name, ours in (("the paper's bytes", by_bytes), ("plan", planned(model) / 1e9)):
            found.append(Row(f"{model['name']}: {name}", model["billions"], ours, "billion parameters"))
    return found


def planned(model: Mapping[str, Any]) -> int:
    """Parameters of the deepest GPT-2 of this width whose plan fits on GPUs of a DGX-2, its host and drives."""
    tensor, gpus, batch = model.get("tensor_parallel", 1), model["gpus"], model["batch"]
    split = ["parallel=tensor", f"deepspeed.tensor_parallel.autotp_size={tensor}"] if tensor > 1 else []
    config = compose([
        "machine=dgx2", "precision=fp16", "activation=recompute", "model.attention=eager", *split,
        f"batch.micro_size={batch}", f"batch.global_size={batch * gpus // tensor}",
        *gpt2({"length": 1024, **model}, tensor), *model["overrides"],
    ])  # fmt: skip
    shape = model_shape(config)
    machine, ranks, device = place(config, gpus)
    ds = ds_config.complete(config, world=ranks, device=device, vocab_size=shape.vocab_size)

    def full(layers: int) -> bool:
        return not plan_on(machine, config, ds, deeper(shape, layers), ranks=ranks, device=device).fits

    return deeper(shape, bisect_left(range(1, MOST), True, key=full)).parameters


def deeper(shape: ModelShape, layers: int) -> ModelShape:
    embeddings, block, *_, head = shape.layers
    return replace(shape, layers=(embeddings, *[block] * layers, head))
